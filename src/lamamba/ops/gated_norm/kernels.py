"""Triton kernels of the gated norm, forward and backward; see README.md.

One program processes some pixels, a few rows of channels at a time (`lamamba.ops.rows`).

Names: `p_` pointer, `b_` block of values, `o_` offsets, `m_` mask.
"""

import triton
import triton.language as tl

from lamamba.ops.rows import (
    add,
    load_channels,
    load_rows,
    multiply,
    normalize,
    normalize_backward,
    store_rows,
    store_sums,
    zeros,
)


@triton.jit(do_not_specialize=["num_pixels", "pixels_per_program"])
def gated_norm_forward_kernel(
    p_planes, p_z, p_weight, p_bias, p_y, p_out,
    z_stride, eps, num_pixels, pixels_per_program,
    PLANES: tl.constexpr,
    CHANNELS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
):
    """Add up the planes, normalize, and multiply by SiLU(z).

    `z_stride` is the distance between pixels of z. `p_y` is None if the sum of the planes is not needed.
    """
    first = tl.program_id(0) * pixels_per_program
    end = tl.minimum(first + pixels_per_program, num_pixels)
    plane_stride = tl.cast(num_pixels, tl.int64) * CHANNELS
    weight = load_channels(p_weight, CHANNELS, PIECE, PIECES)
    bias = load_channels(p_bias, CHANNELS, PIECE, PIECES)
    for pixel in range(first, end, ROWS):
        m_row = pixel + tl.arange(0, ROWS) < end
        o_first = tl.cast(pixel, tl.int64) * CHANNELS
        z = load_rows(p_z + tl.cast(pixel, tl.int64) * z_stride, z_stride, m_row, CHANNELS, PIECE, PIECES)
        y = load_rows(p_planes + o_first, CHANNELS, m_row, CHANNELS, PIECE, PIECES)
        for plane in tl.static_range(1, PLANES):
            p_plane = p_planes + plane * plane_stride + o_first
            y = add(y, load_rows(p_plane, CHANNELS, m_row, CHANNELS, PIECE, PIECES), PIECES)
        if PLANES > 1:
            rounded = ()
            for piece in tl.static_range(PIECES):
                # Round as the saved tensor is rounded, so that the backward pass normalizes the same values.
                rounded = rounded + (y[piece].to(p_planes.dtype.element_ty).to(tl.float32),)
            y = rounded
            if p_y is not None:
                store_rows(p_y + o_first, y, m_row, CHANNELS, PIECE, PIECES)
        normalized, _ = normalize(y, eps, CHANNELS, PIECE, PIECES)
        out = ()
        for piece in tl.static_range(PIECES):
            b_normed = normalized[piece] * weight[piece] + bias[piece]
            out = out + (b_normed * (z[piece] * tl.sigmoid(z[piece])),)
        store_rows(p_out + o_first, out, m_row, CHANNELS, PIECE, PIECES)


@triton.jit(do_not_specialize=["num_pixels", "pixels_per_program"])
def gated_norm_backward_kernel(
    p_y, p_z, p_weight, p_bias, p_grad_out, p_grad_y, p_grad_z, p_sums,
    z_stride, eps, num_pixels, pixels_per_program,
    CHANNELS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
):
    """Recompute the normalized values, and compute all gradients.

    The gradients of the weight and the bias are summed over the pixels of the program, (programs, 2, e). The caller
    adds up the programs.
    """
    first = tl.program_id(0) * pixels_per_program
    end = tl.minimum(first + pixels_per_program, num_pixels)
    weight = load_channels(p_weight, CHANNELS, PIECE, PIECES)
    bias = load_channels(p_bias, CHANNELS, PIECE, PIECES)
    sum_weight, sum_bias = zeros(ROWS, PIECE, PIECES), zeros(ROWS, PIECE, PIECES)
    for pixel in range(first, end, ROWS):
        m_row = pixel + tl.arange(0, ROWS) < end
        o_first = tl.cast(pixel, tl.int64) * CHANNELS
        y = load_rows(p_y + o_first, CHANNELS, m_row, CHANNELS, PIECE, PIECES)
        z = load_rows(p_z + tl.cast(pixel, tl.int64) * z_stride, z_stride, m_row, CHANNELS, PIECE, PIECES)
        grad_out = load_rows(p_grad_out + o_first, CHANNELS, m_row, CHANNELS, PIECE, PIECES)
        normalized, b_rstd = normalize(y, eps, CHANNELS, PIECE, PIECES)
        grad_z, grad_normed = (), ()
        for piece in tl.static_range(PIECES):
            b_z = z[piece]
            b_sigmoid = tl.sigmoid(b_z)
            b_normed = normalized[piece] * weight[piece] + bias[piece]
            grad_z = grad_z + (grad_out[piece] * b_normed * b_sigmoid * (1 + b_z * (1 - b_sigmoid)),)
            grad_normed = grad_normed + (grad_out[piece] * b_z * b_sigmoid,)
        store_rows(p_grad_z + o_first, grad_z, m_row, CHANNELS, PIECE, PIECES)
        sum_weight = add(sum_weight, multiply(grad_normed, normalized, PIECES), PIECES)
        sum_bias = add(sum_bias, grad_normed, PIECES)
        grad_y = normalize_backward(multiply(grad_normed, weight, PIECES), normalized, b_rstd, CHANNELS, PIECES)
        store_rows(p_grad_y + o_first, grad_y, m_row, CHANNELS, PIECE, PIECES)
    p_sums += tl.program_id(0) * 2 * CHANNELS
    store_sums(p_sums, sum_weight, CHANNELS, PIECE, PIECES)
    store_sums(p_sums + CHANNELS, sum_bias, CHANNELS, PIECE, PIECES)
