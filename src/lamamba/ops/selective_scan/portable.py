"""The selective scan for exported programs: plain PyTorch operations, without gradients.

It is the scan in blocks of README.md. `blocked.py` computes the same as a custom operation, which other programs lack.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lamamba.ops.grid import as_constant

CHUNK = 16  # steps of a block


def selective_scan_portable(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Run k selective scans; arguments and result as in `lamamba.ops.selective_scan.selective_scan`."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    x, B, C = u.to(dtype), B.to(dtype), C.to(dtype)
    factors, inputs = torch.exp(delta.unsqueeze(-2) * A.mT[:, None]), (delta * x).unsqueeze(-2) * B.unsqueeze(-1)
    h = linear_recurrence(factors.flatten(-2), inputs.flatten(-2)).unflatten(-1, (A.shape[2], -1))
    y = (h * C.unsqueeze(-1)).sum(dim=-2)
    return (y + D.to(dtype)[:, None] * x).to(u.dtype)


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
