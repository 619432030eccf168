"""The selective scan in blocks, in plain PyTorch with its own backward pass. It runs where there is no fast version.

A loop over time would start l tiny operations. Here the sequence is cut into chunks, and the loop runs over the steps
within a chunk, for all chunks at once. The last states of the chunks are a sequence, too, and are scanned the same way.
Then each is added to the chunk that follows. README.md has the equations.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lamamba.ops.gradients import register_gradients

CHUNK = 32
# On a CPU the work is cut into tiles of about this many states, whose buffers stay in cache and are reused. New memory
# for whole tensors would cost more than the arithmetic.
TILE_ELEMENTS = 1 << 20


@torch.library.custom_op("lamamba::selective_scan", mutates_args=())
def selective_scan_blocked(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor]:
    """Run k selective scans along l; arguments as in `lamamba.ops.selective_scan`, all of one floating-point dtype.

    Returns:
        y, (b, k, l, d), and the states h, (b, k, l, n, d), which the backward pass reads.
    """
    b, k, l, d = u.shape
    y, h = u.new_empty(b, k, l, d), u.new_empty(b, k, l, A.shape[2], d)
    for tile, path in _tiles(h):
        tile_u, tile_delta, tile_y, tile_h = u[tile, path], delta[tile, path], y[tile, path], h[tile, path]
        decay = _decay(tile_delta, A[path])
        torch.mul((tile_delta * tile_u).unsqueeze(3), B[tile, path].unsqueeze(4), out=tile_h)
        linear_recurrence_(decay, tile_h)
        _sum_states(tile_h, C[tile, path], out=tile_y).addcmul_(D[path, None], tile_u)
    return y, h


selective_scan_blocked.register_fake(
    lambda u, delta, A, *others: (u.new_empty(u.shape), u.new_empty(*u.shape[:3], A.shape[2], u.shape[3]))
)


@torch.library.custom_op("lamamba::selective_scan_backward", mutates_args=())
def _backward(
    grad_y: Tensor, h: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = tuple(_empty_like(x) for x in (u, delta, A, B, C, D))
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D = gradients
    grad_A.zero_()
    grad_D.zero_()
    for tile, path in _tiles(h):
        part = (tile, path)
        _backward_tile(
            (grad_y[part], h[part], u[part], delta[part], A[path], B[part], C[part], D[path]),
            (grad_u[part], grad_delta[part], grad_A[path], grad_B[part], grad_C[part], grad_D[path]),
        )
    return gradients  # type: ignore[return-value]


def _backward_tile(inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> None:
    """Write one tile of every gradient; add to the gradients of A and D, which all tiles share."""
    grad_y, h, u, delta, A, B, C, D = inputs
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D = gradients
    decay = _decay(delta, A)
    # g[t], the gradient of h[t], obeys the same recurrence backward in time: g[t] = C[t] dy[t] + decay[t+1] g[t+1].
    g = C.unsqueeze(4) * grad_y.unsqueeze(3)
    next_decay = torch.empty_like(decay)
    next_decay[:, :, :-1] = decay[:, :, 1:]
    next_decay[:, :, -1] = 0
    linear_recurrence_(next_decay, g, reverse=True)

    scratch = next_decay  # its values are no longer needed
    grad_C.copy_(torch.mul(h, grad_y.unsqueeze(3), out=scratch).sum(dim=4))
    grad_B.copy_(torch.mul(g, (delta * u).unsqueeze(3), out=scratch).sum(dim=4))
    grad_D.add_((grad_y * u).sum(dim=(0, 2)))
    grad_drive = _sum_states(g, B, out=grad_u)
    # decay[t] h[t-1] g[t] is the gradient of the exponent delta[t] A. It is 0 at the first step, where h[-1] = 0.
    grad_exponent = decay.mul_(g)
    grad_exponent[:, :, 1:].mul_(h[:, :, :-1])
    grad_exponent[:, :, 0] = 0
    grad_A.add_(torch.mul(grad_exponent, delta.unsqueeze(3), out=scratch).sum(dim=(0, 2)).mT)
    torch.sum(torch.mul(grad_exponent, A.mT.unsqueeze(1), out=scratch), dim=3, out=grad_delta)
    grad_delta.addcmul_(grad_drive, u)
    grad_drive.mul_(delta).addcmul_(D[:, None], grad_y)


_backward.register_fake(lambda grad_y, h, *inputs: tuple(map(_empty_like, inputs)))


register_gradients(selective_scan_blocked, _backward, num_tensors=6, saved_output=1)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _tiles(h: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut (b, k, ...) into slices of b and k whose buffers fit into a CPU's cache; on other devices, use one tile."""
    b, k = h.shape[:2]
    if h.device.type != "cpu":
        yield slice(0, b), slice(0, k)
        return
    elements = h[0, 0].numel()
    num_paths = k if k * elements <= TILE_ELEMENTS else 1
    num_batch = max(1, TILE_ELEMENTS // (num_paths * elements))
    for path in range(0, k, num_paths):
        for start in range(0, b, num_batch):
            yield slice(start, start + num_batch), slice(path, path + num_paths)


def _decay(delta: Tensor, A: Tensor) -> Tensor:
    """Compute exp(delta A), (b, k, l, n, d), with channels last so that every step reads contiguous rows."""
    return (delta.unsqueeze(3) * A.mT.unsqueeze(1)).exp_()


def _sum_states(h: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """Sum (b, k, l, n, d) over n with weights (b, k, l, n) into out."""
    torch.mul(h[:, :, :, 0], weights[..., :1], out=out)
    for state in range(1, h.shape[3]):
        out.addcmul_(h[:, :, :, state], weights[..., state : state + 1])
    return out


def linear_recurrence_(a: Tensor, x: Tensor, reverse: bool = False) -> None:
    """Replace x in place by h[t] = a[t] h[t-1] + x[t], along the third dimension; a is overwritten.

    Args:
        a: (b, k, l, ...) factors.
        x: (b, k, l, ...) inputs; h on return.
        reverse: run from the last step to the first, h[t] = a[t] h[t+1] + x[t].
    """
    length = x.shape[2]
    if length <= CHUNK:
        for t in _steps(length, reverse):
            x[:, :, t].addcmul_(a[:, :, t], x[:, :, _before(t, reverse)])
        return

    num_chunks, remainder = divmod(length, CHUNK)
    whole = slice(remainder, None) if reverse else slice(0, length - remainder)
    chunk_a = a[:, :, whole].unflatten(2, (num_chunks, CHUNK))
    chunk_x = x[:, :, whole].unflatten(2, (num_chunks, CHUNK))
    for t in _steps(CHUNK, reverse):
        chunk_x[:, :, :, t].addcmul_(chunk_a[:, :, :, t], chunk_x[:, :, :, _before(t, reverse)])
        chunk_a[:, :, :, t].mul_(chunk_a[:, :, :, _before(t, reverse)])
    # Now each chunk is scanned from a zero state, and `a` holds the decay since the state before the chunk.
    last = 0 if reverse else -1
    states = chunk_x[:, :, :, last]
    linear_recurrence_(chunk_a[:, :, :, last], states, reverse)
    if reverse:
        chunk_x[:, :, :-1, 1:].addcmul_(chunk_a[:, :, :-1, 1:], states[:, :, 1:].unsqueeze(3))
    else:
        chunk_x[:, :, 1:, :-1].addcmul_(chunk_a[:, :, 1:, :-1], states[:, :, :-1].unsqueeze(3))

    if remainder:
        rest = slice(0, remainder) if reverse else slice(length - remainder, None)
        first, past = (remainder - 1, remainder) if reverse else (length - remainder, length - remainder - 1)
        x[:, :, first].addcmul_(a[:, :, first], x[:, :, past])
        linear_recurrence_(a[:, :, rest], x[:, :, rest], reverse)


def _steps(length: int, reverse: bool) -> range:
    return range(length - 2, -1, -1) if reverse else range(1, length)


def _before(t: int, reverse: bool) -> int:
    return t + 1 if reverse else t - 1
