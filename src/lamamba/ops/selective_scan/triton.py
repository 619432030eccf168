"""The scan kernels as one differentiable operation that torch.compile can see."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from lamamba.ops.gradients import register_gradients
from lamamba.ops.launch import launch
from lamamba.ops.linear import rounded, weight_gradient
from lamamba.ops.selective_scan import states_cuda
from lamamba.ops.selective_scan.kernels import scan_backward_kernel, scan_forward_kernel, scan_summary_kernel
from lamamba.ops.selective_scan.products import steps_backward, sum_and_project
from lamamba.ops.selective_scan.states_kernels import (
    from_paths_kernel,
    states_backward_kernel,
    states_forward_kernel,
    states_summary_kernel,
    to_paths_kernel,
)
from lamamba.ops.sum_kernels import sum_parts

# Paths of LONG_PATH tiles or more may be cut into segments of SHORTEST_SEGMENT tiles or more, which are walked twice.
# * Forward: with fewer than ENOUGH_PROGRAMS programs, all paths are cut, to get twice as many programs as a large GPU
#   runs at once.
# * Backward: programs need so many registers that fewer run at once. Most images fill the GPU a whole number of times;
#   the paths of the remaining images are cut until they fill it as well.
LONG_PATH, SHORTEST_SEGMENT, MAX_SEGMENTS = 16, 3, 112
ENOUGH_PROGRAMS, WANTED_PROGRAMS, BACKWARD_AT_ONCE = 512, 4224, 1056
TILE = 16  # steps; the smallest side of a matrix product on tensor cores
# Channels per program. More channels mean fewer instructions per channel, until the registers of a warp run out. With
# fewer programs than NARROWER_BELOW (forward) or NARROWER_BACKWARD_BELOW, they get fewer, unless paths are cut.
BLOCK, NARROWER_BELOW, NARROWER_BACKWARD_BELOW = 64, 800, 1024
STEPS = 64  # per program that copies B and C into the order of the paths, or their gradients back
STATES_REGISTERS = 128  # per thread of the forward kernel for several states, so that 16 warps fit on a multiprocessor
MAX_BATCH = 65535  # CUDA's limit for the third axis of a grid of programs


class _Part(NamedTuple):
    """Some images of a batch, and the number of segments that their paths are cut into."""

    first_image: int
    num_images: int
    num_segments: int
    tiles_per_segment: int


class _Geometry(NamedTuple):
    """Sizes of a call, for the kernels. Each part of the batch is one launch."""

    num_blocks: int
    parts: list[_Part]
    constants: dict[str, Any]


def _geometry(
    x: Tensor, low: Tensor, rank: int, A_log: Tensor, continuous: bool, backward: bool, at_once: int = 0
) -> _Geometry:
    batch, height, width, channels = x.shape
    if batch > MAX_BATCH:
        raise ValueError(f"scan_grid: a batch of {batch} is too large for the kernels: use {MAX_BATCH} or less")
    states = A_log.shape[2]
    # With several states, values that are loaded ahead need the registers that a second channel per lane would take.
    block = 32 if states > 1 else max(32, min(BLOCK, triton.next_power_of_2(channels)))
    num_tiles = triton.cdiv(height * width, TILE)
    if backward:
        block, cuts = _cut_backward(batch, channels, num_tiles, block, at_once)
    else:
        block, cuts = _cut_forward(batch, channels, num_tiles, block)
    parts, first_image = [], 0
    for num_images, num_segments in cuts:
        tiles_per_segment = triton.cdiv(num_tiles, num_segments)
        parts.append(_Part(first_image, num_images, triton.cdiv(num_tiles, tiles_per_segment), tiles_per_segment))
        first_image += num_images
    constants = {
        "HEIGHT": height, "WIDTH": width, "CONTINUOUS": continuous, "TILE": TILE, "CHANNELS": channels,
        "LOW": low.shape[3], "RANK": rank, "BLOCK": block,
        "PRECISE": x.dtype == torch.float32, "num_warps": 1, "num_stages": 1,
    }
    constants |= {"STATES": states} if states > 1 else {"RUN": math.gcd(height, width, TILE)}
    return _Geometry(triton.cdiv(channels, block), parts, constants)


Cut = tuple[int, list[tuple[int, int]]]


def _cut_forward(batch: int, channels: int, num_tiles: int, block: int) -> Cut:
    """Choose the channels per program, at most `block`, and pairs (number of images, segments per path)."""
    num_programs = 4 * batch * triton.cdiv(channels, block)
    if num_tiles >= LONG_PATH and num_programs < ENOUGH_PROGRAMS:
        return block, [(batch, _most_segments(num_tiles, WANTED_PROGRAMS // num_programs))]
    return _narrower(batch, channels, block, NARROWER_BELOW), [(batch, 1)]


def _cut_backward(batch: int, channels: int, num_tiles: int, block: int, at_once: int = 0) -> Cut:
    """Choose the same for the backward pass. A large GPU runs `at_once` programs, 0 for those in Triton."""
    at_once = at_once or BACKWARD_AT_ONCE
    if num_tiles < LONG_PATH:
        return _narrower(batch, channels, block, NARROWER_BACKWARD_BELOW), [(batch, 1)]
    of_image = 4 * triton.cdiv(channels, block)
    whole = batch * of_image // at_once * at_once // of_image
    left = batch - whole
    segments = _most_segments(num_tiles, at_once // (left * of_image)) if left else 1
    return block, [(batch, 1)] if segments == 1 else [(whole, 1), (left, segments)] if whole else [(batch, segments)]


def _most_segments(num_tiles: int, wanted: int) -> int:
    return max(1, min(wanted, MAX_SEGMENTS, triton.cdiv(num_tiles, SHORTEST_SEGMENT)))


def _narrower(batch: int, channels: int, block: int, below: int) -> int:
    while block > 32 and 4 * batch * triton.cdiv(channels, block) < below:
        block //= 2
    return block


def _summarise(
    kernel: Any, geometry: _Geometry, part: _Part, num_states: int,
    u: Tensor, plane: int, *shared: Tensor, backward: bool,
) -> tuple[Tensor, Tensor]:
    """Scan every segment of a part from a zero state; does nothing if a path is one segment."""
    if part.num_segments == 1:
        nothing = shared[-1].new_empty(0)
        return nothing, nothing
    shape = (part.num_images, 4, part.num_segments, num_states, u.shape[-1])
    carry, decay = shared[-1].new_empty(shape), shared[-1].new_empty(shape)
    launch(
        kernel, (geometry.num_blocks, 4 * (part.num_segments - 1), part.num_images),
        u, *shared, carry, decay,
        plane, part.first_image, part.tiles_per_segment, part.num_segments, BACKWARD=backward, **geometry.constants,
    )
    return carry, decay


@torch.library.custom_op("lamamba::scan_grid", mutates_args=())
def scan_grid_triton(
    x: Tensor,
    low: Tensor,
    weight: Tensor,
    bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    rank: int,
    continuous: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Run the forward kernels; arguments as in `lamamba.ops.selective_scan.scan_grid`, bias, A_log and D in float32.

    Each path's part of low may end with padding, which is ignored. The rows of weight, (4, e, r'), are padded with
    zeros to a multiple of 8. So they begin at multiples of 16 bytes, as the loads of the kernels and matrix products
    need.

    Returns:
        y of each path, (4, b, h, w, e), and with `save` the states at the start of each tile, (b, 4, tiles, n, e),
        which the backward pass reads.
    """
    x, low, weight, bias, A_log, D = (tensor.contiguous() for tensor in (x, low, weight, bias, A_log, D))
    batch, height, width, channels = x.shape
    geometry = _geometry(x, low, rank, A_log, continuous, backward=False)
    planes = x.new_empty(4, batch, height, width, channels)
    states = x.new_empty(_states_shape(x, A_log, save), dtype=saved_dtype(x, A_log.shape[2]))
    (part,) = geometry.parts
    if A_log.shape[2] > 1:
        _scan_states(geometry, part, x, low, weight, bias, A_log, D, planes, states, rank, continuous)
        return planes, states
    carry, decay = _summarise(scan_summary_kernel, geometry, part, 1, x, 0, low, weight, bias, A_log, backward=False)
    launch(
        scan_forward_kernel, (geometry.num_blocks, 4 * part.num_segments, batch),
        x, low, weight, bias, A_log, D, planes, states, carry, decay,
        batch, part.tiles_per_segment, part.num_segments, SAVE=save, **geometry.constants,
    )
    return planes, states


