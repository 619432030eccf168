"""Triton kernels for the second layer of an MLP, which also compute GELU; see README.md.

One program computes ROWS rows of some or all columns. HIDDEN is a multiple of DEPTH and of COLUMNS. The weight has the
dtype of the result.

Names: `p_` pointer, `b_` block of values, `o_` offsets, `m_` mask.
"""

import triton
import triton.language as tl

from lamamba.ops.linear_gelu.kernels import normal


@triton.jit
def _load_bias(p_bias, o_c):
    return tl.load(p_bias + o_c).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def gelu_linear_kernel(
    p_x, p_bias, p_weight, p_out, num_rows,
    HIDDEN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):
    """Compute gelu(x + bias) weight^T, a part of the hidden channels at a time. OUT is a power of two."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m_row = o_row < num_rows
    o_out = tl.arange(0, OUT)
    dtype: tl.constexpr = p_out.dtype.element_ty
    b_out = tl.zeros([ROWS, OUT], tl.float32)
    for first in tl.range(0, HIDDEN, DEPTH):
        o_hidden = first + tl.arange(0, DEPTH)
        b_z = tl.load(p_x + o_row * HIDDEN + o_hidden[None, :], mask=m_row, other=0.0).to(tl.float32)
        b_z += _load_bias(p_bias, o_hidden)
        b_below, _ = normal(b_z, dtype == tl.float32)
        b_weight = tl.load(p_weight + o_out[None, :] * HIDDEN + o_hidden[:, None])
        b_out = tl.dot((b_z * b_below).to(dtype), b_weight, b_out, input_precision="ieee")
    tl.store(p_out + o_row * OUT + o_out[None, :], b_out.to(dtype), mask=m_row)


@triton.jit(do_not_specialize=["num_rows"])
def gelu_linear_backward_kernel(
    p_x, p_bias, p_weight, p_grad_out, p_hidden, p_grad_x, p_sums, num_rows,
    HIDDEN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):
    """Compute gelu(x + bias), the gradient of x, and the sums of that gradient over each tile of rows, (tiles, HIDDEN).

    OUT is a multiple of DEPTH.
    """
    tile = (tl.program_id(0) // (HIDDEN // COLUMNS)).to(tl.int64)
    o_row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    m_row = o_row < num_rows
    o_hidden = tl.program_id(0) % (HIDDEN // COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
    dtype: tl.constexpr = p_grad_x.dtype.element_ty
    o_x = o_row * HIDDEN + o_hidden[None, :]
    b_z = tl.load(p_x + o_x, mask=m_row, other=0.0)
    b_grad = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, OUT, DEPTH):
        o_out = first + tl.arange(0, DEPTH)
        b_grad_out = tl.load(p_grad_out + o_row * OUT + o_out[None, :], mask=m_row, other=0.0)
        b_weight = tl.load(p_weight + o_out[:, None] * HIDDEN + o_hidden[None, :])
        b_grad = tl.dot(b_grad_out, b_weight, b_grad, input_precision="ieee")
    b_z = b_z.to(tl.float32) + _load_bias(p_bias, o_hidden)
    b_below, b_density = normal(b_z, dtype == tl.float32)
    b_grad *= b_below + b_z * b_density
    tl.store(p_hidden + o_x, (b_z * b_below).to(dtype), mask=m_row)
    tl.store(p_grad_x + o_x, b_grad.to(dtype), mask=m_row)
    tl.store(p_sums + tile * HIDDEN + o_hidden, tl.sum(b_grad, axis=0))
