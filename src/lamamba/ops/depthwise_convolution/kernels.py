"""Triton kernels for the 3x3 depthwise convolution and SiLU, forward and backward; see README.md.

One program processes a block of channels of some tiles of the grid, one tile after the other. Lanes are channels. A
tile is a strip of rows that the program walks column by column, with the last three columns in registers. So each pixel
is loaded only once, except in the rows and columns that neighboring tiles share.

Names: `p_` pointer, `b_` block of values, `o_` offsets, `m_` mask. A column is a tuple of blocks (e,), one per row.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def _place(tile, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Find a tile: its image, its first row, its first column, and the column after its last one."""
    STRIPS: tl.constexpr = (HEIGHT + ROWS - 1) // ROWS
    SEGMENTS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    first_column = tile % SEGMENTS * COLUMNS
    first_row = tile // SEGMENTS % STRIPS * ROWS
    image = tl.cast(tile // (SEGMENTS * STRIPS), tl.int64)
    return image, first_row, first_column, tl.minimum(first_column + COLUMNS, WIDTH)


@triton.jit
def _load_parameters(p_weight, p_bias, o_e, m_e):
    """Load the nine taps and the bias (or 0) of each channel, as a tuple of ten blocks (e,) in float32."""
    parameters = ()
    for tap in tl.static_range(9):
        parameters = parameters + (tl.load(p_weight + 9 * o_e + tap, mask=m_e, other=0.0).to(tl.float32),)
    if p_bias is None:
        parameters = parameters + (tl.zeros(o_e.shape, tl.float32),)
    else:
        parameters = parameters + (tl.load(p_bias + o_e, mask=m_e, other=0.0).to(tl.float32),)
    return parameters


@triton.jit
def _load_column(
    p_image, o_e, m_e, first_row, column,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, MARGIN: tl.constexpr,
):
    """Load a column of a strip and MARGIN rows above and below it in float32, with zeros outside the image."""
    m_column = m_e & (column >= 0) & (column < WIDTH)
    p_column = p_image + o_e + ((first_row - MARGIN) * WIDTH + column) * STRIDE
    pixels = ()
    for row in tl.static_range(ROWS + 2 * MARGIN):
        if HEIGHT % ROWS == 0 and row >= MARGIN and row < ROWS + MARGIN:
            m_pixel = m_column
        else:
            y = first_row - MARGIN + row
            m_pixel = m_column & (y >= 0) & (y < HEIGHT)
        pixels = pixels + (tl.load(p_column + row * WIDTH * STRIDE, mask=m_pixel, other=0.0).to(tl.float32),)
    return pixels


@triton.jit
def _convolve(b_sum, left, middle, right, taps, row: tl.constexpr, ROWS: tl.constexpr, FLIPPED: tl.constexpr):
    """Add the nine products around a row of the middle column; ROWS is the number of rows in each column."""
    columns = (left, middle, right)
    for dy in tl.static_range(3):
        if row + dy >= 1 and row + dy <= ROWS:
            for dx in tl.static_range(3):
                tap = taps[8 - 3 * dy - dx] if FLIPPED else taps[3 * dy + dx]
                b_sum += tap * columns[dx][row + dy - 1]
    return b_sum


@triton.jit
def _add_products(sums, b_grad_z, left, middle, right, row: tl.constexpr, ROWS: tl.constexpr):
    """Add the gradients of the nine taps, the gradient of z times the pixel of the tap, and of the bias."""
    columns = (left, middle, right)
    summed = ()
    for dy in tl.static_range(3):
        for dx in tl.static_range(3):
            if row + dy >= 1 and row + dy <= ROWS:
                summed = summed + (sums[3 * dy + dx] + b_grad_z * columns[dx][row + dy - 1],)
            else:
                summed = summed + (sums[3 * dy + dx],)
    return summed + (sums[9] + b_grad_z,)


@triton.jit
def _sigmoid(b_z, FAST: tl.constexpr):
    """Compute 1 / (1 + exp(-z)); FAST uses instructions that flush subnormal numbers to 0."""
    if FAST:
        return libdevice.fast_dividef(1.0, 1 + libdevice.fast_expf(-b_z))
    return 1 / (1 + tl.exp(-b_z))


@triton.jit(do_not_specialize=["num_tiles"])
def convolution_forward_kernel(
    p_x, p_weight, p_bias, p_y, num_tiles,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
):
    """Convolve and apply SiLU; STRIDE is the distance between pixels of x."""
    MARGIN: tl.constexpr = 1 if ROWS < HEIGHT else 0
    o_e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < CHANNELS
    parameters = _load_parameters(p_weight, p_bias, o_e, m_e)
    for tile in range(tl.program_id(1), num_tiles, tl.num_programs(1)):
        image, first_row, first_column, end = _place(tile, HEIGHT, WIDTH, ROWS, COLUMNS)
        p_image = p_x + image * HEIGHT * WIDTH * STRIDE
        left = _load_column(p_image, o_e, m_e, first_row, first_column - 1, HEIGHT, WIDTH, STRIDE, ROWS, MARGIN)
        middle = _load_column(p_image, o_e, m_e, first_row, first_column, HEIGHT, WIDTH, STRIDE, ROWS, MARGIN)
        for column in range(first_column, end):
            right = _load_column(p_image, o_e, m_e, first_row, column + 1, HEIGHT, WIDTH, STRIDE, ROWS, MARGIN)
            p_column = p_y + image * HEIGHT * WIDTH * CHANNELS + o_e + (first_row * WIDTH + column) * CHANNELS
            for row in tl.static_range(ROWS):
                b_z = _convolve(parameters[9], left, middle, right, parameters, row + MARGIN, ROWS + 2 * MARGIN, False)
                b_y = b_z * _sigmoid(b_z, FAST)
                m_pixel = m_e if HEIGHT % ROWS == 0 else m_e & (first_row + row < HEIGHT)
                tl.store(p_column + row * WIDTH * CHANNELS, b_y.to(p_y.dtype.element_ty), mask=m_pixel)
            left, middle = middle, right


@triton.jit
def _store_grad_x(
    p_column, m_e, left, middle, right, taps, first_row,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, MARGIN: tl.constexpr,
):
    """Convolve the gradient of z at three columns with the flipped taps."""
    for row in tl.static_range(ROWS):
        b_zero = tl.zeros_like(taps[0])
        b_grad_x = _convolve(b_zero, left, middle, right, taps, row + MARGIN, ROWS + 2 * MARGIN, True)
        m_pixel = m_e if HEIGHT % ROWS == 0 else m_e & (first_row + row < HEIGHT)
        tl.store(p_column + row * WIDTH * CHANNELS, b_grad_x.to(p_column.dtype.element_ty), mask=m_pixel)


@triton.jit(do_not_specialize=["num_tiles"])
def convolution_backward_kernel(
    p_x, p_weight, p_bias, p_grad_y, p_grad_x, p_sums, num_tiles,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
):
    """Recompute z, and compute all gradients; those of the taps and the bias are summed over the tiles of the program.

    A new column of x completes the gradient of z in the column to its left. That completes the gradient of x two
    columns to the left. Each program writes its sums, (e, 9) for the taps and then (e,) for the bias, and the caller
    adds them up.
    """
    MARGIN: tl.constexpr = 1 if ROWS < HEIGHT else 0
    o_e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < CHANNELS
    parameters = _load_parameters(p_weight, p_bias, o_e, m_e)
    b_zero = tl.zeros([BLOCK], tl.float32)
    sums = ()
    for _ in tl.static_range(10):
        sums = sums + (b_zero,)
    for tile in range(tl.program_id(1), num_tiles, tl.num_programs(1)):
        image, first_row, first_column, end = _place(tile, HEIGHT, WIDTH, ROWS, COLUMNS)
        p_image = p_x + image * HEIGHT * WIDTH * STRIDE
        p_grad_y_image = p_grad_y + image * HEIGHT * WIDTH * CHANNELS
        p_grad_x_strip = p_grad_x + image * HEIGHT * WIDTH * CHANNELS + first_row * WIDTH * CHANNELS + o_e
        # The gradient of x at the edges of a tile depends on the columns beside the tile.
        start, stop = tl.maximum(first_column - 1, 0), tl.minimum(end + 1, WIDTH)
        left = _load_column(p_image, o_e, m_e, first_row, start - 1, HEIGHT, WIDTH, STRIDE, ROWS, 2 * MARGIN)
        middle = _load_column(p_image, o_e, m_e, first_row, start, HEIGHT, WIDTH, STRIDE, ROWS, 2 * MARGIN)
        # Separate zeros for each variable: if a variable gets the very value that another one had, the compiler assumes
        # that the loop does not change it.
        grad_left = ()
        grad_middle = ()
        outside = ()
        for _ in tl.static_range(ROWS + 2 * MARGIN):
            grad_left = grad_left + (tl.zeros([BLOCK], tl.float32),)
            grad_middle = grad_middle + (tl.zeros([BLOCK], tl.float32),)
            outside = outside + (b_zero,)
        for column in range(start, stop):
            right = _load_column(p_image, o_e, m_e, first_row, column + 1, HEIGHT, WIDTH, STRIDE, ROWS, 2 * MARGIN)
            grad_y = _load_column(p_grad_y_image, o_e, m_e, first_row, column, HEIGHT, WIDTH, CHANNELS, ROWS, MARGIN)
            grad_right = ()
            for row in tl.static_range(ROWS + 2 * MARGIN):
                b_z = _convolve(parameters[9], left, middle, right, parameters, row + MARGIN, ROWS + 4 * MARGIN, False)
                b_sigmoid = _sigmoid(b_z, FAST)
                grad_right = grad_right + (grad_y[row] * b_sigmoid * (1 + b_z * (1 - b_sigmoid)),)
            if column > first_column:
                _store_grad_x(
                    p_grad_x_strip + (column - 1) * CHANNELS, m_e, grad_left, grad_middle, grad_right, parameters,
                    first_row, HEIGHT, WIDTH, CHANNELS, ROWS, MARGIN,
                )
            for row in tl.static_range(ROWS):
                b_grad_z = grad_right[row + MARGIN]
                if COLUMNS < WIDTH:
                    b_grad_z = tl.where((column >= first_column) & (column < end), b_grad_z, 0.0)
                sums = _add_products(sums, b_grad_z, left, middle, right, row + 2 * MARGIN, ROWS + 4 * MARGIN)
            left, middle = middle, right
            grad_left, grad_middle = grad_middle, grad_right
        if stop == end:
            _store_grad_x(
                p_grad_x_strip + (end - 1) * CHANNELS, m_e, grad_left, grad_middle, outside, parameters,
                first_row, HEIGHT, WIDTH, CHANNELS, ROWS, MARGIN,
            )
    p_sums += tl.program_id(1) * 10 * CHANNELS
    for tap in tl.static_range(9):
        tl.store(p_sums + 9 * o_e + tap, sums[tap], mask=m_e)
    tl.store(p_sums + 9 * CHANNELS + o_e, sums[9], mask=m_e)
