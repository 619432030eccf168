"""The kernels of `kernels.py` as one differentiable operation that torch.compile can see."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamamba.ops.launch import launch
from lamamba.ops.sequence_scan import Arguments
from lamamba.ops.sequence_scan.kernels import sequence_backward_kernel, sequence_forward_kernel, sequence_starts_kernel
from lamamba.ops.sum_kernels import sum_parts

TILE, BLOCK = 16, 32  # steps, and channels per program
FORWARD_REGISTERS = 128  # per thread, so that 16 warps fit on a multiprocessor
# With fewer than ENOUGH_PROGRAMS programs, sequences are cut into segments of SHORTEST_SEGMENT tiles or more, to get
# WANTED_PROGRAMS. Segments are walked twice.
ENOUGH_PROGRAMS, WANTED_PROGRAMS, SHORTEST_SEGMENT, MAX_SEGMENTS = 512, 2112, 4, 512
COLUMNS = 16  # states per program that computes the states before segments
MAX_BATCH = 65535  # CUDA's limit for the third axis of a grid of programs

Strided = tuple[Tensor | None, tuple[int, ...]]
NOTHING: Strided = (None, (0, 0, 0, 0))


class _Plan(NamedTuple):
    """Sizes of a call, for the kernels."""

    grid: tuple[int, int, int]
    num_blocks: int
    num_segments: int
    sizes: tuple[int, ...]
    constants: dict[str, Any]
    carry: tuple[int, ...]
    """Shape of one state per segment."""
    states: tuple[int, ...]
    """Shape of one state per tile."""


def _plan(u: Tensor, num_states: int, softplus: bool) -> _Plan:
    batch, groups, channels, length = u.shape
    if batch > MAX_BATCH:
        raise ValueError(f"selective_scan_fn: a batch of {batch} is too large for the kernels: use {MAX_BATCH} or less")
    num_blocks, num_tiles = -(-channels // BLOCK), -(-length // TILE)
    num_programs = batch * groups * num_blocks
    wanted = -(-WANTED_PROGRAMS // num_programs) if num_programs < ENOUGH_PROGRAMS else 1
    tiles_per_segment = -(-num_tiles // max(1, min(wanted, MAX_SEGMENTS, num_tiles // SHORTEST_SEGMENT)))
    num_segments = -(-num_tiles // tiles_per_segment)
    constants = {
        "STATES": num_states, "TILE": TILE, "BLOCK": BLOCK, "SOFTPLUS": softplus, "WHOLE": length % TILE == 0,
        "PRECISE": u.dtype == torch.float32, "num_warps": 1, "num_stages": 1,
    }
    sizes = (groups, channels, length, tiles_per_segment, num_segments)
    grid = (groups * num_blocks, num_segments, batch)
    carry, states = ((batch, groups, number, num_states, channels) for number in (num_segments, num_tiles))
    return _Plan(grid, num_blocks, num_segments, sizes, constants, carry, states)


def _strided(x: Tensor | None) -> Strided:
    return NOTHING if x is None else (x, x.stride())


def _at_once(num_states: int, most: int) -> int:
    """Return how many states an iteration walks: 4 or 2, at most `most`, if they divide the states; else 1."""
    return next((number for number in (4, 2) if number <= most and num_states % number == 0), 1)


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _prepare_carry(
    plan: _Plan, first: Tensor | None, rates: Tensor, arguments: tuple[Any, ...], backward: bool
) -> tuple[Tensor, bool]:
    """Compute the state before every segment, or in the backward pass the gradient of the state after it.

    Args:
        plan: sizes of the call.
        first: (b, g, w, n) state before the first segment (gradient after the last one), or None for zero.
        rates: A as (g, n, w).
        arguments: of the forward kernel, up to `p_bias`, to summarize the segments.
        backward: whether this is the backward pass.

    Returns:
        Room for states, (b, g, segments, n, w) float32, and whether they are set. Otherwise the first one is zero, and
        there are no others.
    """
    carry = rates.new_empty(plan.carry)
    if plan.num_segments == 1:
        return (carry, False) if first is None else (carry.copy_(first.mT[:, :, None]), True)
    ends, decays = rates.new_empty(plan.carry), rates.new_empty(plan.carry)
    channels, _, images = plan.grid
    launch(
        sequence_forward_kernel, (channels, plan.num_segments - 1, images),
        *arguments, *NOTHING, None, ends, decays, *plan.sizes, STARTED=False, BACKWARD=backward,
        AT_ONCE=_at_once(plan.carry[3], 4), maxnreg=FORWARD_REGISTERS, **plan.constants,
    )
    columns = plan.carry[3] * plan.carry[4]
    launch(
        sequence_starts_kernel, (-(-columns // COLUMNS), plan.carry[0] * plan.carry[1], 1),
        ends, decays, _float(None if first is None else first.mT), carry, columns, plan.num_segments,
        SEGMENTS=triton.next_power_of_2(plan.num_segments), COLUMNS=COLUMNS, BACKWARD=backward, num_warps=4,
    )
    return carry, True


def _run_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, initial_state: Tensor | None,
    softplus: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward kernels; arguments as in `lamamba.ops.sequence_scan.Arguments`, grouped.

    Returns:
        y, (b, g, w, l), the states after each segment, (b, g, segments, n, w), and with `save` the states before each
        tile, (b, g, tiles, n, w), which the backward pass reads.
    """
    y = torch.empty_like(u)
    return y, *_scan_into(y, u, delta, A, B, C, D, z, delta_bias, initial_state, softplus, save)


