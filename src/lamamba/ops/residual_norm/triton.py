"""The kernels of `kernels.py` as one differentiable operation that torch.compile can see."""

from typing import Any

import torch
import triton
from torch import Tensor

from lamamba.ops.launch import Plan, dense, launch, readable_rows, share_rows
from lamamba.ops.residual_norm.kernels import (
    residual_norm_backward_kernel,
    residual_norm_forward_kernel,
    residual_norm_sum_kernel,
)
from lamamba.ops.rows import cut_rows
from lamamba.ops.sum_kernels import sum_parts

# Enough warps to keep a large GPU busy: several programs share an image where there are fewer images. In the backward
# pass each program writes its sums.
FORWARD_WARPS, BACKWARD_WARPS = 4096, 1024
SUM_BLOCK, MAX_SUM_ROWS = 32, 64


def _plan(x: Tensor, wanted_warps: int) -> Plan:
    batch, height, width, channels = x.shape
    num_pixels = height * width
    constants = cut_rows(channels, num_pixels)
    wanted = triton.cdiv(wanted_warps, batch * constants["num_warps"])
    pixels_per_program, programs_of_image = share_rows(num_pixels, constants["ROWS"], wanted)
    return Plan((batch, programs_of_image), (num_pixels, pixels_per_program), constants)


def _empty_like(tensor: Tensor | None, x: Tensor) -> Tensor:
    """Allocate a result. An operation must return tensors, so a missing result is a tensor without elements."""
    return x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)


