"""The definition of the gated residual, the norm and its modulation, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_gated_reference(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x + gate (branch + bias); arguments as in `lamamba.ops.residual_norm`."""
    branch = branch.to(x.dtype)
    if bias is not None:
        branch = branch + bias.to(x.dtype)
    return torch.addcmul(x, gate.to(x.dtype)[:, None, None], branch)


def layer_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    modulation: tuple[Tensor, Tensor] | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Normalize and modulate; arguments as in `lamamba.ops.residual_norm`."""
    weight, bias = (None if tensor is None else tensor.to(x.dtype) for tensor in (weight, bias))
    x = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if modulation is not None:
        shift, scale = (tensor.to(x.dtype)[:, None, None] for tensor in modulation)
        x = torch.addcmul(shift, x, 1 + scale)
    return x.to(dtype)
