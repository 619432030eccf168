"""Which version of an operation runs: the Triton kernels, loops that numba compiles, or plain PyTorch."""

import importlib
import importlib.util
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter

Backend = Literal["auto", "triton", "pytorch"]

_left_to_choose: Backend = "auto"


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Run every operation whose backend is "auto" by this one instead, as long as the context lasts."""
    global _left_to_choose
    before, _left_to_choose = _left_to_choose, backend
    try:
        yield
    finally:
        _left_to_choose = before


def choose_kernels(operation: str, x: Tensor, backend: Backend, limit: str = "") -> bool:
    """Say whether the kernels are to run.

    Args:
        operation: its name, for the error.
        x: what it works on.
        backend: "triton" insists on the kernels, "pytorch" on doing without; "auto" takes the kernels for tensors on
            CUDA, other than float64, that they fit, and warns once where triton is missing there. On a CPU "auto"
            takes the loops of operations that have some, see `choose_loops`.
        limit: what keeps the kernels from this call, whatever it works on, and what helps; empty if nothing.

    Raises:
        ValueError: the kernels are insisted on and cannot run; the message says why and what helps.
    """
    backend = _left_to_choose if backend == "auto" else backend
    if backend == "pytorch":
        return False
    if backend == "auto" and not (x.is_cuda and x.dtype != torch.float64 and not limit and _has_triton()):
        return False
    obstacle = limit or _obstacle(x.device.type, x.dtype)
    if obstacle:
        raise ValueError(f'{operation}: {obstacle}, or use backend "pytorch"')
    return True


def choose_loops(x: Tensor, backend: Backend) -> bool:
    """Say whether loops that numba compiles are to run: where it is installed, on a CPU, on anything but float64."""
    chosen = _left_to_choose if backend == "auto" else backend
    return chosen == "auto" and x.device.type == "cpu" and x.dtype != torch.float64 and _has_numba()


def choose_loops_outside_graphs(tensors: Iterable[Tensor], backend: Backend) -> bool:
    """Say whether loops are to run that PyTorch does not know as an operation, on float32 alone.

    Not in torch.compile, which makes one pass of the plain version, too, nor on what only stands for a tensor.
    """
    tensors = list(tensors)
    plain = all(type(tensor) in (Tensor, Parameter) and tensor.dtype == torch.float32 for tensor in tensors)
    return not torch.compiler.is_compiling() and plain and choose_loops(tensors[0], backend)


@torch.compiler.assume_constant_result
def _has_numba() -> bool:
    return _import_numba()


@lru_cache(maxsize=1)
def _import_numba() -> bool:
    """Say whether numba can be imported; it refuses versions of NumPy and Python that it does not know."""
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        importlib.import_module("numba")
    except ImportError as error:
        message = f"numba cannot be imported ({error}): lamamba runs without its loops, and slower, on this CPU"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return False
    return True


# Not the cached function itself: torch.compile would look through the cache and trace what is behind it.
@torch.compiler.assume_constant_result
def _has_triton() -> bool:
    return _find_triton()


@lru_cache(maxsize=1)
def _find_triton() -> bool:
    """Say whether there is a triton for NVIDIA's GPUs; where only the package is missing, say what is lost."""
    if torch.version.hip is not None:
        return False
    found = importlib.util.find_spec("triton") is not None
    if not found:
        message = "the package triton is not installed: lamamba runs without its kernels, and slower, on this GPU"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return found


@torch.compiler.assume_constant_result
def _obstacle(device_type: str, dtype: torch.dtype) -> str | None:
    """Say why the kernels cannot run and what would help, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed: pip install triton"
    from triton import knobs

    if device_type != "cuda" and not knobs.runtime.interpret:
        return f"the kernels need CUDA tensors, x is on {device_type}: move it to a GPU"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels do not take {dtype}: use float32 or bfloat16"
    return None
