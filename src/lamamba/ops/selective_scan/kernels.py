"""Triton kernels for the scan with one state over the four paths of a grid, forward and backward; see README.md.

One program is one warp. It walks one path of one image, or a segment of it, for a block of channels: lanes are
channels, and time is a loop. Steps are grouped in tiles of 16. The step sizes of a tile are one small matrix product,
whose rows are then walked one by one in registers. The pixel of a step is computed, so nothing is gathered, and all
loads and stores are contiguous channels of a pixel.

Names: `p_` pointer, `b_` block of values, `o_` offsets, `m_` mask.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _parity(b_x):
    """Split (2 m, d) into its even and its odd rows."""
    return b_x.reshape(b_x.shape[0] // 2, 2, b_x.shape[1]).permute(0, 2, 1).split()


@triton.jit
def _rows(b_x):
    """Split (16, d) into a tuple of 16 rows (1, d)."""
    parts = (b_x,)
    for level in tl.static_range(4):
        evens = ()
        odds = ()
        for index in tl.static_range(1 << level):
            even, odd = _parity(parts[index])
            evens = evens + (even,)
            odds = odds + (odd,)
        parts = evens + odds
    return parts


@triton.jit
def _stack(rows):
    """Join 16 rows (1, d) to (16, d); the inverse of `_rows`."""
    parts = rows
    for level in tl.static_range(4):
        joined = ()
        for index in tl.static_range(8 >> level):
            pair = tl.join(parts[index], parts[index + (8 >> level)]).permute(0, 2, 1)
            joined = joined + (pair.reshape(pair.shape[0] * 2, pair.shape[2]),)
        parts = joined
    return parts[0]


@triton.jit
def _sum_channels(rows, BLOCK: tl.constexpr):
    """Sum each of 16 rows (1, d) over its channels: (16,). Rows in 16 bits are summed by tensor cores."""
    b_x = _stack(rows)
    if b_x.dtype == tl.float32:
        return tl.sum(b_x, axis=1)
    return tl.sum(tl.dot(b_x, tl.full([BLOCK, 16], 1.0, b_x.dtype)), axis=1) * (1.0 / 16)


@triton.jit
def _is_reversed(path, CONTINUOUS: tl.constexpr):
    """Return whether a path is the reverse of another one."""
    if CONTINUOUS:
        return path % 2 == 1
    return path >= 2


@triton.jit
def _pixel(t, path, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONTINUOUS: tl.constexpr):
    """Compute the row-major pixel that a path reads at step t (a number or a block); see `lamamba.ops.grid`."""
    columns = path >= 2 if CONTINUOUS else path % 2 == 1
    t = tl.where(_is_reversed(path, CONTINUOUS), HEIGHT * WIDTH - 1 - t, t)
    row, right = t // WIDTH, t % WIDTH
    column, down = t // HEIGHT, t % HEIGHT
    if CONTINUOUS:
        right = tl.where(row % 2 == 1, WIDTH - 1 - right, right)
        down = tl.where(column % 2 == 0, HEIGHT - 1 - down, down)
    return tl.where(columns, down * WIDTH + column, row * WIDTH + right)


@triton.jit
def _below(o_x, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return the mask of offsets below a length; a constant, which helps the compiler, if blocks fill the length."""
    if LENGTH % BLOCK == 0:
        return tl.full(o_x.shape, 1, tl.int1)
    return o_x < LENGTH


@triton.jit
def _runs(
    first, path,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONTINUOUS: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
):
    """Find the pixels of a tile: first pixel and stride of each run of RUN steps, which lie on one line of the grid."""
    firsts = ()
    strides = ()
    for run in tl.static_range(0, TILE, RUN):
        pixel = _pixel(first + run, path, HEIGHT, WIDTH, CONTINUOUS)
        firsts = firsts + (pixel,)
        strides = strides + (_pixel(first + run + 1, path, HEIGHT, WIDTH, CONTINUOUS) - pixel,)
    return firsts, strides


