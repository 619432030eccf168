"""Norms and the layers after them: one kernel for both when no gradients are needed, and separate operations otherwise.

A branch of a block begins with `residual_norm` or `layer_norm`, and goes on with linear layers. With 16-bit activations
on a GPU, and where that is faster (`tiles.py`), one kernel keeps what is between them on the chip.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lamamba.ops.backend import Backend, choose_kernels
from lamamba.ops.fused_layers.tiles import gated_norm_linear_pays, norm_linear_pays, norm_mlp_pays
from lamamba.ops.gated_norm import check_gated_norm, gated_norm
from lamamba.ops.linear import compute_dtype, linear, linear_in_halves, rounded
from lamamba.ops.linear_gelu import check_layer, gelu_mlp
from lamamba.ops.residual_norm import Residual, check_norm, layer_norm, residual_norm
from lamamba.ops.shapes import check_shapes
from lamamba.ops.window_attention import check_windows, has_kernels_for, project_and_attend, window_attention

__all__ = ["Norm", "gated_norm_linear", "norm_attention", "norm_linear_in_halves", "norm_mlp"]


class Norm(NamedTuple):
    """What a branch begins with: the arguments of `residual_norm`, or of `layer_norm` without a residual."""

    x: Tensor
    """(b, h, w, c) the stream."""
    residual: Residual | None
    weight: Tensor
    """(c,)."""
    bias: Tensor
    """(c,)."""
    modulation: tuple[Tensor, Tensor]
    """Shift and scale, each (b, c)."""
    eps: float

    def apply(self, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
        """Return the stream with the residual added, and the normalized values in the dtype of the next layer."""
        affine, dtype = (self.weight, self.bias, self.modulation, self.eps), compute_dtype(self.x)
        if self.residual is None:
            return self.x, layer_norm(self.x, *affine, dtype, backend)
        return residual_norm(self.x, self.residual, *affine, dtype, backend)

    def stream(self, x_new: Tensor) -> Tensor:
        """Return the stream from the result of a kernel, which is empty without a residual."""
        return self.x if self.residual is None else x_new

    def arguments(self, operation: str) -> tuple[Tensor | float | None, ...]:
        """Check the shapes, and return the arguments of the kernels."""
        check_norm(operation, self.x, self.residual, (self.weight, self.bias), self.modulation)
        return self.x, *(self.residual or (None, None, None)), self.weight, self.bias, *self.modulation, self.eps


def norm_linear_in_halves(norm: Norm, weight: Tensor, backend: Backend = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Normalize, and apply a linear layer.

    Args:
        norm: see `Norm`.
        weight: (o, c).
        backend: see `lamamba.ops.backend`. Without gradients, "auto" fuses 16-bit activations where that is faster, and
            "triton" fuses everything. With gradients, both run the kernels of the separate operations.

    Returns:
        The stream with the residual added, and both halves of the layer's result, each (b, h, w, o / 2).

    Raises:
        ValueError: shapes disagree, or the kernels cannot run on these tensors. The other functions raise it too.
    """
    if _fuses("norm_linear", norm.x, norm_linear_pays, backend):
        x, out = _norm_linear(norm, weight, None, False)
        first, second = out.chunk(2, dim=-1)
        return x, first, second
    x, normed = norm.apply(backend)
    first, second = linear_in_halves(normed, weight)
    return x, first, second


def gated_norm_linear(
    planes: Tensor, z: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor,
    backend: Backend = "auto",
) -> Tensor:
    """Apply `lamamba.ops.gated_norm`, then a linear layer with weight (o, e).

    Returns:
        (b, h, w, o) in the dtype of the layer.
    """
    if _fuses("gated_norm_linear", z, gated_norm_linear_pays, backend):
        from lamamba.ops.fused_layers.triton import gated_norm_linear_triton

        check_gated_norm(planes, z, norm_weight, norm_bias)
        check_shapes("gated_norm_linear", f"z {tuple(z.shape)}", {"weight": (weight, (len(weight), z.shape[3]))})
        dtype = compute_dtype(z)
        out: Tensor = gated_norm_linear_triton(planes, z, norm_weight, norm_bias, eps, rounded(weight, dtype), dtype)
        return out
    return linear(gated_norm(planes, z, norm_weight, norm_bias, eps, backend), weight)


