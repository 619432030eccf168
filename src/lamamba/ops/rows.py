"""What the kernels of both norms share: rows of channels, one a pixel, in registers.

A row is cut into up to five pieces, because widths are often five times a power of two and blocks are powers of two.
Several rows are worked on at once; what is known of them is a tuple of blocks (rows, piece), one for each piece.

Names: `p_` pointer, `b_` block of values, `o_` offsets, `m_` mask.
"""

import triton
import triton.language as tl

# Channels of a piece that a thread holds (16 bytes of float32), and what a program takes at once of a piece: one warp's
# share, so that narrow rows are summed up without any exchange between warps.
CHANNELS_PER_THREAD, PIECE_OF_ROWS = 4, 128
MAX_PIECES, MAX_WARPS = 5, 32


def cut_rows(channels: int, num_rows: int) -> dict[str, int]:
    """Say how a program cuts rows into pieces, how many rows it takes at once, and by how many warps."""
    piece = max(CHANNELS_PER_THREAD, triton.next_power_of_2(triton.cdiv(channels, MAX_PIECES)))
    rows = max(1, min(PIECE_OF_ROWS // piece, triton.next_power_of_2(num_rows)))
    num_warps = max(1, min(MAX_WARPS, rows * piece // (32 * CHANNELS_PER_THREAD)))
    return {
        "CHANNELS": channels, "PIECE": piece, "PIECES": triton.cdiv(channels, piece), "ROWS": rows,
        "num_warps": num_warps, "num_stages": 1,
    }  # fmt: skip


@triton.jit
def channels_of(piece: tl.constexpr, CHANNELS: tl.constexpr, PIECE: tl.constexpr):
    """Give a piece's channels, (1, piece), and which of them there are."""
    o_c = piece * PIECE + tl.arange(0, PIECE)[None, :]
    return o_c, o_c < CHANNELS


@triton.jit
def load_rows(p_row, stride, m_row, CHANNELS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """Load rows, `stride` apart, in float32; zeros where there are none."""
    p_rows = p_row + tl.arange(0, m_row.shape[0])[:, None] * stride
    rows = ()
    for piece in tl.static_range(PIECES):
        o_c, m_c = channels_of(piece, CHANNELS, PIECE)
        rows = rows + (tl.load(p_rows + o_c, mask=m_row[:, None] & m_c, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def store_rows(p_row, rows, m_row, CHANNELS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """Store rows one after the other."""
    p_rows = p_row + tl.arange(0, m_row.shape[0])[:, None] * CHANNELS
    for piece in tl.static_range(PIECES):
        o_c, m_c = channels_of(piece, CHANNELS, PIECE)
        tl.store(p_rows + o_c, rows[piece].to(p_row.dtype.element_ty), mask=m_row[:, None] & m_c)


@triton.jit
def store_sums(p_sums, sums, CHANNELS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """Add up the rows and store what is one row then."""
    for piece in tl.static_range(PIECES):
        o_c, m_c = channels_of(piece, CHANNELS, PIECE)
        tl.store(p_sums + o_c, tl.sum(sums[piece], axis=0, keep_dims=True), mask=m_c)


@triton.jit
def zeros(ROWS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """Give rows of zeros."""
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
    """Average over the channels, of which those that there are not hold zeros: (rows, 1)."""
    b_sum = rows[0]
    for piece in tl.static_range(1, PIECES):
        b_sum += rows[piece]
    return tl.sum(b_sum, axis=1, keep_dims=True) * (1 / CHANNELS)


@triton.jit
def normalize(x, eps, CHANNELS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """Take the mean off and divide by the standard deviation; also give one over that, (rows, 1)."""
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
    """Turn the gradient of what `normalize` gives into that of what it takes."""
    b_mean = mean(grad, CHANNELS, PIECES)
    b_along = mean(multiply(grad, normalized, PIECES), CHANNELS, PIECES)
    grad_x = ()
    for piece in tl.static_range(PIECES):
        grad_x = grad_x + (b_rstd * (grad[piece] - b_mean - normalized[piece] * b_along),)
    return grad_x
