"""An MLP as one differentiable operation, whose second layer computes GELU in the same kernel where that is faster.

The limits below were measured on one H200 in bf16 (benchmarks/results/2026-11-30_second_layer.txt).
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from lamamba.ops.launch import launch
from lamamba.ops.linear import rounded, weight_gradient
from lamamba.ops.linear_gelu.product_kernels import gelu_linear_backward_kernel, gelu_linear_kernel
from lamamba.ops.linear_gelu.triton import bias_gelu_recompute, bias_gelu_triton
from lamamba.ops.sum_kernels import sum_parts

ROWS, DEPTH = 64, 64  # rows of a program, and channels that it multiplies at a time
COLUMNS = 64  # of a program of the backward kernel
MIN_ROWS = 128 * ROWS  # fewer rows give the forward kernel too few programs
MAX_WIDTH, MAX_WIDTH_OF_GRADIENT = 256, 512
LARGEST_WIDE = 2**23  # most values of a gradient with more than 128 channels


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


def second_layer(x: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    """Compute gelu(x + bias) weight^T without gradients: x (..., h), bias (h,), weight (o, h) in the dtype of x."""
    width, hidden = weight.shape
    is_power = width >= DEPTH and width & (width - 1) == 0  # a power of two, because a program computes all columns
    if is_power and width <= MAX_WIDTH and _is_cut_evenly(x) and x.numel() >= MIN_ROWS * hidden:
        return gelu_linear(x, bias, weight)
    return F.linear(bias_gelu_triton(x, bias), weight)


def second_layer_backward(grad_out: Tensor, x: Tensor, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return gelu(x + bias), the gradient of x, and the float32 gradient of bias, given the gradient of the result."""
    width = len(weight)
    pays = width <= 128 or (width <= MAX_WIDTH_OF_GRADIENT and grad_out.numel() <= LARGEST_WIDE)
    if pays and width % DEPTH == 0 and _is_cut_evenly(x):
        return gelu_linear_backward(grad_out, x, bias, weight)
    return bias_gelu_recompute(grad_out @ weight, x, bias)


def _is_cut_evenly(x: Tensor) -> bool:
    return x.dtype.itemsize == 2 and x.shape[-1] % DEPTH == 0


@torch.library.custom_op("lamamba::gelu_linear", mutates_args=())
def gelu_linear(x: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    """Run the forward kernel; arguments as of `second_layer`."""
    x, bias, weight = x.contiguous(), bias.contiguous(), weight.contiguous()
    width, hidden = weight.shape
    num_rows = x.numel() // hidden
    out = x.new_empty(*x.shape[:-1], width)
    # Shared memory holds three or four tiles of each operand, and some GPUs have only 99 KiB of it.
    depth, stages = (DEPTH, 3) if width < MAX_WIDTH else (DEPTH // 2, 4)
    launch(
        gelu_linear_kernel, (triton.cdiv(num_rows, ROWS),), x, bias, weight, out, num_rows,
        HIDDEN=hidden, OUT=width, ROWS=ROWS, DEPTH=depth, num_warps=4, num_stages=stages,
    )
    return out


gelu_linear.register_fake(lambda x, bias, weight: x.new_empty(*x.shape[:-1], len(weight)))


@torch.library.custom_op("lamamba::gelu_linear_backward", mutates_args=())
def gelu_linear_backward(grad_out: Tensor, x: Tensor, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernel; arguments and results as of `second_layer_backward`."""
    grad_out, x, bias, weight = (tensor.contiguous() for tensor in (grad_out, x, bias, weight))
    width, hidden = weight.shape
    num_rows = x.numel() // hidden
    num_tiles = triton.cdiv(num_rows, ROWS)
    out, grad_x = x.new_empty(x.shape), x.new_empty(x.shape)
    sums = x.new_empty(num_tiles, hidden, dtype=torch.float32)
    launch(
        gelu_linear_backward_kernel, (num_tiles * (hidden // COLUMNS),),
        x, bias, weight, grad_out, out, grad_x, sums, num_rows,
        HIDDEN=hidden, OUT=width, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH,
        num_warps=4 if width <= 128 else 8, num_stages=3,
    )
    return out, grad_x, sum_parts(sums)


@gelu_linear_backward.register_fake
def _(grad_out: Tensor, x: Tensor, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[-1], dtype=torch.float32)
