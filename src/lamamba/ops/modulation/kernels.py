"""The kernel that computes many linear layers of the same few images.

Names: `p_` pointer, `b_` block of values, `o_` offsets, `m_` mask.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["batch"])
def linears_kernel(
    p_shared, p_hidden, p_table, p_out, batch,
    SILU: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):
    """Compute the columns of a layer that the table names.

    ALIGNED promises that all rows begin at multiples of 16 bytes.
    """
    dtype: tl.constexpr = p_out.dtype.element_ty
    p_entry = p_table + tl.program_id(0) * 7
    p_weight = tl.load(p_entry).to(tl.pointer_type(dtype))
    p_bias = tl.load(p_entry + 1).to(tl.pointer_type(dtype))
    place, first = tl.load(p_entry + 2), tl.load(p_entry + 3).to(tl.int32)
    before, columns = tl.load(p_entry + 4), tl.load(p_entry + 5).to(tl.int32)
    depth = tl.load(p_entry + 6).to(tl.int32)
    if ALIGNED:
        p_weight, depth = tl.multiple_of(p_weight, 16), tl.multiple_of(depth, 8)
    p_x = p_shared if place < 0 else p_hidden + place * batch
    o_row, o_column, o_k = tl.arange(0, ROWS), first + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    m_row, m_column = o_row < batch, o_column < columns
    b_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, depth, DEPTH):
        m_k = start + o_k < depth
        b_x = tl.load(p_x + o_row[:, None] * depth + start + o_k, mask=m_row[:, None] & m_k, other=0.0)
        o_weight = o_column[None, :].to(tl.int64) * depth + start + o_k[:, None]
        b_weight = tl.load(p_weight + o_weight, mask=m_column[None, :] & m_k[:, None], other=0.0)
        b_sum = tl.dot(b_x, b_weight, b_sum)
    b_sum += tl.load(p_bias + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    if SILU:
        b_sum = b_sum.to(dtype).to(tl.float32)  # rounded like the result of a linear layer
        b_sum = b_sum / (1.0 + tl.exp(-b_sum))
    o_out = before * batch + o_row[:, None] * columns + o_column
    tl.store(p_out + o_out, b_sum.to(dtype), mask=m_row[:, None] & m_column)
