"""Triton kernels for the scan of sequences, forward and backward; see README.md.

One program is one warp. It walks one sequence, or a segment of it, for a block of channels of one group: lanes are
channels, and time is a loop over tiles of 16 steps. A tile is read along its contiguous dimension, which may be time
or channels. Shared memory then passes it to the lanes, so that each has all steps of its channel.

AT_ONCE states stay in registers. If there are more, a loop walks as many at a time, and keeps the others in memory. It
loads the data of its next iteration first, as the kernels of `lamamba.ops.selective_scan.states_kernels` do.

Tensors of sequences are (b, g, w, l) and come with their strides. States are (b, g, segments or tiles, n, w), and
`p_rates` is A as (g, n, w), all contiguous. `p_carry` holds the state before each segment, and receives the state after
it. A missing tensor is None.

Names: `p_` pointer, `b_` block of values, `o_` offsets, `m_` mask, `s_` strides.
"""

import triton
import triton.language as tl

from lamamba.ops.selective_scan.kernels import LN_2, LOG2_E, _exp2, _rows, _slope, _softplus, _stack, numbers
from lamamba.ops.selective_scan.states_kernels import _operand


@triton.jit
def _within(o_t, length, WHOLE: tl.constexpr):
    """Return the mask of steps within the sequence; a constant, which helps the compiler, if tiles fill it."""
    if WHOLE:
        return tl.full(o_t.shape, 1, tl.int1)
    return o_t < length


