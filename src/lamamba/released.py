"""Reads checkpoints of the authors' released LaMamba-Diff code, by name and shape, and runs nothing of theirs."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lamamba.errors import CheckpointError
from lamamba.model import LaMambaDiff

# Released name -> this package's, the first rule that matches a prefix at a time, from the root inwards.
_ROOTS = (
    (r"pos_embed", "position_embedding"),
    (r"t_embedder\.mlp\.0", "timestep_embedding.linear_1"),
    (r"t_embedder\.mlp\.2", "timestep_embedding.linear_2"),
    (r"y_embedder\.embedding_table", "label_embedding"),
    (r"patch_embed\.proj", "patch_projection"),
    (r"patch_embed\.norm", "patch_norm"),
    (r"layers\.(\d+)\.downsample\.norm", r"downsamples.\1.norm"),
    (r"layers\.(\d+)\.downsample\.reduction", r"downsamples.\1.reduction"),
    (r"layers\.(\d+)\.downsample\.1", r"downsamples.\1.convolution"),
    (r"layers\.(\d+)\.downsample\.3", r"downsamples.\1.norm"),
    (r"layers\.(\d+)\.blocks\.(\d+)", r"encoder.\1.\2"),
    (r"mid_layer\.blocks\.(\d+)", r"bottleneck.\1"),
    (r"layers_up\.2\.upsample\.expand", "upsamples.0.expansion"),
    (r"layers_up\.3\.upsample\.expand", "upsamples.1.expansion"),
    (r"layers_up\.2\.upsample\.norm", "upsamples.0.norm"),
    (r"layers_up\.3\.upsample\.norm", "upsamples.1.norm"),
    (r"layers_up\.(\d+)\.blocks\.(\d+)", r"decoder.\1.\2"),
    (r"final_condition_projection", "head.condition_projection"),
    (r"final_up\.expand", "head.linear"),
    (r"final_up\.norm", "head.norm"),
    (r"final_adaLN_modulation\.1", "head.modulation"),
    (r"final_linear", "head.output"),
)
_IN_BLOCK = (
    (r"condition_projection", "condition_projection"),
    (r"adaLN_modulation\.1", "modulation"),
    (r"norm_swin", "attention_norm"),
    (r"norm2", "mlp_norm"),
    (r"norm", "ssm_norm"),
    (r"op\.conv2d", "ssm.convolution"),
    (r"op\.dt_projs_", "ssm.dt_"),
    (r"op\.A_logs", "ssm.A_log"),
    (r"op\.Ds", "ssm.D"),
    (r"op\.", "ssm."),
    (r"attn\.proj", "attention.out_proj"),
    (r"attn\.relative_position_bias_table", "attention.relative_position_bias"),
    (r"attn\.qkv", "attention.qkv"),
    (r"mlp\.fc1", "mlp.linear_1"),
    (r"mlp\.fc2", "mlp.linear_2"),
)
# Derived from the geometry, which this package computes for any size.
_DERIVED = re.compile(r"(attn\.relative_position_index|attn_mask)$")


def load_released(
    path_or_state_dict: str | Path | Mapping[str, Tensor], weights: Literal["model", "ema"] = "ema", **config: Any
) -> LaMambaDiff:
    """Load a checkpoint of the released code into a network of this package.

    Only tensors are taken from the file; whatever else its pickle names is replaced by an inert object, never called.

    Args:
        path_or_state_dict: a checkpoint file, or a state dict under the released names.
        weights: which of the two a checkpoint file holds to take; ignored for a plain state dict.
        **config: the network's options where they differ from the released XL at 256 px.

    Raises:
        CheckpointError: it cannot be read, or does not fit; every name that is missing, unknown or of another shape is
            listed.
    """
    if isinstance(path_or_state_dict, Mapping):
        released, source = path_or_state_dict, "state dict"
    else:
        released, source = _read(Path(path_or_state_dict), weights), str(path_or_state_dict)
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
            problems.append(f"{released_name} is {tuple(value.shape)}, the network's is {tuple(shape)}")
    problems += [f"{name} is missing" for name in wanted if name not in state]
    if problems:
        listed = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{source} does not fit this network, give its options as keywords: {listed}")
    network.load_state_dict(state)
    network.eval()
    return network


def translate(released_name: str) -> str:
    """Translate a parameter's released name into this package's; a name that no rule knows comes back unchanged."""
    for pattern, replacement in _ROOTS:
        match = re.match(pattern + r"(?=\.|$)", released_name)
        if match:
            rest = released_name[match.end() :].removeprefix(".")
            if re.match(r"encoder|decoder|bottleneck", match.expand(replacement)):
                rest = next(
                    (new + rest[inner.end() :] for old, new in _IN_BLOCK if (inner := re.match(old, rest))), rest
                )
            return ".".join(part for part in (match.expand(replacement), rest) if part)
    return released_name


def _reshapes(name: str) -> bool:
    """Whether a parameter's released layout differs: (k e, n) or (k e,) paths and the 1x1 patch convolution."""
    return name.endswith((".A_log", ".D")) or name == "patch_projection.weight"


class _Inert(dict[Any, Any]):
    """Stands in for any object a pickle names beside tensors, and does nothing."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


def _read(path: Path, weights: str) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the unpickler
        raise CheckpointError(f"{path} cannot be read as a PyTorch checkpoint: {error}".splitlines()[0]) from error
    if isinstance(content, Mapping) and ("model" in content or "ema" in content):
        if weights not in content:
            raise CheckpointError(f"{path} holds no {weights!r} weights, only {', '.join(map(str, content))}")
        content = content[weights]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no state dict: expected 'model' or 'ema' with tensors by name")
    return {str(name).removeprefix("module."): value for name, value in content.items()}
