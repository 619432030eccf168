"""An MLP and its first half: linear layers and the exact GELU (Hendrycks & Gimpel 2016, arXiv 1606.08415).

`reference.py` defines the operation and runs on any device. `kernels.py` and `triton.py` are the version for GPUs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lamamba.ops.backend import Backend, choose_kernels
from lamamba.ops.linear import compute_dtype, linear, rounded
from lamamba.ops.linear_gelu.reference import linear_gelu_reference
from lamamba.ops.shapes import check_shapes

__all__ = ["check_layer", "gelu_mlp", "linear_gelu"]


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, backend: Backend = "auto") -> Tensor:
    """Apply a linear layer, then GELU.

        out = gelu(x weight^T + bias),   gelu(z) = z (1 + erf(z / sqrt(2))) / 2

    Args:
        x: (..., i).
        weight: (c, i).
        bias: (c,). The kernels add it in float32, to the product that PyTorch has rounded to its dtype. On a GPU, in
            bfloat16 and without gradients, cuBLASLt adds it before rounding.
        backend: see `lamamba.ops.backend`.

    Returns:
        (..., c) in the dtype of the product, which is the autocast dtype where autocast is on.

    Raises:
        ValueError: shapes disagree, or the kernels cannot run on these tensors.
    """
    check_layer(x, weight, bias)
    if choose_kernels("linear_gelu", x, backend):
        from lamamba.ops.linear_gelu.triton import bias_gelu_triton

        if _uses_epilogue(x):
            return _linear_gelu_epilogue(x, weight, bias)
        return bias_gelu_triton(linear(x, weight), bias)
    return linear_gelu_reference(x, weight, bias)


def gelu_mlp(
    x: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, dropout: float = 0.0, backend: Backend = "auto"
) -> Tensor:
    """Apply a linear layer, GELU, dropout, and a linear layer without bias.

        out = dropout(gelu(x weight_1^T + bias_1)) weight_2^T

    Without dropout, the kernels do not save the hidden values for the backward pass, which computes them again.

    Args:
        x: (..., i).
        weight_1: (c, i).
        bias_1: (c,).
        weight_2: (o, c).
        dropout: probability of dropping a hidden value.
        backend: see `lamamba.ops.backend`.

    Returns:
        (..., o) in the dtype of the product, which is the autocast dtype where autocast is on.

    Raises:
        ValueError: shapes disagree, or the kernels cannot run on these tensors.
    """
    with_layer = f"weight_1 {tuple(weight_1.shape)}"
    check_shapes("gelu_mlp", with_layer, {"weight_2": (weight_2, (len(weight_2), len(weight_1)))})
    if dropout or not choose_kernels("gelu_mlp", x, backend):
        hidden = linear_gelu(x, weight_1, bias_1, backend)
        return linear(F.dropout(hidden, dropout) if dropout else hidden, weight_2)
    check_layer(x, weight_1, bias_1)
    from lamamba.ops.linear_gelu.products import GeluMlp, second_layer

    x = x.to(compute_dtype(x))
    if _uses_epilogue(x):
        return linear(_linear_gelu_epilogue(x, weight_1, bias_1), weight_2)
    if not torch.is_grad_enabled():
        return second_layer(linear(x, weight_1), bias_1, rounded(weight_2, x.dtype))
    out: Tensor = GeluMlp.apply(x, weight_1, bias_1, weight_2)
    return out


def _uses_epilogue(x: Tensor) -> bool:
    """Return whether cuBLASLt applies bias and GELU: in bfloat16, and without gradients, which need the product."""
    return x.is_cuda and compute_dtype(x) == torch.bfloat16 and not torch.is_grad_enabled()


def _linear_gelu_epilogue(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `linear_gelu` in one kernel of cuBLASLt, which adds the bias and applies GELU before it rounds.

    This GELU is the tanh approximation, which is off by at most 4.7e-4 (see README.md).
    """
    dtype = compute_dtype(x)
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    out = torch._addmm_activation(rounded(bias, dtype), rows, rounded(weight, dtype).mT, use_gelu=True)
    return out.view(*x.shape[:-1], len(weight))


def check_layer(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise ValueError if the shapes of x (..., i), a weight (c, i) and a bias (c,) disagree."""
    if x.ndim == 0 or 0 in x.shape:
        raise ValueError(f"linear_gelu: x is {tuple(x.shape)}: give (..., i), none of them 0")
    check_shapes("linear_gelu", f"x {tuple(x.shape)}", {"weight": (weight, (len(weight), x.shape[-1]))})
    check_shapes("linear_gelu", f"weight {tuple(weight.shape)}", {"bias": (bias, (len(weight),))})
