"""An MLP as one differentiable operation, made of kernels and matrix products."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lamamba.ops.linear import rounded, weight_gradient
from lamamba.ops.linear_gelu.products import second_layer, second_layer_backward


class GeluMlp(torch.autograd.Function):
    """Two linear layers with bias and GELU between them, whose backward pass recomputes the hidden values.

    Takes x, the weight and bias of the first layer, and the weight of the second. The hidden values are the largest
    tensor of a block. The backward kernel of GELU reads what it needs to compute them anyway.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor) -> Tensor:
        low_1, low_2 = rounded(weight_1, x.dtype), rounded(weight_2, x.dtype)
        z = F.linear(x, low_1)
        out = second_layer(z, bias_1, low_2)
        ctx.save_for_backward(x, low_1, z, bias_1, low_2)
        ctx.dtypes = weight_1.dtype, weight_2.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (grad,), (x, weight_1, z, bias_1, weight_2) = grads, ctx.saved_tensors
        dtype_1, dtype_2 = ctx.dtypes
        with torch.autocast(x.device.type, enabled=False):  # autocast would round the gradients
            hidden, grad_z, grad_bias = second_layer_backward(grad, z, bias_1, weight_2)
            grad_weight_2 = weight_gradient(grad, hidden, dtype_2)
            del hidden
            grad_weight_1 = weight_gradient(grad_z, x, dtype_1)
            return grad_z @ weight_1, grad_weight_1, grad_bias.to(bias_1.dtype), grad_weight_2