@triton.jit
def _along(p, runs, ROW: tl.constexpr, RUN: tl.constexpr):
    """Compute a tuple of pointers to the pixels of `_runs`; pixels are ROW values apart."""
    pointers = ()
    firsts, strides = runs
    for run in tl.static_range(16 // RUN):
        p_pixel = p + firsts[run] * ROW
        stride = strides[run].to(tl.int64) * ROW
        for _ in tl.static_range(RUN):
            pointers = pointers + (p_pixel,)
            p_pixel += stride
    return pointers


@triton.jit
def _load_expansion(p_weight, path, o_d, m_d, CHANNELS: tl.constexpr, RANK: tl.constexpr):
    """Load a path's matrix from low-rank step sizes to a block of channels, as a tuple of blocks (16, d).

    In memory its rows are padded to a multiple of 8. So eight values are loaded at a time, and the compiler keeps them
    in shared memory instead of registers.
    """
    ROW: tl.constexpr = (RANK + 7) // 8 * 8
    weights = ()
    for first in tl.static_range(0, RANK, 16):
        o_r = first + tl.arange(0, 16)[:, None]
        weights = weights + (
            tl.load(p_weight + (path * CHANNELS + o_d) * ROW + o_r, mask=m_d & (o_r < ROW), other=0.0),
        )
    return weights


@triton.jit
def _load_low(
    p_low, start, path, LOW: tl.constexpr, RANK: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONTINUOUS: tl.constexpr,
):
    """Load the low-rank step sizes of 16 steps as blocks (2, 16, 8), the layout of a tensor core operand."""
    b_lows = ()
    o_half, o_place = tl.arange(0, 2)[:, None, None], tl.arange(0, 8)[None, None, :]
    o_t = start + tl.arange(0, 16)[None, :, None]
    p_rows = p_low + _pixel(o_t, path, HEIGHT, WIDTH, CONTINUOUS) * LOW
    m_t = (o_t >= 0) & (o_t < HEIGHT * WIDTH)
    for first in tl.static_range(0, RANK, 16):
        o_r = first + o_half * 8 + o_place
        b_lows = b_lows + (tl.load(p_rows + o_r, mask=m_t & (o_r < RANK), other=0.0),)
    return b_lows


@triton.jit
def _load_numbers(
    p_low, start, path, LOW: tl.constexpr, RANK: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONTINUOUS: tl.constexpr,
):
    """Load B ln(2) and C of 16 steps as one block (32,)."""
    o_i = tl.arange(0, 32)
    o_t = start + o_i % 16
    o_BC = _pixel(o_t, path, HEIGHT, WIDTH, CONTINUOUS) * LOW + RANK + o_i // 16
    b_BC = tl.load(p_low + o_BC, mask=(o_t >= 0) & (o_t < HEIGHT * WIDTH), other=0.0).to(tl.float32)
    return tl.where(o_i < 16, b_BC * LN_2, b_BC)


@triton.jit
def numbers(b_row):
    """Split a block (32,) into a tuple of 32 numbers (1, 1), which every lane then has."""
    parts = (b_row.reshape(32, 1),)
    for level in tl.static_range(5):
        cut = ()
        for index in tl.static_range(1 << level):
            first, second = parts[index].reshape(2, parts[index].shape[0] // 2, 1).permute(1, 2, 0).split()
            cut = cut + (first, second)
        parts = cut
    return parts


@triton.jit
def _exp2(b_x, PRECISE: tl.constexpr):
    """Compute 2^x. PRECISE avoids the error of the plain instruction, three units in the last place.

    It is the polynomial for 2^f with the smallest relative error from -1/2 to 1/2, 2e-9, with the whole part of x added
    to the exponent. The smallest result is 2^-126.
    """
    if PRECISE:
        b_x = tl.minimum(tl.maximum(b_x, -126.0), 128.0)
        b_shifted = b_x + 12582912.0  # 1.5 * 2^23: rounds x, and leaves the whole part in the last bits
        b_f = b_x - (b_shifted - 12582912.0)
        b_power = 0.055503324 + b_f * (0.009618437 + b_f * (0.0013398876 + b_f * 0.0001535336))
        b_power = 1 + b_f * (0.6931472 + b_f * (0.24022648 + b_f * b_power))
        b_bits = b_power.to(tl.int32, bitcast=True) + (b_shifted.to(tl.int32, bitcast=True) << 23)
        return b_bits.to(tl.float32, bitcast=True)
    return tl.exp2(b_x)


@triton.jit
def _exp(b_x, PRECISE: tl.constexpr):
    """Compute e^x."""
    if PRECISE:  # the remainder of x after the power of two, with ln(2) in two parts
        b_whole = tl.floor(b_x * LOG2_E + 0.5)
        b_rest = (b_x - b_whole * 0.693145751953125) - b_whole * 1.428606765330187e-06
        return _exp2(b_rest * LOG2_E, PRECISE) * tl.exp2(b_whole)
    return tl.exp2(b_x * LOG2_E)


@triton.jit
def _softplus(b_z, PRECISE: tl.constexpr, SERIES: tl.constexpr = False):
    """Compute m = softplus(z) log2(e) from z log2(e); then exp(A softplus(z)) = 2^(m A).

    SERIES needs more instructions, and PRECISE still more; both have about the error of float32.
    """
    b_u = _exp2(-tl.abs(b_z), PRECISE)
    if PRECISE or SERIES:  # log(1 + u) = 2 artanh(u / (2 + u))
        b_s = tl.div_rn(b_u, 2 + b_u) if PRECISE else b_u / (2 + b_u)
        b_q = b_s * b_s
        b_sum = 1.0 / 11 + b_q * (1.0 / 13 + b_q * (1.0 / 15))
        b_sum = 1 + b_q * (1.0 / 3 + b_q * (1.0 / 5 + b_q * (1.0 / 7 + b_q * (1.0 / 9 + b_q * b_sum))))
        b_log = (2 * LOG2_E) * b_s * b_sum
    else:  # the polynomial for log2(1 + u) / u with the smallest relative error from 0 to 1, 4e-4
        b_log = b_u * (1.44212821 + b_u * (-0.70174807 + b_u * (0.36648198 - b_u * 0.10725511)))
    return tl.maximum(b_z, 0.0) + b_log


@triton.jit
def _steps(b_lows, weights, b_bias, start, LENGTH: tl.constexpr, RANK: tl.constexpr, PRECISE: tl.constexpr):
    """Compute the m of a tile's step sizes, as a tuple of 16 rows (1, d).

    Steps beyond the end of the path get 0, so that they change nothing and have no gradient.
    """
    b_z = tl.zeros([16, b_bias.shape[1]], tl.float32)
    for block in tl.static_range((RANK + 15) // 16):
        b_low = b_lows[block].permute(1, 0, 2).reshape(16, 16)
        b_z = tl.dot(b_low, weights[block], b_z, input_precision="ieee")
    b_m = _softplus(b_z * LOG2_E + b_bias * LOG2_E, PRECISE)
    if LENGTH % 16 != 0:
        b_m = tl.where(start + tl.arange(0, 16)[:, None] < LENGTH, b_m, 0.0)
    return _rows(b_m)


@triton.jit
def _slope(b_m, PRECISE: tl.constexpr, SERIES: tl.constexpr = False):
    """Compute the derivative of m with respect to z, (1 - 2^-m) log2(e); 1 - 2^-m = 1 / (1 + exp(-z))."""
    if PRECISE or SERIES:  # near 0, the difference 1 - 2^-m would lose digits
        b_x = b_m * LN_2
        b_series = 1 - b_x * (1.0 / 4) * (1 - b_x * (1.0 / 5) * (1 - b_x * (1.0 / 6)))
        b_series = b_x * (1 - b_x * (1.0 / 2) * (1 - b_x * (1.0 / 3) * b_series))
        return tl.where(b_x < 0.25, b_series, 1 - _exp2(-b_m, PRECISE)) * LOG2_E
    return LOG2_E - LOG2_E * tl.exp2(-b_m)


@triton.jit(do_not_specialize=["first_image", "tiles_per_segment", "num_segments"])
def scan_summary_kernel(
    p_u, p_low, p_weight, p_bias, p_A_log, p_carry, p_decay, plane, first_image, tiles_per_segment, num_segments,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONTINUOUS: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
    CHANNELS: tl.constexpr, LOW: tl.constexpr, RANK: tl.constexpr,
    BLOCK: tl.constexpr, PRECISE: tl.constexpr, BACKWARD: tl.constexpr,
):
    """Scan a segment from a zero state; store the last state and the decay over the segment, each (e,).

    BACKWARD does the same backward in time for the gradient of the state. Then u is the gradient of y, and `plane` is
    the distance between the gradients of two paths. The segment that is walked last has no program, because no other
    segment needs its end. Results are indexed by image - `first_image`.
    """
    LENGTH: tl.constexpr = HEIGHT * WIDTH
    WHOLE: tl.constexpr = LENGTH % TILE == 0
    o_d = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    m_d = _below(o_d, CHANNELS, BLOCK)
    path, image = tl.program_id(1) % 4, first_image + tl.program_id(2).to(tl.int64)
    segment = tl.program_id(1) // 4
    segment = tl.where(_is_reversed(path, CONTINUOUS), num_segments - 2 - segment, segment) + (1 if BACKWARD else 0)
    o_path = path * CHANNELS + o_d
    b_bias = tl.load(p_bias + o_path, mask=m_d, other=0.0)
    b_A = -_exp(tl.load(p_A_log + o_path, mask=m_d, other=0.0), PRECISE)
    p_u += image * LENGTH * CHANNELS + path.to(tl.int64) * plane
    p_low += image * LENGTH * LOW + path * (LOW // 4)
    weights = _load_expansion(p_weight, path, o_d, m_d, CHANNELS, RANK)

    b_h = tl.zeros([1, BLOCK], tl.float32)
    b_exponents = tl.zeros([1, BLOCK], tl.float32)
    first = segment * tiles_per_segment
    last = tl.minimum(first + tiles_per_segment, tl.cdiv(LENGTH, TILE))
    b_lows = _load_low(p_low, (last - 1 if BACKWARD else first) * TILE, path, LOW, RANK, HEIGHT, WIDTH, CONTINUOUS)
    for count in range(first, last):
        start = (first + last - 1 - count if BACKWARD else count) * TILE
        runs = _runs(start, path, HEIGHT, WIDTH, CONTINUOUS, TILE, RUN)
        p_us = _along(p_u + o_d, runs, CHANNELS, RUN)
        p_weights = _along(p_low + RANK + (1 if BACKWARD else 0), runs, LOW, RUN)
        b_us = ()
        b_weights = ()
        for step in tl.static_range(TILE):
            m_t = WHOLE or start + step < LENGTH
            b_us = b_us + (tl.load(p_us[step], mask=m_d & m_t, other=0.0),)
            b_weights = b_weights + (tl.load(p_weights[step], mask=m_t, other=0.0),)
        b_deltas = _steps(b_lows, weights, b_bias, start, LENGTH, RANK, PRECISE)
        b_lows = _load_low(p_low, start + (-TILE if BACKWARD else TILE), path, LOW, RANK, HEIGHT, WIDTH, CONTINUOUS)
        for i in tl.static_range(TILE):
            b_u = b_us[TILE - 1 - i if BACKWARD else i].to(tl.float32)
            b_weight = b_weights[TILE - 1 - i if BACKWARD else i].to(tl.float32)
            b_step = b_deltas[TILE - 1 - i if BACKWARD else i]
            b_exponent = b_A * b_step
            b_a = _exp2(b_exponent, PRECISE)
            b_h = b_a * (b_h + b_weight * b_u) if BACKWARD else b_a * b_h + b_weight * (b_step * b_u)
            b_exponents += b_exponent
    if not BACKWARD:
        b_h *= LN_2
    o_segment = (tl.program_id(2).to(tl.int64) * 4 + path) * num_segments + segment
    o_end = o_segment * CHANNELS + o_d
    tl.store(p_carry + o_end, b_h, mask=m_d)
    tl.store(p_decay + o_end, _exp2(b_exponents, PRECISE), mask=m_d)


@triton.jit
def _walk_segments(p_carry, p_decay, o_first, STRIDE: tl.constexpr, count, m_d):
    """Compute a state after `count` segments from the summaries of these segments."""
    AT_ONCE: tl.constexpr = 8
    b_h = tl.zeros(m_d.shape, tl.float32)
    for first in range(0, count, AT_ONCE):
        b_decays = ()
        b_ends = ()
        for index in tl.static_range(AT_ONCE):
            o_end = o_first + STRIDE * (first + index)
            m = m_d & (first + index < count)  # a segment that does not exist leaves the state unchanged
            b_decays = b_decays + (tl.load(p_decay + o_end, mask=m, other=1.0),)
            b_ends = b_ends + (tl.load(p_carry + o_end, mask=m, other=0.0),)
        for index in tl.static_range(AT_ONCE):
            b_h = b_decays[index] * b_h + b_ends[index]
    return b_h


@triton.jit(do_not_specialize=["batch", "tiles_per_segment", "num_segments"])
def scan_forward_kernel(
    p_x, p_low, p_weight, p_bias, p_A_log, p_D, p_y, p_states, p_carry, p_decay,
    batch, tiles_per_segment, num_segments,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONTINUOUS: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
    CHANNELS: tl.constexpr, LOW: tl.constexpr, RANK: tl.constexpr,
    BLOCK: tl.constexpr, PRECISE: tl.constexpr, SAVE: tl.constexpr,
):
    """Scan a segment and write y, one plane per path; SAVE also writes the state at the start of each tile."""
    LENGTH: tl.constexpr = HEIGHT * WIDTH
    WHOLE: tl.constexpr = LENGTH % TILE == 0
    NUM_TILES: tl.constexpr = (LENGTH + TILE - 1) // TILE
    o_d = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    m_d = _below(o_d, CHANNELS, BLOCK)
    path, segment, image = tl.program_id(1) % 4, tl.program_id(1) // 4, tl.program_id(2).to(tl.int64)
    # A path and its reverse read the same pixels at the same time: only one of them waits for memory.
    segment = tl.where(_is_reversed(path, CONTINUOUS), num_segments - 1 - segment, segment)
    o_path = path * CHANNELS + o_d
    b_bias = tl.load(p_bias + o_path, mask=m_d, other=0.0)
    b_D = tl.load(p_D + o_path, mask=m_d, other=0.0)
    b_A = -_exp(tl.load(p_A_log + o_path, mask=m_d, other=0.0), PRECISE)
    p_x += image * LENGTH * CHANNELS
    p_y += (path * batch + image) * LENGTH * CHANNELS
    p_low += image * LENGTH * LOW + path * (LOW // 4)
    weights = _load_expansion(p_weight, path, o_d, m_d, CHANNELS, RANK)

    o_segment = (image * 4 + path) * num_segments
    b_h = _walk_segments(p_carry, p_decay, o_segment * CHANNELS + o_d, CHANNELS, segment, m_d)

    first = segment * tiles_per_segment
    b_lows = _load_low(p_low, first * TILE, path, LOW, RANK, HEIGHT, WIDTH, CONTINUOUS)
    b_BC = _load_numbers(p_low, first * TILE, path, LOW, RANK, HEIGHT, WIDTH, CONTINUOUS)
    for tile in range(first, tl.minimum(first + tiles_per_segment, NUM_TILES)):
        start = tile * TILE
        # All loads of a tile come before its stores, because the compiler cannot know that they do not overlap. The
        # low-rank step sizes are loaded one tile ahead, and the other values while the step sizes are computed.
        runs = _runs(start, path, HEIGHT, WIDTH, CONTINUOUS, TILE, RUN)
        p_xs = _along(p_x + o_d, runs, CHANNELS, RUN)
        b_xs = ()
        for step in tl.static_range(TILE):
            m_t = WHOLE or start + step < LENGTH
            b_xs = b_xs + (tl.load(p_xs[step], mask=m_d & m_t, other=0.0),)
        b_deltas = _steps(b_lows, weights, b_bias, start, LENGTH, RANK, PRECISE)
        b_lows = _load_low(p_low, start + TILE, path, LOW, RANK, HEIGHT, WIDTH, CONTINUOUS)
        BC = numbers(b_BC)
        b_BC = _load_numbers(p_low, start + TILE, path, LOW, RANK, HEIGHT, WIDTH, CONTINUOUS)
        if SAVE:
            tl.store(p_states + ((image * 4 + path) * NUM_TILES + tile) * CHANNELS + o_d, b_h, mask=m_d)
        p_ys = _along(p_y + o_d, runs, CHANNELS, RUN)
        for step in tl.static_range(TILE):
            m_t = WHOLE or start + step < LENGTH
            b_x = b_xs[step].to(tl.float32)
            b_h = _exp2(b_A * b_deltas[step], PRECISE) * b_h + BC[step] * (b_deltas[step] * b_x)
            b_y = BC[TILE + step] * b_h + b_D * b_x
            # y is not read again soon: this leaves the cache to other data.
            tl.store(p_ys[step], b_y.to(p_y.dtype.element_ty), mask=m_d & m_t, cache_modifier=".cs")


@triton.jit(do_not_specialize=["batch", "first_image", "tiles_per_segment", "num_segments"])
def scan_backward_kernel(
    p_x, p_low, p_weight, p_bias, p_A_log, p_D, p_grad_y, p_states, p_carry, p_decay,
    p_grad_x, p_grad_z, p_grad_BC, p_grad_shared,
    plane, batch, first_image, tiles_per_segment, num_segments,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONTINUOUS: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
    CHANNELS: tl.constexpr, LOW: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr, PRECISE: tl.constexpr,
):
    """Walk the tiles of a segment backward; in each, scan forward from the saved state, then backward.

    Writes these gradients, which the caller adds up:

    * of x and of the step sizes before softplus, one plane per path
    * of B and C, one plane per block of channels
    * of A_log, D and the bias, (n + 2, 4, e) per image (counted from `first_image`) and segment

    `plane` is the distance between the gradients of y of two paths.
    """
    LENGTH: tl.constexpr = HEIGHT * WIDTH
    WHOLE: tl.constexpr = LENGTH % TILE == 0
    NUM_TILES: tl.constexpr = (LENGTH + TILE - 1) // TILE
    SUM: tl.constexpr = tl.float32 if PRECISE else tl.bfloat16
    o_d = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    m_d = _below(o_d, CHANNELS, BLOCK)
    path, segment, count_of_image = tl.program_id(1) % 4, tl.program_id(1) // 4, tl.program_id(2).to(tl.int64)
    image = first_image + count_of_image
    o_path = path * CHANNELS + o_d
    b_bias = tl.load(p_bias + o_path, mask=m_d, other=0.0)
    b_D = tl.load(p_D + o_path, mask=m_d, other=0.0)
    b_A = -_exp(tl.load(p_A_log + o_path, mask=m_d, other=0.0), PRECISE)
    p_x += image * LENGTH * CHANNELS
    p_grad_y += image * LENGTH * CHANNELS + path.to(tl.int64) * plane
    p_grad_x += (path * batch + image) * LENGTH * CHANNELS
    p_grad_z += (path * batch + image) * LENGTH * CHANNELS
    p_low += image * LENGTH * LOW + path * (LOW // 4)
    weights = _load_expansion(p_weight, path, o_d, m_d, CHANNELS, RANK)
    p_grad_BC += ((tl.program_id(0) * batch + image) * LENGTH * 4 + path) * 2

    # b_g always holds a[t+1] g[t+1], from the step that was walked before.
    o_last = ((count_of_image * 4 + path + 1) * num_segments - 1) * CHANNELS + o_d
    b_g = _walk_segments(p_carry, p_decay, o_last, -CHANNELS, num_segments - 1 - segment, m_d)

    b_grad_A = tl.zeros([1, BLOCK], tl.float32)
    b_grad_D = tl.zeros([1, BLOCK], tl.float32)
    b_grad_bias = tl.zeros([1, BLOCK], tl.float32)
    first = segment * tiles_per_segment
    last = tl.minimum(first + tiles_per_segment, NUM_TILES)
    b_lows = _load_low(p_low, (last - 1) * TILE, path, LOW, RANK, HEIGHT, WIDTH, CONTINUOUS)
    b_BC = _load_numbers(p_low, (last - 1) * TILE, path, LOW, RANK, HEIGHT, WIDTH, CONTINUOUS)
    for count in range(first, last):
        tile = first + last - 1 - count
        start = tile * TILE
        runs = _runs(start, path, HEIGHT, WIDTH, CONTINUOUS, TILE, RUN)
        p_xs = _along(p_x + o_d, runs, CHANNELS, RUN)
        p_grad_ys = _along(p_grad_y + o_d, runs, CHANNELS, RUN)
        b_xs = ()
        b_grad_ys = ()
        for step in tl.static_range(TILE):
            m_t = WHOLE or start + step < LENGTH
            b_xs = b_xs + (tl.load(p_xs[step], mask=m_d & m_t, other=0.0),)
            b_grad_ys = b_grad_ys + (tl.load(p_grad_ys[step], mask=m_d & m_t, other=0.0),)
        b_deltas = _steps(b_lows, weights, b_bias, start, LENGTH, RANK, PRECISE)
        b_lows = _load_low(p_low, start - TILE, path, LOW, RANK, HEIGHT, WIDTH, CONTINUOUS)

        BC = numbers(b_BC)
        b_BC = _load_numbers(p_low, start - TILE, path, LOW, RANK, HEIGHT, WIDTH, CONTINUOUS)
        b_h = tl.load(p_states + ((image * 4 + path) * NUM_TILES + tile) * CHANNELS + o_d, mask=m_d, other=0.0)
        b_hs = (b_h,)
        b_as = ()
        for step in tl.static_range(TILE):
            b_a = _exp2(b_A * b_deltas[step], PRECISE)
            b_h = b_a * b_h + BC[step] * (b_deltas[step] * b_xs[step].to(tl.float32))
            b_as = b_as + (b_a,)
            b_hs = b_hs + (b_h,)
        b_grad_Bs = ()
        b_grad_Cs = ()
        p_grad_xs = _along(p_grad_x + o_d, runs, CHANNELS, RUN)
        p_grad_zs = _along(p_grad_z + o_d, runs, CHANNELS, RUN)
        for step in tl.static_range(TILE - 1, -1, -1):
            m_t = WHOLE or start + step < LENGTH
            b_m, b_x, b_grad_y = b_deltas[step], b_xs[step].to(tl.float32), b_grad_ys[step].to(tl.float32)
            b_g += BC[TILE + step] * b_grad_y
            b_grad_Bs = ((b_g * (b_m * b_x)).to(SUM),) + b_grad_Bs
            b_grad_Cs = ((b_hs[step + 1] * b_grad_y).to(SUM),) + b_grad_Cs
            b_drive = b_g * BC[step]
            b_g *= b_as[step]
            b_exponent = b_g * b_hs[step]
            b_grad_A += b_exponent * b_m
            b_grad_x = b_drive * b_m + b_D * b_grad_y
            b_grad_z = (b_exponent * (b_A * LN_2) + b_drive * b_x) * _slope(b_m, PRECISE)
            tl.store(p_grad_xs[step], b_grad_x.to(p_grad_x.dtype.element_ty), mask=m_d & m_t)
            tl.store(p_grad_zs[step], b_grad_z.to(p_grad_z.dtype.element_ty), mask=m_d & m_t)
            b_grad_D += b_grad_y * b_x
            b_grad_bias += b_grad_z
        o_t = start + tl.arange(0, TILE)
        p_BC = p_grad_BC + _pixel(o_t, path, HEIGHT, WIDTH, CONTINUOUS) * 8
        tl.store(p_BC, _sum_channels(b_grad_Bs, BLOCK) * LN_2, mask=o_t < LENGTH)
        tl.store(p_BC + 1, _sum_channels(b_grad_Cs, BLOCK), mask=o_t < LENGTH)

    p_grad_shared += (count_of_image * num_segments + segment) * 3 * 4 * CHANNELS + o_path
    tl.store(p_grad_shared, b_grad_A * (b_A * LN_2), mask=m_d)
    tl.store(p_grad_shared + 4 * CHANNELS, b_grad_D, mask=m_d)
    tl.store(p_grad_shared + 2 * 4 * CHANNELS, b_grad_bias, mask=m_d)
