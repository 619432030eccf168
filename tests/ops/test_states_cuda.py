"""The kernels in CUDA C++ for the scan with several states: emulated on a CPU, and compiled for every GPU."""

import ctypes
import importlib.util
import re
import subprocess
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lamamba.ops import cuda
from lamamba.ops.cuda import CudaKernel
from lamamba.ops.launch import launch
from ops.test_scan_grid import NAMES, check, make_inputs, output_and_gradients, relative_error

triton = pytest.importorskip("triton")

from lamamba.ops.selective_scan import states_cuda  # noqa: E402

triton_host = pytest.importorskip("lamamba.ops.selective_scan.triton")
HERE = Path(__file__).parent
H100_SHARED = 232448


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Run the kernels in CUDA C++ on this CPU; returns the names of those that run."""
    if torch.cuda.is_available():
        pytest.skip("runs without a GPU")
    folder, names = tmp_path_factory.mktemp("emulated"), []

    def launch_emulated(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        if not isinstance(kernel, CudaKernel):
            launch(kernel, grid, *arguments, **constants)
            return
        names.append(kernel.name)
        threads, constants = constants["threads"], {k: v for k, v in constants.items() if k.isupper()}
        run = build(kernel, tuple(constants.items()), folder)
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        assert all(x.is_contiguous() for x in tensors)
        pointers = (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))
        numbers = [int(x) for x in arguments if not isinstance(x, Tensor)]
        run(threads, (ctypes.c_int * 3)(*grid), pointers, (ctypes.c_int * len(numbers))(*numbers))

    monkeypatch.setattr(triton_host, "launch", launch_emulated)
    # What Triton's interpreter cannot do in bfloat16 is done in PyTorch or in float32.
    monkeypatch.setattr(triton_host, "steps_backward", steps_backward)
    summarise = triton_host._summarise
    monkeypatch.setattr(
        triton_host,
        "_summarise",
        lambda *arguments, **options: summarise(
            *(x.float() if isinstance(x, Tensor) else x for x in arguments), **options
        ),
    )
    monkeypatch.setattr(states_cuda, "shared_limit", lambda device: H100_SHARED)
    return names


def steps_backward(grad_z: Tensor, low: Tensor, weight: Tensor, rank: int, grad_low: Tensor) -> Tensor:
    grad_low[..., :rank] = torch.einsum("pze,per->zpr", grad_z, weight[..., :rank])
    return F.pad(torch.einsum("pze,zpr->per", grad_z, low[..., :rank]), (0, weight.shape[2] - rank))


@lru_cache
def build(kernel: CudaKernel, constants: tuple[tuple[str, int], ...], folder: Path) -> Any:
    source, library = (folder / f"{kernel.name}-{hash(constants)}{end}" for end in (".cpp", ".so"))
    backward = dict(constants)["BACKWARD"]
    kinds = "hhfhfffhhffhhhf" if backward else "hhfhfffhhff"  # in the order of the arguments
    pointers = [f"({'bf16' if kind == 'h' else 'float'}*)p[{index}]" for index, kind in enumerate(kinds)]
    numbers = [f"i[{index}]" for index in range(5 if backward else 4)]
    source.write_text(
        f'#include "{HERE / "emulated_cuda.h"}"\n{kernel.source(dict(constants))}\n'
        'extern "C" void run(int threads, const int* grid, void** p, const int* i) {\n'
        f"    launch(threads, grid, [=] {{ {kernel.name}({', '.join(pointers + numbers)}); }});\n}}\n",
        encoding="utf-8",
    )
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library)).run


# (b, h, w, e, r, n): whole tiles; masked channels and steps; more warps than one, rank over one product.
SHAPES = {"whole": (1, 4, 4, 32, 4, 2), "masked": (2, 3, 7, 40, 4, 3), "wide": (1, 4, 8, 72, 18, 4)}


@pytest.mark.parametrize("scan", ["continuous", "raster"])
@pytest.mark.parametrize("case", SHAPES)
def test_emulated_kernels_agree_with_float64(case: str, scan: str, emulated: list[str]) -> None:
    check(make_inputs(*SHAPES[case]), torch.bfloat16, scan)
    assert emulated == ["states_forward", "states_backward"]


def test_emulated_segments_give_the_same(emulated: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(1, 6, 8, 40, 4, 2)
    inputs = [tensor.to(torch.bfloat16 if index < 3 else torch.float32) for index, tensor in enumerate(inputs)]
    whole = output_and_gradients(inputs, "triton")
    monkeypatch.setattr(triton_host, "LONG_PATH", 1)
    monkeypatch.setattr(triton_host, "SHORTEST_SEGMENT", 1)
    cut = output_and_gradients(inputs, "triton")
    assert len(emulated) == 4
    for name, a, b in zip(("y", *NAMES), cut, whole, strict=True):
        assert relative_error(a, b.double()) < 4e-3, name


def test_without_nvrtc_the_triton_kernels_run_after_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise OSError("libnvrtc.so: cannot open shared object file")

    monkeypatch.setattr(torch.cuda._utils, "_get_gpu_rtc_library", missing, raising=False)
    monkeypatch.setattr(cuda, "has_compiler", cuda.has_compiler.__wrapped__)
    with pytest.warns(RuntimeWarning, match="NVRTC is missing .* slower Triton kernels"):
        assert not cuda.has_compiler()


SMALLEST_SHARED = 101376  # of the GPUs below, in bytes


def compile_by_nvrtc(nvrtc: Any, source: str, capability: str) -> bytes:
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = [f"--gpu-architecture=sm_{capability}".encode(), b"--std=c++17"]
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"states_kernels.cu", 0, None, None)
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))

    def read(length: Callable[..., int], content: Callable[..., int]) -> bytes:
        length(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        content(program, buffer)
        return buffer.raw

    assert not failed, read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode()
    return read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)


@pytest.mark.slow
def test_kernels_compile_without_a_gpu_and_spill_little(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compile for the first and the last blocks of XL with 16 states, by NVRTC, for Ampere to Blackwell."""
    nvidia = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in nvidia.submodule_search_locations or []] if nvidia else []
    found = [path for place in places for path in place.glob("cu*/lib/libnvrtc.so.*")]
    if not found:
        pytest.skip("needs nvidia-cuda-nvrtc")
    ctypes.CDLL(str(next(found[0].parent.glob("libnvrtc-builtins.so.*"))))  # which nvrtc then finds
    nvrtc = ctypes.CDLL(str(found[0]))
    monkeypatch.setattr(states_cuda, "shared_limit", lambda device: SMALLEST_SHARED)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for side, channels, rank in ((32, 640, 20), (8, 2560, 80)):
        x = torch.empty(1, side, side, channels, dtype=torch.bfloat16, device="meta")
        low = torch.empty(1, side, side, 4 * (rank + 36), dtype=torch.bfloat16, device="meta")
        for backward, kernel in enumerate((states_cuda.forward_kernel, states_cuda.backward_kernel)):
            plan = states_cuda.plan(x, low, x, rank, 16, True, bool(backward))
            assert plan is not None
            source = kernel.source({name: value for name, value in plan.constants.items() if name.isupper()})
            for capability in ("80", "86", "89", "90", "100", "120"):
                cubin = tmp_path / "kernel.cubin"
                cubin.write_bytes(compile_by_nvrtc(nvrtc, source, capability))
                used = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True)
                stack = re.search(r"STACK:(\d+)", used.stdout + used.stderr)
                assert stack is not None
                assert int(stack[1]) <= 128, (kernel.name, side, capability)
