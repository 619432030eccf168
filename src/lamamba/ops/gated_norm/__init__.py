"""Add up the paths of a scan, normalize, and gate by SiLU(z) (VMamba, Liu et al. 2024, arXiv 2401.10166).

`reference.py` defines the operation and runs on any device. `loops.py` and `cpu.py` are the version for CPUs,
`kernels.py` and `triton.py` the version for GPUs.
"""

import torch
from torch import Tensor

from lamamba.ops.backend import Backend, choose_kernels, choose_loops_outside_graphs
from lamamba.ops.gated_norm.cpu import GatedNorm
from lamamba.ops.gated_norm.reference import gated_norm_reference
from lamamba.ops.shapes import check_dimensions, check_shapes

__all__ = ["check_gated_norm", "gated_norm"]


def gated_norm(
    planes: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, backend: Backend = "auto"
) -> Tensor:
    """Add up planes, normalize the sum over the channels, and multiply by SiLU(z).

        y = sum of planes            out = (weight (y - mean) / sqrt(variance + eps) + bias) silu(z)

    Args:
        planes: (p, b, h, w, e) outputs of the paths. The sum is taken in float32 and rounded to their dtype.
        z: (b, h, w, e) gate. It may be half of the channels of a tensor; the kernels read it without a copy.
        weight: (e,).
        bias: (e,).
        eps: positive.
        backend: see `lamamba.ops.backend`.

    Returns:
        (b, h, w, e) in the dtype of z; the kernels compute in float32.

    Raises:
        ValueError: shapes disagree, or the kernels cannot run on these tensors.
    """
    check_gated_norm(planes, z, weight, bias)
    if choose_kernels("gated_norm", planes, backend):
        from lamamba.ops.gated_norm.triton import gated_norm_triton

        save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (planes, z, weight, bias))
        out, _ = gated_norm_triton(planes, z, weight, bias, eps, save)
        return out
    if len(planes) == 1 and choose_loops_outside_graphs((planes, z, weight, bias), backend):
        out = GatedNorm.apply(planes[0], z, weight, bias, eps)
        return out
    return gated_norm_reference(planes, z, weight, bias, eps)


def check_gated_norm(planes: Tensor, z: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise ValueError if shapes disagree; arguments as in `gated_norm`."""
    check_dimensions("gated_norm", "planes", planes, "p b h w e")
    channels = planes.shape[4:]
    wanted = {"z": (z, planes.shape[1:]), "weight": (weight, channels), "bias": (bias, channels)}
    check_shapes("gated_norm", f"planes {tuple(planes.shape)}", wanted)
