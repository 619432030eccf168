"""The kernels of `kernels.py` as one differentiable operation that torch.compile sees as a whole."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lamamba.ops.launch import launch
from lamamba.ops.window_attention.geometry import Windows
from lamamba.ops.window_attention.kernels import attention_backward_kernel, attention_forward_kernel

# Enough to keep a large GPU busy; each looks its bias up once, and leaves one sum of the logits' gradients.
WANTED_PROGRAMS = 2048


class _Plan(NamedTuple):
    grid: tuple[int, int]
    numbers: tuple[int, int, float]
    constants: dict[str, Any]


def _plan(qkv: Tensor, num_heads: int, window_size: int, shifted: bool) -> _Plan:
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
        "num_warps": 4, "num_stages": 1,
    }  # fmt: skip
    grid = (num_heads, triton.cdiv(num_windows, windows_per_program))
    return _Plan(grid, (num_windows, windows_per_program, head_channels**-0.5), constants)


@torch.library.custom_op("lamamba::window_attention", mutates_args=())
def window_attention_triton(qkv: Tensor, bias: Tensor, num_heads: int, window_size: int, shifted: bool) -> Tensor:
    """Run the kernels forwards; arguments as in `lamamba.ops.window_attention`, which checks them."""
    qkv, bias = qkv.contiguous(), bias.contiguous()
    plan = _plan(qkv, num_heads, window_size, shifted)
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    launch(attention_forward_kernel, plan.grid, qkv, bias, out, *plan.numbers, **plan.constants)
    return out


@window_attention_triton.register_fake
def _(qkv: Tensor, bias: Tensor, num_heads: int, window_size: int, shifted: bool) -> Tensor:
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


@torch.library.custom_op("lamamba::window_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor, qkv: Tensor, bias: Tensor, num_heads: int, window_size: int, shifted: bool
) -> tuple[Tensor, Tensor]:
    grad_out, qkv, bias = grad_out.contiguous(), qkv.contiguous(), bias.contiguous()
    plan = _plan(qkv, num_heads, window_size, shifted)
    places = plan.constants["PLACES"]
    grad_qkv = qkv.new_empty(qkv.shape)
    sums = qkv.new_empty(plan.grid[1], num_heads, places * places, dtype=torch.float32)
    launch(attention_backward_kernel, plan.grid, qkv, bias, grad_out, grad_qkv, sums, *plan.numbers, **plan.constants)
    rows = _row_of_each_pair(plan.constants["SIDE_Y"], plan.constants["SIDE_X"], places, window_size, str(qkv.device))
    # A product with zeros and ones, since adding to rows by index has no fixed order on a GPU.
    with torch.autocast(qkv.device.type, enabled=False):
        return grad_qkv, (rows @ sums.sum(dim=0).mT).to(bias.dtype)


@_backward.register_fake
def _(
    grad_out: Tensor, qkv: Tensor, bias: Tensor, num_heads: int, window_size: int, shifted: bool
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


def _autograd(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    gradients: tuple[Tensor, ...] = _backward(grad_out, *ctx.saved_tensors, *ctx.options)
    return *gradients, None, None, None


window_attention_triton.register_autograd(_autograd, setup_context=_setup_context)


@lru_cache(maxsize=64)
def _row_of_each_pair(side_y: int, side_x: int, places: int, window_size: int, device: str) -> Tensor:
    """Ones where a pair of places looks a row of the bias table up: ((2 s - 1)^2, places^2) float32."""
    place = torch.arange(side_y * side_x)
    y, x = place // side_x, place % side_x
    row = (y[:, None] - y + window_size - 1) * (2 * window_size - 1) + x[:, None] - x + window_size - 1
    ones = torch.zeros((2 * window_size - 1) ** 2, places, places)
    ones[row, place[:, None], place] = 1
    return ones.flatten(1).to(device)
