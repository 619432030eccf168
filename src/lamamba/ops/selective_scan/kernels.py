"""What runs on the GPU: the scan over the four paths of a grid, forwards and backwards; equations in README.md.

One program walks one path of one image (or a segment of it) for a block of channels and is one warp wide: lanes are
channels, time is a loop. Steps go in tiles of 16: a tile's step sizes are one small matrix product, whose rows are then
walked one by one in registers. Pixels are found by arithmetic, so nothing is gathered, and whatever memory is touched
is the contiguous channels of a pixel.

Names: `p_` pointer, `b_` block of values, `o_` offsets, `m_` mask.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LINEAR = tl.constexpr(20.0 * 1.4426950408889634)  # PyTorch's threshold, 20: beyond it softplus(z) is z


@triton.jit
def _parity(b_x):
    """Cut (2 m, d) into its even and its odd rows."""
    return b_x.reshape(b_x.shape[0] // 2, 2, b_x.shape[1]).permute(0, 2, 1).split()


@triton.jit
def _rows(b_x):
    """Cut (16, d) into a tuple of 16 rows (1, d)."""
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
def _pixel(t, path, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONTINUOUS: tl.constexpr):
    """Find the row-major pixel that a path reads at step t, a number or a block; see `lamamba.ops.grid.path_order`."""
    if CONTINUOUS:
        columns, backwards = path >= 2, path % 2 == 1
    else:
        columns, backwards = path % 2 == 1, path >= 2
    t = tl.where(backwards, HEIGHT * WIDTH - 1 - t, t)
    row, right = t // WIDTH, t % WIDTH
    column, down = t // HEIGHT, t % HEIGHT
    if CONTINUOUS:
        right = tl.where(row % 2 == 1, WIDTH - 1 - right, right)
        down = tl.where(column % 2 == 0, HEIGHT - 1 - down, down)
    return tl.where(columns, down * WIDTH + column, row * WIDTH + right)


@triton.jit
def _pixels(
    first, path,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONTINUOUS: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Find the pixels of a tile's steps; RUN steps at a time lie on one line of the grid, evenly spaced."""
    pixels = ()
    for run in tl.static_range(0, TILE, RUN):
        pixel = _pixel(first + run, path, HEIGHT, WIDTH, CONTINUOUS)
        pixels = pixels + (pixel,)
        if RUN > 1:
            stride = _pixel(first + run + 1, path, HEIGHT, WIDTH, CONTINUOUS) - pixel
            for step in tl.static_range(1, RUN):
                pixels = pixels + (pixel + step * stride,)
    return pixels


