"""The definition of the gated norm, in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor


def gated_norm_reference(planes: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Add up, normalize and gate; arguments and result as in `lamamba.ops.gated_norm`."""
    y = planes[0] if len(planes) == 1 else planes.sum(dim=0)
    normed = F.layer_norm(y, y.shape[-1:], weight.to(y.dtype), bias.to(y.dtype), eps)
    return (normed * F.silu(z)).to(z.dtype)
