"""The compiled loops of `loops.py` as one differentiable operation; threads share the sequences."""

import torch
from torch import Tensor

from lamamba.ops.gradients import register_gradients
from lamamba.ops.selective_scan.cpu import TILE
from lamamba.ops.threads import array, share_images


@torch.library.custom_op("lamamba::scan_sequences_cpu", mutates_args=())
def scan_sequences_cpu(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, start: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the recurrence of sequences, all float32.

    Args:
        u, delta: (b, l, w) input and step sizes.
        A: (b, n, w) decay rates.
        B, C: (b, l, n) weights.
        start: (b, n, w) state before the first step.

    Returns:
        y, (b, l, w), the last state, (b, n, w), and the states before every `TILE` steps, for the backward pass.
    """
    from lamamba.ops.sequence_scan.loops import sequences_forward

    y, last, starts = _results(u, A)
    inputs, outputs = map(array, (u, delta, A, B, C, start)), (y.numpy(), last.numpy(), starts.numpy())
    share_images(sequences_forward, tuple(inputs), (), outputs)
    return y, last, starts


def _results(u: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    num_tiles = -(-u.shape[1] // TILE)
    return u.new_empty(u.shape), u.new_empty(A.shape), u.new_empty(len(u), num_tiles, *A.shape[1:])


scan_sequences_cpu.register_fake(lambda u, delta, A, *others: _results(u, A))


@torch.library.custom_op("lamamba::scan_sequences_cpu_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    grad_last: Tensor,
    starts: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    start: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from lamamba.ops.sequence_scan.loops import sequences_backward

    gradients = tuple(u.new_empty(x.shape) for x in (u, delta, A, B, C, start))
    inputs = map(array, (grad_y, grad_last, starts, u, delta, A, B, C))
    share_images(sequences_backward, tuple(inputs), (), tuple(x.numpy() for x in gradients))
    return gradients  # type: ignore[return-value]


_backward.register_fake(lambda grad_y, grad_last, starts, *inputs: tuple(x.new_empty(x.shape) for x in inputs))


register_gradients(scan_sequences_cpu, _backward, num_tensors=6, saved_output=2)
