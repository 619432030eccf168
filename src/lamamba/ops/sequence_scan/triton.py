"""The kernels of `kernels.py` as one differentiable operation that torch.compile can see."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

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
MAX_OFFSETS = 2**31  # the kernels compute where the weights of a state lie in 32 bits

Strided = tuple[Tensor | None, tuple[int, ...]]
NOTHING: Strided = (None, (0, 0, 0, 0))


class _Plan(NamedTuple):
    """Sizes of a call, for the kernels."""

    grid: tuple[int, int, int]
    num_blocks: int
    num_segments: int
    sizes: tuple[int, ...]
    forward: dict[str, Any]
    """Constants of the forward kernel."""
    backward: dict[str, Any]
    """Constants of the backward kernel."""
    carry: tuple[int, ...]
    """Shape of one state per segment."""
    states: tuple[int, ...]
    """Shape of one state per tile."""


def _make_plan(
    shape: Sequence[int], num_groups: int | None, num_states: int, dtype: torch.dtype, softplus: bool
) -> _Plan:
    """Plan the scan of u in this shape: (b, g, w, l), or (b, d, l) with a number of groups."""
    batch, *_, length = shape
    groups, channels = shape[1:3] if num_groups is None else (num_groups, shape[1] // num_groups)
    if batch > MAX_BATCH:
        raise ValueError(f"selective_scan_fn: a batch of {batch} is too large for the kernels: use {MAX_BATCH} or less")
    if num_states * length >= MAX_OFFSETS:
        given = f"{num_states} states along {length} steps"
        raise ValueError(f"selective_scan_fn: {given} are too many for the kernels: use fewer than 2^31 in all")
    num_blocks, num_tiles = -(-channels // BLOCK), -(-length // TILE)
    num_programs = batch * groups * num_blocks
    wanted = -(-WANTED_PROGRAMS // num_programs) if num_programs < ENOUGH_PROGRAMS else 1
    tiles_per_segment = -(-num_tiles // max(1, min(wanted, MAX_SEGMENTS, num_tiles // SHORTEST_SEGMENT)))
    num_segments = -(-num_tiles // tiles_per_segment)
    constants = {
        "STATES": num_states, "TILE": TILE, "BLOCK": BLOCK, "SOFTPLUS": softplus, "WHOLE": length % TILE == 0,
        "PRECISE": dtype == torch.float32, "num_warps": 1, "num_stages": 1,
    }
    carry, states = ((batch, groups, number, num_states, channels) for number in (num_segments, num_tiles))
    return _Plan(
        (groups * num_blocks, num_segments, batch), num_blocks, num_segments,
        (groups, channels, length, tiles_per_segment, num_segments),
        {**constants, "AT_ONCE": _at_once(num_states, 4), "maxnreg": FORWARD_REGISTERS},
        {**constants, "AT_ONCE": _at_once(num_states, 2)}, carry, states,
    )  # fmt: skip


_plan = lru_cache(maxsize=1024)(_make_plan)


def _at_once(num_states: int, most: int) -> int:
    """Return how many states an iteration walks: 4 or 2, at most `most`, if they divide the states; else 1."""
    return next((number for number in (4, 2) if number <= most and num_states % number == 0), 1)


def _strided(x: Tensor | None, size: int) -> Strided:
    """Return (b, g, size, l) with its strides. If it is (b, g size, l), return the strides of its view in groups."""
    if x is None:
        return NOTHING
    strides = x.stride()
    if len(strides) == 3:
        strides = (strides[0], size * strides[1], *strides[1:])
    return x, strides


def _weights(x: Tensor, num_states: int) -> Strided:
    """Return B or C with its strides; it is copied if the offset of a state does not fit into 32 bits."""
    return _strided(x if x.stride(-2) * num_states < MAX_OFFSETS else x.contiguous(), num_states)


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _rates(A: Tensor, channels: int) -> Tensor:
    """Return A, (g, w, n) or (g w, n), as (g, n, w); with one state it may keep its shape."""
    num_states = A.shape[-1]
    return (A if num_states == 1 else A.reshape(-1, channels, num_states).mT).float().contiguous()


def _prepare_carry(
    plan: _Plan, first: Tensor | None, rates: Tensor, arguments: tuple[Any, ...], backward: bool
) -> tuple[Tensor, bool]:
    """Compute the state before every segment, or in the backward pass the gradient of the state after it.

    Args:
        plan: sizes of the call.
        first: (b, g, n, w) state before the first segment (gradient after the last one), or None for zero.
        rates: A as (g, n, w).
        arguments: of the forward kernel, up to `p_bias`, to summarize the segments.
        backward: whether this is the backward pass.

    Returns:
        Room for states, (b, g, segments, n, w) float32, and whether they are set. Otherwise the first one is zero, and
        there are no others.
    """
    carry = rates.new_empty(plan.carry)
    if plan.num_segments == 1:
        return (carry, False) if first is None else (carry.copy_(first[:, :, None]), True)
    ends, decays = rates.new_empty(plan.carry), rates.new_empty(plan.carry)
    channels, segments, images = plan.grid
    launch(
        sequence_forward_kernel, (channels, segments - 1, images),
        *arguments, *NOTHING, None, ends, decays, *plan.sizes, STARTED=False, BACKWARD=backward, **plan.forward,
    )  # fmt: skip
    batch, groups, _, num_states, width = plan.carry
    columns = num_states * width
    launch(
        sequence_starts_kernel, (-(-columns // COLUMNS), batch * groups),
        ends, decays, _float(first), carry, columns, segments,
        SEGMENTS=1 << (segments - 1).bit_length(), COLUMNS=COLUMNS, BACKWARD=backward, num_warps=4,
    )  # fmt: skip
    return carry, True


def _scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, initial_state: Tensor | None,
    num_groups: int | None, softplus: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward kernels on tensors as in `lamamba.ops.sequence_scan.Arguments`.

    If `num_groups` is None, they are already grouped.

    Returns:
        y, like u, the states after each segment, (b, g, segments, n, w), and with `save` the states before each tile,
        (b, g, tiles, n, w), which the backward pass reads.
    """
    num_states = A.shape[-1]
    plan = _plan(u.shape, num_groups, num_states, u.dtype, softplus)
    batch, groups, _, _, channels = plan.carry
    y, rates, bias = torch.empty_like(u), _rates(A, channels), _float(delta_bias)
    states = rates.new_empty(plan.states if save else (0,))
    inputs = (
        *_strided(u, channels), *_strided(delta, channels), rates, *_weights(B, num_states), *_weights(C, num_states),
    )  # fmt: skip
    first = None if initial_state is None else initial_state.reshape(batch, groups, channels, num_states).mT
    carry, started = _prepare_carry(plan, first, rates, (*inputs, None, *NOTHING, bias), backward=False)
    launch(
        sequence_forward_kernel, plan.grid,
        *inputs, _float(D), *_strided(z, channels), bias, *_strided(y, channels), states if save else None, carry, None,
        *plan.sizes, STARTED=started, BACKWARD=False, **plan.forward,
    )  # fmt: skip
    return y, carry, states


