"""Choose the version of an operation: Triton kernels, loops compiled by numba, plain PyTorch, or one for export."""

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

Backend = Literal["auto", "triton", "pytorch", "portable"]
_Function = TypeVar("_Function", bound=Callable[..., Any])

_left_to_choose: Backend = "auto"


def assume_constant_result(function: _Function) -> _Function:
    """Mark a function whose results are constants to torch.compile.

    `torch.compiler.assume_constant_result` does the same, but first imports the compiler, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Replace the backend "auto" by this one while the context lasts."""
    global _left_to_choose
    before, _left_to_choose = _left_to_choose, backend
    try:
        yield
    finally:
        _left_to_choose = before


def choose_kernels(operation: str, x: Tensor, backend: Backend, limit: str = "") -> bool:
    """Return whether the Triton kernels should run.

    Args:
        operation: name of the operation, for the error.
        x: input of the operation.
        backend: "triton" always takes the kernels, "pytorch" and "portable" never do. "auto" takes them for CUDA
            tensors of any dtype but float64, unless `limit` rules them out, and warns once if triton is not installed.
            On a CPU, "auto" takes compiled loops where an operation has some, see `choose_loops`. "portable" takes
            operations that other runtimes have, too, see `is_portable`.
        limit: why the kernels cannot run this call on any device, and what to do; empty if they can.

    Raises:
        ValueError: the backend is "triton" and the kernels cannot run; the message says why and what to do.
    """
    backend = _left_to_choose if backend == "auto" else backend
    if backend in ("pytorch", "portable"):
        return False
    if backend == "auto" and not (x.is_cuda and x.dtype != torch.float64 and not limit and _has_triton()):
        return False
    obstacle = limit or _obstacle(x.device.type, x.dtype)
    if obstacle:
        raise ValueError(f'{operation}: {obstacle}, or use backend "pytorch"')
    return True


def is_portable(backend: Backend) -> bool:
    """Return whether to use only operations that exporters know, with no custom operation of this package."""
    return "portable" in (backend, _left_to_choose)


def choose_loops(x: Tensor, backend: Backend) -> bool:
    """Return whether compiled loops should run: on a CPU with numba, for any dtype but float64."""
    chosen = _left_to_choose if backend == "auto" else backend
    return chosen == "auto" and x.device.type == "cpu" and x.dtype != torch.float64 and _has_numba()


def choose_loops_outside_graphs(tensors: Iterable[Tensor], backend: Backend) -> bool:
    """Return whether compiled loops should run that are not registered as a PyTorch operation, for float32 only.

    They do not run inside torch.compile, which fuses the plain version into one pass, too. They do not run on
    subclasses of tensors either, which may have no memory.
    """
    tensors = list(tensors)
    plain = all(type(tensor) in (Tensor, Parameter) and tensor.dtype == torch.float32 for tensor in tensors)
    return not torch.compiler.is_compiling() and plain and choose_loops(tensors[0], backend)


@assume_constant_result
def _has_numba() -> bool:
    return _import_numba()


@lru_cache(maxsize=1)
def _import_numba() -> bool:
    """Return whether numba can be imported; it refuses versions of NumPy and Python that it does not support."""
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        importlib.import_module("numba")
    except ImportError as error:
        message = f"numba cannot be imported ({error}): lamamba falls back to slower PyTorch operations on this CPU"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return False
    return True


# A function of its own, because torch.compile ignores `lru_cache` and would trace the cached function.
@assume_constant_result
def _has_triton() -> bool:
    return _find_triton()


@lru_cache(maxsize=1)
def _find_triton() -> bool:
    """Return whether triton is installed on an NVIDIA machine; warn if only the package is missing."""
    if torch.version.hip is not None:
        return False
    found = importlib.util.find_spec("triton") is not None
    if not found:
        message = "triton is not installed: lamamba falls back to slower PyTorch operations on this GPU"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return found


@assume_constant_result
def _obstacle(device_type: str, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot run and what to do about it, or None if they can run."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    from triton import knobs

    if device_type != "cuda" and not knobs.runtime.interpret:
        return f"the kernels need CUDA tensors, x is on {device_type}: move it to a GPU"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels do not take {dtype}: use float32 or bfloat16"
    return None
