"""The definition of the linear layer with GELU, in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from lamamba.ops.linear import linear


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a linear layer, then GELU; arguments and result as in `lamamba.ops.linear_gelu`."""
    return F.gelu(linear(x, weight, bias))