def _scan_into(
    y: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, initial_state: Tensor | None,
    softplus: bool, save: bool,
) -> tuple[Tensor, Tensor]:
    """Run the forward kernels, which write y; return the states after each segment, and those before each tile."""
    plan = _plan(u, A.shape[2], softplus)
    rates, bias = A.float().mT.contiguous(), _float(delta_bias)
    states = u.new_empty(plan.states if save else (0,), dtype=torch.float32)
    inputs = (*_strided(u), *_strided(delta), rates, *_strided(B), *_strided(C))
    carry, started = _prepare_carry(plan, initial_state, rates, (*inputs, None, *NOTHING, bias), backward=False)
    launch(
        sequence_forward_kernel, plan.grid,
        *inputs, _float(D), *_strided(z), bias, *_strided(y), states if save else None, carry, None, *plan.sizes,
        STARTED=started, BACKWARD=False, AT_ONCE=_at_once(A.shape[2], 4), maxnreg=FORWARD_REGISTERS, **plan.constants,
    )
    return carry, states


scan_sequences_triton = torch.library.custom_op("lamamba::scan_sequences", mutates_args=())(_run_forward)


@scan_sequences_triton.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    softplus, save = others[-2:]
    plan = _plan(u, A.shape[2], softplus)
    states = u.new_empty(plan.states if save else (0,), dtype=torch.float32)
    return torch.empty_like(u), u.new_empty(plan.carry, dtype=torch.float32), states


