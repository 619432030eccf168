"""Read and write checkpoints of the authors' LaMamba-Diff code, without running their pickles."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lamamba.errors import CheckpointError, ConfigError, first_line
from lamamba.files import atomic_write
from lamamba.files.weights import fill, read_pickle
from lamamba.model import LaMambaDiff
from lamamba.ops.window_attention.geometry import WindowGeometry

# Pairs of prefixes: the name in the authors' code and in this package. # is a number. The first match counts.
_Rules = Sequence[tuple[str, str]]
_ROOTS: _Rules = (
    ("pos_embed", "position_embedding"),
    ("t_embedder.mlp.0", "timestep_embedding.linear_1"),
    ("t_embedder.mlp.2", "timestep_embedding.linear_2"),
    ("y_embedder.embedding_table", "label_embedding"),
    ("patch_embed.proj", "patch_projection"),
    ("patch_embed.norm", "patch_norm"),
    ("layers.#.downsample.norm", "downsamples.#.norm"),
    ("layers.#.downsample.reduction", "downsamples.#.reduction"),
    ("layers.#.downsample.1", "downsamples.#.convolution"),
    ("layers.#.downsample.3", "downsamples.#.norm"),
    ("layers.#.blocks.#", "encoder.#.#"),
    ("mid_layer.blocks.#", "bottleneck.#"),
    ("layers_up.2.upsample.expand", "upsamples.0.expansion"),
    ("layers_up.3.upsample.expand", "upsamples.1.expansion"),
    ("layers_up.2.upsample.norm", "upsamples.0.norm"),
    ("layers_up.3.upsample.norm", "upsamples.1.norm"),
    ("layers_up.#.blocks.#", "decoder.#.#"),
    ("final_condition_projection", "head.condition_projection"),
    ("final_up.expand", "head.linear"),
    ("final_up.norm", "head.norm"),
    ("final_adaLN_modulation.1", "head.modulation"),
    ("final_linear", "head.output"),
)
_IN_BLOCK: _Rules = (
    ("adaLN_modulation.1", "modulation"),
    ("norm", "ssm_norm"),
    ("norm_swin", "attention_norm"),
    ("norm2", "mlp_norm"),
    ("op.conv2d", "ssm.convolution"),
    ("op.dt_projs_weight", "ssm.dt_weight"),
    ("op.dt_projs_bias", "ssm.dt_bias"),
    ("op.A_logs", "ssm.A_log"),
    ("op.Ds", "ssm.D"),
    ("op", "ssm"),
    ("attn.proj", "attention.out_proj"),
    ("attn.relative_position_bias_table", "attention.relative_position_bias"),
    ("attn", "attention"),
    ("mlp.fc1", "mlp.linear_1"),
    ("mlp.fc2", "mlp.linear_2"),
)
# Prefixes that torch.compile, FSDP and checkpointing insert.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Buffers that the authors' code derives from the geometry; this package computes them for any size.
_DERIVED = re.compile(r"(attn\.relative_position_index|attn_mask)$")


def load_released(
    path_or_state_dict: str | Path | Mapping[str, Tensor], weights: Literal["model", "ema"] = "ema", **config: Any
) -> LaMambaDiff:
    """Load a checkpoint of the authors' code into a network of this package.

    Only tensors are read from the file. Any other object in its pickle becomes an inert placeholder and is never
    called.

    Args:
        path_or_state_dict: a checkpoint file, or a state dict with the authors' names.
        weights: which weights of a checkpoint file to load; ignored for a plain state dict.
        **config: options of the network that differ from XL at 256 px.

    Raises:
        CheckpointError: it cannot be read, or does not fit the network. The message lists the first names that are
            missing, unknown or of another shape.
    """
    if isinstance(path_or_state_dict, Mapping):
        released, source = _state_in(path_or_state_dict, "the state dict"), "the state dict"
    else:
        states, source = read_released(path_or_state_dict), str(path_or_state_dict)
        if weights not in states:
            raise CheckpointError(f"{source} has no {weights!r} weights, only {', '.join(states)}")
        released = states[weights]
    with torch.device("meta"):  # no weights are initialized, since they would be overwritten
        network = LaMambaDiff(**config)
    wanted = network.state_dict()
    state: dict[str, Tensor] = {}
    problems = []
    for released_name, value in released.items():
        if _DERIVED.search(released_name):
            continue
        name = translate(released_name)
        if name not in wanted:
            problems.append(f"{released_name} is unknown")
            continue
        shape = wanted[name].shape
        state[name] = value.reshape(shape) if value.numel() == shape.numel() and _reshapes(name) else value
        if state[name].shape != shape:
            problems.append(f"{released_name} is {tuple(value.shape)}, but the network needs {tuple(shape)}")
    problems += [f"{name} is missing" for name in wanted if name not in state]
    if problems:
        listed = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{source} does not fit this network, give its options: {listed}")
    fill(network, {name: value.clone() for name, value in state.items()}, source)
    return network.eval()


def released_state(network: LaMambaDiff) -> dict[str, Tensor]:
    """Return a network's state dict in float32 with the names, layouts and buffers of the authors' code.

    The buffers are what that code derives from the geometry: the row of the relative position table for each pair of
    pixels, and the mask of shifted windows. `load_released` restores the same values.

    Raises:
        ConfigError: the authors' code cannot build this network: a branch is missing, or windows do not fill the grids.
    """
    config = network.config
    if not (config.use_ssm and config.use_attention):
        raise ConfigError("the authors' code always has scans and attention: it cannot read this network")
    if config.sample_size % (4 * config.window_size):
        raise ConfigError(
            f"windows of {config.window_size} do not fill all grids of a network of sample_size {config.sample_size}: "
            f"the authors' code needs a sample_size that is a multiple of {4 * config.window_size}"
        )
    roots = [
        (ours, theirs) for theirs, ours in _ROOTS if config.downsample != "conv" or "downsample.norm" not in theirs
    ]
    in_block = [(ours, theirs) for theirs, ours in _IN_BLOCK]
    state: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        if name == "patch_projection.weight":
            value = value[:, :, None, None]
        elif _reshapes(name):
            value = value.flatten(0, 1)
        state[_rename(name, roots, in_block)] = value.float()
    for name, shrunk in _stages(network):
        for index, block in enumerate(network.get_submodule(name).children()):
            side, attention = config.sample_size // shrunk, block.get_submodule("attention")
            geometry = WindowGeometry(side, side, config.window_size, bool(attention.shifted), "cpu")
            begin = _rename(f"{name}.{index}", roots, ())
            state[f"{begin}.attn.relative_position_index"] = geometry.offsets
            if geometry.mask is not None:
                state[f"{begin}.attn_mask"] = geometry.mask
    return state


def _stages(network: LaMambaDiff) -> Iterator[tuple[str, int]]:
    """Yield each stack of blocks, and by which factor its grid is smaller than the network's input."""
    for index, shrunk in enumerate((1, 2, 4, 4)):
        yield f"encoder.{index}", shrunk
        yield f"decoder.{3 - index}", shrunk
    yield "bottleneck", 4


