"""Compile CUDA C++ at run time with NVRTC, which comes with PyTorch, and launch it like a Triton kernel."""

import warnings
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch


class CudaKernel:
    """A CUDA C++ kernel that `lamamba.ops.launch` launches and precompiles like a Triton kernel.

    Every launch has the keyword arguments `threads` (of a block) and `shared` (bytes of shared memory of a block). All
    other keyword arguments are constants in capitals, which become macros of the source.

    Args:
        path: the source file.
        name: name of the kernel in the source.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
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
            kernel = torch.cuda._compile_kernel(self.source(constants), self.name, nvcc_options=["--std=c++17"])
            kernel.set_shared_memory_config(shared)
            self._compiled[key] = kernel
        return self._compiled[key]

    def source(self, constants: dict[str, int]) -> str:
        """Return the source with its constants defined at the top."""
        lines = [f"#define {name} {int(value)}" for name, value in constants.items()]
        return "\n".join([*lines, self.path.read_text(encoding="utf-8")])


@lru_cache(maxsize=1)
def has_compiler() -> bool:
    """Return whether PyTorch can compile CUDA C++, which needs PyTorch 2.10 and NVRTC; warn if it cannot."""
    try:
        obstacle = ""
        torch.cuda._utils._get_gpu_rtc_library()
    except AttributeError:
        obstacle = f"PyTorch {torch.__version__} is older than 2.10"
    except OSError as error:
        obstacle = f"CUDA's compiler NVRTC is missing ({error})"
    if obstacle:
        message = f"{obstacle}: lamamba uses slower Triton kernels to scan several states"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return not obstacle
