"""Compile CUDA C++ at run time, by the compiler NVRTC that comes with PyTorch, and launch it like a Triton kernel."""

import ctypes
import warnings
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch


class CudaKernel:
    """A kernel in CUDA C++ that `lamamba.ops.launch` launches and precompiles like a Triton kernel.

    A launch takes the constants of the source as keywords, in capitals: they become macros. It also takes `threads` and
    `shared`, the bytes of shared memory, of a block.

    Args:
        paths: the source files, joined in this order.
        name: the name of the kernel in the source.
    """

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        self.paths, self.name = paths, name
        self._compiled: dict[tuple[object, ...], Any] = {}

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return partial(self._run, grid)

    def _run(self, grid: tuple[int, int, int], *arguments: Any, threads: int, shared: int, **constants: int) -> None:
        kernel = self.warmup(grid=grid, threads=threads, shared=shared, **constants)
        kernel(grid=grid, block=(threads, 1, 1), args=list(arguments), shared_mem=shared)

    def warmup(self, *_: object, grid: object, threads: int, shared: int, **constants: int) -> Any:
        """Compile the kernel for the current device, once for each set of constants."""
        key = torch.cuda.current_device(), *constants.items()
        if key not in self._compiled:
            major, minor = torch.cuda.get_device_capability()
            binary = compile_source(self.source(constants), f"{major}{minor}")
            loaded: Any = torch.cuda._utils._cuda_load_module(binary, [self.name])
            loaded[self.name].set_shared_memory_config(shared)
            self._compiled[key] = loaded[self.name]
        return self._compiled[key]

    def source(self, constants: dict[str, int]) -> str:
        """Return the source after its constants."""
        lines = [f"#define {name} {int(value)}" for name, value in constants.items()]
        return "\n".join([*lines, *(path.read_text(encoding="utf-8") for path in self.paths)])


def compile_source(source: str, capability: str, nvrtc: Any = None) -> bytes:
    """Compile CUDA C++ that includes nothing, which needs no CUDA toolkit.

    `torch.cuda._compile_kernel` looks for a toolkit's headers, and fails without them.

    Args:
        source: the program.
        capability: the compute capability, such as "90".
        nvrtc: the compiler's library; None is PyTorch's.

    Raises:
        OSError: there is no compiler.
        RuntimeError: the program does not compile; the message is the compiler's.
    """
    nvrtc = nvrtc or torch.cuda._utils._get_gpu_rtc_library()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = [f"--gpu-architecture=sm_{capability}".encode(), b"--std=c++17"]
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"lamamba.cu", 0, None, None)
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    get_size, get = (
        (nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog) if failed else
        (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    )  # fmt: skip
    get_size(program, ctypes.byref(size))
    found = ctypes.create_string_buffer(size.value)
    get(program, found)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise RuntimeError(found.value.decode().strip())
    return found.raw


@lru_cache
def has_compiler(capability: str) -> bool:
    """Return whether such kernels can be compiled for a GPU: with PyTorch 2.10 or newer and its NVRTC. Warn if not."""
    obstacle = ""
    if not hasattr(torch.cuda._utils, "_get_gpu_rtc_library"):
        obstacle = f"PyTorch {torch.__version__} is older than 2.10"
    else:
        try:
            compile_source('extern "C" __global__ void nothing() {}', capability)
        except (OSError, RuntimeError) as error:
            obstacle = f"CUDA's compiler NVRTC cannot be used ({error})"
    if obstacle:
        message = f"{obstacle}: lamamba scans with slower Triton kernels"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return not obstacle