@triton.jit
def _expand_steps(
    p_low, p_weight, b_bias, o_pixel, m_pixel, o_d, m_d,
    LOW: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiply out a tile's low-rank step sizes and add the bias (1, d), all times log2(e): (16, d)."""
    b_z = tl.zeros([16, BLOCK], tl.float32)
    for first in tl.static_range(0, RANK, 16):
        o_r = first + tl.arange(0, 16)
        m_r = o_r < RANK
        b_low = tl.load(p_low + o_pixel[:, None] * LOW + o_r[None, :], mask=m_pixel[:, None] & m_r[None, :], other=0.0)
        b_weight = tl.load(p_weight + o_d * RANK + o_r[:, None], mask=m_d & m_r[:, None], other=0.0)
        b_z = tl.dot(b_low, b_weight, b_z, input_precision="ieee")
    return b_z * LOG2_E + b_bias * LOG2_E


@triton.jit
def _softplus(b_z, PRECISE: tl.constexpr):
    """Of z log2(e), return softplus(z) log2(e), of which exp(A softplus(z)) is 2 to the A-fold, and exp(z)."""
    b_u = tl.exp2(b_z)
    b_w = 1 + b_u
    if PRECISE:
        b_log = tl.log2(b_w) + (b_u - (b_w - 1)) / b_w * LOG2_E
    else:
        # Near 1 the logarithm would see only what is left of u.
        b_series = b_u * (LOG2_E + b_u * (-0.5 * LOG2_E + b_u * (LOG2_E / 3)))
        b_log = tl.where(b_u < 0.015625, b_series, libdevice.fast_log2f(b_w))
    return tl.where(b_z > LINEAR, b_z, b_log), b_u


@triton.jit
def summary_kernel(
    p_u, p_low, p_weight, p_bias, p_A, p_carry, p_spent, tiles_per_segment, num_segments,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONTINUOUS: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
    CHANNELS: tl.constexpr, RANK: tl.constexpr, STATES: tl.constexpr, STATES_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr, PRECISE: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Scan a segment from a zero state and keep only its end: the state (n, e), and the sum of step sizes (e).

    Backwards in time it does the same for the gradient of the state, where u is the gradient of y.
    """
    LENGTH: tl.constexpr = HEIGHT * WIDTH
    WHOLE: tl.constexpr = LENGTH % TILE == 0
    LOW: tl.constexpr = 4 * (RANK + 2 * STATES)
    o_d = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    m_d = o_d < CHANNELS
    path, segment, image = tl.program_id(1) % 4, tl.program_id(1) // 4, tl.program_id(2).to(tl.int64)
    o_n = tl.arange(0, STATES_BLOCK)[:, None]
    m_n = o_n < STATES
    o_path = path * CHANNELS + o_d
    b_bias = tl.load(p_bias + o_path, mask=m_d, other=0.0)
    b_A = tl.load(p_A + o_path * STATES + o_n, mask=m_n & m_d, other=0.0)
    p_u += image * LENGTH * CHANNELS
    p_low += image * LENGTH * LOW + path * (RANK + 2 * STATES)
    p_weight += path * CHANNELS * RANK

    b_h = tl.zeros([STATES_BLOCK, BLOCK], tl.float32)
    b_spent = tl.zeros([1, BLOCK], tl.float32)
    first = segment * tiles_per_segment
    last = tl.minimum(first + tiles_per_segment, tl.cdiv(LENGTH, TILE))
    for count in range(first, last):
        start = (first + last - 1 - count if BACKWARD else count) * TILE
        o_t = start + tl.arange(0, TILE)
        m_tile = o_t < LENGTH
        pixels = _pixels(start, path, HEIGHT, WIDTH, CONTINUOUS, TILE, RUN)
        b_us = ()
        b_weights = ()
        for step in tl.static_range(TILE):
            m_t = WHOLE or start + step < LENGTH
            p_weights = p_low + pixels[step] * LOW + RANK + (STATES if BACKWARD else 0)
            b_us = b_us + (tl.load(p_u + pixels[step] * CHANNELS + o_d, mask=m_d & m_t, other=0.0),)
            b_weights = b_weights + (tl.load(p_weights + o_n, mask=m_n & m_t, other=0.0),)
        o_pixel = _pixel(o_t, path, HEIGHT, WIDTH, CONTINUOUS)
        b_z = _expand_steps(p_low, p_weight, b_bias, o_pixel, m_tile, o_d, m_d, LOW, RANK, BLOCK)
        b_delta = _softplus(b_z, PRECISE)[0]
        if not WHOLE:
            b_delta = tl.where(m_tile[:, None], b_delta, 0.0)
        b_deltas = _rows(b_delta)
        for i in tl.static_range(TILE):
            b_u = b_us[TILE - 1 - i if BACKWARD else i].to(tl.float32)
            b_weight = b_weights[TILE - 1 - i if BACKWARD else i].to(tl.float32)
            b_step = b_deltas[TILE - 1 - i if BACKWARD else i]
            b_a = tl.exp2(b_A * b_step)
            b_h = b_a * (b_h + b_weight * b_u) if BACKWARD else b_a * b_h + (b_weight * LN_2) * (b_step * b_u)
            b_spent += b_step
    o_segment = (image * 4 + path) * num_segments + segment
    tl.store(p_carry + (o_segment * STATES + o_n) * CHANNELS + o_d, b_h, mask=m_n & m_d)
    tl.store(p_spent + o_segment * CHANNELS + o_d, b_spent, mask=m_d)


@triton.jit
def forward_kernel(
    p_x, p_low, p_weight, p_bias, p_A, p_D, p_y, p_states, p_carry, p_spent,
    batch, tiles_per_segment, num_segments,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONTINUOUS: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
    CHANNELS: tl.constexpr, RANK: tl.constexpr, STATES: tl.constexpr, STATES_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr, PRECISE: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Scan a segment and write y, one plane for each path; SAVE also writes the state at the start of each tile."""
    LENGTH: tl.constexpr = HEIGHT * WIDTH
    WHOLE: tl.constexpr = LENGTH % TILE == 0
    NUM_TILES: tl.constexpr = (LENGTH + TILE - 1) // TILE
    LOW: tl.constexpr = 4 * (RANK + 2 * STATES)
    o_d = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    m_d = o_d < CHANNELS
    path, segment, image = tl.program_id(1) % 4, tl.program_id(1) // 4, tl.program_id(2).to(tl.int64)
    o_n = tl.arange(0, STATES_BLOCK)[:, None]
    m_n = o_n < STATES
    o_path = path * CHANNELS + o_d
    b_bias = tl.load(p_bias + o_path, mask=m_d, other=0.0)
    b_D = tl.load(p_D + o_path, mask=m_d, other=0.0)
    b_A = tl.load(p_A + o_path * STATES + o_n, mask=m_n & m_d, other=0.0)
    p_x += image * LENGTH * CHANNELS
    p_y += (path * batch + image) * LENGTH * CHANNELS
    p_low += image * LENGTH * LOW + path * (RANK + 2 * STATES)
    p_weight += path * CHANNELS * RANK

    # The state that the segments before leave.
    b_h = tl.zeros([STATES_BLOCK, BLOCK], tl.float32)
    for before in range(segment):
        o_segment = (image * 4 + path) * num_segments + before
        b_spent = tl.load(p_spent + o_segment * CHANNELS + o_d, mask=m_d, other=0.0)
        b_end = tl.load(p_carry + (o_segment * STATES + o_n) * CHANNELS + o_d, mask=m_n & m_d, other=0.0)
        b_h = tl.exp2(b_A * b_spent) * b_h + b_end

    first = segment * tiles_per_segment
    for tile in range(first, tl.minimum(first + tiles_per_segment, NUM_TILES)):
        start = tile * TILE
        o_t = start + tl.arange(0, TILE)
        m_tile = o_t < LENGTH
        # All loads of a tile come before its stores: the compiler cannot know that these do not change what those read.
        pixels = _pixels(start, path, HEIGHT, WIDTH, CONTINUOUS, TILE, RUN)
        b_xs = ()
        b_Bs = ()
        b_Cs = ()
        for step in tl.static_range(TILE):
            m_t = WHOLE or start + step < LENGTH
            p_BC = p_low + pixels[step] * LOW + RANK + o_n
            b_xs = b_xs + (tl.load(p_x + pixels[step] * CHANNELS + o_d, mask=m_d & m_t, other=0.0),)
            b_Bs = b_Bs + (tl.load(p_BC, mask=m_n & m_t, other=0.0),)
            b_Cs = b_Cs + (tl.load(p_BC + STATES, mask=m_n & m_t, other=0.0),)
        o_pixel = _pixel(o_t, path, HEIGHT, WIDTH, CONTINUOUS)
        b_z = _expand_steps(p_low, p_weight, b_bias, o_pixel, m_tile, o_d, m_d, LOW, RANK, BLOCK)
        b_delta = _softplus(b_z, PRECISE)[0]
        if not WHOLE:
            b_delta = tl.where(m_tile[:, None], b_delta, 0.0)
        b_deltas = _rows(b_delta)
        if SAVE:
            p_state = p_states + (((image * 4 + path) * NUM_TILES + tile) * STATES + o_n) * CHANNELS + o_d
            tl.store(p_state, b_h, mask=m_n & m_d)
        for step in tl.static_range(TILE):
            m_t = WHOLE or start + step < LENGTH
            b_x, b_B, b_C = b_xs[step].to(tl.float32), b_Bs[step].to(tl.float32), b_Cs[step].to(tl.float32)
            b_h = tl.exp2(b_A * b_deltas[step]) * b_h + (b_B * LN_2) * (b_deltas[step] * b_x)
            b_y = tl.sum(b_C * b_h, axis=0, keep_dims=True) + b_D * b_x
            tl.store(p_y + pixels[step] * CHANNELS + o_d, b_y.to(p_y.dtype.element_ty), mask=m_d & m_t)


@triton.jit
def backward_kernel(
    p_x, p_low, p_weight, p_bias, p_A, p_D, p_grad_y, p_states, p_carry, p_spent,
    p_grad_x, p_grad_z, p_grad_BC, p_grad_A, p_grad_D, p_grad_bias,
    batch, tiles_per_segment, num_segments,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONTINUOUS: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
    CHANNELS: tl.constexpr, RANK: tl.constexpr, STATES: tl.constexpr, STATES_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Walk a segment's tiles backwards; in each, scan forwards from the saved state, then backwards.

    Writes the gradients by x and by the step sizes before their softplus, a plane for each path; by B and C, a plane
    for each block of channels; by A, D and the bias, a row for each image and segment. The caller adds them up.
    """
    LENGTH: tl.constexpr = HEIGHT * WIDTH
    WHOLE: tl.constexpr = LENGTH % TILE == 0
    NUM_TILES: tl.constexpr = (LENGTH + TILE - 1) // TILE
    LOW: tl.constexpr = 4 * (RANK + 2 * STATES)
    o_d = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    m_d = o_d < CHANNELS
    path, segment, image = tl.program_id(1) % 4, tl.program_id(1) // 4, tl.program_id(2).to(tl.int64)
    o_n = tl.arange(0, STATES_BLOCK)[:, None]
    m_n = o_n < STATES
    o_path = path * CHANNELS + o_d
    b_bias = tl.load(p_bias + o_path, mask=m_d, other=0.0)
    b_D = tl.load(p_D + o_path, mask=m_d, other=0.0)
    b_A = tl.load(p_A + o_path * STATES + o_n, mask=m_n & m_d, other=0.0)
    p_x += image * LENGTH * CHANNELS
    p_grad_y += image * LENGTH * CHANNELS
    p_grad_x += (path * batch + image) * LENGTH * CHANNELS
    p_grad_z += (path * batch + image) * LENGTH * CHANNELS
    p_low += image * LENGTH * LOW + path * (RANK + 2 * STATES)
    p_weight += path * CHANNELS * RANK
    p_grad_BC += ((tl.program_id(0) * batch + image) * LENGTH * 4 + path) * 2 * STATES

    # The gradient that the segments after it leave: always a[t+1] g[t+1] of the step to come.
    b_carry = tl.zeros([STATES_BLOCK, BLOCK], tl.float32)
    for count in range(num_segments - 1 - segment):
        o_segment = (image * 4 + path) * num_segments + num_segments - 1 - count
        b_spent = tl.load(p_spent + o_segment * CHANNELS + o_d, mask=m_d, other=0.0)
        b_end = tl.load(p_carry + (o_segment * STATES + o_n) * CHANNELS + o_d, mask=m_n & m_d, other=0.0)
        b_carry = tl.exp2(b_A * b_spent) * b_carry + b_end

    b_grad_A = tl.zeros([STATES_BLOCK, BLOCK], tl.float32)
    b_grad_D = tl.zeros([1, BLOCK], tl.float32)
    b_grad_bias = tl.zeros([1, BLOCK], tl.float32)
    first = segment * tiles_per_segment
    last = tl.minimum(first + tiles_per_segment, NUM_TILES)
    for count in range(first, last):
        tile = first + last - 1 - count
        start = tile * TILE
        o_t = start + tl.arange(0, TILE)
        m_tile = o_t < LENGTH
        pixels = _pixels(start, path, HEIGHT, WIDTH, CONTINUOUS, TILE, RUN)
        b_xs = ()
        b_grad_ys = ()
        for step in tl.static_range(TILE):
            m_t = WHOLE or start + step < LENGTH
            o_row = pixels[step] * CHANNELS + o_d
            b_xs = b_xs + (tl.load(p_x + o_row, mask=m_d & m_t, other=0.0),)
            b_grad_ys = b_grad_ys + (tl.load(p_grad_y + o_row, mask=m_d & m_t, other=0.0),)
        o_pixel = _pixel(o_t, path, HEIGHT, WIDTH, CONTINUOUS)
        b_z = _expand_steps(p_low, p_weight, b_bias, o_pixel, m_tile, o_d, m_d, LOW, RANK, BLOCK)
        b_delta, b_u = _softplus(b_z, PRECISE)
        b_slope = tl.where(b_z > LINEAR, 1.0, b_u / (1 + b_u))
        if not WHOLE:
            b_delta = tl.where(m_tile[:, None], b_delta, 0.0)
            b_slope = tl.where(m_tile[:, None], b_slope, 0.0)
        b_deltas = _rows(b_delta)
        b_slopes = _rows(b_slope)

        # Sums over the states: of g B, and of the gradient of the exponent delta A times A.
        b_drives = ()
        b_exponents = ()
        for _ in tl.static_range(TILE):
            b_drives = b_drives + (tl.zeros([1, BLOCK], tl.float32),)
            b_exponents = b_exponents + (tl.zeros([1, BLOCK], tl.float32),)
        for state in range(STATES):
            m_state = o_n == state
            b_A_s = tl.sum(tl.where(m_state, b_A, 0.0), axis=0, keep_dims=True)
            b_g = tl.sum(tl.where(m_state, b_carry, 0.0), axis=0, keep_dims=True)
            p_state = p_states + (((image * 4 + path) * NUM_TILES + tile) * STATES + state) * CHANNELS
            b_h = tl.load(p_state + o_d, mask=m_d, other=0.0)
            Bs = ()
            Cs = ()
            for step in tl.static_range(TILE):
                m_t = WHOLE or start + step < LENGTH
                p_BC = p_low + pixels[step] * LOW + RANK + state
                Bs = Bs + (tl.load(p_BC, mask=m_t, other=0.0),)
                Cs = Cs + (tl.load(p_BC + STATES, mask=m_t, other=0.0),)
            b_hs = (b_h,)
            b_as = ()
            for step in tl.static_range(TILE):
                b_a = tl.exp2(b_A_s * b_deltas[step])
                b_h = b_a * b_h + (Bs[step].to(tl.float32) * LN_2) * (b_deltas[step] * b_xs[step].to(tl.float32))
                b_as = b_as + (b_a,)
                b_hs = b_hs + (b_h,)
            b_grad_A_s = tl.zeros([1, BLOCK], tl.float32)
            b_new_drives = ()
            b_new_exponents = ()
            for step in tl.static_range(TILE - 1, -1, -1):
                m_t = WHOLE or start + step < LENGTH
                B, b_grad_y = Bs[step].to(tl.float32), b_grad_ys[step].to(tl.float32)
                b_g += Cs[step].to(tl.float32) * b_grad_y
                grad_B = tl.sum(b_g * (b_deltas[step] * b_xs[step].to(tl.float32))) * LN_2
                grad_C = tl.sum(b_hs[step + 1] * b_grad_y)
                p_BC = p_grad_BC + pixels[step] * 8 * STATES + state
                tl.store(p_BC, grad_B, mask=m_t)
                tl.store(p_BC + STATES, grad_C, mask=m_t)
                b_new_drives = (b_drives[step] + b_g * B,) + b_new_drives
                b_g *= b_as[step]
                b_exponent = b_g * b_hs[step]
                b_new_exponents = (b_exponents[step] + b_exponent * b_A_s,) + b_new_exponents
                b_grad_A_s += b_exponent * b_deltas[step]
            b_drives = b_new_drives
            b_exponents = b_new_exponents
            b_carry = tl.where(m_state, b_g, b_carry)
            b_grad_A += tl.where(m_state, b_grad_A_s * LN_2, 0.0)

        for step in tl.static_range(TILE):
            m_t = WHOLE or start + step < LENGTH
            b_x, b_grad_y = b_xs[step].to(tl.float32), b_grad_ys[step].to(tl.float32)
            b_grad_x = b_drives[step] * (b_deltas[step] * LN_2) + b_D * b_grad_y
            b_grad_z = (b_exponents[step] + b_drives[step] * b_x) * b_slopes[step]
            o_row = pixels[step] * CHANNELS + o_d
            tl.store(p_grad_x + o_row, b_grad_x.to(p_grad_x.dtype.element_ty), mask=m_d & m_t)
            tl.store(p_grad_z + o_row, b_grad_z.to(p_grad_z.dtype.element_ty), mask=m_d & m_t)
            b_grad_D += b_grad_y * b_x
            b_grad_bias += b_grad_z

    o_row = ((image * num_segments + segment) * 4 + path) * CHANNELS + o_d
    tl.store(p_grad_A + o_row * STATES + o_n, b_grad_A, mask=m_n & m_d)
    tl.store(p_grad_D + o_row, b_grad_D, mask=m_d)
    tl.store(p_grad_bias + o_row, b_grad_bias, mask=m_d)
