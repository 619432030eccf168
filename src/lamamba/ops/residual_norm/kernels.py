"""Triton kernels for gated residual, LayerNorm and modulation, forward and backward; see README.md.

One program processes some pixels of one image, a few rows of channels at a time (`lamamba.ops.rows`). So the gate,
shift and scale of the image, and the sums over its pixels, stay in registers. Pointers of missing arguments are None.

Names: `p_` pointer, `b_` block of values, `o_` offsets, `m_` mask.
"""

import triton
import triton.language as tl

from lamamba.ops.rows import (
    add,
    channels_of,
    load_channels,
    load_rows,
    multiply,
    normalize,
    normalize_backward,
    store_rows,
    store_sums,
    zeros,
)


@triton.jit
def _load_factor(p_weight, p_scale, CHANNELS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """Load the factor of the normalized channels, weight (1 + scale)."""
    factor = ()
    for piece in tl.static_range(PIECES):
        o_c, m_c = channels_of(piece, CHANNELS, PIECE)
        b_factor = tl.full([1, PIECE], 1.0, tl.float32)
        if p_weight is not None:
            b_factor = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
        if p_scale is not None:
            b_factor *= 1 + tl.load(p_scale + o_c, mask=m_c, other=0.0).to(tl.float32)
        factor = factor + (b_factor,)
    return factor


@triton.jit
def _load_offset(p_bias, p_shift, p_scale, CHANNELS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """Load the offset that is added after the factor, bias (1 + scale) + shift."""
    offset = ()
    for piece in tl.static_range(PIECES):
        o_c, m_c = channels_of(piece, CHANNELS, PIECE)
        b_offset = tl.zeros([1, PIECE], tl.float32)
        if p_bias is not None:
            b_offset = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
            if p_scale is not None:
                b_offset *= 1 + tl.load(p_scale + o_c, mask=m_c, other=0.0).to(tl.float32)
        if p_shift is not None:
            b_offset += tl.load(p_shift + o_c, mask=m_c, other=0.0).to(tl.float32)
        offset = offset + (b_offset,)
    return offset


@triton.jit(do_not_specialize=["num_pixels", "pixels_per_program"])
def residual_norm_forward_kernel(
    p_x, p_branch, p_gate, p_branch_bias, p_weight, p_bias, p_shift, p_scale, p_x_new, p_normed,
    gate_stride, shift_stride, scale_stride, eps, num_pixels, pixels_per_program,
    CHANNELS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
):
    """Add the branch if there is one, then normalize if `p_normed` is given; strides are between images."""
    image = tl.cast(tl.program_id(0), tl.int64)
    first = tl.program_id(1) * pixels_per_program
    end = tl.minimum(first + pixels_per_program, num_pixels)
    if p_scale is not None:
        p_scale += image * scale_stride
    if p_shift is not None:
        p_shift += image * shift_stride
    if p_branch is not None:
        gate = load_channels(p_gate + image * gate_stride, CHANNELS, PIECE, PIECES)
    if p_branch_bias is not None:
        branch_bias = load_channels(p_branch_bias, CHANNELS, PIECE, PIECES)
    if p_normed is not None:
        factor = _load_factor(p_weight, p_scale, CHANNELS, PIECE, PIECES)
        offset = _load_offset(p_bias, p_shift, p_scale, CHANNELS, PIECE, PIECES)
    for pixel in range(first, end, ROWS):
        m_row = pixel + tl.arange(0, ROWS) < end
        o_first = (image * num_pixels + pixel) * CHANNELS
        x = load_rows(p_x + o_first, CHANNELS, m_row, CHANNELS, PIECE, PIECES)
        if p_branch is not None:
            branch = load_rows(p_branch + o_first, CHANNELS, m_row, CHANNELS, PIECE, PIECES)
            if p_branch_bias is not None:
                branch = add(branch, branch_bias, PIECES)
            x_new = ()
            for piece in tl.static_range(PIECES):
                # Round as the stored tensor is rounded, so that the backward pass normalizes the same values.
                b_x_new = (x[piece] + gate[piece] * branch[piece]).to(p_x_new.dtype.element_ty)
                x_new = x_new + (b_x_new.to(tl.float32),)
            store_rows(p_x_new + o_first, x_new, m_row, CHANNELS, PIECE, PIECES)
            x = x_new
        if p_normed is not None:
            normalized, _ = normalize(x, eps, CHANNELS, PIECE, PIECES)
            normed = add(multiply(normalized, factor, PIECES), offset, PIECES)
            store_rows(p_normed + o_first, normed, m_row, CHANNELS, PIECE, PIECES)


@triton.jit(do_not_specialize=["num_pixels", "pixels_per_program"])
def residual_norm_backward_kernel(
    p_x_new, p_branch, p_gate, p_weight, p_scale, p_grad_x_new, p_grad_normed, p_grad_x, p_grad_branch, p_sums,
    gate_stride, scale_stride, eps, num_pixels, pixels_per_program,
    SUMS: tl.constexpr, CHANNELS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
):
    """Recompute the normalized values, and compute all gradients.

    Gradients per channel are summed over the pixels of the program: (images, programs of an image, 3 or 4, c). The sums
    are S1 to S4 of README.md:

    * the gradient of `normed`
    * the gradient of `normed` times the normalized channels
    * the branch times the gradient of x
    * the gradient of x, if the branch has a bias

    Without a gradient of `normed`, the gradient of x equals the gradient of `x_new`.
    """
    image = tl.cast(tl.program_id(0), tl.int64)
    first = tl.program_id(1) * pixels_per_program
    end = tl.minimum(first + pixels_per_program, num_pixels)
    if p_scale is not None:
        p_scale += image * scale_stride
    if p_grad_normed is not None:
        factor = _load_factor(p_weight, p_scale, CHANNELS, PIECE, PIECES)
        sum_grad, sum_product = zeros(ROWS, PIECE, PIECES), zeros(ROWS, PIECE, PIECES)
    if p_branch is not None:
        gate = load_channels(p_gate + image * gate_stride, CHANNELS, PIECE, PIECES)
        sum_branch = zeros(ROWS, PIECE, PIECES)
    if SUMS == 4:
        sum_x = zeros(ROWS, PIECE, PIECES)
    for pixel in range(first, end, ROWS):
        m_row = pixel + tl.arange(0, ROWS) < end
        o_first = (image * num_pixels + pixel) * CHANNELS
        if p_grad_normed is not None:
            x_new = load_rows(p_x_new + o_first, CHANNELS, m_row, CHANNELS, PIECE, PIECES)
            grad_normed = load_rows(p_grad_normed + o_first, CHANNELS, m_row, CHANNELS, PIECE, PIECES)
        if p_grad_x_new is not None:
            grad_x_new = load_rows(p_grad_x_new + o_first, CHANNELS, m_row, CHANNELS, PIECE, PIECES)
        if p_branch is not None:
            branch = load_rows(p_branch + o_first, CHANNELS, m_row, CHANNELS, PIECE, PIECES)
        if p_grad_normed is not None:
            normalized, b_rstd = normalize(x_new, eps, CHANNELS, PIECE, PIECES)
            sum_grad = add(sum_grad, grad_normed, PIECES)
            sum_product = add(sum_product, multiply(grad_normed, normalized, PIECES), PIECES)
            grad = multiply(grad_normed, factor, PIECES)
            grad_x = normalize_backward(grad, normalized, b_rstd, CHANNELS, PIECES)
            if p_grad_x_new is not None:
                grad_x = add(grad_x, grad_x_new, PIECES)
            store_rows(p_grad_x + o_first, grad_x, m_row, CHANNELS, PIECE, PIECES)
        else:
            grad_x = grad_x_new
        if p_branch is not None:
            sum_branch = add(sum_branch, multiply(branch, grad_x, PIECES), PIECES)
            store_rows(p_grad_branch + o_first, multiply(grad_x, gate, PIECES), m_row, CHANNELS, PIECE, PIECES)
        if SUMS == 4:
            sum_x = add(sum_x, grad_x, PIECES)
    p_sums += (image * tl.num_programs(1) + tl.program_id(1)) * SUMS * CHANNELS
    if p_grad_normed is not None:
        store_sums(p_sums, sum_grad, CHANNELS, PIECE, PIECES)
        store_sums(p_sums + CHANNELS, sum_product, CHANNELS, PIECE, PIECES)
    if p_branch is not None:
        store_sums(p_sums + 2 * CHANNELS, sum_branch, CHANNELS, PIECE, PIECES)
    if SUMS == 4:
        store_sums(p_sums + 3 * CHANNELS, sum_x, CHANNELS, PIECE, PIECES)


@triton.jit
def _sum_programs(p_sums, m_c, num_programs, SUMS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    """Add up one kind of sum over the programs of an image."""
    b_sum = tl.zeros([ROWS, m_c.shape[0]], tl.float32)
    for first in range(0, num_programs, ROWS):
        o_program = first + tl.arange(0, ROWS)[:, None]
        m_sum = (o_program < num_programs) & m_c[None, :]
        b_sum += tl.load(p_sums[None, :] + o_program * SUMS * CHANNELS, mask=m_sum, other=0.0)
    return tl.sum(b_sum, axis=0)


@triton.jit(do_not_specialize=["num_programs"])
def residual_norm_sum_kernel(
    p_sums, p_gate, p_branch_bias, p_weight, p_bias, p_scale,
    p_grad_gate, p_grad_branch_bias, p_grad_shift, p_grad_scale, p_grad_affine,
    gate_stride, scale_stride, part_stride, num_programs,
    SUMS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):
    """Compute gradients from the sums: of gate, shift and scale, and the part of each image for weight and biases."""
    image = tl.cast(tl.program_id(0), tl.int64)
    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < CHANNELS
    p_sums += image * num_programs * SUMS * CHANNELS + o_c
    o_image = image * CHANNELS + o_c
    if p_grad_gate is not None:
        b_branch = _sum_programs(p_sums + 2 * CHANNELS, m_c, num_programs, SUMS, CHANNELS, ROWS)
        if p_branch_bias is not None:
            b_x = _sum_programs(p_sums + 3 * CHANNELS, m_c, num_programs, SUMS, CHANNELS, ROWS)
            b_gate = tl.load(p_gate + image * gate_stride + o_c, mask=m_c, other=0.0).to(tl.float32)
            tl.store(p_grad_branch_bias + image * part_stride + o_c, b_gate * b_x, mask=m_c)
            b_branch += b_x * tl.load(p_branch_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
        tl.store(p_grad_gate + o_image, b_branch.to(p_grad_gate.dtype.element_ty), mask=m_c)
    if p_grad_affine is not None:
        b_grad = _sum_programs(p_sums, m_c, num_programs, SUMS, CHANNELS, ROWS)
        b_product = _sum_programs(p_sums + CHANNELS, m_c, num_programs, SUMS, CHANNELS, ROWS)
        if p_grad_shift is not None:
            tl.store(p_grad_shift + o_image, b_grad.to(p_grad_shift.dtype.element_ty), mask=m_c)
        b_factor = tl.full([BLOCK], 1.0, tl.float32)
        if p_scale is not None:
            b_grad_scale = b_product
            if p_weight is not None:
                b_grad_scale *= tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
            if p_bias is not None:
                b_grad_scale += b_grad * tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
            tl.store(p_grad_scale + o_image, b_grad_scale.to(p_grad_scale.dtype.element_ty), mask=m_c)
            b_factor += tl.load(p_scale + image * scale_stride + o_c, mask=m_c, other=0.0).to(tl.float32)
        p_grad_affine += image * part_stride + o_c
        tl.store(p_grad_affine, b_factor * b_product, mask=m_c)
        tl.store(p_grad_affine + CHANNELS, b_factor * b_grad, mask=m_c)
