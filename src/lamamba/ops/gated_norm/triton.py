"""The kernels of `kernels.py` as one differentiable operation that torch.compile can see."""

from typing import Any

import torch
import triton
from torch import Tensor

from lamamba.ops.gated_norm.kernels import gated_norm_backward_kernel, gated_norm_forward_kernel
from lamamba.ops.launch import Plan, launch, readable_pixels, share_rows
from lamamba.ops.rows import cut_rows
from lamamba.ops.sum_kernels import sum_parts

# Enough warps to keep a large GPU busy; with more pixels, each program takes more of them. In the backward pass each
# program writes two sums, so there are only as many programs as run at once: more for narrow rows, where a program is
# one warp.
FORWARD_WARPS, BACKWARD_WARPS, BACKWARD_NARROW = 32768, 1024, 1536


def _plan(z: Tensor, wanted_warps: int) -> Plan:
    num_pixels, channels = z.shape[:3].numel(), z.shape[3]
    constants = cut_rows(channels, num_pixels)
    wanted = triton.cdiv(wanted_warps, constants["num_warps"])
    pixels_per_program, num_programs = share_rows(num_pixels, constants["ROWS"], wanted)
    return Plan((num_programs,), (num_pixels, pixels_per_program), constants)


@torch.library.custom_op("lamamba::gated_norm", mutates_args=())
def gated_norm_triton(
    planes: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float, save: bool
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel; arguments as in `lamamba.ops.gated_norm`.

    Returns:
        The result, and the sum of the planes, (b, h, w, e) in their dtype, which the backward pass reads. The sum is
        empty without `save`, and for a single plane, which is its own sum.
    """
    planes, weight, bias = planes.contiguous(), weight.contiguous(), bias.contiguous()
    z, z_stride = readable_pixels(z)
    out, y = _results(planes, z, save)
    plan = _plan(z, FORWARD_WARPS)
    launch(
        gated_norm_forward_kernel, plan.grid,
        planes, z, weight, bias, y if y.numel() else None, out,
        z_stride, eps, *plan.numbers, PLANES=planes.shape[0], **plan.constants,
    )
    return out, y


def _results(planes: Tensor, z: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), planes.new_empty(z.shape if save and planes.shape[0] > 1 else 0)


gated_norm_triton.register_fake(lambda planes, z, weight, bias, eps, save: _results(planes, z, save))


@torch.library.custom_op("lamamba::gated_norm_backward", mutates_args=())
def _backward(
    grad_out: Tensor, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernel.

    Returns:
        The gradients of y, of z, and of weight and bias stacked, (2, e) float32.
    """
    grad_out, y, weight, bias = grad_out.contiguous(), y.contiguous(), weight.contiguous(), bias.contiguous()
    z, z_stride = readable_pixels(z)
    is_narrow = cut_rows(z.shape[3], 1)["num_warps"] == 1
    plan = _plan(z, BACKWARD_NARROW if is_narrow else BACKWARD_WARPS)
    grad_y, grad_z = y.new_empty(y.shape), z.new_empty(z.shape)
    sums = y.new_empty(*plan.grid, 2, z.shape[3], dtype=torch.float32)
    launch(
        gated_norm_backward_kernel, plan.grid,
        y, z, weight, bias, grad_out, grad_y, grad_z, sums,
        z_stride, eps, *plan.numbers, **plan.constants,
    )
    return grad_y, grad_z, sum_parts(sums)


_backward.register_fake(
    lambda grad_out, y, z, *others: (
        y.new_empty(y.shape),
        z.new_empty(z.shape),
        y.new_empty(2, z.shape[3], dtype=torch.float32),
    )
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    planes, z, weight, bias, ctx.eps, _ = inputs
    ctx.num_planes = planes.shape[0]
    ctx.save_for_backward(planes if ctx.num_planes == 1 else output[1], z, weight, bias)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_out: Tensor | None, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:  # nothing downstream depends on the result
        return (None,) * 6
    y, z, weight, bias = ctx.saved_tensors
    y = y[0] if ctx.num_planes == 1 else y
    grad_y, grad_z, (grad_weight, grad_bias) = _backward(grad_out, y, z, weight, bias, ctx.eps)
    # The gradients of all planes share one memory.
    grad_planes = grad_y.expand(ctx.num_planes, *grad_y.shape)
    return grad_planes, grad_z, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None, None


gated_norm_triton.register_autograd(_autograd, setup_context=_setup_context)
