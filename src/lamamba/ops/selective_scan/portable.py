"""The selective scan for exported programs: plain PyTorch operations, without gradients.

It is the scan in blocks of README.md. `blocked.py` computes the same as a custom operation, which other programs lack.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lamamba.ops.grid import NUM_PATHS, Scan, as_constant, scan_paths

CHUNK = 16  # steps of a block


def scan_grid_portable(
    x: Tensor, low: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, scan: Scan
) -> Tensor:
    """Scan a grid along its four paths; arguments and result as in `lamamba.ops.selective_scan.scan_grid`."""
    height, width = as_constant(x.shape[1]), as_constant(x.shape[2])
    num_states, rank = A_log.shape[2], dt_weight.shape[2]
    paths = scan_paths(height, width, scan, x.device)
    dtype = torch.promote_types(x.dtype, torch.float32)
    u = x.flatten(1, 2).index_select(1, paths.pixels).unflatten(1, (NUM_PATHS, -1))
    parts = low.unflatten(3, (NUM_PATHS, -1)).flatten(1, 3).split([rank, num_states, num_states], dim=-1)
    delta_low, B, C = (part.index_select(1, paths.projections).unflatten(1, (NUM_PATHS, -1)) for part in parts)
    delta = F.softplus((delta_low @ dt_weight.mT).to(dtype) + dt_bias.to(dtype)[:, None])
    A = -torch.exp(A_log.to(dtype)).mT
    u, B, C = u.to(dtype), B.to(dtype), C.to(dtype)
    factors, inputs = torch.exp(delta.unsqueeze(-2) * A[:, None]), (delta * u).unsqueeze(-2) * B.unsqueeze(-1)
    h = linear_recurrence(factors.flatten(-2), inputs.flatten(-2)).unflatten(-1, (num_states, -1))
    y = (h * C.unsqueeze(-1)).sum(dim=-2)
    y = (y + D.to(dtype)[:, None] * u).to(x.dtype)
    y = y.flatten(1, 2).index_select(1, paths.pixel_positions.flatten()).unflatten(1, (NUM_PATHS, -1)).sum(dim=1)
    return y.unflatten(1, (height, width))[None]


def linear_recurrence(a: Tensor, x: Tensor) -> Tensor:
    """Compute h[t] = a[t] h[t-1] + x[t] along the third dimension of (b, k, l, e) in blocks."""
    length = as_constant(x.shape[2])
    if length <= CHUNK:
        return _steps(a, x)[0]
    if length % CHUNK:
        a, x = (F.pad(tensor, (0, 0, 0, -length % CHUNK)) for tensor in (a, x))
    local, decay = _steps(a.unflatten(2, (-1, CHUNK)), x.unflatten(2, (-1, CHUNK)))
    last = linear_recurrence(decay[..., -1, :], local[..., -1, :])
    before = F.pad(last, (0, 0, 1, -1)).unsqueeze(3)
    return (local + decay * before).flatten(2, 3)[:, :, :length]


def _steps(a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run the recurrence along the last dimension but one from a zero state; also return the products of factors."""
    factors, inputs = a.split(1, dim=-2), x.split(1, dim=-2)
    h, decay = [inputs[0]], [factors[0]]
    for factor, value in zip(factors[1:], inputs[1:], strict=True):
        h.append(factor * h[-1] + value)
        decay.append(factor * decay[-1])
    return torch.cat(h, dim=-2), torch.cat(decay, dim=-2)
