"""Window attention on a CPU, in pieces whose logits stay in cache. The backward pass recomputes the logits.

With numba and float32, the compiled loops of `loops.py` run. Otherwise PyTorch works on a few images and one head at a
time. Heads are narrow, and a matrix product with few columns takes many times as long as one with few rows. So the
result of a head is computed as (c, pixels), and transposed when it is written to the grid.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lamamba.ops.backend import choose_loops
from lamamba.ops.threads import array, share_images
from lamamba.ops.window_attention.geometry import Windows, window_geometry

# Queries that the loops process at once. The queries of a window are padded to a multiple of this.
LANES = 64
# Number of logits of one head that PyTorch holds at once.
TILE_ELEMENTS = 1 << 18


@torch.library.custom_op("lamamba::window_attention_cpu", mutates_args=())
def window_attention_cpu(qkv: Tensor, bias: Tensor, num_heads: int, window_size: int, shifted: bool) -> Tensor:
    """Attend within windows; arguments and result as in `lamamba.ops.window_attention`, float32 or float64."""
    windows = Windows.of(qkv.shape[1], qkv.shape[2], window_size, shifted)
    added = _added_to_logits(qkv, bias, window_size, shifted)
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    if choose_loops(qkv, "auto"):
        from lamamba.ops.window_attention.loops import attention_forward

        shared = _shared_by_loops(qkv, added, num_heads, window_size, shifted)
        heads = out.view(len(out), -1, num_heads, out.shape[3] // num_heads)
        share_images(attention_forward, (_parts(len(qkv) * windows.number),), (*shared, heads.numpy()), ())
        return out
    with torch.autocast("cpu", enabled=False):
        for tile in _tiles(len(qkv), windows):
            parts = _cut(qkv[tile], windows).unflatten(2, (3, num_heads, -1)).unbind(2)
            result = qkv.new_empty(num_heads, len(parts[0]), parts[0].shape[3], windows.side_y * windows.side_x)
            logits, weights = qkv.new_empty(2, len(parts[0]), *added.shape[2:])
            for head in range(num_heads):
                query, key, value = (part[:, :, head] for part in parts)
                _compute_weights(query, key, added[head], logits, out=weights)
                torch.bmm(value.mT, weights.mT, out=result[head])
            _paste(result, windows, out=out[tile])
    return out


window_attention_cpu.register_fake(lambda qkv, *others: qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3))


@torch.library.custom_op("lamamba::window_attention_cpu_backward", mutates_args=())
def _backward(
    grad_out: Tensor, qkv: Tensor, bias: Tensor, num_heads: int, window_size: int, shifted: bool
) -> tuple[Tensor, Tensor]:
    windows = Windows.of(qkv.shape[1], qkv.shape[2], window_size, shifted)
    added = _added_to_logits(qkv, bias, window_size, shifted)
    grad_qkv = qkv.new_empty(qkv.shape)
    offsets = window_geometry(qkv.shape[1], qkv.shape[2], window_size, shifted, qkv.device).offsets
    if choose_loops(qkv, "auto"):
        from lamamba.ops.window_attention.loops import attention_backward

        parts = _parts(len(qkv) * windows.number)
        shared = _shared_by_loops(qkv, added, num_heads, window_size, shifted)
        grads = array(grad_out).reshape(*shared[0].shape[:2], num_heads, -1)
        written = grad_qkv.view(shared[0].shape).numpy()
        of_parts = qkv.new_empty(len(parts), num_heads, *shared[2].shape[2:])
        share_images(attention_backward, (parts,), (grads, *shared, written), (of_parts.numpy(),))
        grad_added = of_parts.sum(dim=0)[..., : len(offsets)].mT
        return grad_qkv, _grad_bias(grad_added, offsets, bias)
    grad_added = qkv.new_zeros(num_heads, *added.shape[2:])
    with torch.autocast("cpu", enabled=False):
        for tile in _tiles(len(qkv), windows):
            parts = _cut(qkv[tile], windows).unflatten(2, (3, num_heads, -1)).unbind(2)
            grads = _cut(grad_out[tile], windows).unflatten(2, (num_heads, -1))
            result = qkv.new_empty(3, num_heads, len(grads), grads.shape[3], windows.side_y * windows.side_x)
            logits, weights = qkv.new_empty(2, len(grads), *added.shape[2:])
            for head in range(num_heads):
                query, key, value = (part[:, :, head] for part in parts)
                grad = grads[:, :, head]
                grad_query, grad_key, grad_value = result[:, head]
                _compute_weights(query, key, added[head], logits, out=weights)
                torch.bmm(grad.mT, weights, out=grad_value)
                grad_weights = torch.bmm(grad, value.mT, out=logits)
                grad_logits = torch._softmax_backward_data(
                    grad_weights, weights, -1, weights.dtype, grad_input=grad_weights
                )
                grad_added[head] += grad_logits.sum(dim=0)
                torch.bmm(key.mT, grad_logits.mT, out=grad_query)
                torch.bmm(query.mT, grad_logits, out=grad_key)
            result[:2] *= query.shape[2] ** -0.5
            _paste(result.flatten(0, 1), windows, out=grad_qkv[tile])
    return grad_qkv, _grad_bias(grad_added, offsets, bias)


_backward.register_fake(lambda grad_out, qkv, bias, *others: (qkv.new_empty(qkv.shape), bias.new_empty(bias.shape)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, bias, *ctx.options = inputs
    ctx.save_for_backward(qkv, bias)


def _autograd(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad_out, *ctx.saved_tensors, *ctx.options), None, None, None


window_attention_cpu.register_autograd(_autograd, setup_context=_setup_context)


def _grad_bias(grad_added: Tensor, offsets: Tensor, bias: Tensor) -> Tensor:
    """Sum the gradients of logits, (heads, query, key), over pairs with the same relative position."""
    grad_bias = grad_added.new_zeros(bias.shape).index_add_(0, offsets.flatten(), grad_added.flatten(1).mT)
    return grad_bias.to(bias.dtype)


def _parts(num_windows: int) -> np.ndarray:
    """Divide all windows of a batch among PyTorch's threads: (parts, 2), first window and the one after the last."""
    bounds = np.linspace(0, num_windows, min(torch.get_num_threads(), num_windows) + 1).astype(int)
    return np.stack([bounds[:-1], bounds[1:]], axis=1)