@torch.library.custom_op("lamamba::residual_norm", mutates_args=())
def residual_norm_triton(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, branch_bias: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    eps: float, dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel; arguments as in `lamamba.ops.residual_norm`, but `dtype` None means no norm.

    Returns:
        x_new, which is empty without a branch (then x_new equals x), and normed, which is empty without a norm.
    """
    x = x.contiguous()
    branch, branch_bias, weight, bias = (dense(tensor) for tensor in (branch, branch_bias, weight, bias))
    gate, gate_stride = readable_rows(gate)
    shift, shift_stride = readable_rows(shift)
    scale, scale_stride = readable_rows(scale)
    x_new, normed = _results(x, branch, dtype)
    plan = _plan(x, FORWARD_WARPS)
    launch(
        residual_norm_forward_kernel, plan.grid,
        x, branch, gate, branch_bias, weight, bias, shift, scale,
        None if branch is None else x_new, None if dtype is None else normed,
        gate_stride, shift_stride, scale_stride, eps, *plan.numbers, **plan.constants,
    )
    return x_new, normed


def _results(x: Tensor, branch: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    x_new = x.new_empty(0 if branch is None else x.shape)
    return x_new, x.new_empty(0) if dtype is None else x.new_empty(x.shape, dtype=dtype)


residual_norm_triton.register_fake(lambda x, branch, *others: _results(x, branch, others[-1]))


@torch.library.custom_op("lamamba::residual_norm_backward", mutates_args=())
def _backward(
    grad_x_new: Tensor | None, grad_normed: Tensor | None, x_new: Tensor | None,
    branch: Tensor | None, gate: Tensor | None, branch_bias: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernels. At least one of the two gradients is given.

    Returns:
        The gradients of x, branch, gate, shift and scale. Then, stacked as (p, c) float32, the gradients of weight and
        bias, and of the branch's bias if it has one.

        Without `grad_normed`, the gradients of x, shift and scale are empty, and those of weight and bias are left out.
        The gradient of x then equals `grad_x_new`.
    """
    grad_x_new, grad_normed, x_new, branch, branch_bias, weight, bias = (
        dense(tensor) for tensor in (grad_x_new, grad_normed, x_new, branch, branch_bias, weight, bias)
    )
    gate, gate_stride = readable_rows(gate)
    scale, scale_stride = readable_rows(scale)
    results = _gradients(grad_x_new, grad_normed, x_new, branch, gate, branch_bias, shift, scale)
    like = grad_normed if grad_x_new is None else grad_x_new
    assert like is not None
    batch, _, _, channels = like.shape
    plan = _plan(like, BACKWARD_WARPS)
    num_sums = 3 if branch_bias is None else 4
    sums = like.new_empty(*plan.grid, num_sums, channels, dtype=torch.float32)
    grad_x, grad_branch, grad_gate, grad_shift, grad_scale, _ = (
        None if tensor.numel() == 0 else tensor for tensor in results
    )
    of_parameters = results[-1]
    of_images = of_parameters.new_empty(batch, *of_parameters.shape)
    grad_affine = None if grad_normed is None else of_images[:, :2]
    grad_branch_bias = None if branch_bias is None else of_images[:, -1]
    launch(
        residual_norm_backward_kernel, plan.grid,
        x_new, branch, gate, weight, scale, grad_x_new, grad_normed, grad_x, grad_branch, sums,
        gate_stride, scale_stride, eps, *plan.numbers, SUMS=num_sums, **plan.constants,
    )
    launch(
        residual_norm_sum_kernel, (batch, triton.cdiv(channels, SUM_BLOCK)),
        sums, gate, branch_bias, weight, bias, scale,
        grad_gate, grad_branch_bias, grad_shift, grad_scale, grad_affine,
        gate_stride, scale_stride, of_images.stride(0), plan.grid[1],
        SUMS=num_sums, CHANNELS=channels, BLOCK=SUM_BLOCK,
        ROWS=min(MAX_SUM_ROWS, triton.next_power_of_2(plan.grid[1])), num_warps=2,
    )
    sum_parts(of_images, out=of_parameters)
    return results


def _gradients(
    grad_x_new: Tensor | None, grad_normed: Tensor | None, x_new: Tensor | None,
    branch: Tensor | None, gate: Tensor | None, branch_bias: Tensor | None,
    shift: Tensor | None, scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate the results of the backward pass."""
    like = grad_normed if grad_x_new is None else grad_x_new
    assert like is not None
    without_norm = grad_normed is None
    num_parameters = (0 if without_norm else 2) + (0 if branch_bias is None else 1)
    return (
        _empty_like(None if without_norm else x_new, like),
        _empty_like(branch, like),
        _empty_like(gate, like),
        _empty_like(None if without_norm else shift, like),
        _empty_like(None if without_norm else scale, like),
        like.new_empty(num_parameters, like.shape[3], dtype=torch.float32),
    )


_backward.register_fake(lambda *inputs: _gradients(*inputs[:6], *inputs[8:10]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, branch, gate, branch_bias, weight, bias, shift, scale, ctx.eps, dtype = inputs
    x_new = x if branch is None else output[0]
    ctx.save_for_backward(None if dtype is None else x_new, branch, gate, branch_bias, weight, bias, shift, scale)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_x_new: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
    x_new, branch, gate, branch_bias, weight, bias, shift, scale = ctx.saved_tensors
    if x_new is None:
        grad_normed = None  # it belongs to a tensor without elements
    if branch is None:
        grad_x_new = None
    if grad_x_new is None and grad_normed is None:  # nothing downstream depends on the results
        return (None,) * 10
    grad_x, grad_branch, grad_gate, grad_shift, grad_scale, of_parameters = _backward(
        grad_x_new, grad_normed, x_new, branch, gate, branch_bias, weight, bias, shift, scale, ctx.eps
    )
    of_residual: tuple[Tensor | None, ...] = (None, None, None)
    if branch is not None:
        grad_bias = None if branch_bias is None else of_parameters[-1].to(branch_bias.dtype)
        of_residual = (grad_branch, grad_gate, grad_bias)
    if grad_normed is None:
        return grad_x_new, *of_residual, *(None,) * 6
    of_affine = (
        None if tensor is None else grad.to(tensor.dtype)
        for tensor, grad in zip((weight, bias), of_parameters[:2], strict=True)
    )
    of_modulation = (None if shift is None else grad_shift, None if scale is None else grad_scale)
    return grad_x, *of_residual, *of_affine, *of_modulation, None, None


residual_norm_triton.register_autograd(_autograd, setup_context=_setup_context)