@triton.jit
def _place(num_channels, BLOCK: tl.constexpr):
    """Find the image and the group of a program, its channels (1, BLOCK) within the group, and their mask."""
    num_blocks = tl.cdiv(num_channels, BLOCK)
    o_w = (tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    return tl.program_id(2).to(tl.int64), (tl.program_id(0) // num_blocks).to(tl.int64), o_w, o_w < num_channels


@triton.jit
def _lanes(p_x, s_x, image, group, o_w):
    """Compute pointers (1, BLOCK) to the first step of each channel."""
    return p_x + image * s_x[0] + group * s_x[1] + o_w.to(tl.int64) * s_x[2]


@triton.jit
def _at(p_xs, s_x, o_t):
    """Compute pointers (TILE, BLOCK) to steps from pointers to the first step of each channel."""
    return p_xs + o_t.to(tl.int64) * s_x[3]


@triton.jit
def _m(b_delta, b_bias, m_t, WHOLE: tl.constexpr, SOFTPLUS: tl.constexpr, PRECISE: tl.constexpr):
    """Compute m = delta log2(e). Steps beyond the end of the sequence get 0, so that they change nothing."""
    b_m = b_delta.to(tl.float32) * LOG2_E + b_bias * LOG2_E
    if SOFTPLUS:
        b_m = _softplus(b_m, PRECISE, True)
    return b_m if WHOLE else tl.where(m_t, b_m, 0.0)


@triton.jit
def _sigmoid(b_z, PRECISE: tl.constexpr):
    if PRECISE:
        return tl.div_rn(1.0, 1.0 + _exp2(b_z * -LOG2_E, PRECISE))
    return 1.0 / (1.0 + _exp2(b_z * -LOG2_E, PRECISE))


@triton.jit
def _load_states(p, first, stride, m, AT_ONCE: tl.constexpr):
    """Load rows (1, BLOCK) of states, from `first` on."""
    rows = ()
    for i in tl.static_range(AT_ONCE):
        rows = rows + (tl.load(p + (first + i) * stride, mask=m, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def _load_weights(p_B, s_B, p_C, s_C, first, start, length, TILE: tl.constexpr, AT_ONCE: tl.constexpr):
    """Load B ln(2) and C of a tile, from state `first` on, each state as one block (2 TILE,)."""
    o_i = tl.arange(0, 2 * TILE)
    o_t = (start + o_i % TILE).to(tl.int64)
    blocks = ()
    for i in tl.static_range(AT_ONCE):
        p_B_t, p_C_t = p_B + (first + i) * s_B[2] + o_t * s_B[3], p_C + (first + i) * s_C[2] + o_t * s_C[3]
        b_B = tl.load(p_B_t, mask=(o_i < TILE) & (o_t < length), other=0.0).to(tl.float32)
        b_C = tl.load(p_C_t, mask=(o_i >= TILE) & (o_t < length), other=0.0).to(tl.float32)
        blocks = blocks + (b_B * LN_2 + b_C,)
    return blocks


@triton.jit
def _zeros(TILE: tl.constexpr, BLOCK: tl.constexpr):
    rows = ()
    for _ in tl.static_range(TILE):
        rows = rows + (tl.zeros([1, BLOCK], tl.float32),)
    return rows


@triton.jit
def _walk(b_h, b_A, BC, b_ms, b_inputs, b_ys, TILE: tl.constexpr, PRECISE: tl.constexpr, BACKWARD: tl.constexpr):
    """Walk one state along a tile, and add what it contributes to y. BACKWARD walks its gradient; inputs are dy."""
    b_sums = ()
    for i in tl.static_range(TILE):
        if BACKWARD:
            b_h = _exp2(b_A * b_ms[TILE - 1 - i], PRECISE) * (b_h + BC[2 * TILE - 1 - i] * b_inputs[TILE - 1 - i])
            b_sums = b_sums + (b_ys[i],)
        else:
            b_h = tl.fma(_exp2(b_A * b_ms[i], PRECISE), b_h, BC[i] * b_inputs[i])
            b_sums = b_sums + (b_ys[i] + BC[TILE + i] * b_h,)
    return b_h, b_sums


@triton.jit(do_not_specialize=["num_groups", "tiles_per_segment", "num_segments"])
def sequence_forward_kernel(
    p_u, s_u, p_delta, s_delta, p_rates, p_B, s_B, p_C, s_C, p_D, p_z, s_z, p_bias, p_y, s_y, p_states,
    p_carry, p_decay, num_groups, num_channels, length, tiles_per_segment, num_segments,
    STATES: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, SOFTPLUS: tl.constexpr,
    WHOLE: tl.constexpr, PRECISE: tl.constexpr, STARTED: tl.constexpr, BACKWARD: tl.constexpr,
):
    """Scan a segment, write y, and in `p_states` the state at the start of each tile.

    `p_decay` instead of `p_y` asks for a summary of the segment: its last state from a zero state, and its decay.
    BACKWARD does the same for the gradient of the state, backward in time; then u is the gradient of y. The segment
    that is walked last has no program, because no other needs its end. STARTED says that `p_carry` holds states to
    start with; else these are zero.
    """
    IN_REGISTERS: tl.constexpr = STATES == AT_ONCE
    image, group, o_w, m_w = _place(num_channels, BLOCK)
    segment = tl.program_id(1) + (1 if BACKWARD else 0)
    o_c = group * num_channels + o_w
    o_segment = (image * num_groups + group) * num_segments + segment
    num_tiles = tl.cdiv(length, TILE)
    first = segment * tiles_per_segment
    last = tl.minimum(first + tiles_per_segment, num_tiles)
    p_us = _lanes(p_u, s_u, image, group, o_w)
    p_deltas = _lanes(p_delta, s_delta, image, group, o_w)
    p_zs = None if p_z is None else _lanes(p_z, s_z, image, group, o_w)
    p_rates += group * STATES * num_channels + o_w
    p_carry += o_segment * STATES * num_channels + o_w
    p_B += image * s_B[0] + group * s_B[1]
    p_C += image * s_C[0] + group * s_C[1]
    b_bias = 0.0 if p_bias is None else tl.load(p_bias + o_c, mask=m_w, other=0.0)
    b_D = 0.0 if p_D is None else tl.load(p_D + o_c, mask=m_w, other=0.0)

    b_total = tl.zeros([1, BLOCK], tl.float32)
    b_hs = _load_states(p_carry, 0, num_channels, m_w & STARTED, AT_ONCE)
    o_next = (last - 1 if BACKWARD else first) * TILE + tl.arange(0, TILE)[:, None]
    m_next = m_w & _within(o_next, length, WHOLE)
    b_next_u = tl.load(_at(p_us, s_u, o_next), mask=m_next, other=0.0)
    b_next_delta = tl.load(_at(p_deltas, s_delta, o_next), mask=m_next, other=0.0)
    for count in range(first, last):
        tile = first + last - 1 - count if BACKWARD else count
        o_t = tile * TILE + tl.arange(0, TILE)[:, None]
        m_t = _within(o_t, length, WHOLE)
        m = m_w & m_t
        # All loads of a tile come before its stores, because the compiler cannot know that they do not overlap.
        b_u, b_delta = b_next_u.to(tl.float32), b_next_delta
        o_next = o_t + (-TILE if BACKWARD else TILE)
        m_next = m_w & (count + 1 < last) & _within(o_next, length, WHOLE)
        b_next_u = tl.load(_at(p_us, s_u, o_next), mask=m_next, other=0.0)
        b_next_delta = tl.load(_at(p_deltas, s_delta, o_next), mask=m_next, other=0.0)
        b_BCs = _load_weights(p_B, s_B, p_C, s_C, 0, tile * TILE, length, TILE, AT_ONCE)
        b_As = _load_states(p_rates, 0, num_channels, m_w, AT_ONCE)
        if not IN_REGISTERS:
            b_hs = _load_states(p_carry, 0, num_channels, m_w & (STARTED or count > first), AT_ONCE)
        b_z = 0.0
        if p_z is not None:
            b_z = tl.load(_at(p_zs, s_z, o_t), mask=m, other=0.0).to(tl.float32)
        b_m = _m(b_delta, b_bias, m_t, WHOLE, SOFTPLUS, PRECISE)
        b_total += tl.sum(b_m, axis=0)[None, :]
        b_ms = _rows(b_m)
        if BACKWARD:
            if p_z is not None:
                b_u *= b_z * _sigmoid(b_z, PRECISE)
            b_inputs = _rows(b_u)
        else:
            b_inputs = _rows(b_m * b_u)
        b_ys = _zeros(TILE, BLOCK)
        for turn in range(0, STATES, AT_ONCE):
            to_come = tl.minimum(turn + AT_ONCE, STATES - AT_ONCE)
            b_next_BCs, b_next_As, b_next_hs = b_BCs, b_As, b_hs
            if not IN_REGISTERS:
                b_next_BCs = _load_weights(p_B, s_B, p_C, s_C, to_come, tile * TILE, length, TILE, AT_ONCE)
                b_next_As = _load_states(p_rates, to_come, num_channels, m_w, AT_ONCE)
                b_next_hs = _load_states(p_carry, to_come, num_channels, m_w & (STARTED or count > first), AT_ONCE)
            b_ends = ()
            for i in tl.static_range(AT_ONCE):
                o_state = (turn + i) * num_channels
                if p_states is not None:
                    o_tile = ((image * num_groups + group) * num_tiles + tile) * STATES * num_channels + o_w
                    tl.store(p_states + o_tile + o_state, b_hs[i].to(p_states.dtype.element_ty), mask=m_w)
                b_h, b_ys = _walk(b_hs[i], b_As[i], numbers(b_BCs[i]), b_ms, b_inputs, b_ys, TILE, PRECISE, BACKWARD)
                b_ends = b_ends + (b_h,)
                tl.store(p_carry + o_state, b_h, mask=m_w & (not IN_REGISTERS or count == last - 1))
            b_BCs, b_As, b_hs = b_next_BCs, b_next_As, b_next_hs
            if IN_REGISTERS:
                b_hs = b_ends
        if p_y is not None:
            b_y = _stack(b_ys) + b_D * b_u
            if p_z is not None:
                b_y *= b_z * _sigmoid(b_z, PRECISE)
            p_ys = _at(_lanes(p_y, s_y, image, group, o_w), s_y, o_t)
            tl.store(p_ys, b_y.to(p_y.dtype.element_ty), mask=m)
        if not IN_REGISTERS:
            tl.debug_barrier()
    if p_decay is not None:
        p_decay += o_segment * STATES * num_channels + o_w
        for state in range(0, STATES):
            b_A = tl.load(p_rates + state * num_channels, mask=m_w, other=0.0)
            tl.store(p_decay + state * num_channels, _exp2(b_A * b_total, PRECISE), mask=m_w)


@triton.jit
def _then(b_decay, b_end, b_next_decay, b_next_end):
    """Combine the summaries of two segments."""
    return b_decay * b_next_decay, b_next_decay * b_end + b_next_end


@triton.jit(do_not_specialize=["num_segments"])
def sequence_starts_kernel(
    p_ends, p_decays, p_first, p_starts, num_states, num_segments,
    SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr, BACKWARD: tl.constexpr,
):
    """Compute the state before each segment from the ends and decays of `sequence_forward_kernel`.

    All are (b g, segments, n w), and the state before the first segment is (b g, n w). BACKWARD computes the gradient
    of the state after each segment.
    """
    o_s = tl.arange(0, SEGMENTS)[:, None]
    o_n = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    o_before = o_s + (1 if BACKWARD else -1)
    o = (tl.program_id(1).to(tl.int64) * num_segments + o_before) * num_states + o_n
    m = (o_n < num_states) & (o_before >= 0) & (o_before < num_segments) & (o_s < num_segments)
    b_decay = tl.load(p_decays + o, mask=m, other=1.0)
    b_start = tl.load(p_ends + o, mask=m, other=0.0)
    if p_first is not None:
        m_first = (o_n < num_states) & (o_s == (num_segments - 1 if BACKWARD else 0))
        o_first = tl.program_id(1).to(tl.int64) * num_states + o_n + o_s * 0
        b_start += tl.load(p_first + o_first, mask=m_first, other=0.0)
    b_start = tl.associative_scan((b_decay, b_start), 0, _then, reverse=BACKWARD)[1]
    o = (tl.program_id(1).to(tl.int64) * num_segments + o_s) * num_states + o_n
    tl.store(p_starts + o, b_start, mask=(o_n < num_states) & (o_s < num_segments))


@triton.jit
def _split(rows):
    """Split each of 16 rows into two rows in bfloat16. Their sum equals the row up to a relative error of 2^-17."""
    b_highs = ()
    b_lows = ()
    for row in tl.static_range(16):
        b_high = rows[row].to(tl.bfloat16)
        b_highs = b_highs + (b_high,)
        b_lows = b_lows + ((rows[row] - b_high.to(tl.float32)).to(tl.bfloat16),)
    return b_highs, b_lows


@triton.jit
def _sum_channels(rows, BLOCK: tl.constexpr, PRECISE: tl.constexpr):
    """Sum each of 16 rows (1, BLOCK) over its channels: (16,).

    Unless PRECISE, each row is split into two rows in bfloat16, and tensor cores sum both.
    """
    if PRECISE:
        return tl.sum(_stack(rows), axis=1)
    b_highs, b_lows = _split(rows)
    o_row, o_of_four = tl.arange(0, 16)[:, None], tl.arange(0, BLOCK // 2)[None, :] % 4
    b_sums = tl.zeros([16, 8], tl.float32)
    for four in tl.static_range(0, 16, 4):
        b_pick = tl.maximum(1 - tl.abs(o_row - four - o_of_four), 0).to(tl.float32).to(tl.bfloat16)
        b_sums = tl.dot(b_pick, _operand(b_highs, four, BLOCK), b_sums)
        b_sums = tl.dot(b_pick, _operand(b_lows, four, BLOCK), b_sums)
    return tl.sum(b_sums, axis=1)


@triton.jit
def _walk_back(
    b_h, b_g, b_grad_A, b_A, BC, b_ms, b_inputs, b_grad_ys, b_drives, b_exponents, b_ys,
    TILE: tl.constexpr, BLOCK: tl.constexpr, PRECISE: tl.constexpr, GATED: tl.constexpr,
):
    """Walk one state along a tile forward, then its gradient backward; b_g always holds a[t+1] g[t+1].

    Returns:
        b_g and the gradient of A; three sums over states at each step: g B, the gradient of the exponent times A, and
        y; and the gradients of B and C, (TILE,). The first sum is g B ln(2), as BC holds B ln(2).
    """
    b_hs = (b_h,)
    b_as = ()
    b_new_ys = ()
    for step in tl.static_range(TILE):
        b_a = _exp2(b_A * b_ms[step], PRECISE)
        b_h = tl.fma(b_a, b_h, BC[step] * b_inputs[step])
        b_as = b_as + (b_a,)
        b_hs = b_hs + (b_h,)
        if GATED:
            b_new_ys = b_new_ys + (b_ys[step] + BC[TILE + step] * b_h,)
    b_grad_Bs = ()
    b_grad_Cs = ()
    b_new_drives = ()
    b_new_exponents = ()
    b_of_tile = tl.zeros_like(b_grad_A)  # summed over a tile first: a sum over thousands of steps loses digits
    for step in tl.static_range(TILE - 1, -1, -1):
        b_g += BC[TILE + step] * b_grad_ys[step]
        b_grad_Bs = (b_g * b_inputs[step],) + b_grad_Bs
        b_grad_Cs = (b_hs[step + 1] * b_grad_ys[step],) + b_grad_Cs
        b_new_drives = (b_drives[step] + b_g * BC[step],) + b_new_drives
        b_g *= b_as[step]
        b_exponent = b_g * b_hs[step]
        b_new_exponents = (b_exponents[step] + b_exponent * b_A,) + b_new_exponents
        b_of_tile += b_exponent * b_ms[step]
    b_grad_A += b_of_tile
    if not GATED:
        b_new_ys = b_ys
    of_BC = (_sum_channels(b_grad_Bs, BLOCK, PRECISE) * LN_2, _sum_channels(b_grad_Cs, BLOCK, PRECISE))
    return b_g, b_grad_A, b_new_drives, b_new_exponents, b_new_ys, of_BC


@triton.jit(do_not_specialize=["plane", "num_groups", "tiles_per_segment", "num_segments"])
def sequence_backward_kernel(
    p_u, s_u, p_delta, s_delta, p_rates, p_B, s_B, p_C, s_C, p_D, p_z, s_z, p_bias, p_grad_y, s_grad_y, p_states,
    p_carry, p_grad_u, s_grad_u, p_grad_delta, s_grad_delta, p_grad_z, s_grad_z, p_grad_BC, p_grad_shared,
    plane, num_groups, num_channels, length, tiles_per_segment, num_segments,
    STATES: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, SOFTPLUS: tl.constexpr,
    WHOLE: tl.constexpr, PRECISE: tl.constexpr, STARTED: tl.constexpr,
):
    """Walk the tiles of a segment backward; in each, scan every state forward from the saved one, then backward.

    `p_carry` holds the gradient of the state after the segment, and receives that of the state before it. Besides the
    gradients of u, delta and z, the kernel writes these, which the caller adds up:

    * of B and C, `plane` apart, (b, g, blocks of channels, n, l)
    * of A, D and the bias, (b, segments, n + 2, g, w)
    """
    IN_REGISTERS: tl.constexpr = STATES == AT_ONCE
    GATED: tl.constexpr = p_z is not None
    image, group, o_w, m_w = _place(num_channels, BLOCK)
    segment = tl.program_id(1)
    o_c = group * num_channels + o_w
    o_sequence = image * num_groups + group
    o_segment = o_sequence * num_segments + segment
    num_blocks, num_tiles = tl.cdiv(num_channels, BLOCK), tl.cdiv(length, TILE)
    first = segment * tiles_per_segment
    last = tl.minimum(first + tiles_per_segment, num_tiles)
    p_us = _lanes(p_u, s_u, image, group, o_w)
    p_deltas = _lanes(p_delta, s_delta, image, group, o_w)
    p_grad_ys = _lanes(p_grad_y, s_grad_y, image, group, o_w)
    p_rates += group * STATES * num_channels + o_w
    p_carry += o_segment * STATES * num_channels + o_w
    to_next = num_groups * num_channels  # from one state to the next
    p_grad_shared += (image * num_segments + segment) * (STATES + 2) * to_next + o_c
    p_B += image * s_B[0] + group * s_B[1]
    p_C += image * s_C[0] + group * s_C[1]
    p_grad_BC += (o_sequence * num_blocks + tl.program_id(0) % num_blocks) * STATES * length
    b_bias = 0.0 if p_bias is None else tl.load(p_bias + o_c, mask=m_w, other=0.0)
    b_D = 0.0 if p_D is None else tl.load(p_D + o_c, mask=m_w, other=0.0)

    b_grad_D = tl.zeros([1, BLOCK], tl.float32)
    b_grad_bias = tl.zeros([1, BLOCK], tl.float32)
    b_gs = _load_states(p_carry, 0, num_channels, m_w & STARTED, AT_ONCE)
    b_grad_As = _zeros(AT_ONCE, BLOCK)
    for count in range(first, last):
        tile = first + last - 1 - count
        start = tile * TILE
        o_t = start + tl.arange(0, TILE)[:, None]
        m_t = _within(o_t, length, WHOLE)
        m = m_w & m_t
        p_tile = p_states + (o_sequence * num_tiles + tile) * STATES * num_channels + o_w
        b_u = tl.load(_at(p_us, s_u, o_t), mask=m, other=0.0).to(tl.float32)
        b_delta = tl.load(_at(p_deltas, s_delta, o_t), mask=m, other=0.0)
        b_grad_y = tl.load(_at(p_grad_ys, s_grad_y, o_t), mask=m, other=0.0).to(tl.float32)
        b_BCs = _load_weights(p_B, s_B, p_C, s_C, 0, start, length, TILE, AT_ONCE)
        b_As = _load_states(p_rates, 0, num_channels, m_w, AT_ONCE)
        b_starts = _load_states(p_tile, 0, num_channels, m_w, AT_ONCE)
        if not IN_REGISTERS:
            b_gs = _load_states(p_carry, 0, num_channels, m_w & (STARTED or count > first), AT_ONCE)
            b_grad_As = _load_states(p_grad_shared, 0, to_next, m_w & (count > first), AT_ONCE)
        if GATED:
            b_z = tl.load(_at(_lanes(p_z, s_z, image, group, o_w), s_z, o_t), mask=m, other=0.0).to(tl.float32)
            b_grad_y *= b_z * _sigmoid(b_z, PRECISE)
        b_ms = _rows(_m(b_delta, b_bias, m_t, WHOLE, SOFTPLUS, PRECISE))
        b_us = _rows(b_u)
        b_grad_rows = _rows(b_grad_y)
        b_inputs = ()
        for step in tl.static_range(TILE):
            b_inputs = b_inputs + (b_ms[step] * b_us[step],)

        b_drives = _zeros(TILE, BLOCK)
        b_exponents = _zeros(TILE, BLOCK)
        b_ys = _zeros(TILE, BLOCK)
        for turn in range(0, STATES, AT_ONCE):
            to_come = tl.minimum(turn + AT_ONCE, STATES - AT_ONCE)
            b_next_BCs, b_next_As, b_next_starts = b_BCs, b_As, b_starts
            b_next_gs, b_next_grad_As = b_gs, b_grad_As
            b_new_gs = ()
            b_new_grad_As = ()
            for i in tl.static_range(AT_ONCE):
                b_g, b_grad_A, b_drives, b_exponents, b_ys, of_BC = _walk_back(
                    b_starts[i], b_gs[i], b_grad_As[i], b_As[i], numbers(b_BCs[i]), b_ms, b_inputs, b_grad_rows,
                    b_drives, b_exponents, b_ys, TILE, BLOCK, PRECISE, GATED,
                )
                b_new_gs = b_new_gs + (b_g,)
                b_new_grad_As = b_new_grad_As + (b_grad_A,)
                p_weights = p_grad_BC + (turn + i) * length + start + tl.arange(0, TILE)
                tl.store(p_weights, of_BC[0].to(p_grad_BC.dtype.element_ty), mask=start + tl.arange(0, TILE) < length)
                of_C = of_BC[1].to(p_grad_BC.dtype.element_ty)
                tl.store(p_weights + plane, of_C, mask=start + tl.arange(0, TILE) < length)
                m_keep = m_w & (not IN_REGISTERS or count == last - 1)
                b_scale = tl.where(count == last - 1, LN_2, 1.0)
                tl.store(p_carry + (turn + i) * num_channels, b_g, mask=m_keep)
                tl.store(p_grad_shared + (turn + i) * to_next, b_grad_A * b_scale, mask=m_keep)
                if i == 0 and not IN_REGISTERS:  # while there is still work left in this iteration
                    b_next_BCs = _load_weights(p_B, s_B, p_C, s_C, to_come, start, length, TILE, AT_ONCE)
                    b_next_As = _load_states(p_rates, to_come, num_channels, m_w, AT_ONCE)
                    b_next_starts = _load_states(p_tile, to_come, num_channels, m_w, AT_ONCE)
                    b_next_gs = _load_states(p_carry, to_come, num_channels, m_w & (STARTED or count > first), AT_ONCE)
                    b_next_grad_As = _load_states(p_grad_shared, to_come, to_next, m_w & (count > first), AT_ONCE)
            b_BCs, b_As, b_starts, b_gs, b_grad_As = b_next_BCs, b_next_As, b_next_starts, b_next_gs, b_next_grad_As
            if IN_REGISTERS:
                b_gs, b_grad_As = b_new_gs, b_new_grad_As

        if not IN_REGISTERS:  # keeping u would have taken registers that the loop needed
            b_us = _rows(tl.load(_at(p_us, s_u, o_t), mask=m, other=0.0).to(tl.float32))
        b_grad_us = ()
        b_grad_deltas = ()
        b_full_ys = ()
        b_of_D = tl.zeros_like(b_grad_D)
        b_of_bias = tl.zeros_like(b_grad_bias)
        for step in tl.static_range(TILE):
            b_step, b_drive = b_ms[step], b_drives[step]
            b_grad_us = b_grad_us + (b_drive * b_step + b_D * b_grad_rows[step],)
            b_grad_delta = b_exponents[step] * LN_2 + b_drive * b_us[step]
            b_grad_delta *= _slope(b_step, PRECISE, True) if SOFTPLUS else LOG2_E
            b_grad_deltas = b_grad_deltas + (b_grad_delta,)
            b_of_D += b_grad_rows[step] * b_us[step]
            if WHOLE or SOFTPLUS:
                b_of_bias += b_grad_delta
            else:
                b_of_bias += tl.where(start + step < length, b_grad_delta, 0.0)
            b_full_ys = b_full_ys + (b_ys[step] + b_D * b_us[step],)
        b_grad_D += b_of_D
        b_grad_bias += b_of_bias
        if GATED:
            b_z = tl.load(_at(_lanes(p_z, s_z, image, group, o_w), s_z, o_t), mask=m, other=0.0).to(tl.float32)
            b_out = tl.load(_at(p_grad_ys, s_grad_y, o_t), mask=m, other=0.0).to(tl.float32)
            b_open = _sigmoid(b_z, PRECISE)
            b_grad_z = b_out * _stack(b_full_ys) * (b_open * (1 + b_z * (1 - b_open)))
            p_grad_zs = _at(_lanes(p_grad_z, s_grad_z, image, group, o_w), s_grad_z, o_t)
            tl.store(p_grad_zs, b_grad_z.to(p_grad_z.dtype.element_ty), mask=m)
        p_grad_us = _at(_lanes(p_grad_u, s_grad_u, image, group, o_w), s_grad_u, o_t)
        p_grad_deltas = _at(_lanes(p_grad_delta, s_grad_delta, image, group, o_w), s_grad_delta, o_t)
        tl.store(p_grad_us, _stack(b_grad_us).to(p_grad_u.dtype.element_ty), mask=m)
        tl.store(p_grad_deltas, _stack(b_grad_deltas).to(p_grad_delta.dtype.element_ty), mask=m)
        if not IN_REGISTERS:
            tl.debug_barrier()
    tl.store(p_grad_shared + STATES * to_next, b_grad_D, mask=m_w)
    tl.store(p_grad_shared + (STATES + 1) * to_next, b_grad_bias, mask=m_w)
