"""The kernels of `kernels.py` as one differentiable operation that torch.compile can see."""

import torch
import triton
from torch import Tensor

from lamamba.ops.depthwise_convolution.kernels import convolution_backward_kernel, convolution_forward_kernel
from lamamba.ops.gradients import register_gradients
from lamamba.ops.launch import Plan, launch, readable_pixels
from lamamba.ops.sum_kernels import sum_parts

# Channels and rows per program: with more rows it reads fewer shared rows, until registers run out.
FORWARD_BLOCK, FORWARD_ROWS = 64, 8
BACKWARD_BLOCK, BACKWARD_ROWS = 32, 8
NUM_WARPS = 1
# If there are too few tiles to fill a large GPU, tiles get smaller, down to this side.
ENOUGH_PROGRAMS, SMALLEST_SIDE = 512, 4
# If there are more tiles, each program takes several. In the backward pass each program writes ten sums per channel.
MAX_PROGRAMS = 16384


def _plan(x: Tensor, stride: int, widest_block: int, most_rows: int) -> Plan:
    batch, height, width, channels = x.shape
    block = max(32, min(widest_block, triton.next_power_of_2(channels)))
    num_blocks = triton.cdiv(channels, block)
    num_strips, num_segments = triton.cdiv(height, most_rows), 1
    while batch * num_strips * num_segments * num_blocks < ENOUGH_PROGRAMS:
        if width >= 2 * SMALLEST_SIDE * num_segments:
            num_segments *= 2
        elif height >= 2 * SMALLEST_SIDE * num_strips:
            num_strips *= 2
        else:
            break
    rows, columns = triton.cdiv(height, num_strips), triton.cdiv(width, num_segments)
    num_tiles = batch * triton.cdiv(height, rows) * triton.cdiv(width, columns)
    tiles_per_program = triton.cdiv(num_tiles * num_blocks, MAX_PROGRAMS)
    constants = {
        "HEIGHT": height, "WIDTH": width, "STRIDE": stride, "CHANNELS": channels,
        "ROWS": rows, "COLUMNS": columns, "BLOCK": block, "FAST": x.dtype != torch.float32,
        "num_warps": NUM_WARPS, "num_stages": 1,
    }
    return Plan((num_blocks, triton.cdiv(num_tiles, tiles_per_program)), (num_tiles,), constants)


@torch.library.custom_op("lamamba::depthwise_convolution", mutates_args=())
def depthwise_convolution_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run the forward kernel; arguments as in `lamamba.ops.depthwise_convolution`."""
    x, stride = readable_pixels(x)
    plan = _plan(x, stride, FORWARD_BLOCK, FORWARD_ROWS)
    y = x.new_empty(x.shape)
    launch(
        convolution_forward_kernel, plan.grid,
        x, weight.contiguous(), bias, y, *plan.numbers, **plan.constants,
    )
    return y


depthwise_convolution_triton.register_fake(lambda x, weight, bias: x.new_empty(x.shape))


@torch.library.custom_op("lamamba::depthwise_convolution_backward", mutates_args=())
def _backward(grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run the backward kernel.

    Returns:
        The gradient of x. Then, in one flat float32 tensor, the gradient of the taps (e, 9) and that of the bias (e,).
    """
    x, stride = readable_pixels(x)
    plan = _plan(x, stride, BACKWARD_BLOCK, BACKWARD_ROWS)
    grad_x = x.new_empty(x.shape)
    sums = x.new_empty(plan.grid[1], 10 * x.shape[3], dtype=torch.float32)
    launch(
        convolution_backward_kernel, plan.grid,
        x, weight.contiguous(), bias, grad_y.contiguous(), grad_x, sums, *plan.numbers, **plan.constants,
    )
    return grad_x, sum_parts(sums)


_backward.register_fake(
    lambda grad_y, x, weight, bias: (x.new_empty(x.shape), x.new_empty(10 * x.shape[3], dtype=torch.float32))
)


def _gradients(grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, sums = _backward(grad_y, x, weight, bias)
    of_taps, of_bias = sums.split([weight.numel(), x.shape[3]])
    return grad_x, of_taps.view(weight.shape), of_bias


register_gradients(depthwise_convolution_triton, _gradients, num_tensors=3)