def _scan_states(
    geometry: _Geometry, part: _Part, x: Tensor,
    low: Tensor, weight: Tensor, bias: Tensor, A_log: Tensor, D: Tensor,
    planes: Tensor, states: Tensor, rank: int, continuous: bool,
) -> None:
    """Scan with several states: write y of each path to `planes`, and saved states to `states` unless it is empty."""
    batch, _, _, channels = x.shape
    num_states = A_log.shape[2]
    save = states.numel() > 0
    in_cuda = states_cuda.plan(x, low, weight, rank, num_states, continuous, backward=False)
    rates = _rates(A_log)
    rows = rates  # a placeholder that no kernel reads
    if in_cuda is None or part.num_segments > 1:
        rows = _rows_of_weights(low, rank, num_states, continuous)
    carry, decay = _summarise(
        states_summary_kernel, geometry, part, num_states, x, 0, low, rows, weight, bias, rates, backward=False
    )
    if in_cuda:
        launch(
            states_cuda.forward_kernel, (in_cuda.num_blocks, 4 * part.num_segments, batch),
            *map(states_cuda.aligned, (x, low, weight)), bias, rates, D,
            planes, states, carry, decay, save, batch, part.tiles_per_segment, part.num_segments, **in_cuda.constants,
        )
        return
    room = A_log.new_empty(batch, 4, part.num_segments, num_states, channels)
    launch(
        states_forward_kernel, (geometry.num_blocks, 4 * part.num_segments, batch),
        x, low, rows, weight, bias, rates, D, planes, room, states, carry, decay,
        batch, part.tiles_per_segment, part.num_segments,
        SAVE=save, AT_ONCE=_states_at_once(num_states, 4), maxnreg=STATES_REGISTERS, **geometry.constants,
    )