def _run_backward(
    grad_y: Tensor, grad_last: Tensor | None, states: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, softplus: bool, for_initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernels.

    Returns:
        Gradients of u, delta and z (empty if z is None); of B and C, stacked in float32; of A, D and the bias, stacked
        as (n + 2, g, w) in float32; and of the initial state (empty unless `for_initial`).
    """
    plan = _plan(u, A.shape[2], softplus)
    rates, bias = A.float().mT.contiguous(), _float(delta_bias)
    others = (rates, *_strided(B), *_strided(C))
    summary = (*_strided(grad_y), *_strided(delta), *others, None, *_strided(z), bias)
    carry, started = _prepare_carry(plan, grad_last, rates, summary, backward=True)
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
    grad_z = u.new_empty(0) if z is None else torch.empty_like(z)
    batch, groups, segments, num_states, channels = plan.carry
    grad_BC = u.new_empty(2, batch, groups, plan.num_blocks, *B.shape[2:], dtype=torch.float32)
    grad_shared = rates.new_empty(batch * segments, num_states + 2, groups, channels)
    launch(
        sequence_backward_kernel, plan.grid,
        *_strided(u), *_strided(delta), *others, _float(D), *_strided(z), bias, *_strided(grad_y), states, carry,
        *_strided(grad_u), *_strided(grad_delta), *(NOTHING if z is None else _strided(grad_z)),
        grad_BC, grad_shared, grad_BC[0].numel(), *plan.sizes,
        STARTED=started, AT_ONCE=_at_once(A.shape[2], 2), **plan.constants,
    )
    of_BC = grad_BC.sum(dim=3)
    of_initial = carry[:, :, 0].mT.clone() if for_initial else carry.new_empty(0)
    return grad_u, grad_delta, grad_z, of_BC, sum_parts(grad_shared), of_initial


_backward = torch.library.custom_op("lamamba::scan_sequences_backward", mutates_args=())(_run_backward)


@_backward.register_fake
def _(grad_y: Tensor, grad_last: Tensor | None, states: Tensor, u: Tensor, *others: Any) -> tuple[Tensor, ...]:
    delta, A, B, _, _, z, *_, for_initial = others
    groups, channels, num_states = A.shape
    of_initial = u.new_empty(len(u), groups, num_states, channels, dtype=torch.float32)
    return (
        torch.empty_like(u),
        torch.empty_like(delta),
        u.new_empty(0) if z is None else torch.empty_like(z),
        u.new_empty(2, *B.shape, dtype=torch.float32),
        u.new_empty(num_states + 2, groups, channels, dtype=torch.float32),
        of_initial.mT if for_initial else of_initial.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, initial_state, ctx.softplus, _ = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.dtype_of_state = None if initial_state is None else initial_state.dtype
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _autograd(
    ctx: Any, grad_y: Tensor | None, grad_carry: Tensor | None, grad_states: Tensor | None, run: Any = _backward
) -> tuple[Tensor | None, ...]:
    states, u, delta, A, B, C, D, z, delta_bias = ctx.saved_tensors
    if grad_y is None and grad_carry is None:  # nothing downstream depends on the results
        return (None,) * 11
    grad_y = torch.zeros_like(u) if grad_y is None else grad_y
    grad_last = None if grad_carry is None else grad_carry[:, :, -1].mT
    of_u, of_delta, of_z, of_BC, shared, of_state = run(
        grad_y, grad_last, states, u, delta, A, B, C, D, z, delta_bias, ctx.softplus, ctx.dtype_of_state is not None
    )
    of_B, of_C = of_BC.to(B.dtype) if B.dtype == C.dtype else (of_BC[0].to(B.dtype), of_BC[1].to(C.dtype))
    return (
        of_u, of_delta, shared[:-2].permute(1, 2, 0).to(A.dtype), of_B, of_C,
        None if D is None else shared[-2].to(D.dtype), None if z is None else of_z,
        None if delta_bias is None else shared[-1].to(delta_bias.dtype),
        None if ctx.dtype_of_state is None else of_state.to(ctx.dtype_of_state), None, None,
    )


scan_sequences_triton.register_autograd(_autograd, setup_context=_setup_context)


class _Scan(torch.autograd.Function):
    """The operation with gradients, without the time that PyTorch's wrappers of registered operations take.

    Channels are split into groups inside `forward`, so that autograd does not record these views. y is no view, so that
    it can be modified in place.
    """

    @staticmethod
    def forward(ctx: Any, num_groups: int | None, softplus: bool, *given: Any) -> tuple[Tensor, Tensor]:
        grouped = _in_groups(Arguments(*given), num_groups)
        y = torch.empty_like(given[0])
        carry, states = _scan_into(y.view(grouped.u.shape), *grouped, softplus, True)
        ctx.save_for_backward(states, *grouped[:-1])
        ctx.softplus, first = softplus, grouped.initial_state
        ctx.dtype_of_state = None if first is None else first.dtype
        ctx.grouped, ctx.shapes = grouped.u.shape, [None if x is None else x.shape for x in given]
        ctx.set_materialize_grads(False)
        return y, carry

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_y, grad_carry = grads
        if grad_y is not None:
            grad_y = grad_y.view(ctx.grouped)
        found = _autograd(ctx, grad_y, grad_carry, None, run=_run_backward)
        of_given = (None if x is None else x.reshape(shape) for x, shape in zip(found, ctx.shapes, strict=False))
        return None, None, *of_given


def _in_groups(given: Arguments, num_groups: int | None) -> Arguments:
    return given if num_groups is None else given.in_groups(num_groups)


def scan_sequences(given: Arguments, num_groups: int | None, softplus: bool, save: bool) -> tuple[Tensor, Tensor]:
    """Run the kernels, with gradients if `save`. torch.compile and subclasses of tensors take `scan_sequences_triton`.

    Args:
        given: the tensors.
        num_groups: number of groups; None if the tensors are already grouped.
        softplus: apply softplus to delta.
        save: save states for the backward pass.

    Returns:
        y, in the shape of u, and the states after each segment, (b, g, segments, n, w).
    """
    plain = not torch.compiler.is_compiling() and type(given.u) in (Tensor, torch.nn.Parameter)
    if plain and save:
        return _Scan.apply(num_groups, softplus, *given)
    run = _run_forward if plain else scan_sequences_triton
    y, carry, _ = run(*_in_groups(given, num_groups), softplus, save)
    return y if num_groups is None else y.flatten(1, 2), carry