def save_released(path: Path, model: LaMambaDiff, ema: LaMambaDiff) -> None:
    """Write a checkpoint that the authors' code can load: a pickle with `model` and `ema`, tensors by name.

    Raises:
        ConfigError: the authors' code cannot build this network; see `released_state`.
        CheckpointError: it could not be written.
    """
    states = {"model": released_state(model)}
    states["ema"] = states["model"] if ema is model else released_state(ema)
    with atomic_write(path) as temporary:
        try:
            torch.save(states, temporary)
        except RuntimeError as error:  # of a full disk
            raise OSError(first_line(error)) from error


def translate(released_name: str) -> str:
    """Translate a parameter's name in the authors' code to this package's; unknown names stay unchanged."""
    return _rename(released_name, _ROOTS, _IN_BLOCK)


def _rename(name: str, rules: _Rules, in_block: _Rules) -> str:
    """Replace the prefix of a name by the first matching rule; inside a block, also the rest, by `in_block`."""
    for old, new in rules:
        match = re.match(re.escape(old).replace(r"\#", r"(\d+)") + r"(?=\.|$)", name)
        if match:
            numbers, rest = iter(match.groups()), name[match.end() + 1 :]
            begin = re.sub("#", lambda _: next(numbers), new)  # noqa: B023 - it is called at once
            if "blocks" in old + new:
                rest = _rename(rest, in_block, ())
            return ".".join(part for part in (begin, rest) if part)
    return name


def _reshapes(name: str) -> bool:
    """Return whether the authors' layout differs: paths as (k e, n) or (k e,), and the 1x1 patch convolution."""
    return name.endswith((".A_log", ".D")) or name == "patch_projection.weight"


def read_released(path: str | Path) -> dict[str, Mapping[str, Tensor]]:
    """Read `model` and `ema` from a checkpoint file without running code. For a plain state dict, both are the same.

    Tensors are memory-mapped if the file's format allows that.

    Raises:
        CheckpointError: the file is missing or damaged, or contains something else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    content = read_pickle(path)
    if isinstance(content, Mapping) and ("model" in content or "ema" in content):
        return {name: _state_in(content[name], path) for name in ("model", "ema") if name in content}
    return dict.fromkeys(("model", "ema"), _state_in(content, path))


def _state_in(content: Any, source: str | Path) -> Mapping[str, Tensor]:
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{source} has no state dict: expected 'model' or 'ema' with tensors by name")
    state = {_unwrapped(str(name)): value for name, value in content.items()}
    if len(state) < len(content):
        both = next(name for name, uses in Counter(map(_unwrapped, map(str, content))).items() if uses > 1)
        raise CheckpointError(f"{source} has {both} twice, under names with and without the prefix of a wrapper")
    return state


def _unwrapped(name: str) -> str:
    """Remove the prefixes that torch.compile, DDP and FSDP insert into names."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts[:1] == ["module"]:
        parts = parts[1:]
    return ".".join(parts)


def sizes_in(released: Mapping[str, Tensor]) -> dict[str, int]:
    """Infer the options that depend on the training data from a state dict with the authors' names."""
    found = {
        "in_channels": ("patch_embed.proj.weight", lambda shape: shape[1]),
        "sample_size": ("pos_embed", lambda shape: shape[1]),
        "num_classes": ("y_embedder.embedding_table.weight", lambda shape: shape[0] - 1),
    }
    return {
        option: int(size(released[name].shape))
        for option, (name, size) in found.items()
        if name in released and released[name].ndim >= 2
    }
