"""Triton kernels for the matrix products of the scan's backward pass, which read large gradients only once.

Names: `p_` pointer, `b_` block of values, `o_` offsets, `m_` mask.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def sum_and_project_kernel(
    p_planes, p_grad_low, p_weight, p_grad_x, num_rows,
    PROJECTED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOW: tl.constexpr,
):
    """Add up four planes, (rows, e), and the product of (rows, low) and (low, e) unless PROJECTED is 0."""
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    o_row = (tl.program_id(0) // BLOCKS * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    o_e = (tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK))[None, :]
    m_row, m_e = o_row < num_rows, o_e < WIDTH
    p_pixels = p_planes + o_row * WIDTH + o_e
    plane = tl.cast(num_rows, tl.int64) * WIDTH
    b_first = tl.load(p_pixels, mask=m_row & m_e, other=0.0)
    b_second = tl.load(p_pixels + plane, mask=m_row & m_e, other=0.0)
    b_third = tl.load(p_pixels + 2 * plane, mask=m_row & m_e, other=0.0)
    b_fourth = tl.load(p_pixels + 3 * plane, mask=m_row & m_e, other=0.0)
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.static_range(0, PROJECTED, LOW):
        o_low = first + tl.arange(0, LOW)
        m_low = o_low < PROJECTED
        b_low = tl.load(p_grad_low + o_row * PROJECTED + o_low[None, :], mask=m_row & m_low[None, :], other=0.0)
        b_weight = tl.load(p_weight + o_low[:, None] * WIDTH + o_e, mask=m_low[:, None] & m_e, other=0.0)
        b_sum = tl.dot(b_low, b_weight, b_sum, input_precision="ieee")
    b_sum += (b_first.to(tl.float32) + b_second.to(tl.float32)) + (b_third.to(tl.float32) + b_fourth.to(tl.float32))
    tl.store(p_grad_x + o_row * WIDTH + o_e, b_sum.to(p_grad_x.dtype.element_ty), mask=m_row & m_e)


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"])
def steps_backward_kernel(
    p_grad_z, p_low, p_weight, p_grad_low, p_grad_weight, num_rows, rows_per_program,
    RANK: tl.constexpr, LOW: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, RANK_BLOCK: tl.constexpr,
):
    """Multiply the gradient of z of a path with the weight and with the low-rank step sizes; see `steps_backward`."""
    FILLED: tl.constexpr = (RANK + 7) // 8 * 8
    path, chunk = tl.program_id(0), tl.program_id(1)
    o_r = tl.arange(0, RANK_BLOCK)[None, :]
    p_grad_z += path.to(tl.int64) * num_rows * WIDTH
    p_low += path * (LOW // 4)
    p_grad_low += path * (LOW // 4)
    p_weight += path * WIDTH * FILLED
    p_grad_weight += (chunk * 4 + path).to(tl.int64) * WIDTH * FILLED
    sums = ()
    for _ in tl.static_range(PIECES):
        sums = sums + (tl.zeros([PIECE, RANK_BLOCK], tl.float32),)
    first = chunk * rows_per_program
    for row in range(first, tl.minimum(first + rows_per_program, num_rows), ROWS):
        o_row = (row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        m_row = o_row < num_rows
        b_low = tl.load(p_low + o_row * LOW + o_r, mask=m_row & (o_r < RANK), other=0.0)
        b_grad_low = tl.zeros([ROWS, RANK_BLOCK], tl.float32)
        summed = ()
        for piece in tl.static_range(PIECES):
            o_e = piece * PIECE + tl.arange(0, PIECE)
            m_e = o_e < WIDTH
            b_grad_z = tl.load(p_grad_z + o_row * WIDTH + o_e[None, :], mask=m_row & m_e[None, :], other=0.0)
            m_weight = m_e[:, None] & (o_r < FILLED)
            b_weight = tl.load(p_weight + o_e[:, None] * FILLED + o_r, mask=m_weight, other=0.0)
            b_grad_low = tl.dot(b_grad_z, b_weight, b_grad_low, input_precision="ieee")
            summed = summed + (tl.dot(b_grad_z.T, b_low, sums[piece], input_precision="ieee"),)
        sums = summed
        p_pixels = p_grad_low + o_row * LOW + o_r
        tl.store(p_pixels, b_grad_low.to(p_grad_low.dtype.element_ty), mask=m_row & (o_r < RANK))
    for piece in tl.static_range(PIECES):
        o_e = (piece * PIECE + tl.arange(0, PIECE))[:, None]
        tl.store(p_grad_weight + o_e * FILLED + o_r, sums[piece], mask=(o_e < WIDTH) & (o_r < FILLED))