def _rates(A_log: Tensor) -> Tensor:
    """Compute exp of A_log, (4, e, n), with contiguous channels: (4, n, e)."""
    paths, channels, num_states = A_log.shape
    return torch.exp(A_log.mT, out=A_log.new_empty(paths, num_states, channels))


def _states_at_once(num_states: int, most: int) -> int:
    """Return how many states an iteration walks: 4 or 2, at most `most`, if that leaves several iterations; else 1."""
    numbers = (number for number in (4, 2) if number <= most and num_states % number == 0 and number < num_states)
    return next(numbers, 1)


def _rows_of_weights(low: Tensor, rank: int, num_states: int, continuous: bool) -> Tensor:
    """Copy B and C from low, (b, h, w, 4 (r + 2 n) or more), into the order of the paths: (b, 4, tiles, n, 2, 16)."""
    batch, height, width, _ = low.shape
    rows = low.new_empty(batch, 4, triton.cdiv(height * width, TILE), num_states, 2, TILE, dtype=torch.float32)
    _copy_rows(to_paths_kernel, low, rank, num_states, continuous, low, rows)
    return rows


def _copy_rows(
    kernel: Any, low: Tensor, rank: int, num_states: int, continuous: bool, *arguments: Tensor | int
) -> None:
    batch, height, width, channels = low.shape
    launch(
        kernel, (triton.cdiv(height * width, STEPS), 4, batch), *arguments,
        HEIGHT=height, WIDTH=width, CONTINUOUS=continuous, LOW=channels, RANK=rank, STATES=num_states,
        VALUES=triton.next_power_of_2(2 * num_states), STEPS=STEPS, TILE=TILE, num_warps=4, num_stages=1,
    )


def _states_shape(x: Tensor, A_log: Tensor, save: bool) -> tuple[int, ...]:
    batch, height, width, channels = x.shape
    return (batch, 4, triton.cdiv(height * width, TILE), A_log.shape[2], channels) if save else (0,)


def fill_up(projection: Tensor, dtype: torch.dtype, fill: int) -> Tensor:
    """Round a projection (4, low, e), append `fill` rows of zeros for each path, and return (4 (low + fill), e)."""
    low = rounded(projection, dtype)
    return (F.pad(low, (0, 0, 0, fill)) if fill else low).flatten(0, 1)


def padded(weight: Tensor) -> Tensor:
    """Pad the rows of a weight (4, e, r) to a multiple of 8."""
    fill = -weight.shape[2] % 8
    return F.pad(weight, (0, fill)) if fill else weight


