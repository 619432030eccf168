"""Triton kernels for bias and GELU after a matrix product, forward and backward; see README.md.

One program processes some rows of a block of columns, a few rows at a time. The bias of these columns and the sum of
its gradient stay in registers.

Names: `p_` pointer, `b_` block of values, `o_` offsets, `m_` mask.
"""

import triton
import triton.language as tl

# Values per thread: two loads of 16 bytes for 16-bit numbers. A warp reads 64 to 256 columns.
VALUES_PER_THREAD, MIN_COLUMNS, MAX_COLUMNS, MAX_WARPS = 16, 64, 256, 4

ROOT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # of the normal distribution
LOG2_E, LOG_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
# q(z) = z times a polynomial of z^2, whose logistic function 1 / (1 + 2^-q) is close to P(z): z times it is off by at
# most 1.4e-5, and the derivative of that by 4.9e-5. Beyond Z_SQUARED, the polynomial is constant.
Q1, Q3, Q5, Q7 = (
    tl.constexpr(c) for c in (2.3016434949342592, 0.10593224261137932, -0.0007135715268524529, -2.689509817548915e-05)
)
Z_SQUARED = tl.constexpr(36.0)


def cut_columns(channels: int, num_rows: int) -> dict[str, int]:
    """Choose the columns per program, the rows that it handles at once, and the number of warps."""
    without_rest = channels & -channels
    columns = min(max(MIN_COLUMNS, min(MAX_COLUMNS, without_rest)), triton.next_power_of_2(channels))
    values = 32 * MAX_WARPS * VALUES_PER_THREAD
    rows = min(values // columns, triton.next_power_of_2(num_rows))
    num_warps = max(1, rows * columns // (32 * VALUES_PER_THREAD))
    return {"CHANNELS": channels, "COLUMNS": columns, "ROWS": rows, "num_warps": num_warps, "num_stages": 1}


@triton.jit
def _columns_of_program(CHANNELS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the columns of the program, (1, columns), and a mask of those that exist."""
    o_c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return o_c, o_c < CHANNELS


@triton.jit
def _place(row, end, o_c, m_c, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    """Return offsets of the values of ROWS rows from `row` on, and a mask of those that exist."""
    o_row = tl.arange(0, ROWS)[:, None]
    return tl.cast(row, tl.int64) * CHANNELS + (o_row * CHANNELS + o_c), (row + o_row < end) & m_c


@triton.jit
def normal(b_z, PRECISE: tl.constexpr):
    """Compute the cumulative distribution function and the density of the normal distribution at z.

    For 16-bit results, a logistic function of a polynomial takes half of the instructions of the error function.
    """
    if PRECISE:
        b_below = 0.5 + 0.5 * tl.erf(b_z * ROOT_HALF)
        b_density = tl.exp2(b_z * b_z * (-0.5 * LOG2_E)) * DENSITY_AT_0
    else:
        b_square = tl.minimum(b_z * b_z, Z_SQUARED)
        b_power = b_z * (Q1 + b_square * (Q3 + b_square * (Q5 + b_square * Q7)))
        b_below = 1 / (1 + tl.exp2(-b_power))
        b_slope = Q1 + b_square * (3 * Q3 + b_square * (5 * Q5 + b_square * (7 * Q7)))
        b_density = b_below * (1 - b_below) * (b_slope * LOG_2)
    return b_below, b_density


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"])
def linear_gelu_forward_kernel(
    p_x, p_bias, p_out, num_rows, rows_per_program,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):
    """Add the bias, then apply GELU."""
    o_c, m_c = _columns_of_program(CHANNELS, COLUMNS)
    first = tl.program_id(1) * rows_per_program
    end = tl.minimum(first + rows_per_program, num_rows)
    b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    for row in range(first, end, ROWS):
        o_x, m_x = _place(row, end, o_c, m_c, CHANNELS, ROWS)
        b_z = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32) + b_bias
        b_below, _ = normal(b_z, p_x.dtype.element_ty == tl.float32)
        b_out = b_z * b_below
        tl.store(p_out + o_x, b_out.to(p_out.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"])
def linear_gelu_backward_kernel(
    p_x, p_bias, p_grad_out, p_out, p_grad_x, p_sums, num_rows, rows_per_program,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):
    """Compute the gradient of x, and its sum over the rows of the program; and the result again, if `p_out` is given.

    The caller adds up the sums, (programs of a column, c).
    """
    o_c, m_c = _columns_of_program(CHANNELS, COLUMNS)
    first = tl.program_id(1) * rows_per_program
    end = tl.minimum(first + rows_per_program, num_rows)
    b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for row in range(first, end, ROWS):
        o_x, m_x = _place(row, end, o_c, m_c, CHANNELS, ROWS)
        b_z = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32) + b_bias
        b_grad_out = tl.load(p_grad_out + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_below, b_density = normal(b_z, p_x.dtype.element_ty == tl.float32)
        b_grad_x = b_grad_out * (b_below + b_z * b_density)
        tl.store(p_grad_x + o_x, b_grad_x.to(p_grad_x.dtype.element_ty), mask=m_x)
        if p_out is not None:
            tl.store(p_out + o_x, (b_z * b_below).to(p_out.dtype.element_ty), mask=m_x)
        b_sum += b_grad_x
    p_sums += tl.cast(tl.program_id(1), tl.int64) * CHANNELS
    tl.store(p_sums + o_c, tl.sum(b_sum, axis=0, keep_dims=True), mask=m_c)
