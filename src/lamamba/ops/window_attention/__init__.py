"""Attention among the pixels of a window, with a learned bias for each relative position (Swin, arXiv 2103.14030).

`reference.py` defines the operation and runs on any device. `loops.py` and `cpu.py` are the version for CPUs,
`kernels.py` and `triton.py` the version for GPUs.
"""

import torch
from torch import Tensor

from lamamba.ops.backend import Backend, choose_kernels, choose_loops
from lamamba.ops.linear import compute_dtype, linear
from lamamba.ops.shapes import check_shapes
from lamamba.ops.window_attention.cpu import window_attention_cpu
from lamamba.ops.window_attention.reference import window_attention_reference

__all__ = ["check_windows", "has_kernels_for", "project_and_attend", "window_attention"]

# Largest number of pixels of a window that the kernels support.
MAX_PLACES = 64


def window_attention(
    qkv: Tensor, bias: Tensor, num_heads: int, window_size: int, shifted: bool = False, backend: Backend = "auto"
) -> Tensor:
    """Attend among the pixels of each window of a grid: softmax(q k^T / sqrt(c) + bias + mask) v.

    A grid that is not larger than the window is one window. A grid that windows do not divide is padded, and the
    padding is masked. If there is more than one window, `shifted` shifts them cyclically by half their side. Then -100
    is added to the logits between pixels from opposite edges of the grid.

    Args:
        qkv: (b, h, w, 3 heads c) queries, keys and values of every pixel, in this order, each split into heads.
        bias: ((2 s - 1)^2, heads) added to the logits. Row (dy + s - 1)(2 s - 1) + dx + s - 1 is for the relative
            position (dy, dx) = query - key.
        num_heads: number of heads.
        window_size: side s of a window.
        shifted: whether to shift the windows.
        backend: see `lamamba.ops.backend`; the kernels support windows of up to 64 pixels.

    Returns:
        (b, h, w, heads c), in the dtype of qkv.

    Raises:
        ValueError: shapes disagree, or the kernels cannot run on these tensors.
    """
    check_windows(qkv, qkv.shape[-1], bias, num_heads, window_size)
    if _choose_kernels(qkv, window_size, backend):
        from lamamba.ops.window_attention.triton import window_attention_triton

        out: Tensor = window_attention_triton(qkv, bias, num_heads, window_size, shifted)
        return out
    if qkv.dtype == torch.float32 and choose_loops(qkv, backend):
        out = window_attention_cpu(qkv, bias, num_heads, window_size, shifted)
        return out
    return window_attention_reference(qkv, bias, num_heads, window_size, shifted)


def project_and_attend(
    x: Tensor,
    weight: Tensor,
    weight_bias: Tensor,
    bias: Tensor,
    num_heads: int,
    window_size: int,
    shifted: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Project x to queries, keys and values, then attend as `window_attention` does.

    Args:
        x: (b, h, w, i); autocast rounds it to the autocast dtype.
        weight: (3 heads c, i) weight of the linear layer that computes queries, keys and values.
        weight_bias: (3 heads c) bias of that layer.
        bias, num_heads, window_size, shifted, backend: as for `window_attention`.

    Returns:
        The result of `window_attention`.

    Raises:
        ValueError: shapes disagree, or the kernels cannot run on these tensors.
    """
    x = x.to(compute_dtype(x))
    check_windows(x, len(weight), bias, num_heads, window_size)
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, weight_bias, bias))
    if not (differentiated and _choose_kernels(x, window_size, backend)):
        return window_attention(linear(x, weight, weight_bias), bias, num_heads, window_size, shifted, backend)
    from lamamba.ops.window_attention.triton import ProjectedAttention

    out: Tensor = ProjectedAttention.apply(x, weight, weight_bias, bias, num_heads, window_size, shifted)
    return out


def has_kernels_for(x: Tensor, window_size: int) -> bool:
    """Return whether the windows of a grid (b, h, w, ...) are small enough for the kernels."""
    return min(x.shape[1], window_size) * min(x.shape[2], window_size) <= MAX_PLACES


def _choose_kernels(x: Tensor, window_size: int, backend: Backend) -> bool:
    fits = has_kernels_for(x, window_size)
    limit = "" if fits else f"the kernels take windows of up to {MAX_PLACES} pixels: use a window_size of 8 or less"
    return choose_kernels("window_attention", x, backend, limit)


def check_windows(x: Tensor, channels: int, bias: Tensor, num_heads: int, window_size: int) -> None:
    """Raise ValueError if shapes disagree. Queries, keys and values together have `channels` channels."""
    if x.ndim != 4 or 0 in x.shape or channels % (3 * num_heads):
        shape = (*x.shape[:-1], channels)
        raise ValueError(f"window_attention: qkv is {shape}: give (b, h, w, 3 * {num_heads} * c)")
    wanted = {"bias": (bias, ((2 * window_size - 1) ** 2, num_heads))}
    check_shapes("window_attention", f"windows of {window_size} and {num_heads} heads", wanted)