def norm_attention(
    norm: Norm, qkv_weight: Tensor, qkv_bias: Tensor, bias: Tensor, weight: Tensor,
    num_heads: int, window_size: int, shifted: bool = False, backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Normalize, apply `lamamba.ops.window_attention.project_and_attend`, then a linear layer with weight (c, c).

    Returns:
        The stream with the residual added, and the result (b, h, w, c).
    """
    x, geometry = norm.x, (num_heads, window_size, shifted)
    if has_kernels_for(x, window_size) and _fuses("norm_attention", x, norm_mlp_pays, backend):
        from lamamba.ops.fused_layers.triton import norm_attention_triton

        check_windows(x, len(qkv_weight), bias, num_heads, window_size)
        check_layer(x, qkv_weight, qkv_bias)
        width = x.shape[3]
        wanted = {"weight": (weight, (width, width)), "qkv_weight": (qkv_weight, (3 * width, width))}
        check_shapes("norm_attention", f"x {tuple(x.shape)}", wanted)
        dtype = compute_dtype(x)
        layers = (rounded(qkv_weight, dtype), qkv_bias, bias, rounded(weight, dtype))
        x_new, out = norm_attention_triton(*norm.arguments("norm_attention"), *layers, *geometry, dtype)
        return norm.stream(x_new), out
    if _fuses("norm_linear", x, norm_linear_pays, backend):
        x, qkv = _norm_linear(norm, qkv_weight, qkv_bias, False)
        attended = window_attention(qkv, bias, *geometry, backend)
    else:
        x, normed = norm.apply(backend)
        attended = project_and_attend(normed, qkv_weight, qkv_bias, bias, *geometry, backend)
    return x, linear(attended, weight)


def norm_mlp(
    norm: Norm, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, dropout: float = 0.0, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Normalize, then apply `lamamba.ops.linear_gelu.gelu_mlp`.

    Returns:
        The stream with the residual added, and the result (b, h, w, o).
    """
    x = norm.x
    if not dropout and len(weight_2) == x.shape[-1] and _fuses("norm_mlp", x, norm_mlp_pays, backend):
        from lamamba.ops.fused_layers.triton import norm_mlp_triton

        check_layer(x, weight_1, bias_1)
        with_layer = f"weight_1 {tuple(weight_1.shape)}"
        check_shapes("norm_mlp", with_layer, {"weight_2": (weight_2, (len(weight_2), len(weight_1)))})
        dtype = compute_dtype(x)
        layers = (rounded(weight_1, dtype), bias_1, rounded(weight_2, dtype))
        x_new, out = norm_mlp_triton(*norm.arguments("norm_mlp"), *layers, dtype)
        return norm.stream(x_new), out
    if not dropout and _fuses("norm_linear", x, norm_linear_pays, backend):
        x, hidden = _norm_linear(norm, weight_1, bias_1, True)
        return x, linear(hidden, weight_2)
    x, normed = norm.apply(backend)
    return x, gelu_mlp(normed, weight_1, bias_1, weight_2, dropout, backend)


def _norm_linear(norm: Norm, weight: Tensor, bias: Tensor | None, gelu: bool) -> tuple[Tensor, Tensor]:
    from lamamba.ops.fused_layers.triton import norm_linear_triton

    check_shapes("norm_linear", f"x {tuple(norm.x.shape)}", {"weight": (weight, (len(weight), norm.x.shape[-1]))})
    check_shapes("norm_linear", f"weight {tuple(weight.shape)}", {"bias": (bias, (len(weight),))})
    dtype = compute_dtype(norm.x)
    x_new, out = norm_linear_triton(*norm.arguments("norm_linear"), rounded(weight, dtype), bias, gelu, dtype)
    return norm.stream(x_new), out


def _fuses(operation: str, x: Tensor, pays: Callable[[int, int], bool], backend: Backend) -> bool:
    """Return whether to run the fused kernel on pixels (b, h, w, c)."""
    if not choose_kernels(operation, x, backend) or torch.is_grad_enabled():
        return False
    is_short = compute_dtype(x).itemsize == 2
    return backend == "triton" or (is_short and pays(x.shape[:3].numel(), x.shape[3]))
