"""The compiled loops of `loops.py` as one differentiable operation, whose backward pass recomputes the logits."""

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lamamba.ops.gradients import register_gradients
from lamamba.ops.threads import array, share_images
from lamamba.ops.window_attention.geometry import Windows, window_geometry

# Queries that the loops process at once. The queries of a window are padded to a multiple of this.
LANES = 64


@torch.library.custom_op("lamamba::window_attention_cpu", mutates_args=())
def window_attention_cpu(qkv: Tensor, bias: Tensor, num_heads: int, window_size: int, shifted: bool) -> Tensor:
    """Attend within windows; arguments and result as in `lamamba.ops.window_attention`, all float32."""
    from lamamba.ops.window_attention.loops import attention_forward

    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    heads = out.view(len(out), -1, num_heads, out.shape[3] // num_heads)
    parts, shared = _inputs_of_loops(qkv, bias, num_heads, window_size, shifted)
    share_images(attention_forward, (parts,), (*shared, heads.numpy()), ())
    return out


window_attention_cpu.register_fake(lambda qkv, *others: qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3))


@torch.library.custom_op("lamamba::window_attention_cpu_backward", mutates_args=())
def _backward(
    grad_out: Tensor, qkv: Tensor, bias: Tensor, num_heads: int, window_size: int, shifted: bool
) -> tuple[Tensor, Tensor]:
    from lamamba.ops.window_attention.loops import attention_backward

    parts, shared = _inputs_of_loops(qkv, bias, num_heads, window_size, shifted)
    grads = array(grad_out).reshape(*shared[0].shape[:2], num_heads, -1)
    grad_qkv = qkv.new_empty(qkv.shape)
    of_parts = qkv.new_empty(len(parts), num_heads, *shared[2].shape[2:])
    written = grad_qkv.view(shared[0].shape).numpy()
    share_images(attention_backward, (parts,), (grads, *shared, written), (of_parts.numpy(),))
    # Sum the gradients of logits, (heads, query, key), over pairs with the same relative position.
    offsets = window_geometry(qkv.shape[1], qkv.shape[2], window_size, shifted, qkv.device).offsets
    grad_added = of_parts.sum(dim=0)[..., : len(offsets)].mT
    return grad_qkv, torch.zeros_like(bias).index_add_(0, offsets.flatten(), grad_added.flatten(1).mT)


_backward.register_fake(lambda grad_out, qkv, bias, *others: (qkv.new_empty(qkv.shape), bias.new_empty(bias.shape)))


register_gradients(window_attention_cpu, _backward, num_tensors=2)


def _inputs_of_loops(
    qkv: Tensor, bias: Tensor, num_heads: int, window_size: int, shifted: bool
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray, np.float32]]:
    """Prepare the windows of each thread, (parts, 2), first window and the one after the last; and what all read.

    All threads read qkv, the pixels of windows, bias and mask by key, and the scale of the logits.
    """
    batch, height, width, channels = qkv.shape
    num_windows = batch * Windows.of(height, width, window_size, shifted).number
    bounds = np.linspace(0, num_windows, min(torch.get_num_threads(), num_windows) + 1).astype(int)
    geometry = window_geometry(height, width, window_size, shifted, qkv.device)
    added = rearrange(bias[geometry.offsets], "query key heads -> heads 1 key query")
    added = added if geometry.mask is None else added + geometry.mask.mT
    added = F.pad(added, (0, -added.shape[3] % LANES))
    channels //= 3 * num_heads
    by_head = array(qkv).reshape(batch, height * width, 3, num_heads, channels)
    shared = (by_head, array(geometry.pixels), array(added), np.float32(channels**-0.5))
    return np.stack([bounds[:-1], bounds[1:]], axis=1), shared