def _shared_by_loops(
    qkv: Tensor, added: Tensor, num_heads: int, window_size: int, shifted: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.float32]:
    """Prepare the arrays that all threads read: qkv, pixels of windows, bias and mask by key, scale of the logits."""
    batch, height, width, channels = qkv.shape
    channels //= 3 * num_heads
    pixels = window_geometry(height, width, window_size, shifted, qkv.device).pixels
    added = F.pad(added.mT, (0, -added.shape[3] % LANES))
    by_head = array(qkv).reshape(batch, height * width, 3, num_heads, channels)
    return by_head, array(pixels), array(added), np.float32(channels**-0.5)


def _tiles(batch: int, windows: Windows) -> list[slice]:
    """Cut a batch into groups of images with at most TILE_ELEMENTS logits per head."""
    images = max(1, TILE_ELEMENTS // (windows.number * (windows.side_y * windows.side_x) ** 2))
    return [slice(start, start + images) for start in range(0, batch, images)]


def _added_to_logits(qkv: Tensor, bias: Tensor, window_size: int, shifted: bool) -> Tensor:
    """Compute the sum of bias and mask, (heads, windows or 1, query, key)."""
    geometry = window_geometry(qkv.shape[1], qkv.shape[2], window_size, shifted, qkv.device)
    added = rearrange(bias[geometry.offsets], "query key heads -> heads 1 query key").to(qkv.dtype)
    return added if geometry.mask is None else added + geometry.mask


def _compute_weights(query: Tensor, key: Tensor, added: Tensor, logits: Tensor, out: Tensor) -> None:
    """Compute the softmax of the logits from queries (n, query, c) and keys (n, key, c)."""
    logits.unflatten(0, (-1, len(added))).copy_(added)
    logits.baddbmm_(query, key.mT, alpha=query.shape[2] ** -0.5)
    torch.softmax(logits, dim=-1, out=out)


def _cut(x: Tensor, windows: Windows) -> Tensor:
    """Cut (b, h, w, c) into shifted and padded windows, (b windows, pixels, c); `_paste` is the inverse."""
    pad_y, pad_x = -x.shape[1] % windows.side_y, -x.shape[2] % windows.side_x
    if pad_y or pad_x:
        x = F.pad(x, (0, 0, 0, pad_x, 0, pad_y))
    if windows.shift_y or windows.shift_x:
        x = x.roll((-windows.shift_y, -windows.shift_x), dims=(1, 2))
    return rearrange(x, "b (ny sy) (nx sx) c -> (b ny nx) (sy sx) c", sy=windows.side_y, sx=windows.side_x)


def _paste(x: Tensor, windows: Windows, out: Tensor) -> None:
    """Write (parts, b windows, c, pixels) back to the grid, (b, h, w, parts c); the inverse of `_cut`."""
    height, width = out.shape[1:3]
    x = rearrange(
        x, "parts (b ny nx) c (sy sx) -> b (ny sy) (nx sx) (parts c)",
        ny=-(-height // windows.side_y), nx=-(-width // windows.side_x), sy=windows.side_y,
    )  # fmt: skip
    if windows.shift_y or windows.shift_x:
        x = x.roll((windows.shift_y, windows.shift_x), dims=(1, 2))
    out.copy_(x[:, :height, :width])
