"""Launching Triton kernels, and compiling beforehand all those that a function will launch.

A kernel is compiled when it is first launched, which takes up to five seconds, and a network has a hundred of them.
`rehearse` finds out which they are, so that all the processor's cores compile at once; Triton keeps what was compiled
in its cache on disk.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """A launch, its tensors replaced by their dtypes: all that the compiler asks of them."""

    kernel: Any
    arguments: tuple[object, ...]
    constants: tuple[tuple[str, object], ...]


_rehearsed: dict[Launch, None] | None = None
# Held while there is a rehearsal, which is the whole process's: where threads share a GPU, each holds it at work.
LOCK = RLock()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Tensor | float | None, **constants: object) -> None:
    """Launch a kernel on the device of its tensors, or only note it while there is a rehearsal."""
    if _rehearsed is not None:
        kinds = tuple(argument.dtype if isinstance(argument, Tensor) else argument for argument in arguments)
        _rehearsed[Launch(kernel, kinds, tuple(constants.items()))] = None
        return
    tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
    with torch.cuda.device_of(tensor):  # Triton launches on the current device
        kernel[grid](*arguments, **constants)


def rehearse(function: Callable[..., object], *arguments: object) -> None:
    """Call a function without launching its kernels, then compile them, as many at once as there are processors.

    What the function computes is undefined: it must not change anything that is still needed.
    """
    launches = record_launches(function, *arguments)
    with _compile_in_parallel():
        for launched in launches:
            compile_launch(launched)


def record_launches(function: Callable[..., object], *arguments: object) -> list[Launch]:
    """Call a function without launching its kernels, and return the launches, each kind once."""
    global _rehearsed
    with LOCK:
        # Of the module, not of the context, since autograd runs backward passes in a thread of its own.
        _rehearsed = {}
        try:
            function(*arguments)
            return list(_rehearsed)
        finally:
            _rehearsed = None


def compile_launch(launched: Launch) -> Any:
    """Compile the kernel of a launch for the current device, and return what was compiled."""
    return launched.kernel.warmup(*launched.arguments, grid=(1,), **dict(launched.constants))


@contextmanager
def _compile_in_parallel() -> Iterator[None]:
    """Hand what is compiled to threads, whose work is done without Python's lock; before Triton 3.6, one by one."""
    try:
        from triton import AsyncCompileMode
    except ImportError:
        yield
        return
    with ThreadPoolExecutor(os.cpu_count()) as threads, AsyncCompileMode(threads):
        yield
