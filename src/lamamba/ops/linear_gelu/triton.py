"""The kernels of `kernels.py` as one differentiable operation that torch.compile can see."""

import torch
import triton
from torch import Tensor

from lamamba.ops.gradients import register_gradients
from lamamba.ops.launch import Plan, launch, share_rows
from lamamba.ops.linear_gelu.kernels import cut_columns, linear_gelu_backward_kernel, linear_gelu_forward_kernel
from lamamba.ops.sum_kernels import sum_parts

# Enough warps to keep a large GPU busy; with more rows, each program takes more of them. In the backward pass each
# program writes a sum.
FORWARD_WARPS, BACKWARD_WARPS = 16384, 8192


def _plan(x: Tensor, wanted_warps: int) -> Plan:
    channels = x.shape[-1]
    num_rows = x.numel() // channels
    constants = cut_columns(channels, num_rows)
    num_blocks = triton.cdiv(channels, constants["COLUMNS"])
    wanted = triton.cdiv(wanted_warps, num_blocks * constants["num_warps"])
    rows_per_program, num_programs = share_rows(num_rows, constants["ROWS"], wanted)
    # Consecutive programs take neighboring columns of the same rows.
    return Plan((num_blocks, num_programs), (num_rows, rows_per_program), constants)


@torch.library.custom_op("lamamba::bias_gelu", mutates_args=())
def bias_gelu_triton(x: Tensor, bias: Tensor) -> Tensor:
    """Run the forward kernel: GELU of x + bias, with x (..., c) and bias (c,), in the dtype of x."""
    x, bias = x.contiguous(), bias.contiguous()
    out = x.new_empty(x.shape)
    plan = _plan(x, FORWARD_WARPS)
    launch(linear_gelu_forward_kernel, plan.grid, x, bias, out, *plan.numbers, **plan.constants)
    return out


bias_gelu_triton.register_fake(lambda x, bias: x.new_empty(x.shape))


@torch.library.custom_op("lamamba::bias_gelu_backward", mutates_args=())
def _backward(grad_out: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Run the backward kernel.

    Returns:
        The gradients of x, and of bias in float32.
    """
    return _differentiate(grad_out, x, bias, None)


_backward.register_fake(lambda grad_out, x, bias: (x.new_empty(x.shape), x.new_empty(x.shape[-1], dtype=torch.float32)))


@torch.library.custom_op("lamamba::bias_gelu_recompute", mutates_args=())
def bias_gelu_recompute(grad_out: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernel; return the forward result too, before the gradients."""
    out = x.new_empty(x.shape)
    return out, *_differentiate(grad_out, x, bias, out)


@bias_gelu_recompute.register_fake
def _(grad_out: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[-1], dtype=torch.float32)


def _differentiate(grad_out: Tensor, x: Tensor, bias: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    grad_out, x, bias = grad_out.contiguous(), x.contiguous(), bias.contiguous()
    plan = _plan(x, BACKWARD_WARPS)
    grad_x = x.new_empty(x.shape)
    sums = x.new_empty(plan.grid[1], x.shape[-1], dtype=torch.float32)
    launch(
        linear_gelu_backward_kernel, plan.grid,
        x, bias, grad_out, out, grad_x, sums, *plan.numbers, **plan.constants,
    )
    return grad_x, sum_parts(sums)


register_gradients(bias_gelu_triton, _backward, num_tensors=2)