def saved_dtype(x: Tensor, num_states: int) -> torch.dtype:
    """Return the dtype of saved states and of the parts of dB and dC: bfloat16 saves memory, float16 could overflow."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 and num_states > 1 else torch.float32


@scan_grid_triton.register_fake
def _(x: Tensor, low: Tensor, weight: Tensor, bias: Tensor, A_log: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    states = x.new_empty(_states_shape(x, A_log, others[-1]), dtype=saved_dtype(x, A_log.shape[2]))
    return x.new_empty(4, *x.shape), states


@torch.library.custom_op("lamamba::scan_grid_backward", mutates_args=())
def _scan_grid_backward(
    grad_y: Tensor, states: Tensor,
    x: Tensor, low: Tensor, weight: Tensor, bias: Tensor, A_log: Tensor, D: Tensor, rank: int, continuous: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernels.

    Returns:
        The gradients of x, one per path, (4, b, h, w, e), of low, and of weight in float32. Then, stacked as
        (n + 2, 4, e) float32, the gradients of A_log, of D and of bias.
    """
    tensors = (grad_y, x, low, weight, bias, A_log, D)
    grad_y, x, low, weight, bias, A_log, D = (tensor.contiguous() for tensor in tensors)
    plane = x.numel() if grad_y.ndim == 5 else 0  # distance between the gradients of two paths
    batch, height, width, channels = x.shape
    num_states = A_log.shape[2]
    in_cuda = states_cuda.plan(x, low, weight, rank, num_states, continuous, backward=True)
    if in_cuda:
        grad_y, x, low, weight = map(states_cuda.aligned, (grad_y, x, low, weight))
    geometry = _geometry(x, low, rank, A_log, continuous, True, in_cuda.at_once if in_cuda else 0)
    num_blocks, constants = (in_cuda or geometry).num_blocks, (in_cuda or geometry).constants
    is_fused = in_cuda is not None and in_cuda.constants["FUSED"]
    grad_x = x.new_empty(4, batch, height * width, channels)
    low_by_path = low.view(batch * height * width, 4, -1)
    num_shared = num_states + 2
    if is_fused:  # the kernel writes planes of the gradient of low, no grad_z, and the gradient of weight after others
        grad_z, grad_low = grad_x, low.new_empty(num_blocks, *low.shape)
        num_shared += weight.shape[2]
    else:
        is_filled_up = low_by_path.shape[2] > rank + 2 * num_states
        grad_z, grad_low = torch.empty_like(grad_x), torch.zeros_like(low) if is_filled_up else torch.empty_like(low)
    num_rows = [part.num_images * part.num_segments for part in geometry.parts]
    grad_shared = A_log.new_empty(sum(num_rows), num_shared, 4, channels)
    parts = zip(geometry.parts, grad_shared.split(num_rows), strict=True)
    if num_states == 1:
        kernel, summary = states_cuda.one_state_kernel if in_cuda else scan_backward_kernel, scan_summary_kernel
        inputs: tuple[Tensor, ...] = (low, weight, bias, A_log)
        grad_BC = A_log.new_empty(0 if is_fused else num_blocks, batch, height * width, 4, 2)
        results = (grad_x, grad_z, grad_low, grad_BC) if in_cuda else (grad_x, grad_z, grad_BC)
    else:
        kernel, summary = states_cuda.backward_kernel if in_cuda else states_backward_kernel, states_summary_kernel
        rows = _rows_of_weights(low, rank, num_states, continuous)
        inputs = (low, rows, weight, bias, _rates(A_log))
        grad_rows = x.new_empty(num_blocks, *rows.shape, dtype=saved_dtype(x, num_states))
        results = (grad_x, grad_z, grad_rows)
        if not in_cuda:
            constants = {**constants, "AT_ONCE": _states_at_once(num_states, 2)}
    for part, of_part in parts:
        carry, decay = _summarise(summary, geometry, part, num_states, grad_y, plane, *inputs, backward=True)
        shape = (part.num_images, 4, part.num_segments, num_states, channels)
        room = (A_log.new_empty(shape),) if kernel is states_backward_kernel else ()
        launch(
            kernel, (num_blocks, 4 * part.num_segments, part.num_images),
            x, *inputs, D, grad_y, states, carry, decay, *room, *results, of_part,
            plane, batch, part.first_image, part.tiles_per_segment, part.num_segments, **constants,
        )
    if num_states > 1:
        _copy_rows(
            from_paths_kernel, low, rank, num_states, continuous, grad_rows, grad_low, num_blocks, rows.numel()
        )
    elif not is_fused:
        grad_low.view_as(low_by_path)[..., rank : rank + 2] = grad_BC.sum(dim=0).flatten(0, 1)
    sums = sum_parts(grad_shared)
    if is_fused:
        grad_low = grad_low[0] if num_blocks == 1 else grad_low.sum(dim=0, dtype=low.dtype)
        grad_weight = sums[num_states + 2 :].permute(1, 2, 0).contiguous()
    else:
        grad_weight = steps_backward(grad_z.flatten(1, 2), low_by_path, weight, rank, grad_low.view_as(low_by_path))
    return grad_x.view(4, *x.shape), grad_low, grad_weight, sums[: num_states + 2]


