"""The definition of the depthwise convolution, in plain PyTorch."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def depthwise_convolution_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve and apply SiLU; arguments and result as in `lamamba.ops.depthwise_convolution`."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    # Contiguous, so that the convolution gets and returns PyTorch's channels-last format.
    x = rearrange(x.contiguous(), "b h w e -> b e h w")
    y = F.silu(F.conv2d(x, weight, bias, padding=1, groups=x.shape[1]))
    return rearrange(y, "b e h w -> b h w e").contiguous()
