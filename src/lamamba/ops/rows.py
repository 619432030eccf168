"""Functions that the kernels of both norms share. They keep rows of channels, one per pixel, in registers.

A row is cut into up to five pieces, because widths are often five times a power of two, and blocks must be powers of
two. A program handles several rows at once, as a tuple of blocks (rows, piece), one block per piece.

Names: `p_` pointer, `b_` block of values, `o_` offsets, `m_` mask.
"""

import triton
import triton.language as tl

# Channels of a piece per thread (16 bytes of float32), and values of a piece per program: as many as one warp holds, so
# that sums over narrow rows need no exchange between warps.
CHANNELS_PER_THREAD, PIECE_OF_ROWS = 4, 128
MAX_PIECES, MAX_WARPS = 5, 32


def cut_rows(channels: int, num_rows: int) -> dict[str, int]:
    """Choose the pieces of a row, the rows per program, and the number of warps."""
    piece = max(CHANNELS_PER_THREAD, triton.next_power_of_2(triton.cdiv(channels, MAX_PIECES)))
    rows = max(1, min(PIECE_OF_ROWS // piece, triton.next_power_of_2(num_rows)))
    num_warps = max(1, min(MAX_WARPS, rows * piece // (32 * CHANNELS_PER_THREAD)))
    return {
        "CHANNELS": channels, "PIECE": piece, "PIECES": triton.cdiv(channels, piece), "ROWS": rows,
        "num_warps": num_warps, "num_stages": 1,
    }  # fmt: skip


@triton.jit
def channels_of(piece: tl.constexpr, CHANNELS: tl.constexpr, PIECE: tl.constexpr):
    """Return the channels of a piece, (1, piece), and a mask of those that exist."""
    o_c = piece * PIECE + tl.arange(0, PIECE)[None, :]
    return o_c, o_c < CHANNELS


@triton.jit
def load_channels(p_channels, CHANNELS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """Load one value per channel in float32, as a tuple of blocks (1, piece)."""
    values = ()
    for piece in tl.static_range(PIECES):
        o_c, m_c = channels_of(piece, CHANNELS, PIECE)
        values = values + (tl.load(p_channels + o_c, mask=m_c, other=0.0).to(tl.float32),)
    return values


@triton.jit
def load_rows(p_row, stride, m_row, CHANNELS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """Load rows that are `stride` apart, in float32; masked values are zero."""
    p_rows = p_row + tl.arange(0, m_row.shape[0])[:, None] * stride
    rows = ()
    for piece in tl.static_range(PIECES):
        o_c, m_c = channels_of(piece, CHANNELS, PIECE)
        rows = rows + (tl.load(p_rows + o_c, mask=m_row[:, None] & m_c, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def store_rows(p_row, rows, m_row, CHANNELS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """Store rows that lie one after the other."""
    p_rows = p_row + tl.arange(0, m_row.shape[0])[:, None] * CHANNELS
    for piece in tl.static_range(PIECES):
        o_c, m_c = channels_of(piece, CHANNELS, PIECE)
        tl.store(p_rows + o_c, rows[piece].to(p_row.dtype.element_ty), mask=m_row[:, None] & m_c)


@triton.jit
def store_sums(p_sums, sums, CHANNELS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """Sum over rows, and store the result as one row."""
    for piece in tl.static_range(PIECES):
        o_c, m_c = channels_of(piece, CHANNELS, PIECE)
        tl.store(p_sums + o_c, tl.sum(sums[piece], axis=0, keep_dims=True), mask=m_c)


@triton.jit
def zeros(ROWS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """Return rows of zeros."""
    rows = ()
    for _ in tl.static_range(PIECES):
        rows = rows + (tl.zeros([ROWS, PIECE], tl.float32),)
    return rows


@triton.jit
def multiply(a, b, PIECES: tl.constexpr):
    """Multiply piece by piece."""
    rows = ()
    for piece in tl.static_range(PIECES):
        rows = rows + (a[piece] * b[piece],)
    return rows


@triton.jit
def add(a, b, PIECES: tl.constexpr):
    """Add piece by piece."""
    rows = ()
    for piece in tl.static_range(PIECES):
        rows = rows + (a[piece] + b[piece],)
    return rows


@triton.jit
def mean(rows, CHANNELS: tl.constexpr, PIECES: tl.constexpr):
    """Average over the channels, (rows, 1); masked channels must be zero."""
    b_sum = rows[0]
    for piece in tl.static_range(1, PIECES):
        b_sum += rows[piece]
    return tl.sum(b_sum, axis=1, keep_dims=True) * (1 / CHANNELS)


@triton.jit
def normalize(x, eps, CHANNELS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """Subtract the mean and divide by the standard deviation; also return 1 / standard deviation, (rows, 1)."""
    b_mean = mean(x, CHANNELS, PIECES)
    centred = ()
    for piece in tl.static_range(PIECES):
        b_centred = x[piece] - b_mean
        if (piece + 1) * PIECE > CHANNELS:
            _, m_c = channels_of(piece, CHANNELS, PIECE)
            b_centred = tl.where(m_c, b_centred, 0.0)
        centred = centred + (b_centred,)
    b_rstd = tl.rsqrt(mean(multiply(centred, centred, PIECES), CHANNELS, PIECES) + eps)
    normalized = ()
    for piece in tl.static_range(PIECES):
        normalized = normalized + (centred[piece] * b_rstd,)
    return normalized, b_rstd


@triton.jit
def normalize_backward(grad, normalized, b_rstd, CHANNELS: tl.constexpr, PIECES: tl.constexpr):
    """Compute the gradient of the input of `normalize` from the gradient of its result."""
    b_mean = mean(grad, CHANNELS, PIECES)
    b_along = mean(multiply(grad, normalized, PIECES), CHANNELS, PIECES)
    grad_x = ()
    for piece in tl.static_range(PIECES):
        grad_x = grad_x + (b_rstd * (grad[piece] - b_mean - normalized[piece] * b_along),)
    return grad_x