scan_sequences_triton = torch.library.custom_op("lamamba::scan_sequences", mutates_args=())(_scan)


@scan_sequences_triton.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_groups, softplus, save = others[-3:]
    plan = _make_plan(u.shape, num_groups, A.shape[-1], u.dtype, softplus)
    states = u.new_empty(plan.states if save else (0,), dtype=torch.float32)
    return torch.empty_like(u), u.new_empty(plan.carry, dtype=torch.float32), states


def _scan_back(
    grad_y: Tensor, grad_last: Tensor | None, states: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None,
    num_groups: int | None, softplus: bool, for_initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernels. `grad_last` is the gradient of the last state, (b, g, n, w).

    Returns:
        Gradients of u, delta and z (empty if z is None); of B and C, stacked in the shape of B, and in the dtype of
        both, or in float32 if these differ; of A, D and the bias, stacked as (n + 2, g w) in float32; and of the
        initial state, (b, g, w, n) in float32 (empty unless `for_initial`).
    """
    num_states = A.shape[-1]
    plan = _plan(u.shape, num_groups, num_states, u.dtype, softplus)
    batch, groups, segments, _, channels = plan.carry
    rates, bias = _rates(A, channels), _float(delta_bias)
    of_y, of_delta, of_z = _strided(grad_y, channels), _strided(delta, channels), _strided(z, channels)
    others = (rates, *_weights(B, num_states), *_weights(C, num_states))
    summary = (*of_y, *of_delta, *others, None, *of_z, bias)
    carry, started = _prepare_carry(plan, grad_last, rates, summary, backward=True)
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
    grad_z = None if z is None else torch.empty_like(z)
    dtype = B.dtype if B.dtype == C.dtype else torch.float32
    if plan.num_blocks == 1:
        grad_BC = B.new_empty((2, *B.shape), dtype=dtype)
    else:
        grad_BC = rates.new_empty((2, *B.shape[:-2], plan.num_blocks, *B.shape[-2:]))
    grad_shared = rates.new_empty((batch * segments, num_states + 2, groups * channels))
    launch(
        sequence_backward_kernel, plan.grid,
        *_strided(u, channels), *of_delta, *others, _float(D), *of_z, bias, *of_y, states, carry,
        *_strided(grad_u, channels), *_strided(grad_delta, channels), *_strided(grad_z, channels),
        grad_BC, grad_shared, grad_BC.numel() // 2, *plan.sizes, STARTED=started, **plan.backward,
    )  # fmt: skip
    of_BC = grad_BC if plan.num_blocks == 1 else grad_BC.sum(dim=-3).to(dtype)
    of_initial = carry[:, :, 0].mT.contiguous() if for_initial else rates.new_empty(0)
    grad_z = rates.new_empty(0) if grad_z is None else grad_z
    return grad_u, grad_delta, grad_z, of_BC, sum_parts(grad_shared), of_initial


_backward = torch.library.custom_op("lamamba::scan_sequences_backward", mutates_args=())(_scan_back)


@_backward.register_fake
def _(grad_y: Tensor, grad_last: Tensor | None, states: Tensor, u: Tensor, *others: Any) -> tuple[Tensor, ...]:
    delta, A, B, C, _, z, _, num_groups, softplus, for_initial = others
    plan = _make_plan(u.shape, num_groups, A.shape[-1], u.dtype, softplus)
    batch, groups, _, num_states, channels = plan.carry

    def empty(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=torch.float32)

    return (
        torch.empty_like(u),
        torch.empty_like(delta),
        empty(0) if z is None else torch.empty_like(z),
        B.new_empty((2, *B.shape), dtype=B.dtype if B.dtype == C.dtype else torch.float32),
        empty(num_states + 2, groups * channels),
        empty(batch, groups, channels, num_states) if for_initial else empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, initial_state, num_groups, softplus, _ = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.num_groups, ctx.softplus = num_groups, softplus
    ctx.initial = None if initial_state is None else (initial_state.shape, initial_state.dtype)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _autograd(
    ctx: Any, grad_y: Tensor | None, grad_carry: Tensor | None, grad_states: Tensor | None, run: Any = _backward
) -> tuple[Tensor | None, ...]:
    if grad_y is None and grad_carry is None:  # nothing downstream depends on the results
        return (None,) * 12
    states, u, delta, A, B, C, D, z, bias = ctx.saved_tensors
    grad_y = torch.zeros_like(u) if grad_y is None else grad_y
    grad_last = None if grad_carry is None else grad_carry[:, :, -1]
    of_u, of_delta, of_z, of_BC, shared, of_initial = run(
        grad_y, grad_last, states, u, delta, A, B, C, D, z, bias, ctx.num_groups, ctx.softplus, ctx.initial is not None
    )
    of_B, of_C = of_BC.unbind()
    of_A = shared[0] if A.shape[-1] == 1 else shared[:-2].mT
    return (
        of_u, of_delta, _like(of_A, A.shape, A.dtype), _like(of_B, B.shape, B.dtype), _like(of_C, C.shape, C.dtype),
        None if D is None else _like(shared[-2], D.shape, D.dtype), None if z is None else of_z,
        None if bias is None else _like(shared[-1], bias.shape, bias.dtype),
        None if ctx.initial is None else _like(of_initial, *ctx.initial), None, None, None,
    )  # fmt: skip


def _like(x: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return a tensor in another shape and dtype. The methods take a microsecond each even where nothing changes."""
    x = x if x.shape == shape else x.view(shape)
    return x if x.dtype == dtype else x.to(dtype)


scan_sequences_triton.register_autograd(_autograd, setup_context=_setup_context)


def _may_launch(*tensors: Tensor | None) -> bool:
    """Return whether kernels can read the memory of these tensors without PyTorch's dispatcher.

    The dispatcher is needed in torch.compile and in vmap, for subclasses, and for views that PyTorch negates lazily,
    such as `x.conj().imag`.
    """
    if torch.compiler.is_compiling():
        return False
    for x in tensors:
        if x is not None and (type(x) not in (Tensor, Parameter) or x.is_neg()):
            return False
    is_mapped = torch._C._functorch.is_batchedtensor
    return not torch._C._are_functorch_transforms_active() or not any(x is not None and is_mapped(x) for x in tensors)


class _Scan(torch.autograd.Function):
    """The operation with gradients, without the time that PyTorch's wrappers of registered operations take."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _scan(*inputs)
        _setup_context(ctx, inputs, output)
        return output[:2]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_carry: Tensor | None) -> tuple[Tensor | None, ...]:
        # The registered operation raises an error if these gradients are differentiated again.
        run = _scan_back if _may_launch(grad_y, grad_carry) and not torch.is_grad_enabled() else _backward
        return _autograd(ctx, grad_y, grad_carry, None, run)


def scan_sequences(given: Arguments, num_groups: int | None, softplus: bool, save: bool) -> tuple[Tensor, Tensor]:
    """Run the kernels, with gradients if `save`.

    Args:
        given: the tensors.
        num_groups: number of groups; None if the tensors are already grouped.
        softplus: apply softplus to delta.
        save: save states for the backward pass.

    Returns:
        y, in the shape of u, and the states after each segment, (b, g, segments, n, w).
    """
    may_launch = _may_launch(*given)
    if may_launch and save:
        return _Scan.apply(*given, num_groups, softplus, True)
    y, carry, _ = (_scan if may_launch else scan_sequences_triton)(*given, num_groups, softplus, save)
    return y, carry
