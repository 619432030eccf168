"""The definition of window attention, in plain PyTorch: pad, shift, cut into windows, attend, and undo these."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lamamba.ops.grid import as_constant
from lamamba.ops.window_attention.geometry import Windows, window_geometry


def window_attention_reference(qkv: Tensor, bias: Tensor, num_heads: int, window_size: int, shifted: bool) -> Tensor:
    """Attend within windows; arguments and result as in `lamamba.ops.window_attention`."""
    batch, height, width = qkv.shape[0], as_constant(qkv.shape[1]), as_constant(qkv.shape[2])
    side_y, side_x, shift_y, shift_x, _ = Windows.of(height, width, window_size, shifted)
    geometry = window_geometry(height, width, window_size, shifted, qkv.device)
    pad_y, pad_x = -height % side_y, -width % side_x

    x = F.pad(qkv, (0, 0, 0, pad_x, 0, pad_y))
    x = x.roll((-shift_y, -shift_x), dims=(1, 2)) if shift_y or shift_x else x
    query, key, value = rearrange(
        x, "b (ny sy) (nx sx) (three heads c) -> three (b ny nx) heads (sy sx) c",
        sy=side_y, sx=side_x, three=3, heads=num_heads,
    )
    added = rearrange(bias[geometry.offsets], "query key heads -> 1 heads query key")
    if geometry.mask is not None:
        added = (added + geometry.mask[:, None]).repeat(batch, 1, 1, 1)
    x = F.scaled_dot_product_attention(query, key, value, attn_mask=added.to(query.dtype))
    x = rearrange(
        x, "(b ny nx) heads (sy sx) c -> b (ny sy) (nx sx) (heads c)",
        ny=(height + pad_y) // side_y, nx=(width + pad_x) // side_x, sy=side_y,
    )
    x = x.roll((shift_y, shift_x), dims=(1, 2)) if shift_y or shift_x else x
    return x[:, :height, :width]
