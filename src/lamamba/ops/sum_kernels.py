"""Sums over the parts of a gradient, which programs or images have contributed.

Names: `p_` pointer, `b_` block of values, `o_` offsets, `m_` mask.
"""

import triton
import triton.language as tl
from torch import Tensor

from lamamba.ops.launch import launch

# Values per program and step: four loads of 16 bytes per thread. A program reads at least 32 bytes of a row, and more
# where there are enough columns to keep a large GPU busy.
VALUES, NUM_WARPS = 4096, 8
MIN_COLUMNS, MAX_COLUMNS, WANTED_PROGRAMS = 8, 64, 128


def sum_parts(parts: Tensor, out: Tensor | None = None) -> Tensor:
    """Sum over the first dimension, always in the same order: (parts, ...) float32 and contiguous -> (...).

    For a few thousand parts, `torch.sum` has too few programs.
    """
    if out is None:
        out = parts.new_empty(parts.shape[1:])
    num_columns = out.numel()
    # The shift rounds up to a power of two. Triton's functions for this and for the quotient below take 2 us each.
    block = min(max(MIN_COLUMNS, 1 << (num_columns // WANTED_PROGRAMS - 1).bit_length()), MAX_COLUMNS)
    launch(
        sum_parts_kernel, (-(-num_columns // block),),
        parts, out, parts.shape[0], num_columns, BLOCK=block, ROWS=VALUES // block, num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_rows"])
def sum_parts_kernel(p_parts, p_out, num_rows, num_columns, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Sum the rows of a block of columns."""
    o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    m_c = o_c < num_columns
    o_row = tl.arange(0, ROWS)[:, None]
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for row in range(0, num_rows, ROWS):
        o_part = tl.cast(row + o_row, tl.int64) * num_columns + o_c
        b_sum += tl.load(p_parts + o_part, mask=m_c & (row + o_row < num_rows), other=0.0)
    tl.store(p_out + o_c, tl.sum(b_sum, axis=0, keep_dims=True), mask=m_c)
