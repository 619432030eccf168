"""Triton kernels for norms and what follows them, without gradients; see README.md.

One program processes a tile of pixels, with all their channels, from the norm to the last linear layer. BLOCK is the
number of channels, rounded up to a power of two. The weights of linear layers have the dtype of the result.

Names: `p_` pointer, `b_` block of values, `o_` offsets, `m_` mask.
"""

import triton
import triton.language as tl

from lamamba.ops.linear_gelu.kernels import normal
from lamamba.ops.rows import normalize
from lamamba.ops.window_attention.kernels import attention_weights, places, relative_bias


@triton.jit
def _channels(p_channels, o_c, m_c):
    """Load one value per channel in float32, (1, channels)."""
    return tl.load(p_channels + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _weight(p_weight, o_in, m_in, o_out, m_out, stride):
    """Load a part of a weight (out, in) as (in, out); `stride` is the length of its rows."""
    o_weight = o_out[None, :] * stride + o_in[:, None]
    return tl.load(p_weight + o_weight, mask=m_in[:, None] & m_out[None, :], other=0.0)


@triton.jit
def _tile(num_pixels, num_tiles, ROWS: tl.constexpr):
    """Return the image of the program, its rows, and a mask of those that exist; an image is cut into `num_tiles`."""
    image = (tl.program_id(0) // num_tiles).to(tl.int64)
    o_pixel = tl.program_id(0) % num_tiles * ROWS + tl.arange(0, ROWS)
    return image, image * num_pixels + o_pixel, o_pixel < num_pixels


@triton.jit
def _residual_norm(
    p_x, p_branch, p_gate, p_branch_bias, p_norm_weight, p_norm_bias, p_shift, p_scale, p_x_new,
    gate_stride, shift_stride, scale_stride, eps, image, o_row, m_row, is_first, CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add a branch if there is one, and normalize rows of one image; the first program of a row stores the stream."""
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < CHANNELS
    o_x = o_row[:, None] * CHANNELS + o_c[None, :]
    m_x = m_row[:, None] & m_c[None, :]
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    if p_branch is not None:
        b_branch = tl.load(p_branch + o_x, mask=m_x, other=0.0).to(tl.float32)
        if p_branch_bias is not None:
            b_branch += _channels(p_branch_bias, o_c, m_c)
        b_stream = (b_x + _channels(p_gate + image * gate_stride, o_c, m_c) * b_branch).to(p_x_new.dtype.element_ty)
        if is_first:
            tl.store(p_x_new + o_x, b_stream, mask=m_x)
        b_x = b_stream.to(tl.float32)
    b_scale = 1 + _channels(p_scale + image * scale_stride, o_c, m_c)
    b_offset = _channels(p_norm_bias, o_c, m_c) * b_scale + _channels(p_shift + image * shift_stride, o_c, m_c)
    normalized, _ = normalize((b_x,), eps, CHANNELS, BLOCK, 1)
    return normalized[0] * (_channels(p_norm_weight, o_c, m_c) * b_scale) + b_offset


@triton.jit(do_not_specialize=["num_pixels", "num_tiles"])
def norm_linear_kernel(
    p_x, p_branch, p_gate, p_branch_bias, p_norm_weight, p_norm_bias, p_shift, p_scale, p_weight, p_bias,
    p_x_new, p_out, gate_stride, shift_stride, scale_stride, eps, num_pixels, num_tiles,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, OUT: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, TURNS: tl.constexpr,
):
    """Norm, linear layer and, if GELU, the activation. A program computes TURNS times COLUMNS columns."""
    image, o_row, m_row = _tile(num_pixels, num_tiles, ROWS)
    dtype = p_out.dtype.element_ty
    b_normed = _residual_norm(
        p_x, p_branch, p_gate, p_branch_bias, p_norm_weight, p_norm_bias, p_shift, p_scale, p_x_new,
        gate_stride, shift_stride, scale_stride, eps, image, o_row, m_row, tl.program_id(1) == 0, CHANNELS, BLOCK,
    ).to(dtype)
    o_c = tl.arange(0, BLOCK)
    for turn in tl.range(0, TURNS):
        o_out = (tl.program_id(1) * TURNS + turn) * COLUMNS + tl.arange(0, COLUMNS)
        m_out = o_out < OUT
        b_weight = _weight(p_weight, o_c, o_c < CHANNELS, o_out, m_out, CHANNELS)
        b_out = tl.dot(b_normed, b_weight, input_precision="ieee")
        if p_bias is not None:
            b_out += _channels(p_bias, o_out, m_out)
        if GELU:
            b_below, _ = normal(b_out, dtype == tl.float32)
            b_out *= b_below
        tl.store(p_out + o_row[:, None] * OUT + o_out[None, :], b_out.to(dtype), mask=m_row[:, None] & m_out[None, :])


@triton.jit(do_not_specialize=["num_pixels", "num_tiles"])
def norm_mlp_kernel(
    p_x, p_branch, p_gate, p_branch_bias, p_norm_weight, p_norm_bias, p_shift, p_scale,
    p_weight_1, p_bias_1, p_weight_2, p_x_new, p_out,
    gate_stride, shift_stride, scale_stride, eps, num_pixels, num_tiles,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):
    """Norm, linear layer, GELU, linear layer; a chunk of the hidden channels at a time."""
    image, o_row, m_row = _tile(num_pixels, num_tiles, ROWS)
    dtype = p_out.dtype.element_ty
    b_normed = _residual_norm(
        p_x, p_branch, p_gate, p_branch_bias, p_norm_weight, p_norm_bias, p_shift, p_scale, p_x_new,
        gate_stride, shift_stride, scale_stride, eps, image, o_row, m_row, True, CHANNELS, BLOCK,
    ).to(dtype)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < CHANNELS
    b_out = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.range(0, HIDDEN, CHUNK):
        o_hidden = first + tl.arange(0, CHUNK)
        m_hidden = o_hidden < HIDDEN
        b_weight_1 = _weight(p_weight_1, o_c, m_c, o_hidden, m_hidden, CHANNELS)
        b_weight_2 = _weight(p_weight_2, o_hidden, m_hidden, o_c, m_c, HIDDEN)
        b_z = tl.dot(b_normed, b_weight_1, input_precision="ieee") + _channels(p_bias_1, o_hidden, m_hidden)
        b_below, _ = normal(b_z, dtype == tl.float32)
        b_out = tl.dot((b_z * b_below).to(dtype), b_weight_2, b_out, input_precision="ieee")
    tl.store(p_out + o_row[:, None] * CHANNELS + o_c[None, :], b_out.to(dtype), mask=m_row[:, None] & m_c[None, :])


@triton.jit
def _project(b_normed, p_weight, p_bias, first, o_c, m_c, o_d, m_d, CHANNELS: tl.constexpr):
    """Compute the queries, keys or values of one head, whose first row in the weight is `first`."""
    b_weight = _weight(p_weight, o_c, m_c, first + o_d, m_d, CHANNELS)
    b_out = tl.dot(b_normed, b_weight, input_precision="ieee") + _channels(p_bias, first + o_d, m_d)
    return b_out.to(b_normed.dtype)


@triton.jit
def norm_attention_kernel(
    p_x, p_branch, p_gate, p_branch_bias, p_norm_weight, p_norm_bias, p_shift, p_scale,
    p_qkv_weight, p_qkv_bias, p_bias, p_weight, p_x_new, p_out,
    gate_stride, shift_stride, scale_stride, eps, attention_scale,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SIDE_Y: tl.constexpr, SIDE_X: tl.constexpr,
    SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr, PLACES: tl.constexpr, WINDOW: tl.constexpr,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr,
):
    """Norm, queries, keys and values, attention in a window, linear layer; one head at a time."""
    HEAD: tl.constexpr = CHANNELS // HEADS
    PER_IMAGE: tl.constexpr = ((HEIGHT + SIDE_Y - 1) // SIDE_Y) * ((WIDTH + SIDE_X - 1) // SIDE_X)
    image = (tl.program_id(0) // PER_IMAGE).to(tl.int64)
    window = tl.program_id(0) % PER_IMAGE
    o_pixel, m_place, b_region = places(window, HEIGHT, WIDTH, SIDE_Y, SIDE_X, SHIFT_Y, SHIFT_X, PLACES)
    o_row = image * HEIGHT * WIDTH + o_pixel
    dtype = p_out.dtype.element_ty
    b_normed = _residual_norm(
        p_x, p_branch, p_gate, p_branch_bias, p_norm_weight, p_norm_bias, p_shift, p_scale, p_x_new,
        gate_stride, shift_stride, scale_stride, eps, image, o_row, m_place, True, CHANNELS, BLOCK,
    ).to(dtype)
    o_c, o_d = tl.arange(0, BLOCK), tl.arange(0, HEAD_BLOCK)
    m_c, m_d = o_c < CHANNELS, o_d < HEAD
    b_out = tl.zeros([PLACES, BLOCK], tl.float32)
    for head in tl.range(0, HEADS):
        first = head * HEAD
        b_q = _project(b_normed, p_qkv_weight, p_qkv_bias, first, o_c, m_c, o_d, m_d, CHANNELS)
        b_k = _project(b_normed, p_qkv_weight, p_qkv_bias, CHANNELS + first, o_c, m_c, o_d, m_d, CHANNELS)
        b_v = _project(b_normed, p_qkv_weight, p_qkv_bias, 2 * CHANNELS + first, o_c, m_c, o_d, m_d, CHANNELS)
        b_bias = relative_bias(p_bias, head, HEADS, WINDOW, SIDE_Y, SIDE_X, PLACES)
        masked = SHIFT_Y > 0 or SHIFT_X > 0
        b_share, b_sum = attention_weights(b_q, b_k, b_bias, m_place, b_region, attention_scale, masked)
        b_y = tl.dot(b_share.to(dtype), b_v, input_precision="ieee") * (1 / b_sum)
        b_weight = _weight(p_weight, first + o_d, m_d, o_c, m_c, CHANNELS)
        b_out = tl.dot(b_y.to(dtype), b_weight, b_out, input_precision="ieee")
    tl.store(p_out + o_row[:, None] * CHANNELS + o_c[None, :], b_out.to(dtype), mask=m_place[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def gated_norm_linear_kernel(
    p_planes, p_z, p_norm_weight, p_norm_bias, p_weight, p_out, z_stride, eps, num_rows,
    PLANES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add up the planes, normalize, multiply by SiLU(z), linear layer; `z_stride` is between pixels of z."""
    o_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_row, m_c = o_row < num_rows, o_c < CHANNELS
    m_x = m_row[:, None] & m_c[None, :]
    o_x = o_row[:, None] * CHANNELS + o_c[None, :]
    b_y = tl.load(p_planes + o_x, mask=m_x, other=0.0).to(tl.float32)
    for plane in tl.static_range(1, PLANES):
        p_plane = p_planes + tl.cast(num_rows, tl.int64) * plane * CHANNELS
        b_y += tl.load(p_plane + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_y = b_y.to(p_planes.dtype.element_ty).to(tl.float32)
    normalized, _ = normalize((b_y,), eps, CHANNELS, BLOCK, 1)
    b_y = normalized[0] * _channels(p_norm_weight, o_c, m_c) + _channels(p_norm_bias, o_c, m_c)
    b_z = tl.load(p_z + o_row[:, None] * z_stride + o_c[None, :], mask=m_x, other=0.0).to(tl.float32)
    dtype = p_out.dtype.element_ty
    b_y = (b_y * (b_z * tl.sigmoid(b_z))).to(dtype)
    o_out = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_out = o_out < OUT
    b_out = tl.dot(b_y, _weight(p_weight, o_c, m_c, o_out, m_out, CHANNELS), input_precision="ieee")
    tl.store(p_out + o_row[:, None] * OUT + o_out[None, :], b_out.to(dtype), mask=m_row[:, None] & m_out[None, :])
