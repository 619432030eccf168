"""The definition of `selective_scan_fn`, one step after the other. Tests compare every other version with it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_fn_reference(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None = None, z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan sequences step by step; arguments and both results as in `lamamba.ops.selective_scan_fn`."""
    batch, channels, length = u.shape
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta

    def of_channels(weights: Tensor) -> Tensor:
        if weights.ndim == 2:
            return weights[None, :, :, None].expand(batch, -1, -1, length)
        weights = weights[:, None] if weights.ndim == 3 else weights
        return weights.repeat_interleave(channels // weights.shape[1], dim=1)

    B, C = of_channels(B), of_channels(C)
    h = u.new_zeros(batch, *A.shape) if initial_state is None else initial_state
    outputs = []
    for t in range(length):
        step = delta[:, :, t, None]
        h = torch.exp(step * A) * h + step * B[..., t] * u[:, :, t, None]
        outputs.append((C[..., t] * h).sum(dim=2))
    y = torch.stack(outputs, dim=2)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h
