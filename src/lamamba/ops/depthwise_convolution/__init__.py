"""3x3 depthwise convolution and SiLU, the local step before the scan (VMamba, arXiv 2401.10166).

`reference.py` defines the operation and runs on any device. `kernels.py` and `triton.py` are the version for GPUs.
"""

from torch import Tensor

from lamamba.ops.backend import Backend, choose_kernels
from lamamba.ops.depthwise_convolution.reference import depthwise_convolution_reference
from lamamba.ops.shapes import check_dimensions, check_shapes

__all__ = ["depthwise_convolution"]


def depthwise_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """Convolve each channel with its own 3x3 weights, with zero padding, and apply SiLU.

    Args:
        x: (b, h, w, e) input. It may be half of the channels of a tensor; the kernels read it without a copy.
        weight: (e, 1, 3, 3), as in `torch.nn.Conv2d`.
        bias: (e,), or None.
        backend: see `lamamba.ops.backend`.

    Returns:
        (b, h, w, e), contiguous, in the dtype of x. The kernels compute in float32.

    Raises:
        ValueError: shapes disagree, or the kernels cannot run on these tensors.
    """
    check_dimensions("depthwise_convolution", "x", x, "b h w e")
    channels = x.shape[3]
    wanted = {"weight": (weight, (channels, 1, 3, 3)), "bias": (bias, (channels,))}
    check_shapes("depthwise_convolution", f"{channels} channels", wanted)
    if choose_kernels("depthwise_convolution", x, backend):
        from lamamba.ops.depthwise_convolution.triton import depthwise_convolution_triton

        y: Tensor = depthwise_convolution_triton(x, weight, bias)
        return y
    return depthwise_convolution_reference(x, weight, bias)
