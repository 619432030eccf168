"""Transfer weights from another network as far as they fit, and describe what does not fit."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lamamba.errors import CheckpointError
from lamamba.model import LaMambaDiff

LABELS, POSITIONS = "label_embedding.weight", "position_embedding"


@torch.no_grad()
def transfer_weights(
    network: LaMambaDiff, other: LaMambaDiff, class_names: Sequence[str], other_class_names: Sequence[str]
) -> list[str]:
    """Copy weights from another network into a network, as far as they fit.

    Classes are matched by name, if both networks have class names, which may be empty. An unknown class starts as "no
    label". A position embedding of another size is resized.

    Returns:
        A message about everything that is not simply copied.

    Raises:
        CheckpointError: less than half of the parameters fit.
    """
    notes, fresh, num_copied = [], [], 0
    theirs = other.state_dict()
    for name, value in network.state_dict().items():
        source = theirs.pop(name, None)
        if source is None or source.shape[-1] != value.shape[-1] or source.ndim != value.ndim:
            fresh.append(name)
        elif name == LABELS:
            rows, note = _rows_of(class_names, other_class_names, len(value) - 1, len(source) - 1)
            value.copy_(source[rows])
            notes += [note] if note else []
        elif name == POSITIONS and source.shape != value.shape:
            height, width = value.shape[1:3]
            value.copy_(other.resize_position_embedding(height, width))
            notes.append(
                f"the position embedding is resized from {source.shape[1]}x{source.shape[2]} to {height}x{width}"
            )
        elif source.shape != value.shape:
            fresh.append(name)
        else:
            value.copy_(source)
            num_copied += value.numel()
    number = network.num_parameters()
    if num_copied < number / 2:
        raise CheckpointError(
            f"only {num_copied:,} of {number:,} parameters fit this network: leave out the options of the network"
        )
    channels, other_channels = network.config.in_channels, other.config.in_channels
    if channels != other_channels:
        notes.append(
            f"the images have {channels} channel{'s' * (channels > 1)} and the weights are for {other_channels}: the "
            "first and the last layer start over, so expect noise at first, as in a new run"
        )
    if fresh:
        notes.append(f"{len(fresh)} weights do not fit and start from scratch: {', '.join(fresh)}")
    if theirs:
        notes.append(f"{len(theirs)} weights are not used: {', '.join(theirs)}")
    return notes


def _rows_of(
    names: Sequence[str], other_names: Sequence[str], num_classes: int, other_num_classes: int
) -> tuple[Tensor, str]:
    """Choose a row of the other network's label table for each label, and then for "no label"."""
    none = other_num_classes
    if not (names and other_names):
        known = num_classes == other_num_classes
        rows = list(range(num_classes)) if known else [none] * num_classes
        new = [] if known else [str(label) for label in range(num_classes)]
    else:
        places = {name: place for place, name in enumerate(other_names)}
        rows = [places.get(name, none) for name in names]
        new = [name for name in names if name not in places]
    note = ""
    if new:
        named = ", ".join(new[:5]) + (f" and {len(new) - 5} more" if len(new) > 5 else "")
        note = f"{len(new)} of {num_classes} classes are new and start as no label: {named}"
    return torch.tensor([*rows, none]), note
