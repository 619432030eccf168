"""The compiled loops of `loops.py` as one differentiable operation; threads share the images."""

import ctypes
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamamba.ops.grid import NUM_PATHS, scan_paths


@torch.library.custom_op("lamamba::scan_grid_cpu", mutates_args=())
def scan_grid_cpu(
    x: Tensor, low: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, continuous: bool
) -> Tensor:
    """Scan a grid; arguments and result as in `lamamba.ops.selective_scan.scan_grid`, all float32."""
    from lamamba.ops.selective_scan.loops import scan_forward

    y = x.new_empty(x.shape)
    per_image, shared = _arrays(x, low, dt_weight, dt_bias, A, D, continuous)
    _share_images(lambda x, low, y: scan_forward(x, low, *shared, y), (*per_image, y.flatten(1, 2).numpy()))
    return y


@scan_grid_cpu.register_fake
def _(x: Tensor, low: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, continuous: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("lamamba::scan_grid_cpu_backward", mutates_args=())
def _backward(
    grad_y: Tensor, x: Tensor, low: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, continuous: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from lamamba.ops.selective_scan.loops import scan_backward

    b, e = x.shape[0], x.shape[3]
    grad_x, grad_low = x.new_empty(x.shape), x.new_empty(low.shape)
    grad_weight, grad_bias = x.new_empty(b, *dt_weight.mT.shape), x.new_empty(b, *dt_bias.shape)
    grad_A, grad_skip = x.new_empty(b, *A.mT.shape), x.new_empty(b, e)
    (x_array, low_array), shared = _arrays(x, low, dt_weight, dt_bias, A, D, continuous)
    gradients = (
        grad_x.flatten(1, 2), grad_low.view(low_array.shape), grad_weight, grad_bias, grad_A, grad_skip,
    )  # fmt: skip
    per_image = (x_array, low_array, _array(grad_y.flatten(1, 2)), *(gradient.numpy() for gradient in gradients))
    _share_images(lambda x, low, *rest: scan_backward(x, low, *shared, *rest), per_image)
    sums = (grad_weight.sum(dim=0).mT, grad_bias.sum(dim=0), grad_A.sum(dim=0).mT)
    # Flat once, so that sides of length 1 have the strides they have in parameters.
    grad_weight, grad_bias, grad_A = (gradient.flatten().view(gradient.shape) for gradient in sums)
    return grad_x, grad_low, grad_weight, grad_bias, grad_A, grad_skip.sum(dim=0).repeat(NUM_PATHS, 1)


@_backward.register_fake
def _(
    grad_y: Tensor, x: Tensor, low: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, continuous: bool
) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, low, dt_weight, dt_bias, A, D))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.continuous = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad_y, *ctx.saved_tensors, ctx.continuous), None


scan_grid_cpu.register_autograd(_autograd, setup_context=_setup_context)


# A function of GNU's OpenMP, which LLVM's has too: to run another one in so many threads.
_openmp: Any = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
if _openmp is not None:
    _openmp.restype, _openmp.argtypes = None, (_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _arrays(
    x: Tensor, low: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, continuous: bool
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Lay arguments out as the loops take them: what each image has, and what they share."""
    _, height, width, _ = x.shape
    pixels = scan_paths(height, width, "continuous" if continuous else "raster", x.device).pixels
    per_image = (x.flatten(1, 2), low.flatten(1, 2).unflatten(2, (NUM_PATHS, -1)))
    # D weighs the input of the pixel itself, whichever path reads it.
    shared = (dt_weight.mT, dt_bias, A.mT, D.sum(dim=0), pixels.view(NUM_PATHS, -1))
    return tuple(map(_array, per_image)), tuple(map(_array, shared))


def _share_images(run: Callable[..., None], per_image: tuple[np.ndarray, ...]) -> None:
    """Run on slices of the images, one for each of PyTorch's threads."""
    bounds = np.linspace(0, len(per_image[0]), min(torch.get_num_threads(), len(per_image[0])) + 1).astype(int)
    parts = [tuple(array[start:stop] for array in per_image) for start, stop in itertools.pairwise(bounds)]
    if len(parts) == 1:
        run(*parts[0])
    elif _openmp is None:
        with ThreadPoolExecutor(len(parts)) as threads:
            list(threads.map(lambda part: run(*part), parts))
    else:
        _run_by_openmp(run, parts)


def _run_by_openmp(run: Callable[..., None], parts: list[tuple[np.ndarray, ...]]) -> None:
    """Run in the threads of PyTorch's own operations.

    They wait for work without leaving their cores: other threads would have half of each as long as they do.
    """
    left, errors = iter(parts), []

    @_Body
    def body(_: int) -> None:
        try:
            for part in left:  # however many threads there are
                run(*part)
        except BaseException as error:  # which would end here, in a thread that is not Python's
            errors.append(error)

    _openmp(body, None, len(parts), 0)
    if errors:
        raise errors[0]
