"""Add a gated branch to the stream of a block, normalize, shift and scale (DiT, arXiv 2212.09748).

`reference.py` defines the operation and runs on any device. `loops.py` and `cpu.py` are the version for CPUs,
`kernels.py` and `triton.py` the version for GPUs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lamamba.ops.backend import Backend, choose_kernels, choose_loops_outside_graphs
from lamamba.ops.residual_norm.cpu import ResidualNorm
from lamamba.ops.residual_norm.reference import add_gated_reference, layer_norm_reference
from lamamba.ops.shapes import check_dimensions, check_shapes

__all__ = ["Residual", "add_gated", "check_norm", "layer_norm", "residual_norm"]


class Residual(NamedTuple):
    """The output of a branch, which is added to the stream as gate (branch + bias).

    The bias belongs to the last layer of the branch, which leaves it out. Here its gradient needs no separate pass over
    memory.
    """

    branch: Tensor
    """(b, h, w, c)."""
    gate: Tensor
    """(b, c). It may be part of a larger tensor."""
    bias: Tensor | None = None
    """(c,), or None for 0."""


def residual_norm(
    x: Tensor,
    residual: Residual,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    modulation: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a gated branch to the stream, and normalize the result for the next branch.

        x_new = x + gate (branch + bias of the branch)
        normed = (weight xhat + bias) (1 + scale) + shift,   xhat = (x_new - mean) / sqrt(variance + eps) over channels

    Args:
        x: (b, h, w, c) the stream.
        residual: the branch, its gate and its bias.
        weight: (c,), or None for 1.
        bias: (c,), or None for 0.
        modulation: shift and scale, each (b, c), or None for 0. Like the gate, they may be parts of a larger tensor.
        eps: positive.
        dtype: dtype of `normed`, for the next branch; None means the dtype of x.
        backend: see `lamamba.ops.backend`.

    Returns:
        x_new in the dtype of x, and normed, both (b, h, w, c). The kernels compute in float32.

    Raises:
        ValueError: shapes disagree, or the kernels cannot run on these tensors.
    """
    check_norm("residual_norm", x, residual, (weight, bias), modulation)
    if choose_kernels("residual_norm", x, backend):
        from lamamba.ops.residual_norm.triton import residual_norm_triton

        x_new, normed = residual_norm_triton(
            x, *residual, weight, bias, *(modulation or (None, None)), eps, dtype or x.dtype
        )
        return x_new, normed
    if (dtype or x.dtype) == x.dtype and choose_loops_outside_graphs((x, residual.branch), backend):
        x_new, normed = ResidualNorm.apply(x, *_as_loops_take(x, residual, weight, bias, modulation), eps)
        return x_new, normed
    x = add_gated_reference(x, *residual)
    return x, layer_norm_reference(x, weight, bias, modulation, eps, dtype or x.dtype)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    modulation: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Normalize and modulate without adding a branch: the second half of `residual_norm`."""
    check_norm("layer_norm", x, None, (weight, bias), modulation)
    if choose_kernels("layer_norm", x, backend):
        from lamamba.ops.residual_norm.triton import residual_norm_triton

        _, normed = residual_norm_triton(
            x, None, None, None, weight, bias, *(modulation or (None, None)), eps, dtype or x.dtype
        )
        return normed
    return layer_norm_reference(x, weight, bias, modulation, eps, dtype or x.dtype)


def add_gated(x: Tensor, residual: Residual, backend: Backend = "auto") -> Tensor:
    """Add a gated branch without a norm after it: the first half of `residual_norm`."""
    check_norm("add_gated", x, residual, (None, None), None)
    if choose_kernels("add_gated", x, backend):
        from lamamba.ops.residual_norm.triton import residual_norm_triton

        x_new, _ = residual_norm_triton(x, *residual, None, None, None, None, 0.0, None)
        return x_new
    return add_gated_reference(x, *residual)


def _as_loops_take(
    x: Tensor,
    residual: Residual,
    weight: Tensor | None,
    bias: Tensor | None,
    modulation: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, ...]:
    """Compute the arguments of `ResidualNorm`: branch, gate, moved, slope and offset."""
    branch, gate, branch_bias = residual
    gate = gate.float()
    moved = torch.zeros_like(gate) if branch_bias is None else gate * branch_bias
    slope = torch.ones_like(gate) if weight is None else weight.float().expand_as(gate)
    offset = torch.zeros_like(gate) if bias is None else bias.float().expand_as(gate)
    if modulation is not None:
        shift, scale = modulation
        slope, offset = slope * (1 + scale), offset * (1 + scale) + shift
    return branch, gate, moved, slope, offset


def check_norm(
    operation: str,
    x: Tensor,
    residual: Residual | None,
    affine: tuple[Tensor | None, Tensor | None],
    modulation: tuple[Tensor, Tensor] | None,
) -> None:
    """Raise ValueError if shapes disagree; arguments as in `residual_norm`, after the name of the operation."""
    check_dimensions(operation, "x", x, "b h w c")
    batch, _, _, channels = x.shape
    branch, gate, branch_bias = residual or (None, None, None)
    shift, scale = modulation or (None, None)
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {"branch": (branch, x.shape)}
    wanted |= {name: (y, (batch, channels)) for name, y in (("gate", gate), ("shift", shift), ("scale", scale))}
    of_channels = zip(("weight", "bias", "bias of the branch"), (*affine, branch_bias), strict=True)
    wanted |= {name: (y, (channels,)) for name, y in of_channels}
    check_shapes(operation, f"x {tuple(x.shape)}", wanted)
