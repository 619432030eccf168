"""Linear layers for mixed precision and before the scan, with fewer passes over memory than autograd needs.

* A float32 weight is rounded to 16 bits for its product. Autograd then computes the gradient of the weight in 16 bits
  and copies it to float32. Here the matrix product writes float32 directly.
* All weights of a network can be rounded together, in a few launches instead of one each: see `RoundedWeights`.
* When the two halves of a result have separate gradients, autograd first concatenates them. Here each half is
  multiplied where it lies, and the second product is added to the first.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamamba.ops.backend import assume_constant_result


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the autocast dtype on the device of x, or None if autocast is off."""
    device = x.device.type
    on = _has_autocast(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which layers process x: the autocast dtype, or the dtype of x."""
    return autocast_dtype(x) or x.dtype


@assume_constant_result  # torch 2.11 cannot trace it
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


_copies: dict[int, Tensor] = {}  # by the address of the weight


class RoundedWeights:
    """16-bit copies of the weights of a network that computes in mixed precision on a GPU.

    Args:
        network: modules name the parameters that they round in every pass in an attribute `rounded_parameters`. Those
            that are float32 now are rounded. They may change, but not move.
        dtype: of the copies.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        named = (
            (path.rpartition(".")[2], name, module)
            for path, module in network.named_modules()
            for name in getattr(module, "rounded_parameters", ())
        )
        places = [place for place in named if _is_rounded(getattr(place[2], place[1]))]
        # Copies of weights of the same name and shape are adjacent in memory, for `stack_rounded`.
        places.sort(key=lambda place: (*place[:2], getattr(place[2], place[1]).shape))
        self._places = [(module, name) for _, name, module in places]
        with torch.inference_mode(False):  # or autograd could not save them
            self.copies = _empty_like_all(self.weights(), dtype)

    def weights(self) -> list[Tensor]:
        """Return the weights that have copies."""
        return [getattr(*place).detach() for place in self._places]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Round the weights now, and let `rounded` return the copies while the context lasts.

        A backward pass belongs into the context of its forward pass, because the next use overwrites the copies.
        """
        weights = self.weights()
        if weights:
            with torch.no_grad():
                torch._foreach_copy_(self.copies, weights)
        mine = {weight.data_ptr(): copy for weight, copy in zip(weights, self.copies, strict=True)}
        before = {address: _copies[address] for address in mine if address in _copies}
        _copies.update(mine)
        try:
            yield
        finally:
            for address in mine:
                _copies.pop(address, None)
            _copies.update(before)


def _empty_like_all(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Allocate a tensor for each weight; consecutive weights of the same shape get adjacent memory."""
    copies: list[Tensor] = []
    for _, of_shape in groupby(weights, key=lambda weight: (weight.shape, weight.device)):
        group = list(of_shape)
        copies += group[0].new_empty(len(group), *group[0].shape, dtype=dtype).unbind()
    return copies


def _is_rounded(weight: Tensor | None) -> bool:
    return weight is not None and weight.dtype == torch.float32 and weight.is_contiguous()


def _has_copies() -> bool:
    return not torch.compiler.is_compiling() and bool(_copies)


def find_rounded(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the weight if it has this dtype, or its copy in `RoundedWeights`; None if there is no such copy."""
    if weight.dtype == dtype:
        return weight
    copy = _copies.get(weight.data_ptr()) if _has_copies() and weight.is_contiguous() else None
    is_of_it = copy is not None and copy.dtype == dtype and copy.numel() == weight.numel()
    return copy.view(weight.shape) if copy is not None and is_of_it else None


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a weight for a product, or return its copy in `RoundedWeights`. Autograd must not record this."""
    found = find_rounded(weight, dtype)
    return weight.to(dtype) if found is None else found


def stack_rounded(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Round n weights of one shape and stack them, (n, ...); copy nothing if the rounded weights are adjacent."""
    all_rounded = [rounded(weight, dtype) for weight in weights]
    first, size = all_rounded[0], all_rounded[0].nbytes
    in_a_row = all(
        weight.is_contiguous() and weight.data_ptr() == first.data_ptr() + index * size
        for index, weight in enumerate(all_rounded)
    )
    if in_a_row and first.untyped_storage().data_ptr() == all_rounded[-1].untyped_storage().data_ptr():
        return first.as_strided((len(all_rounded), *first.shape), (first.numel(), *first.stride()))
    return torch.stack(all_rounded)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x weight^T + bias like `torch.nn.functional.linear`: x (..., i), weight (o, i), bias (o,)."""
    dtype = autocast_dtype(x)
    if dtype is None and _is_faster_as_convolution(x):
        return _convolve(x, weight, bias)
    if dtype is None or not x.is_cuda or not (torch.is_grad_enabled() or _has_copies()):
        return F.linear(x, weight, bias)  # autocast keeps copies of its own
    if not torch.is_grad_enabled():
        return F.linear(x.to(dtype), rounded(weight, dtype), None if bias is None else rounded(bias, dtype))
    out: Tensor = _Linear.apply(x.to(dtype), weight, bias)
    return out


class Linear(nn.Linear):
    """PyTorch's linear layer with faster gradients of float32 weights in mixed precision."""

    rounded_parameters = ("weight", "bias")  # see `RoundedWeights`

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., i) to (..., o)."""
        return linear(input, self.weight, self.bias)


def linear_in_halves(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute both halves of x weight^T, each (..., o / 2): x (..., i), weight (o, i)."""
    if autocast_dtype(x) is None and _is_faster_as_convolution(x):
        return _convolve(x, weight[: len(weight) // 2], None), _convolve(x, weight[len(weight) // 2 :], None)
    first, second = _LinearInHalves.apply(x.to(compute_dtype(x)), weight)
    return first, second


def _is_faster_as_convolution(x: Tensor) -> bool:
    """Return whether to multiply the pixels of x, (b, h, w, i), as a convolution: float32 on a CPU.

    PyTorch uses MKL for matrix products and oneDNN for convolutions only. On AMD processors oneDNN is more than twice
    as fast, because MKL leaves half of the vector unit unused. Elsewhere it is no slower.
    """
    if torch.compiler.is_compiling() or not (x.device.type == "cpu" and x.dtype == torch.float32 and x.ndim == 4):
        return False
    return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer to every pixel of (b, h, w, i) as a 1x1 convolution."""
    x = x.contiguous().permute(0, 3, 1, 2)  # PyTorch's channels-last format, which the result has, too
    return F.conv2d(x, weight[:, :, None, None], bias).permute(0, 2, 3, 1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        low = rounded(weight, x.dtype)
        ctx.save_for_backward(x, low)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return F.linear(x, low, None if bias is None else rounded(bias, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        (grad,), (x, weight), (weight_dtype, bias_dtype) = grads, ctx.saved_tensors, ctx.dtypes
        with torch.autocast(x.device.type, enabled=False):  # autocast would round the gradients
            grad_x = grad @ weight
            grad_weight = weight_gradient(grad, x, weight_dtype)
        grad_bias = None if bias_dtype is None else grad.reshape(-1, len(weight)).sum(dim=0, dtype=bias_dtype)
        return grad_x, grad_weight, grad_bias


class _LinearInHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        low = rounded(weight, x.dtype)
        ctx.save_for_backward(x, low)
        ctx.weight_dtype = weight.dtype
        if x.is_cuda:  # kernels read the halves in place
            return F.linear(x, low).chunk(2, dim=-1)
        return tuple(F.linear(x, half) for half in low.chunk(2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        first, second = (grad.reshape(-1, grad.shape[-1]) for grad in grads)
        first_weight, second_weight = weight.chunk(2)
        with torch.autocast(x.device.type, enabled=False):
            grad_x = (first @ first_weight).addmm_(second, second_weight)
            grad_weight = torch.empty_like(weight, dtype=ctx.weight_dtype)
            for half, of_half in zip((first, second), grad_weight.chunk(2), strict=True):
                weight_gradient(half, x, ctx.weight_dtype, of_half)
        return grad_x.view_as(x), grad_weight


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Compute the gradient of a weight, (o, i) in `dtype`, from gradients (..., o) and inputs (..., i)."""
    grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    if x.is_cuda and dtype == torch.float32 != x.dtype:
        return torch.mm(grad.mT, x, out_dtype=dtype, out=out)
    found = (grad.mT @ x).to(dtype)
    return found if out is None else out.copy_(found)


def weight_gradients(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `weight_gradient` of n layers, (n, o, i), from (n, b, o) and (n, b, i)."""
    if x.is_cuda and dtype == torch.float32 != x.dtype:
        return torch.bmm(grad.mT, x, out_dtype=dtype)
    return (grad.mT @ x).to(dtype)
