"""Launch kernels, and precompile all kernels that a function will launch.

Triton compiles a kernel at its first launch. This takes up to five seconds, and a network has a hundred kernels.
`precompile` collects the launches of a function and compiles them on all cores at once. Triton keeps compiled kernels
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
    """A launch, with tensors replaced by their dtypes, which are all that the compiler needs."""

    kernel: Any
    arguments: tuple[object, ...]
    constants: tuple[tuple[str, object], ...]


class Plan(NamedTuple):
    """How to launch a kernel for tensors of some size."""

    grid: tuple[int, ...]
    numbers: tuple[float, ...]
    """Arguments that follow from the size."""
    constants: dict[str, Any]


def share_rows(num_rows: int, at_once: int, num_programs: int) -> tuple[int, int]:
    """Return the rows of each program, a multiple of `at_once`, and the number of programs, at most `num_programs`."""
    rows_of_program = at_once * -(-num_rows // (at_once * num_programs))
    return rows_of_program, -(-num_rows // rows_of_program)


_recorded: dict[Launch, None] | None = None
# How to launch kernels once they are compiled, by what they were compiled for. A kernel that is kept keeps its id.
_compiled: dict[tuple[object, ...], tuple[Any, Callable[..., None]]] = {}
MOST_COMPILED = 10_000
# Held while launches are recorded, which affects the whole process. Threads that share a GPU hold it while they work.
LOCK = RLock()


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Tensor | float | tuple[int, ...] | None, **constants: object
) -> None:
    """Launch a kernel on the device of its tensors, or only record it while `precompile` runs. Tuples hold strides."""
    if _recorded is not None:
        kinds = tuple(argument.dtype if isinstance(argument, Tensor) else argument for argument in arguments)
        _recorded[Launch(kernel, kinds, tuple(constants.items()))] = None
        return
    parts, values, device = _describe(arguments)
    key = id(kernel), *parts, *constants, *constants.values()
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device
            _launch_on(device, key, kernel, grid, arguments, values, constants)
    else:
        _launch_on(device, key, kernel, grid, arguments, values, constants)


def _describe(arguments: tuple[Any, ...]) -> tuple[list[object], list[object], int]:
    """Describe the arguments of a launch.

    Returns:
        A key, which differs between two calls if Triton compiles separate code for them; the arguments, with the
        address of each tensor instead of the tensor; and the device of the first tensor.
    """
    key: list[object] = list(arguments)
    values = list(key)
    device = None
    for place, argument in enumerate(arguments):
        kind = type(argument)
        if kind is int or kind is tuple or argument is None:
            continue
        if isinstance(argument, Tensor):
            values[place] = address = argument.data_ptr()
            key[place] = argument.dtype
            index = argument.get_device()
            device = index if device is None else device
            key += (address % 16, index)
        else:
            key[place] = kind, argument
    return key, values, -1 if device is None else device


def _launch_on(
    device: int, key: tuple[object, ...], kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...],
    values: list[object], constants: dict[str, object],
) -> None:  # fmt: skip
    """Launch in Triton's general way once, and then as it was compiled, which takes the host less time."""
    if (found := _compiled.get(key)) is not None:
        found[1](device, (*grid, 1, 1)[:3], arguments, values)
        return
    devices = {str(argument.device) for argument in arguments if isinstance(argument, Tensor)}
    if len(devices) > 1:  # a GPU could fail to read another one's memory, after which it takes no more work
        raise ValueError(f"the tensors of a kernel are on {' and '.join(sorted(devices))}: move them to one device")
    compiled = kernel[grid](*arguments, **constants)
    names = getattr(kernel, "arg_names", ())[len(arguments) :]
    if hasattr(compiled, "packed_metadata") and all(name in constants for name in names):
        if len(_compiled) >= MOST_COMPILED:
            _compiled.clear()
        _compiled[key] = kernel, _as_compiled(compiled, [constants[name] for name in names])


def _as_compiled(compiled: Any, others: list[object]) -> Callable[..., None]:
    """Return a function that launches a compiled kernel, without what Triton does for the hooks of profilers."""
    from triton import knobs
    from triton.runtime import driver

    hooks, stream_of = knobs.runtime, driver.active.get_current_stream
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def again(device: int, grid: tuple[int, ...], arguments: tuple[Any, ...], values: list[object]) -> None:
        enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            compiled[grid](*arguments, *others)
        else:
            run(*grid, stream_of(device), function, metadata, None, None, None, *values, *others)

    return again


def readable_pixels(x: Tensor) -> tuple[Tensor, int]:
    """Return (b, h, w, c) and the distance between its pixels; it is copied only if they are not evenly spaced."""
    _, height, width, channels = x.shape
    stride = x.stride(2)
    if x.stride() == (height * width * stride, width * stride, stride, 1):
        return x, stride
    return x.contiguous(), channels


def readable_rows(of_images: Tensor | None) -> tuple[Tensor | None, int]:
    """Return a (b, c) tensor and the distance between its rows; it is copied only if its channels are apart."""
    if of_images is None:
        return None, 0
    if of_images.stride(1) != 1:
        of_images = of_images.contiguous()
    return of_images, of_images.stride(0)


def dense(tensor: Tensor | None) -> Tensor | None:
    """Return a contiguous tensor, or None."""
    return None if tensor is None else tensor.contiguous()


def precompile(function: Callable[..., object], *arguments: object) -> None:
    """Call a function without launching its kernels, then compile these kernels on all cores at once.

    The results of the function are undefined, so it must not overwrite anything that is still needed.
    """
    launches = record_launches(function, *arguments)
    with _compile_in_parallel():
        for launched in launches:
            compile_launch(launched)


def record_launches(function: Callable[..., object], *arguments: object) -> list[Launch]:
    """Call a function without launching its kernels, and return each distinct launch once."""
    global _recorded
    with LOCK:
        # A global and not a context variable, because autograd runs the backward pass in another thread.
        _recorded = {}
        try:
            function(*arguments)
            return list(_recorded)
        finally:
            _recorded = None


def compile_launch(launched: Launch) -> Any:
    """Compile the kernel of a launch for the current device, and return the compiled kernel."""
    return launched.kernel.warmup(*launched.arguments, grid=(1,), **dict(launched.constants))


@contextmanager
def _compile_in_parallel() -> Iterator[None]:
    """Compile in threads, which release Python's lock; before Triton 3.6, compile one kernel after the other."""
    try:
        from triton import AsyncCompileMode
    except ImportError:
        yield
        return
    with ThreadPoolExecutor(os.cpu_count()) as threads, AsyncCompileMode(threads):
        yield