@_scan_grid_backward.register_fake
def _(grad_y: Tensor, states: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    low, weight, _, A_log, D, *_ = others
    grad_weight = weight.new_empty(weight.shape, dtype=torch.float32)
    return (
        x.new_empty(4, *x.shape),
        low.new_empty(low.shape),
        grad_weight,
        A_log.new_empty(A_log.shape[2] + 2, *D.shape),
    )


def _gradients(grad_y: Tensor, saved: Sequence[Tensor], rank: int, continuous: bool) -> tuple[Tensor, ...]:
    """Compute the gradients of x (one per path), low, weight, bias, A_log and D from the saved tensors."""
    if grad_y.stride(0) == 0:  # the gradient of a sum is the same for all paths
        grad_y = grad_y[0]
    grad_x, grad_low, grad_weight, shared = _scan_grid_backward(grad_y, *saved, rank, continuous)
    grad_A_log = shared[:-2].permute(1, 2, 0)
    grad_A_log = grad_A_log.flatten().view(grad_A_log.shape)  # gives it the strides of a parameter, also if n is 1
    return grad_x, grad_low, grad_weight, shared[-1], grad_A_log, shared[-2]


def _backward(grad_y: Tensor, *given: Any) -> tuple[Tensor, ...]:
    *saved, rank, continuous, _ = given
    grad_x, *of_others = _gradients(grad_y, saved, rank, continuous)
    return grad_x.sum(dim=0, dtype=grad_x.dtype), *of_others


register_gradients(scan_grid_triton, _backward, num_tensors=6, saved_output=1)


class ProjectedScan(torch.autograd.Function):
    """The projection of x and the scan as one function; one kernel adds up both gradients of x.

    Takes x, the weight of the projection (4, r + 2 n, e), and the arguments of `scan_grid_triton` after `low`, where
    weight is (4, e, r), not padded. The last argument is the number of rows of zeros that are appended to the
    projection of each path. The weights may have any dtype. Returns y.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, projection: Tensor,
        weight: Tensor, bias: Tensor, A_log: Tensor, D: Tensor, rank: int, continuous: bool, fill: int,
    ) -> Tensor:
        low_projection, low_weight = fill_up(projection, x.dtype, fill), padded(rounded(weight, x.dtype))
        low = F.linear(x, low_projection)
        planes, states = scan_grid_triton(x, low, low_weight, bias, A_log, D, rank, continuous, True)
        ctx.save_for_backward(states, x, low, low_weight, bias, A_log, D, low_projection)
        ctx.options, ctx.dtypes, ctx.num_low = (rank, continuous), (projection.dtype, weight.dtype), projection.shape[1]
        return planes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *saved, projection = ctx.saved_tensors
        planes, grad_low, grad_weight, *of_others = _gradients(grads[0], saved, *ctx.options)
        grad_x = sum_and_project(planes, grad_low, projection)
        grad_projection = weight_gradient(grad_low, saved[1], ctx.dtypes[0]).unflatten(0, (4, -1))[:, : ctx.num_low]
        grad_weight = grad_weight[..., : ctx.options[0]].to(ctx.dtypes[1])
        return grad_x, grad_projection, grad_weight, *of_others, None, None, None
