"""The kernels of `kernels.py` as one differentiable operation that torch.compile can see."""

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from lamamba.ops.gradients import register_gradients
from lamamba.ops.launch import Plan, launch
from lamamba.ops.linear import rounded, weight_gradient
from lamamba.ops.sum_kernels import sum_parts
from lamamba.ops.window_attention.geometry import Windows
from lamamba.ops.window_attention.kernels import attention_backward_kernel, attention_forward_kernel, pair_sum_kernel

# Enough programs to keep a large GPU busy. Each loads its bias once, and writes its sums once.
WANTED_PROGRAMS = 1024


def _plan(qkv: Tensor, num_heads: int, window_size: int, shifted: bool) -> Plan:
    batch, height, width, channels = qkv.shape
    windows = Windows.of(height, width, window_size, shifted)
    num_windows = batch * windows.number
    windows_per_program = triton.cdiv(num_windows * num_heads, WANTED_PROGRAMS)
    head_channels = channels // (3 * num_heads)
    places = max(16, triton.next_power_of_2(windows.side_y * windows.side_x))
    constants = {
        "HEIGHT": height, "WIDTH": width, "SIDE_Y": windows.side_y, "SIDE_X": windows.side_x,
        "SHIFT_Y": windows.shift_y, "SHIFT_X": windows.shift_x, "PLACES": places, "WINDOW": window_size,
        "HEADS": num_heads, "CHANNELS": head_channels, "BLOCK": max(16, triton.next_power_of_2(head_channels)),
        "num_warps": 8 if head_channels > 64 else 4, "num_stages": 1,
    }
    grid = (num_heads, triton.cdiv(num_windows, windows_per_program))
    return Plan(grid, (num_windows, windows_per_program, head_channels**-0.5), constants)


@torch.library.custom_op("lamamba::window_attention", mutates_args=())
def window_attention_triton(qkv: Tensor, bias: Tensor, num_heads: int, window_size: int, shifted: bool) -> Tensor:
    """Run the forward kernel; arguments as in `lamamba.ops.window_attention`, which checks them."""
    qkv, bias = qkv.contiguous(), bias.contiguous()
    plan = _plan(qkv, num_heads, window_size, shifted)
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    launch(attention_forward_kernel, plan.grid, qkv, bias, out, *plan.numbers, **plan.constants)
    return out


window_attention_triton.register_fake(lambda qkv, *others: qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3))


@torch.library.custom_op("lamamba::window_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor, qkv: Tensor, bias: Tensor, num_heads: int, window_size: int, shifted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernel.

    Returns:
        The gradients of qkv and bias, and the float32 gradient of the bias of the qkv layer, (3 heads c):

        * Queries: the sum of their gradients over pixels.
        * Keys: zero, because adding the same vector to every key does not change the weights.
        * Values: the sum of the gradient of the result. Weights add up to 1, so a vector that is added to every value
          is added to the result.
    """
    grad_out, qkv, bias = grad_out.contiguous(), qkv.contiguous(), bias.contiguous()
    plan = _plan(qkv, num_heads, window_size, shifted)
    places = plan.constants["PLACES"]
    grad_qkv = qkv.new_empty(qkv.shape)
    num_logits = num_heads * places**2
    sums = qkv.new_empty(plan.grid[1], num_logits + qkv.shape[3], dtype=torch.float32)
    launch(attention_backward_kernel, plan.grid, qkv, bias, grad_out, grad_qkv, sums, *plan.numbers, **plan.constants)
    logits, added = sum_parts(sums).split([num_logits, qkv.shape[3]])
    grad_bias = bias.new_empty(bias.shape)
    launch(
        pair_sum_kernel, (len(bias), num_heads), logits, grad_bias,
        **{name: plan.constants[name] for name in ("SIDE_Y", "SIDE_X", "PLACES", "WINDOW", "HEADS")}, num_warps=1,
    )
    return grad_qkv, grad_bias, added


@_backward.register_fake
def _(grad_out: Tensor, qkv: Tensor, bias: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    added = qkv.new_empty(qkv.shape[3], dtype=torch.float32)
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape), added


register_gradients(window_attention_triton, lambda *given: _backward(*given)[:2], num_tensors=2)


class ProjectedAttention(torch.autograd.Function):
    """The qkv layer and attention as one function, which computes the gradient of the layer's bias in fewer reads.

    Takes x, the weight and bias of the layer, and the arguments of `window_attention_triton` after qkv.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, weight_bias: Tensor,
        bias: Tensor, num_heads: int, window_size: int, shifted: bool,
    ) -> Tensor:
        low = rounded(weight, x.dtype)
        qkv = F.linear(x, low, rounded(weight_bias, x.dtype))
        out: Tensor = window_attention_triton(qkv, bias, num_heads, window_size, shifted)
        ctx.save_for_backward(qkv, bias, x, low)
        ctx.options, ctx.dtypes = (num_heads, window_size, shifted), (weight.dtype, weight_bias.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias, x, weight = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        grad_qkv, grad_bias, added = _backward(grads[0], qkv, bias, *ctx.options)
        with torch.autocast(x.device.type, enabled=False):
            grad_x, grad_weight = grad_qkv @ weight, weight_gradient(grad_qkv, x, weight_dtype)
        return grad_x, grad_weight, added.to(bias_dtype), grad_bias, None, None, None
