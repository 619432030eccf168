"""Run compiled loops on a CPU in several threads, which share the images of a batch."""

import ctypes
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

# A function of GNU's OpenMP, which LLVM's OpenMP has, too. It runs a function in a given number of threads.
_openmp: Any = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
if _openmp is not None:
    _openmp.restype, _openmp.argtypes = None, (_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


def array(tensor: Tensor) -> np.ndarray:
    """Convert a tensor to an array for compiled loops, without a copy if it is contiguous."""
    return tensor.detach().contiguous().numpy()


def share_images(
    run: Callable[..., None], inputs: tuple[np.ndarray, ...], shared: tuple[Any, ...], outputs: tuple[np.ndarray, ...]
) -> None:
    """Call run(*inputs, *shared, *outputs) in PyTorch's threads, each with its part of the images."""
    num_images, num_inputs = len(inputs[0]), len(inputs)
    bounds = np.linspace(0, num_images, min(torch.get_num_threads(), num_images) + 1).astype(int)
    parts = []
    for start, stop in itertools.pairwise(bounds):
        arrays = [array[start:stop] for array in (*inputs, *outputs)]
        parts.append((*arrays[:num_inputs], *shared, *arrays[num_inputs:]))
    if len(parts) == 1:
        run(*parts[0])
    elif _openmp is None:
        with ThreadPoolExecutor(len(parts)) as threads:
            list(threads.map(lambda part: run(*part), parts))
    else:
        _run_by_openmp(run, parts)


def _run_by_openmp(run: Callable[..., None], parts: list[tuple[Any, ...]]) -> None:
    """Run in the threads that PyTorch's own operations use.

    These threads keep their cores busy while they wait for work, so other threads would get only half of each core.
    """
    left, errors = iter(parts), []

    @_Body
    def body(_: int) -> None:
        try:
            for part in left:  # works with any number of threads
                run(*part)
        except BaseException as error:  # would be lost in a thread that is not Python's
            errors.append(error)

    _openmp(body, None, len(parts), 0)
    if errors:
        raise errors[0]
