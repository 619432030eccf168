"""Triton kernels for the scan with several states. They work like those of `kernels.py`, with a loop over the states.

The step sizes of a tile of 16 steps stay in registers while the kernels walk one state after the other. The state at
the end of a tile is stored in memory for the next tile, so there can be any number of states. B and C are in the order
of the paths: the 32 values of a state and tile are one load, and shared memory passes them to every lane. The first
data of the next states are loaded while a state is walked. README.md has the equations.

Names: `p_` pointer, `b_` block of values, `o_` offsets, `m_` mask.
"""

import triton
import triton.language as tl

from lamamba.ops.selective_scan.kernels import (
    LN_2,
    _below,
    _exp2,
    _is_reversed,
    _load_expansion,
    _load_low,
    _pixel,
    _rows,
    _slope,
    _stack,
    _steps,
    _walk_segments,
    numbers,
)


@triton.jit
def _operand(rows, first: tl.constexpr, BLOCK: tl.constexpr):
    """Arrange four rows as the operand of a product; their values already lie in the lanes that it needs."""
    b_rows = tl.join(tl.join(rows[first], rows[first + 1]), tl.join(rows[first + 2], rows[first + 3]))
    return b_rows.reshape(8, 4, BLOCK // 32, 2, 2).permute(2, 1, 4, 3, 0).reshape(BLOCK // 2, 8)


@triton.jit
def _sum_products(rows, others, BLOCK: tl.constexpr):
    """Multiply 16 pairs of rows (1, BLOCK), and sum each product over its channels: (16,).

    In 16 bits, tensor cores add up. `b_pick` is 1 where a place of the operand belongs to a row. Eight partial sums per
    row remain.
    """
    if rows[0].dtype == tl.float32:
        return tl.sum(_stack(rows) * _stack(others), axis=1)
    PLACES: tl.constexpr = BLOCK // 2
    o_row, o_of_four = tl.arange(0, 16)[:, None], tl.arange(0, PLACES)[None, :] % 4
    b_sums = tl.zeros([16, 8], tl.float32)
    for four in tl.static_range(0, 16, 4):
        b_rows = _operand(rows, four, BLOCK) * _operand(others, four, BLOCK)
        b_pick = tl.maximum(1 - tl.abs(o_row - four - o_of_four), 0).to(tl.float32)
        b_sums = tl.dot(b_pick.to(rows[0].dtype), b_rows, b_sums)
    return tl.sum(b_sums, axis=1)


@triton.jit
def _pixels(
    start, path, o_d, m_d,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONTINUOUS: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr,
):
    """Compute offsets (16, d) of the pixels of a tile, and their mask. One access for all 16 compiles much faster."""
    o_t = start + tl.arange(0, TILE)[:, None]
    return _pixel(o_t, path, HEIGHT, WIDTH, CONTINUOUS) * CHANNELS + o_d, m_d & _below(o_t, HEIGHT * WIDTH, TILE)


@triton.jit
def _path_rows(
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONTINUOUS: tl.constexpr, LOW: tl.constexpr, RANK: tl.constexpr,
    STATES: tl.constexpr, VALUES: tl.constexpr, STEPS: tl.constexpr, TILE: tl.constexpr,
):
    """Compute where B and C of steps lie: offsets in (b, h, w, 4, r + 2n) and (b, 4, tiles, n, 2, 16), and masks."""
    LENGTH: tl.constexpr = HEIGHT * WIDTH
    NUM_TILES: tl.constexpr = (LENGTH + TILE - 1) // TILE
    path, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_t = tl.program_id(0) * STEPS + tl.arange(0, STEPS)[None, :]
    o_value = tl.arange(0, VALUES)[:, None]
    o_low = image * LENGTH * LOW + _pixel(o_t, path, HEIGHT, WIDTH, CONTINUOUS) * LOW
    o_tile = ((image * 4 + path) * NUM_TILES + o_t // TILE) * 2 * STATES * TILE
    o_row = o_tile + (o_value % STATES * 2 + o_value // STATES) * TILE + o_t % TILE
    m_low, m_row = (o_value < 2 * STATES) & (o_t < LENGTH), (o_value < 2 * STATES) & (o_t < NUM_TILES * TILE)
    return o_low + path * (LOW // 4) + RANK + o_value, o_row, m_low, m_row


@triton.jit
def to_paths_kernel(
    p_low, p_rows,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONTINUOUS: tl.constexpr, LOW: tl.constexpr, RANK: tl.constexpr,
    STATES: tl.constexpr, VALUES: tl.constexpr, STEPS: tl.constexpr, TILE: tl.constexpr,
):
    """Copy B and C into the order of the paths, so that the values of a state and tile are contiguous."""
    o_low, o_row, m_low, m_row = _path_rows(HEIGHT, WIDTH, CONTINUOUS, LOW, RANK, STATES, VALUES, STEPS, TILE)
    tl.store(p_rows + o_row, tl.load(p_low + o_low, mask=m_low, other=0.0).to(tl.float32), mask=m_row)


@triton.jit(do_not_specialize=["num_planes", "plane"])
def from_paths_kernel(
    p_grad_rows, p_grad_low, num_planes, plane,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONTINUOUS: tl.constexpr, LOW: tl.constexpr, RANK: tl.constexpr,
    STATES: tl.constexpr, VALUES: tl.constexpr, STEPS: tl.constexpr, TILE: tl.constexpr,
):
    """Sum the gradients of B and C over planes that are `plane` apart, and copy the sums to their places in low."""
    o_low, o_row, m_low, _ = _path_rows(HEIGHT, WIDTH, CONTINUOUS, LOW, RANK, STATES, VALUES, STEPS, TILE)
    b_sum = tl.zeros([VALUES, STEPS], tl.float32)
    for index in range(0, num_planes):
        b_sum += tl.load(p_grad_rows + tl.cast(index, tl.int64) * plane + o_row, mask=m_low, other=0.0)
    tl.store(p_grad_low + o_low, b_sum.to(p_grad_low.dtype.element_ty), mask=m_low)


@triton.jit(do_not_specialize=["plane", "first_image", "tiles_per_segment", "num_segments"])
def states_summary_kernel(
    p_u, p_low, p_rows, p_weight, p_bias, p_rates, p_carry, p_decay,
    plane, first_image, tiles_per_segment, num_segments,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONTINUOUS: tl.constexpr, TILE: tl.constexpr,
    CHANNELS: tl.constexpr, LOW: tl.constexpr, RANK: tl.constexpr, STATES: tl.constexpr,
    BLOCK: tl.constexpr, PRECISE: tl.constexpr, BACKWARD: tl.constexpr,
):
    """Scan a segment from a zero state; store the last states and the decays over the segment, each (n, e).

    BACKWARD does the same backward in time for the gradient of the state. Then u is the gradient of y, and `plane` is
    the distance between the gradients of two paths. The segment that is walked last has no program, because no other
    segment needs its end. Results are indexed by image - `first_image`.
    """
    LENGTH: tl.constexpr = HEIGHT * WIDTH
    NUM_TILES: tl.constexpr = (LENGTH + TILE - 1) // TILE
    o_d = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    m_d = _below(o_d, CHANNELS, BLOCK)
    path, image = tl.program_id(1) % 4, first_image + tl.program_id(2).to(tl.int64)
    segment = tl.program_id(1) // 4
    segment = tl.where(_is_reversed(path, CONTINUOUS), num_segments - 2 - segment, segment) + (1 if BACKWARD else 0)
    b_bias = tl.load(p_bias + path * CHANNELS + o_d, mask=m_d, other=0.0)
    p_rates += path * STATES * CHANNELS + o_d
    p_u += image * LENGTH * CHANNELS + path.to(tl.int64) * plane
    p_low += image * LENGTH * LOW + path * (LOW // 4)
    p_rows += (image * 4 + path) * NUM_TILES * 2 * STATES * TILE
    o_end = ((tl.program_id(2).to(tl.int64) * 4 + path) * num_segments + segment) * STATES * CHANNELS + o_d
    weights = _load_expansion(p_weight, path, o_d, m_d, CHANNELS, RANK)

    b_total = tl.zeros([1, BLOCK], tl.float32)
    first = segment * tiles_per_segment
    last = tl.minimum(first + tiles_per_segment, NUM_TILES)
    b_lows = _load_low(p_low, (last - 1 if BACKWARD else first) * TILE, path, LOW, RANK, HEIGHT, WIDTH, CONTINUOUS)
    for count in range(first, last):
        tile = first + last - 1 - count if BACKWARD else count
        start = tile * TILE
        o_pixels, m_pixels = _pixels(start, path, o_d, m_d, HEIGHT, WIDTH, CONTINUOUS, CHANNELS, TILE)
        b_us = _rows(tl.load(p_u + o_pixels, mask=m_pixels, other=0.0))
        b_ms = _steps(b_lows, weights, b_bias, start, LENGTH, RANK, PRECISE)
        b_lows = _load_low(p_low, start + (-TILE if BACKWARD else TILE), path, LOW, RANK, HEIGHT, WIDTH, CONTINUOUS)
        b_inputs = ()
        for step in tl.static_range(TILE):
            b_u = b_us[step].to(tl.float32)
            b_inputs = b_inputs + (b_u if BACKWARD else b_ms[step] * b_u * LN_2,)
            b_total += b_ms[step]
        for state in range(0, STATES):
            b_A = -tl.load(p_rates + state * CHANNELS, mask=m_d, other=0.0)
            p_end = p_carry + o_end + state * CHANNELS
            b_h = tl.load(p_end, mask=m_d & (count > first), other=0.0)
            BC = numbers(tl.load(p_rows + (tile * STATES + state) * 2 * TILE + tl.arange(0, 32)))
            for i in tl.static_range(TILE):
                b_a = _exp2(b_A * b_ms[TILE - 1 - i if BACKWARD else i], PRECISE)
                if BACKWARD:
                    b_h = b_a * (BC[2 * TILE - 1 - i] * b_inputs[TILE - 1 - i] + b_h)
                else:
                    b_h = tl.fma(b_a, b_h, BC[i] * b_inputs[i])
            tl.store(p_end, b_h, mask=m_d)
        tl.debug_barrier()
    for state in range(0, STATES):
        b_A = -tl.load(p_rates + state * CHANNELS, mask=m_d, other=0.0)
        tl.store(p_decay + o_end + state * CHANNELS, _exp2(b_A * b_total, PRECISE), mask=m_d)


@triton.jit(do_not_specialize=["batch", "tiles_per_segment", "num_segments"])
def states_forward_kernel(
    p_x, p_low, p_rows, p_weight, p_bias, p_rates, p_D, p_y, p_room, p_saved, p_carry, p_decay,
    batch, tiles_per_segment, num_segments,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONTINUOUS: tl.constexpr, TILE: tl.constexpr,
    CHANNELS: tl.constexpr, LOW: tl.constexpr, RANK: tl.constexpr, STATES: tl.constexpr,
    BLOCK: tl.constexpr, PRECISE: tl.constexpr, AT_ONCE: tl.constexpr, SAVE: tl.constexpr,
):
    """Scan a segment and write y, one plane per path.

    `p_room` has room for the states of each program between two tiles. With SAVE, `p_saved` receives the states at the
    start of each tile, for the backward pass.
    """
    LENGTH: tl.constexpr = HEIGHT * WIDTH
    NUM_TILES: tl.constexpr = (LENGTH + TILE - 1) // TILE
    o_d = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    m_d = _below(o_d, CHANNELS, BLOCK)
    path, segment, image = tl.program_id(1) % 4, tl.program_id(1) // 4, tl.program_id(2).to(tl.int64)
    # A path and its reverse read the same pixels at the same time: only one of them waits for memory.
    segment = tl.where(_is_reversed(path, CONTINUOUS), num_segments - 1 - segment, segment)
    b_bias = tl.load(p_bias + path * CHANNELS + o_d, mask=m_d, other=0.0)
    b_D = tl.load(p_D + path * CHANNELS + o_d, mask=m_d, other=0.0)
    p_rates += path * STATES * CHANNELS + o_d
    p_x += image * LENGTH * CHANNELS
    p_y += (path * batch + image) * LENGTH * CHANNELS
    p_low += image * LENGTH * LOW + path * (LOW // 4)
    first = segment * tiles_per_segment
    last = tl.minimum(first + tiles_per_segment, NUM_TILES)
    p_row = p_rows + ((image * 4 + path) * NUM_TILES + first) * 2 * STATES * TILE + tl.arange(0, 32)
    weights = _load_expansion(p_weight, path, o_d, m_d, CHANNELS, RANK)

    o_segment = (image * 4 + path) * num_segments
    p_state = p_room + (o_segment + segment) * STATES * CHANNELS + o_d
    p_saved += ((image * 4 + path) * NUM_TILES + first) * STATES * CHANNELS + o_d
    for state in range(0, STATES):
        o_first = (o_segment * STATES + state) * CHANNELS + o_d
        b_h = _walk_segments(p_carry, p_decay, o_first, STATES * CHANNELS, segment, m_d)
        tl.store(p_state + state * CHANNELS, b_h, mask=m_d)
        if SAVE:
            tl.store(p_saved + state * CHANNELS, b_h.to(p_saved.dtype.element_ty), mask=m_d)

    b_lows = _load_low(p_low, first * TILE, path, LOW, RANK, HEIGHT, WIDTH, CONTINUOUS)
    b_rows = ()
    b_rates = ()
    b_starts = ()
    for i in tl.static_range(AT_ONCE):
        b_rows = b_rows + (tl.load(p_row + i * 2 * TILE),)
        b_rates = b_rates + (tl.load(p_rates + i * CHANNELS, mask=m_d, other=0.0),)
        b_starts = b_starts + (tl.load(p_state + i * CHANNELS, mask=m_d, other=0.0),)
    for tile in range(first, last):
        start = tile * TILE
        is_last = tile + 1 == last
        o_pixels, m_pixels = _pixels(start, path, o_d, m_d, HEIGHT, WIDTH, CONTINUOUS, CHANNELS, TILE)
        b_xs = _rows(tl.load(p_x + o_pixels, mask=m_pixels, other=0.0))
        b_ms = _steps(b_lows, weights, b_bias, start, LENGTH, RANK, PRECISE)
        b_lows = _load_low(p_low, start + TILE, path, LOW, RANK, HEIGHT, WIDTH, CONTINUOUS)
        b_inputs = ()
        b_ys = ()
        for step in tl.static_range(TILE):
            b_x = b_xs[step].to(tl.float32)
            b_inputs = b_inputs + (b_ms[step] * b_x * LN_2,)
            b_ys = b_ys + (b_D * b_x,)
        for turn in range(0, STATES, AT_ONCE):
            # Load the first data of the next iteration, which may belong to the next tile. The compiler would move
            # these loads to the end of this iteration, too late, but the barriers in `numbers` prevent that.
            wraps = turn + AT_ONCE == STATES
            to_come = tl.where(wraps, 0, turn + AT_ONCE)
            p_row += tl.where(wraps & is_last, 0, AT_ONCE * 2 * TILE)
            p_start = p_state + to_come * CHANNELS
            b_new_rows = ()
            b_new_rates = ()
            b_new_starts = ()
            for i in tl.static_range(AT_ONCE):
                b_new_rows = b_new_rows + (tl.load(p_row + i * 2 * TILE),)
                b_new_rates = b_new_rates + (tl.load(p_rates + (to_come + i) * CHANNELS, mask=m_d, other=0.0),)
                b_new_starts = b_new_starts + (tl.load(p_start + i * CHANNELS, mask=m_d, other=0.0),)
            for i in tl.static_range(AT_ONCE):
                b_h, b_A, BC = b_starts[i], -b_rates[i], numbers(b_rows[i])
                b_sums = ()
                for step in tl.static_range(TILE):
                    b_h = tl.fma(_exp2(b_A * b_ms[step], PRECISE), b_h, BC[step] * b_inputs[step])
                    b_sums = b_sums + (b_ys[step] + BC[TILE + step] * b_h,)
                b_ys = b_sums
                tl.store(p_state + (turn + i) * CHANNELS, b_h, mask=m_d)
                if SAVE:
                    p_next = p_saved + (STATES + turn + i) * CHANNELS
                    tl.store(p_next, b_h.to(p_saved.dtype.element_ty), mask=m_d & (not is_last))
            b_rows, b_rates, b_starts = b_new_rows, b_new_rates, b_new_starts
        p_saved += STATES * CHANNELS
        b_new_ys = ()
        for step in tl.static_range(TILE):
            b_new_ys = b_new_ys + (b_ys[step].to(p_y.dtype.element_ty),)
        # y is not read again soon: this leaves the cache to other data.
        tl.store(p_y + o_pixels, _stack(b_new_ys), mask=m_pixels, cache_modifier=".cs")
        tl.debug_barrier()


@triton.jit(do_not_specialize=["plane", "batch", "first_image", "tiles_per_segment", "num_segments"])
def states_backward_kernel(
    p_x, p_low, p_rows, p_weight, p_bias, p_rates, p_D, p_grad_y, p_states, p_carry, p_decay,
    p_grads, p_grad_x, p_grad_z, p_grad_rows, p_grad_shared,
    plane, batch, first_image, tiles_per_segment, num_segments,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONTINUOUS: tl.constexpr, TILE: tl.constexpr,
    CHANNELS: tl.constexpr, LOW: tl.constexpr, RANK: tl.constexpr, STATES: tl.constexpr,
    BLOCK: tl.constexpr, PRECISE: tl.constexpr, AT_ONCE: tl.constexpr,
):
    """Walk the tiles of a segment backward; in each, scan every state forward from the saved one, then backward.

    Writes these gradients, which the caller adds up:

    * of x and of the step sizes before softplus, one plane per path
    * of B and C, in the order of `to_paths_kernel`, one plane per block of channels
    * of A_log, D and the bias, (n + 2, 4, e) per image (counted from `first_image`) and segment

    `plane` is the distance between the gradients of y of two paths. `p_grads` has room for the gradients of the states.
    """
    LENGTH: tl.constexpr = HEIGHT * WIDTH
    NUM_TILES: tl.constexpr = (LENGTH + TILE - 1) // TILE
    SUM: tl.constexpr = tl.float32 if PRECISE else tl.bfloat16
    o_d = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    m_d = _below(o_d, CHANNELS, BLOCK)
    path, segment, count_of_image = tl.program_id(1) % 4, tl.program_id(1) // 4, tl.program_id(2).to(tl.int64)
    image = first_image + count_of_image
    o_path = path * CHANNELS + o_d
    b_bias = tl.load(p_bias + o_path, mask=m_d, other=0.0)
    b_D = tl.load(p_D + o_path, mask=m_d, other=0.0)
    p_rates += path * STATES * CHANNELS + o_d
    p_x += image * LENGTH * CHANNELS
    p_grad_y += image * LENGTH * CHANNELS + path.to(tl.int64) * plane
    p_grad_x += (path * batch + image) * LENGTH * CHANNELS
    p_grad_z += (path * batch + image) * LENGTH * CHANNELS
    p_low += image * LENGTH * LOW + path * (LOW // 4)
    p_rows += (image * 4 + path) * NUM_TILES * 2 * STATES * TILE + tl.arange(0, 32)
    o_block = (tl.program_id(0).to(tl.int64) * batch + image) * 4 + path
    p_grad_rows += o_block * NUM_TILES * 2 * STATES * TILE + tl.arange(0, 16)
    p_grad_A = p_grad_shared + (count_of_image * num_segments + segment) * (STATES + 2) * 4 * CHANNELS + o_path
    weights = _load_expansion(p_weight, path, o_d, m_d, CHANNELS, RANK)

    # b_g always holds a[t+1] g[t+1], from the step that was walked before.
    o_segment = (count_of_image * 4 + path) * num_segments
    p_grad = p_grads + (o_segment + segment) * STATES * CHANNELS + o_d
    for state in range(0, STATES):
        o_first = ((o_segment + num_segments - 1) * STATES + state) * CHANNELS + o_d
        b_g = _walk_segments(p_carry, p_decay, o_first, -STATES * CHANNELS, num_segments - 1 - segment, m_d)
        tl.store(p_grad + state * CHANNELS, b_g, mask=m_d)
        tl.store(p_grad_A + state * 4 * CHANNELS, tl.zeros([1, BLOCK], tl.float32), mask=m_d)

    b_grad_D = tl.zeros([1, BLOCK], tl.float32)
    b_grad_bias = tl.zeros([1, BLOCK], tl.float32)
    first = segment * tiles_per_segment
    last = tl.minimum(first + tiles_per_segment, NUM_TILES)
    b_lows = _load_low(p_low, (last - 1) * TILE, path, LOW, RANK, HEIGHT, WIDTH, CONTINUOUS)
    for count in range(first, last):
        tile = first + last - 1 - count
        start = tile * TILE
        o_pixels, m_pixels = _pixels(start, path, o_d, m_d, HEIGHT, WIDTH, CONTINUOUS, CHANNELS, TILE)
        b_xs = _rows(tl.load(p_x + o_pixels, mask=m_pixels, other=0.0))
        b_grad_ys = _rows(tl.load(p_grad_y + o_pixels, mask=m_pixels, other=0.0))
        p_row = p_rows + tile * 2 * STATES * TILE
        p_state = p_states + ((image * 4 + path) * NUM_TILES + tile) * STATES * CHANNELS + o_d
        b_rows = ()
        b_rates = ()
        b_starts = ()
        b_gs = ()
        b_grad_As = ()
        for i in tl.static_range(AT_ONCE):
            b_rows = b_rows + (tl.load(p_row + i * 2 * TILE),)
            b_rates = b_rates + (tl.load(p_rates + i * CHANNELS, mask=m_d, other=0.0),)
            b_starts = b_starts + (tl.load(p_state + i * CHANNELS, mask=m_d, other=0.0).to(tl.float32),)
            b_gs = b_gs + (tl.load(p_grad + i * CHANNELS, mask=m_d, other=0.0),)
            b_grad_As = b_grad_As + (tl.load(p_grad_A + i * 4 * CHANNELS, mask=m_d, other=0.0),)
        b_ms = _steps(b_lows, weights, b_bias, start, LENGTH, RANK, PRECISE)
        b_lows = _load_low(p_low, start - TILE, path, LOW, RANK, HEIGHT, WIDTH, CONTINUOUS)

        # Sums over the states: g B, and the gradient of the exponent times A.
        b_inputs = ()
        b_drives = ()
        b_exponents = ()
        b_rounded = ()
        b_rounded_ys = ()
        for step in tl.static_range(TILE):
            b_inputs = b_inputs + (b_ms[step] * b_xs[step].to(tl.float32) * LN_2,)
            b_drives = b_drives + (tl.zeros([1, BLOCK], tl.float32),)
            b_exponents = b_exponents + (tl.zeros([1, BLOCK], tl.float32),)
            b_rounded = b_rounded + (b_inputs[step].to(SUM),)
            b_rounded_ys = b_rounded_ys + (b_grad_ys[step].to(SUM),)
        for turn in range(0, STATES, AT_ONCE):
            b_new_rows = ()
            b_new_rates = ()
            b_new_starts = ()
            b_new_gs = ()
            b_new_grad_As = ()
            for i in tl.static_range(AT_ONCE):
                current = turn + i
                b_h, b_g, b_grad_A = b_starts[i], b_gs[i], b_grad_As[i]
                b_A, BC = -b_rates[i], numbers(b_rows[i])
                b_hs = (b_h,)
                b_as = ()
                for step in tl.static_range(TILE):
                    b_a = _exp2(b_A * b_ms[step], PRECISE)
                    b_h = tl.fma(b_a, b_h, BC[step] * b_inputs[step])
                    b_as = b_as + (b_a,)
                    b_hs = b_hs + (b_h,)
                b_grad_Bs = ()
                b_grad_Cs = ()
                b_new_drives = ()
                b_new_exponents = ()
                for step in tl.static_range(TILE - 1, -1, -1):
                    b_grad_y = b_grad_ys[step].to(tl.float32)
                    b_g += BC[TILE + step] * b_grad_y
                    b_grad_Bs = (b_g.to(SUM),) + b_grad_Bs
                    b_grad_Cs = (b_hs[step + 1].to(SUM),) + b_grad_Cs
                    b_new_drives = (b_drives[step] + b_g * BC[step],) + b_new_drives
                    b_g *= b_as[step]
                    b_exponent = b_g * b_hs[step]
                    b_new_exponents = (b_exponents[step] + b_exponent * b_A,) + b_new_exponents
                    b_grad_A += b_exponent * b_ms[step]
                b_drives = b_new_drives
                b_exponents = b_new_exponents
                p_grad_row = p_grad_rows + (tile * STATES + current) * 2 * TILE
                b_sums = _sum_products(b_grad_Bs, b_rounded, BLOCK)
                tl.store(p_grad_row, b_sums.to(p_grad_rows.dtype.element_ty))
                b_sums = _sum_products(b_grad_Cs, b_rounded_ys, BLOCK)
                tl.store(p_grad_row + TILE, b_sums.to(p_grad_rows.dtype.element_ty))
                tl.store(p_grad + current * CHANNELS, b_g, mask=m_d)
                b_last = tl.where(count + 1 == last, b_A * LN_2, 1.0)
                tl.store(p_grad_A + current * 4 * CHANNELS, b_grad_A * b_last, mask=m_d)
                if i == 0:  # load the first data of the next iteration while there is still work left in this one
                    for j in tl.static_range(AT_ONCE):
                        to_come = tl.minimum(turn + AT_ONCE, STATES - AT_ONCE) + j
                        b_new_rows = b_new_rows + (tl.load(p_row + to_come * 2 * TILE),)
                        b_new_rates = b_new_rates + (tl.load(p_rates + to_come * CHANNELS, mask=m_d, other=0.0),)
                        b_start = tl.load(p_state + to_come * CHANNELS, mask=m_d, other=0.0)
                        b_new_starts = b_new_starts + (b_start.to(tl.float32),)
                        b_new_gs = b_new_gs + (tl.load(p_grad + to_come * CHANNELS, mask=m_d, other=0.0),)
                        b_of_A = tl.load(p_grad_A + to_come * 4 * CHANNELS, mask=m_d, other=0.0)
                        b_new_grad_As = b_new_grad_As + (b_of_A,)
            b_rows, b_rates, b_starts = b_new_rows, b_new_rates, b_new_starts
            b_gs, b_grad_As = b_new_gs, b_new_grad_As

        # Read x again, because keeping it would have taken registers that the loop needed.
        b_xs = _rows(tl.load(p_x + o_pixels, mask=m_pixels, other=0.0))
        b_grad_xs = ()
        b_grad_zs = ()
        for step in tl.static_range(TILE):
            b_m, b_x, b_grad_y = b_ms[step], b_xs[step].to(tl.float32), b_grad_ys[step].to(tl.float32)
            b_drive = b_drives[step] * LN_2
            b_grad_z = (b_exponents[step] * LN_2 + b_drive * b_x) * _slope(b_m, PRECISE)
            b_grad_xs = b_grad_xs + ((b_drive * b_m + b_D * b_grad_y).to(p_grad_x.dtype.element_ty),)
            b_grad_zs = b_grad_zs + (b_grad_z.to(p_grad_z.dtype.element_ty),)
            b_grad_D += b_grad_y * b_x
            b_grad_bias += b_grad_z
        tl.store(p_grad_x + o_pixels, _stack(b_grad_xs), mask=m_pixels)
        tl.store(p_grad_z + o_pixels, _stack(b_grad_zs), mask=m_pixels)
        tl.debug_barrier()
    tl.store(p_grad_A + STATES * 4 * CHANNELS, b_grad_D, mask=m_d)
    tl.store(p_grad_A + (STATES + 1) * 4 * CHANNELS, b_grad_bias, mask=m_d)
