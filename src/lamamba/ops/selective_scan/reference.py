"""The definition of the selective scan, one step after the other. Tests compare every other version with it."""

import torch
from torch import Tensor


def selective_scan_reference(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Run k selective scans along l, step by step; arguments and result as in `lamamba.ops.selective_scan`."""
    decay = torch.exp(torch.einsum("bkld,kdn->bkldn", delta, A))
    drive = torch.einsum("bkld,bkln,bkld->bkldn", delta, B, u)
    h = torch.zeros_like(drive[:, :, 0])
    outputs = []
    for t in range(u.shape[2]):
        h = decay[:, :, t] * h + drive[:, :, t]
        outputs.append(torch.einsum("bkn,bkdn->bkd", C[:, :, t], h))
    return torch.stack(outputs, dim=2) + D[:, None] * u
