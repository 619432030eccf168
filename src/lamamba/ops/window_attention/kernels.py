"""Triton kernels for window attention, forward and backward; see README.md.

One program processes one head of some windows, one window after the other. The heads of a window share lines of memory,
so they run at the same time. The places of a window are one tile. Shift, padding and mask are arithmetic on their
coordinates, and pixels are read and written in place in the grid.

Names: `p_` pointer, `b_` block of values, `o_` offsets, `m_` mask.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Below any logit, but finite, so that a row of only such values gives no NaN.
NEVER = tl.constexpr(-1e30)
# Channels of a head up to which each place keeps its own sums of gradients; measured on an H200.
MAX_CHANNELS_OF_SUMS = tl.constexpr(64)


@triton.jit
def places(
    window,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SIDE_Y: tl.constexpr, SIDE_X: tl.constexpr,
    SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr, PLACES: tl.constexpr,
):
    """Find the pixels of a window: (places,) row-major pixel, mask of existing pixels, and region.

    The cyclic shift puts pixels from opposite edges of the grid into one window. They have different regions.
    """
    PADDED_Y: tl.constexpr = (HEIGHT + SIDE_Y - 1) // SIDE_Y * SIDE_Y
    PADDED_X: tl.constexpr = (WIDTH + SIDE_X - 1) // SIDE_X * SIDE_X
    o_place = tl.arange(0, PLACES)
    y = window // (PADDED_X // SIDE_X) * SIDE_Y + o_place // SIDE_X
    x = window % (PADDED_X // SIDE_X) * SIDE_X + o_place % SIDE_X
    region_y = (y >= PADDED_Y - SIDE_Y).to(tl.int32) + (y >= PADDED_Y - SHIFT_Y).to(tl.int32)
    region_x = (x >= PADDED_X - SIDE_X).to(tl.int32) + (x >= PADDED_X - SHIFT_X).to(tl.int32)
    y, x = (y + SHIFT_Y) % PADDED_Y, (x + SHIFT_X) % PADDED_X
    m_place = (o_place < SIDE_Y * SIDE_X) & (y < HEIGHT) & (x < WIDTH)
    region = (region_y if SHIFT_Y > 0 else 0) * 3 + (region_x if SHIFT_X > 0 else 0)
    return y * WIDTH + x, m_place, region + tl.zeros([PLACES], tl.int32)


@triton.jit
def relative_bias(
    p_bias, head, HEADS: tl.constexpr, WINDOW: tl.constexpr,
    SIDE_Y: tl.constexpr, SIDE_X: tl.constexpr, PLACES: tl.constexpr,
):
    """Load the bias of every query and key of a window, (places, places), times log2(e)."""
    o_place = tl.arange(0, PLACES)
    m_place = o_place < SIDE_Y * SIDE_X
    # The row of the table is (y - y' + s - 1)(2 s - 1) + x - x' + s - 1: a difference plus a constant.
    o_row = (o_place // SIDE_X * (2 * WINDOW - 1) + o_place % SIDE_X) * HEADS
    o_bias = o_row[:, None] - o_row[None, :] + (2 * WINDOW * (WINDOW - 1) * HEADS + head)
    b_bias = tl.load(p_bias + o_bias, mask=m_place[:, None] & m_place[None, :], other=0.0)
    return b_bias.to(tl.float32) * LOG2_E


@triton.jit
def attention_weights(b_q, b_k, b_bias, m_place, b_region, scale, MASKED: tl.constexpr):
    """Compute the softmax of scaled products + bias + mask: numerators (queries, keys) and their sums (queries, 1)."""
    b_logit = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * (scale * LOG2_E) + b_bias
    if MASKED:
        b_logit = tl.where(b_region[:, None] == b_region[None, :], b_logit, b_logit - 100.0 * LOG2_E)
    b_logit = tl.where(m_place[None, :], b_logit, NEVER)
    b_weight = tl.exp2(b_logit - tl.max(b_logit, axis=1, keep_dims=True))
    return b_weight, tl.sum(b_weight, axis=1, keep_dims=True)


@triton.jit(do_not_specialize=["num_windows", "windows_per_program"])
def attention_forward_kernel(
    p_qkv, p_bias, p_out, num_windows, windows_per_program, scale,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SIDE_Y: tl.constexpr, SIDE_X: tl.constexpr,
    SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr, PLACES: tl.constexpr, WINDOW: tl.constexpr,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Attend; CHANNELS are the channels of a head, `num_windows` counts the windows of all images."""
    PER_IMAGE: tl.constexpr = ((HEIGHT + SIDE_Y - 1) // SIDE_Y) * ((WIDTH + SIDE_X - 1) // SIDE_X)
    head = tl.program_id(0)
    o_d = tl.arange(0, BLOCK)
    m_d = (o_d < CHANNELS)[None, :]
    b_bias = relative_bias(p_bias, head, HEADS, WINDOW, SIDE_Y, SIDE_X, PLACES)
    first = tl.program_id(1) * windows_per_program
    for window in range(first, tl.minimum(first + windows_per_program, num_windows)):
        image = tl.zeros([1, 1], tl.int64) + window // PER_IMAGE
        o_pixel, m_place, b_region = places(window % PER_IMAGE, HEIGHT, WIDTH, SIDE_Y, SIDE_X, SHIFT_Y, SHIFT_X, PLACES)
        m_row = m_place[:, None] & m_d
        p_image = p_qkv + image * HEIGHT * WIDTH * 3 * HEADS * CHANNELS + head * CHANNELS
        p_row = p_image + o_pixel[:, None] * 3 * HEADS * CHANNELS + o_d[None, :]
        b_q = tl.load(p_row, mask=m_row, other=0.0)
        b_k = tl.load(p_row + HEADS * CHANNELS, mask=m_row, other=0.0)
        b_v = tl.load(p_row + 2 * HEADS * CHANNELS, mask=m_row, other=0.0)
        b_weight, b_sum = attention_weights(b_q, b_k, b_bias, m_place, b_region, scale, SHIFT_Y > 0 or SHIFT_X > 0)
        b_out = tl.dot(b_weight.to(b_v.dtype), b_v, input_precision="ieee") * (1 / b_sum)
        p_out_row = p_out + image * HEIGHT * WIDTH * HEADS * CHANNELS + head * CHANNELS
        p_out_row += o_pixel[:, None] * HEADS * CHANNELS + o_d[None, :]
        tl.store(p_out_row, b_out.to(p_out.dtype.element_ty), mask=m_row)


@triton.jit(do_not_specialize=["num_windows", "windows_per_program"])
def attention_backward_kernel(
    p_qkv, p_bias, p_grad_out, p_grad_qkv, p_sums, num_windows, windows_per_program, scale,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SIDE_Y: tl.constexpr, SIDE_X: tl.constexpr,
    SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr, PLACES: tl.constexpr, WINDOW: tl.constexpr,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Recompute the weights, and compute all gradients.

    Each program sums two gradients over its windows: first that of the logits, (heads, places, places), then that of
    the bias of the qkv layer, (3, heads, c). The caller adds up the programs. It also adds up all pairs of places that
    use the same row of the bias table.
    """
    LOGITS: tl.constexpr = HEADS * PLACES * PLACES
    PER_IMAGE: tl.constexpr = ((HEIGHT + SIDE_Y - 1) // SIDE_Y) * ((WIDTH + SIDE_X - 1) // SIDE_X)
    head = tl.program_id(0)
    o_d = tl.arange(0, BLOCK)
    m_d = (o_d < CHANNELS)[None, :]
    b_bias = relative_bias(p_bias, head, HEADS, WINDOW, SIDE_Y, SIDE_X, PLACES)
    b_grad_bias = tl.zeros([PLACES, PLACES], tl.float32)
    # To sum over places, warps exchange values. So each place keeps its own sums, as long as registers suffice.
    ROWS: tl.constexpr = PLACES if BLOCK <= MAX_CHANNELS_OF_SUMS else 1
    b_query_sum, b_value_sum = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    first = tl.program_id(1) * windows_per_program
    for window in range(first, tl.minimum(first + windows_per_program, num_windows)):
        image = tl.zeros([1, 1], tl.int64) + window // PER_IMAGE
        o_pixel, m_place, b_region = places(window % PER_IMAGE, HEIGHT, WIDTH, SIDE_Y, SIDE_X, SHIFT_Y, SHIFT_X, PLACES)
        m_row = m_place[:, None] & m_d
        o_row = image * HEIGHT * WIDTH * 3 * HEADS * CHANNELS + head * CHANNELS
        o_row += o_pixel[:, None] * 3 * HEADS * CHANNELS + o_d[None, :]
        b_q = tl.load(p_qkv + o_row, mask=m_row, other=0.0)
        b_k = tl.load(p_qkv + o_row + HEADS * CHANNELS, mask=m_row, other=0.0)
        b_v = tl.load(p_qkv + o_row + 2 * HEADS * CHANNELS, mask=m_row, other=0.0)
        p_row = p_grad_out + image * HEIGHT * WIDTH * HEADS * CHANNELS + head * CHANNELS
        b_grad_out = tl.load(p_row + o_pixel[:, None] * HEADS * CHANNELS + o_d[None, :], mask=m_row, other=0.0)
        b_weight, b_sum = attention_weights(b_q, b_k, b_bias, m_place, b_region, scale, SHIFT_Y > 0 or SHIFT_X > 0)
        b_weight *= 1 / b_sum

        b_grad_v = tl.dot(tl.trans(b_weight.to(b_v.dtype)), b_grad_out, input_precision="ieee")
        b_grad_weight = tl.dot(b_grad_out, tl.trans(b_v), input_precision="ieee")
        b_grad_logit = b_weight * (b_grad_weight - tl.sum(b_weight * b_grad_weight, axis=1)[:, None])
        b_grad_bias += b_grad_logit
        b_grad_logit = (b_grad_logit * scale).to(b_v.dtype)
        b_grad_q = tl.dot(b_grad_logit, b_k, input_precision="ieee")
        b_grad_k = tl.dot(tl.trans(b_grad_logit), b_q, input_precision="ieee")
        if ROWS > 1:
            b_query_sum += b_grad_q
            b_value_sum += b_grad_out.to(tl.float32)
        else:
            b_query_sum += tl.sum(b_grad_q, axis=0, keep_dims=True)
            b_value_sum += tl.sum(b_grad_out.to(tl.float32), axis=0, keep_dims=True)
        p_grad_row = p_grad_qkv + o_row
        tl.store(p_grad_row, b_grad_q.to(p_grad_qkv.dtype.element_ty), mask=m_row)
        tl.store(p_grad_row + HEADS * CHANNELS, b_grad_k.to(p_grad_qkv.dtype.element_ty), mask=m_row)
        tl.store(p_grad_row + 2 * HEADS * CHANNELS, b_grad_v.to(p_grad_qkv.dtype.element_ty), mask=m_row)
    o_place = tl.arange(0, PLACES)
    p_sums += tl.program_id(1).to(tl.int64) * (LOGITS + 3 * HEADS * CHANNELS)
    tl.store(p_sums + head * PLACES * PLACES + o_place[:, None] * PLACES + o_place[None, :], b_grad_bias)
    p_sums += LOGITS + head * CHANNELS + o_d
    tl.store(p_sums, tl.sum(b_query_sum, axis=0), mask=o_d < CHANNELS)
    tl.store(p_sums + HEADS * CHANNELS, tl.zeros([BLOCK], tl.float32), mask=o_d < CHANNELS)
    tl.store(p_sums + 2 * HEADS * CHANNELS, tl.sum(b_value_sum, axis=0), mask=o_d < CHANNELS)


@triton.jit
def pair_sum_kernel(
    p_logits, p_out,
    SIDE_Y: tl.constexpr, SIDE_X: tl.constexpr, PLACES: tl.constexpr, WINDOW: tl.constexpr, HEADS: tl.constexpr,
):
    """Sum (heads, places, places) over pairs of places that use the same row of the bias table, ((2 s - 1)^2, heads).

    A program sums the pairs of one row and head.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    o_query = tl.arange(0, PLACES)
    y = o_query // SIDE_X - (row // (2 * WINDOW - 1) - (WINDOW - 1))
    x = o_query % SIDE_X - (row % (2 * WINDOW - 1) - (WINDOW - 1))
    m_pair = (o_query < SIDE_Y * SIDE_X) & (y >= 0) & (y < SIDE_Y) & (x >= 0) & (x < SIDE_X)
    o_pair = (head * PLACES + o_query) * PLACES + y * SIDE_X + x
    b_sum = tl.sum(tl.load(p_logits + o_pair, mask=m_pair, other=0.0), axis=0)
    tl.store(p_out + row * HEADS + head, b_sum.to(p_out.dtype.element_ty))
