"""The first half of an MLP: a linear layer and the exact GELU (Hendrycks & Gimpel 2016, arXiv 1606.08415).

`reference.py` defines the operation and runs on any device. `kernels.py` and `triton.py` are the version for GPUs.
"""

from torch import Tensor

from lamamba.ops.backend import Backend, choose_kernels
from lamamba.ops.linear import linear
from lamamba.ops.linear_gelu.reference import linear_gelu_reference
from lamamba.ops.shapes import check_shapes

__all__ = ["linear_gelu"]


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, backend: Backend = "auto") -> Tensor:
    """Apply a linear layer, then GELU.

        out = gelu(x weight^T + bias),   gelu(z) = z (1 + erf(z / sqrt(2))) / 2

    Args:
        x: (..., i).
        weight: (c, i).
        bias: (c,). The kernels add it in float32, to the product that PyTorch has rounded to its dtype.
        backend: see `lamamba.ops.backend`.

    Returns:
        (..., c) in the dtype of the product, which is the autocast dtype where autocast is on.

    Raises:
        ValueError: shapes disagree, or the kernels cannot run on these tensors.
    """
    if x.ndim == 0 or 0 in x.shape:
        raise ValueError(f"linear_gelu: x is {tuple(x.shape)}: give (..., i), none of them 0")
    check_shapes("linear_gelu", f"x {tuple(x.shape)}", {"weight": (weight, (len(weight), x.shape[-1]))})
    check_shapes("linear_gelu", f"weight {tuple(weight.shape)}", {"bias": (bias, (len(weight),))})
    if choose_kernels("linear_gelu", x, backend):
        from lamamba.ops.linear_gelu.triton import bias_gelu_triton

        return bias_gelu_triton(linear(x, weight), bias)
    return linear_gelu_reference(x, weight, bias)
