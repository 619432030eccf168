"""The kernels of `kernels.py` as operations that torch.compile can see; none of them has gradients."""

from typing import Any

import torch
import triton
from torch import Tensor

from lamamba.ops.fused_layers.kernels import (
    gated_norm_linear_kernel,
    norm_attention_kernel,
    norm_linear_kernel,
    norm_mlp_kernel,
)
from lamamba.ops.fused_layers.tiles import (
    attention_tile,
    gated_norm_linear_tile,
    norm_linear_tile,
    norm_mlp_tile,
    padded,
)
from lamamba.ops.launch import dense, launch, readable_pixels, readable_rows
from lamamba.ops.window_attention.geometry import Windows


class _Norm:
    """The arguments that the kernels of a norm share, and their results, see `norm_linear_triton`."""

    def __init__(
        self, x: Tensor, branch: Tensor | None, gate: Tensor | None, branch_bias: Tensor | None,
        weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, eps: float,
    ) -> None:
        of_images, strides = zip(*map(readable_rows, (gate, shift, scale)), strict=True)
        self.x_new = x.new_empty(0 if branch is None else x.shape)
        self.stored = None if branch is None else self.x_new
        affine = (weight.contiguous(), bias.contiguous())
        self.tensors = (x.contiguous(), dense(branch), of_images[0], dense(branch_bias), *affine, *of_images[1:])
        self.numbers = (*strides, eps)


def _result(x: Tensor, dtype: torch.dtype, width: int | None = None) -> Tensor:
    return x.new_empty(*x.shape[:3], width or x.shape[3], dtype=dtype)


def _fake(x: Tensor, branch: Tensor | None, dtype: torch.dtype, width: int | None = None) -> tuple[Tensor, Tensor]:
    return x.new_empty(0 if branch is None else x.shape), _result(x, dtype, width)


@torch.library.custom_op("lamamba::norm_linear", mutates_args=())
def norm_linear_triton(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, branch_bias: Tensor | None,
    norm_weight: Tensor, norm_bias: Tensor, shift: Tensor, scale: Tensor, eps: float,
    weight: Tensor, bias: Tensor | None, gelu: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments as in `lamamba.ops.fused_layers`.

    Returns:
        x_new, which is empty without a branch (then x_new equals x), and the result in `dtype`.
    """
    norm = _Norm(x, branch, gate, branch_bias, norm_weight, norm_bias, shift, scale, eps)
    batch, height, width, channels = x.shape
    out = _result(x, dtype, len(weight))
    tile = norm_linear_tile(batch * height * width, channels, len(weight))
    num_tiles = triton.cdiv(height * width, tile["ROWS"])
    launch(
        norm_linear_kernel, (batch * num_tiles, triton.cdiv(len(weight), tile["COLUMNS"] * tile["TURNS"])),
        *norm.tensors, weight.contiguous(), dense(bias), norm.stored, out,
        *norm.numbers, height * width, num_tiles,
        CHANNELS=channels, BLOCK=padded(channels), OUT=len(weight), GELU=gelu, **tile,
    )
    return norm.x_new, out


@norm_linear_triton.register_fake
def _(x: Tensor, branch: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    return _fake(x, branch, others[-1], len(others[7]))


@torch.library.custom_op("lamamba::norm_mlp", mutates_args=())
def norm_mlp_triton(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, branch_bias: Tensor | None,
    norm_weight: Tensor, norm_bias: Tensor, shift: Tensor, scale: Tensor, eps: float,
    weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments as in `lamamba.ops.fused_layers`, results as of `norm_linear_triton`."""
    norm = _Norm(x, branch, gate, branch_bias, norm_weight, norm_bias, shift, scale, eps)
    batch, height, width, channels = x.shape
    out = _result(x, dtype)
    tile = norm_mlp_tile(batch * height * width, channels)
    num_tiles = triton.cdiv(height * width, tile["ROWS"])
    launch(
        norm_mlp_kernel, (batch * num_tiles,),
        *norm.tensors, weight_1.contiguous(), bias_1.contiguous(), weight_2.contiguous(), norm.stored, out,
        *norm.numbers, height * width, num_tiles,
        CHANNELS=channels, BLOCK=padded(channels), HIDDEN=len(weight_1), **tile,
    )
    return norm.x_new, out


norm_mlp_triton.register_fake(lambda x, branch, *others: _fake(x, branch, others[-1]))


@torch.library.custom_op("lamamba::norm_attention", mutates_args=())
def norm_attention_triton(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, branch_bias: Tensor | None,
    norm_weight: Tensor, norm_bias: Tensor, shift: Tensor, scale: Tensor, eps: float,
    qkv_weight: Tensor, qkv_bias: Tensor, bias: Tensor, weight: Tensor,
    num_heads: int, window_size: int, shifted: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments as in `lamamba.ops.fused_layers`, results as of `norm_linear_triton`."""
    norm = _Norm(x, branch, gate, branch_bias, norm_weight, norm_bias, shift, scale, eps)
    batch, height, width, channels = x.shape
    out = _result(x, dtype)
    windows = Windows.of(height, width, window_size, shifted)
    head_channels = channels // num_heads
    layers = (tensor.contiguous() for tensor in (qkv_weight, qkv_bias, bias, weight))
    launch(
        norm_attention_kernel, (batch * windows.number,),
        *norm.tensors, *layers, norm.stored, out, *norm.numbers, head_channels**-0.5,
        HEIGHT=height, WIDTH=width, SIDE_Y=windows.side_y, SIDE_X=windows.side_x,
        SHIFT_Y=windows.shift_y, SHIFT_X=windows.shift_x, PLACES=padded(windows.side_y * windows.side_x),
        WINDOW=window_size, HEADS=num_heads, CHANNELS=channels, BLOCK=padded(channels),
        HEAD_BLOCK=padded(head_channels), **attention_tile(batch * height * width, channels),
    )
    return norm.x_new, out


norm_attention_triton.register_fake(lambda x, branch, *others: _fake(x, branch, others[-1]))


@torch.library.custom_op("lamamba::gated_norm_linear", mutates_args=())
def gated_norm_linear_triton(
    planes: Tensor, z: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, dtype: torch.dtype
) -> Tensor:
    """Run the kernel; arguments as in `lamamba.ops.fused_layers`. The result has the given dtype, as the weight."""
    planes = planes.contiguous()
    z, z_stride = readable_pixels(z)
    num_rows, channels = z.shape[:3].numel(), z.shape[3]
    out = _result(z, dtype, len(weight))
    tile = gated_norm_linear_tile(num_rows, channels, len(weight))
    launch(
        gated_norm_linear_kernel,
        (triton.cdiv(num_rows, tile["ROWS"]), triton.cdiv(len(weight), tile["COLUMNS"])),
        planes, z, norm_weight.contiguous(), norm_bias.contiguous(), weight.contiguous(), out, z_stride, eps, num_rows,
        PLANES=len(planes), CHANNELS=channels, BLOCK=padded(channels), OUT=len(weight), **tile,
    )
    return out


gated_norm_linear_triton.register_fake(
    lambda planes, z, norm_weight, norm_bias, eps, weight, dtype: _result(z, dtype, len(weight))
)
