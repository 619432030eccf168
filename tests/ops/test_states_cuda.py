"""The kernels of the scan in CUDA C++: emulated on a CPU, and compiled for every GPU."""

import ctypes
import importlib.util
import math
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lamamba.ops import cuda
from lamamba.ops.cuda import CudaKernel
from lamamba.ops.grid import Scan, path_order
from lamamba.ops.launch import launch
from lamamba.ops.selective_scan import scan_grid
from ops.test_scan_grid import NAMES, check, make_inputs, output_and_gradients, relative_error

triton = pytest.importorskip("triton")

from lamamba.ops.selective_scan import states_cuda  # noqa: E402

triton_host = pytest.importorskip("lamamba.ops.selective_scan.triton")
HERE = Path(__file__).parent
# CUDA C++ Programming Guide, technical specifications by compute capability.
H100 = states_cuda.Limits(232448, 233472, 132)
SMALL = states_cuda.Limits(101376, 102400, 80)
A100 = states_cuda.Limits(166912, 167936, 108)
LIMITS = {"80": A100, "86": SMALL, "89": SMALL, "90": H100, "100": H100, "120": SMALL}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, libraries: Path) -> list[str]:
    """Run the kernels in CUDA C++ on this CPU; returns the names of those that run."""
    if torch.cuda.is_available() or not shutil.which("g++"):
        pytest.skip("runs without a GPU, and needs g++")
    names: list[str] = []

    def launch_emulated(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        if not isinstance(kernel, CudaKernel):
            launch(kernel, grid, *arguments, **constants)
            return
        names.append(kernel.name)
        threads, constants = constants["threads"], {k: v for k, v in constants.items() if k.isupper()}
        run = build(kernel, tuple(constants.items()), libraries)
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        assert all(x.is_contiguous() for x in tensors)
        pointers = (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))
        numbers = [int(x) for x in arguments if not isinstance(x, Tensor)]
        assert run(threads, (ctypes.c_int * 3)(*grid), pointers, (ctypes.c_int * len(numbers))(*numbers)), "misaligned"

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
    monkeypatch.setattr(states_cuda, "limits_of", lambda device: H100)
    return names


def steps_backward(grad_z: Tensor, low: Tensor, weight: Tensor, rank: int, grad_low: Tensor) -> Tensor:
    grad_low[..., :rank] = torch.einsum("pze,per->zpr", grad_z, weight[..., :rank])
    return F.pad(torch.einsum("pze,zpr->per", grad_z, low[..., :rank]), (0, weight.shape[2] - rank))


# The dtypes of the pointers in the order of the arguments: bfloat16 or float32.
KINDS = {
    "states_forward": "hhhfffhhff", "states_backward": "hhfhfffhhffhhhf",
    "one_state_backward": "hhhfffhfffhhhff",
}  # fmt: skip


@lru_cache
def build(kernel: CudaKernel, constants: tuple[tuple[str, int], ...], folder: Path) -> Any:
    source, library = (folder / f"{kernel.name}-{hash(constants)}{end}" for end in (".cpp", ".so"))
    kinds = KINDS[kernel.name]
    pointers = [f"({'bf16' if kind == 'h' else 'float'}*)p[{index}]" for index, kind in enumerate(kinds)]
    numbers = [f"i[{index}]" for index in range(4 if kernel.name.endswith("forward") else 5)]
    source.write_text(
        f'#include "{HERE / "emulated_cuda.h"}"\n{kernel.source(dict(constants))}\n'
        'extern "C" bool run(int threads, const int* grid, void** p, const int* i) {\n'
        f"    return launch(threads, grid, [=] {{ {kernel.name}({', '.join(pointers + numbers)}); }});\n}}\n",
        encoding="utf-8",
    )
    command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library)).run


# (b, h, w, e, r, n): whole tiles; masked channels and steps; more warps than one, rank over one product.
SHAPES = {"whole": (1, 4, 4, 32, 4, 2), "masked": (2, 3, 7, 40, 4, 3), "wide": (1, 4, 8, 72, 18, 4)}


@pytest.mark.parametrize("scan", ["continuous", "raster"])
@pytest.mark.parametrize("case", SHAPES)
def test_emulated_kernels_agree_with_float64(case: str, scan: str, emulated: list[str]) -> None:
    check(make_inputs(*SHAPES[case]), torch.bfloat16, scan)
    assert emulated == ["states_forward", "states_backward"]


def in_bfloat16(*shape: int) -> list[Tensor]:
    inputs = make_inputs(*shape)
    return [tensor.to(torch.bfloat16 if index < 3 else torch.float32) for index, tensor in enumerate(inputs)]


def check_close(found: list[Tensor], wanted: list[Tensor], tolerance: float = 8e-3) -> None:
    for name, value, exact in zip(("y", *NAMES), found, wanted, strict=True):
        assert relative_error(value, exact.double()) < tolerance, name


def test_emulated_segments_give_the_same(emulated: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is cut into two images whose paths are whole, and one whose paths are cut; there are two blocks."""
    inputs = in_bfloat16(3, 6, 8, 200, 10, 3)
    exact = output_and_gradients([tensor.double() for tensor in inputs], "pytorch")
    monkeypatch.setattr(triton_host, "LONG_PATH", 1)
    monkeypatch.setattr(triton_host, "SHORTEST_SEGMENT", 1)
    monkeypatch.setattr(states_cuda, "limits_of", lambda device: H100._replace(multiprocessors=5))
    assert triton_host._cut_backward(3, 200, 3, 32, 60) == (32, [(2, 1), (1, 2)])
    check_close(output_and_gradients(inputs, "triton"), exact)
    assert emulated == ["states_forward", *2 * ["states_backward"]]


def test_emulated_planes_have_gradients_of_their_own(emulated: list[str]) -> None:
    """In float32, the Triton kernels run."""
    inputs = in_bfloat16(2, 3, 7, 40, 4, 3)
    results: list[list[Tensor]] = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [tensor.to(dtype if index < 3 else torch.float32) for index, tensor in enumerate(inputs)]
        leaves = [tensor.detach().requires_grad_() for tensor in leaves]
        planes = scan_grid(*leaves, backend="triton")
        weights = torch.randn(planes.shape, generator=torch.Generator().manual_seed(2)).to(planes)
        results.append([planes.detach(), *torch.autograd.grad(planes, leaves, weights)])
    assert emulated == ["states_forward", "states_backward"]
    check_close(*results)
    with torch.no_grad():  # a scan that saves nothing
        assert torch.equal(scan_grid(*inputs, backend="triton"), results[0][0])


# (b, h, w, e, r, n), and columns that fill up each path's part of low. The last two do not compute products.
ONE_STATE = {
    "whole": ((1, 4, 8, 64, 4, 1), 2), "masked": ((2, 3, 7, 72, 4, 1), 0), "three blocks": ((1, 5, 8, 328, 10, 1), 4),
    "rank over one product": ((1, 8, 9, 24, 18, 1), 4),
    "odd rank": ((1, 4, 5, 136, 5, 1), 1), "short path": ((1, 3, 5, 64, 4, 1), 0),
}  # fmt: skip


def on_path(path: int, low: Tensor, D: Tensor, with_C: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Set C and D of the other paths to 0, so that the scan returns one path. `with_C` replaces C of this path."""
    mask = torch.zeros(4).scatter(0, torch.tensor(path), 1.0)
    *others, C = low.unflatten(3, (4, -1)).split([low.shape[3] // 4 - 1, 1], dim=4)
    C = (C if with_C is None else with_C.expand_as(C)) * mask[:, None]
    return torch.cat([*others, C], dim=4).flatten(3), D * mask[:, None]


def states_before_tiles(inputs: list[Tensor], scan: Scan) -> Tensor:
    """Compute what the forward pass saves for one state, (b, 4, tiles, 1, e): with C = 1 and D = 0, y is the state."""
    x, low, weight, bias, A_log, D = (tensor.double() for tensor in inputs)
    ones = x.new_ones(1)
    states = []
    for path, pixels in enumerate(torch.from_numpy(path_order(*x.shape[1:3], scan))):
        of_path, _ = on_path(path, low, D, with_C=ones)
        h = scan_grid(x, of_path, weight, bias, A_log, 0 * D, scan=scan, backend="pytorch")[0].flatten(1, 2)
        starts = pixels[torch.arange(15, len(pixels), 16)[: (len(pixels) - 1) // 16]]
        states.append(torch.cat([torch.zeros_like(h[:, :1]), h[:, starts]], dim=1))
    return torch.stack(states, dim=1)[:, :, :, None].float()


@pytest.mark.parametrize(("case", "scan"), [("masked", "raster"), *((case, "continuous") for case in ONE_STATE)])
def test_emulated_gradients_of_one_state_agree_with_float64(case: str, scan: Scan, emulated: list[str]) -> None:
    shape, fill = ONE_STATE[case]
    inputs = in_bfloat16(*shape)
    grad_y = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    check_gradients_of_one_state(inputs, scan, fill, grad_y)
    assert emulated == ["one_state_backward"]


def test_emulated_gradients_of_one_state_in_segments(emulated: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths of the last image are cut, and each path has a gradient of its own."""
    inputs = in_bfloat16(3, 4, 8, 72, 4, 1)
    monkeypatch.setattr(triton_host, "LONG_PATH", 1)
    monkeypatch.setattr(triton_host, "SHORTEST_SEGMENT", 1)
    monkeypatch.setattr(states_cuda, "limits_of", lambda device: H100._replace(multiprocessors=2))
    assert triton_host._cut_backward(3, 72, 2, 64, 16) == (64, [(2, 1), (1, 2)])
    grad_y = torch.randn(4, *inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    check_gradients_of_one_state(inputs, "continuous", 2, grad_y)
    assert emulated == 2 * ["one_state_backward"]


def check_gradients_of_one_state(inputs: list[Tensor], scan: Scan, fill: int, grad_y: Tensor) -> None:
    """Compare with float64; `fill` is the number of columns that fill up each path's part of low."""
    (x, low, weight, *others), rank = inputs, inputs[2].shape[2]
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    if grad_y.ndim == 4:
        planes = [scan_grid(*leaves, scan=scan, backend="pytorch")[0]]
    else:
        of_paths = (on_path(path, leaves[1], leaves[5]) for path in range(4))
        planes = [
            scan_grid(leaves[0], of_path, *leaves[2:5], D, scan=scan, backend="pytorch")[0] for of_path, D in of_paths
        ]
    exact = torch.autograd.grad(planes, leaves, [*grad_y.double().view(-1, *x.shape)])
    padded = F.pad(low.unflatten(3, (4, rank + 2)), (0, fill), value=math.nan).flatten(3)
    arguments = x, padded, F.pad(weight, (0, -rank % 8)), *others, rank, scan == "continuous"
    grad_x, grad_low, grad_weight, shared = triton_host._scan_grid_backward(
        grad_y, states_before_tiles(inputs, scan), *arguments
    )
    of_path = grad_low.unflatten(3, (4, -1))
    assert not of_path[..., rank + 2 :].any()
    assert not grad_weight[..., rank:].any()
    found = [
        grad_x.float().sum(dim=0), of_path[..., : rank + 2].flatten(3), grad_weight[..., :rank],
        shared[2], shared[0][..., None], shared[1],
    ]  # fmt: skip
    for name, value, wanted in zip(NAMES, found, exact, strict=True):
        assert relative_error(value, wanted) < 8e-3, name


def scan_directly(x: Tensor, low: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
    filled_up = F.pad(weight, (0, -weight.shape[2] % 8))
    planes: Tensor = triton_host.scan_grid_triton(x, low, filled_up, *others, weight.shape[2], True, False)[0]
    return planes


def test_emulated_low_may_be_padded_and_x_begin_anywhere(emulated: list[str]) -> None:
    x, low, *others = in_bfloat16(1, 4, 5, 72, 4, 2)
    padded = F.pad(low.unflatten(3, (4, 8)), (0, 8), value=math.nan).flatten(3)
    moved = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    assert moved.data_ptr() % 16
    assert torch.equal(scan_directly(moved, padded, *others), scan_directly(x, low, *others))


@pytest.mark.parametrize("shape", [(1, 3, 6, 24, 6, 16), (1, 2, 5, 16, 2, 20)])
def test_emulated_states_are_padded_and_paired(shape: tuple[int, ...], emulated: list[str]) -> None:
    """Matrices of states come in pairs, with B at no multiple of 8 bytes; or there are three, and states are padded."""
    inputs = in_bfloat16(*shape)
    exact = scan_grid(*(tensor.double() for tensor in inputs), backend="pytorch")[0]
    assert relative_error(scan_directly(*inputs).sum(dim=0), exact) < 8e-3
    assert emulated == ["states_forward"]


@pytest.mark.parametrize("place", [4, 6], ids=["B", "C"])
def test_emulated_infinite_weights_change_nothing_else(place: int, emulated: list[str]) -> None:
    """An infinite B or C of a pixel reaches what the paths read later, or this pixel; step sizes stay finite."""
    x, low, *others = in_bfloat16(1, 4, 8, 40, 4, 2)
    low.unflatten(3, (4, 8))[0, 1, 3, :, place] = math.inf
    found = scan_directly(x, low, *others)
    wanted = scan_grid(*(tensor.float() for tensor in (x, low, *others)), backend="triton")
    assert torch.equal(found.isfinite(), wanted.isfinite())


@pytest.mark.parametrize(("shared", "warps"), [(60_000, 1), (120_000, 4)])
def test_emulated_blocks_are_smaller_with_less_shared_memory(
    shared: int, warps: int, emulated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = in_bfloat16(1, 3, 7, 136, 4, 8)
    monkeypatch.setattr(states_cuda, "limits_of", lambda device: states_cuda.Limits(shared, 10 * shared, 132))
    plan = states_cuda.plan(*inputs[:3], 4, 8, True, backward=True)
    assert plan is not None
    exact = output_and_gradients([tensor.double() for tensor in inputs], "pytorch")
    check_close(output_and_gradients(inputs, "triton"), exact)


@pytest.mark.parametrize(
    ("limits", "rank", "num_states", "expected"),
    [
        (H100, 8, 16, (12, 16)), (H100, 8, 64, (None, None)), (A100, 8, 16, (8, 16)),
        (SMALL, 8, 16, (None, 16)), (SMALL, 80, 16, (None, None)),
        (H100, 80, 1, (8, None)), (A100, 8, 1, (8, None)), (SMALL, 8, 1, (None, None)),
    ],
)  # fmt: skip
def test_they_run_where_enough_warps_fit(
    limits: states_cuda.Limits, rank: int, num_states: int, expected: tuple[int | None, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(states_cuda, "limits_of", lambda device: limits)
    inputs = in_bfloat16(1, 4, 4, 128, rank, num_states)[:3]
    plans = [states_cuda.plan(*inputs, rank, num_states, True, backward) for backward in (True, False)]
    assert [plan and plan.at_once // limits.multiprocessors for plan in plans] == list(expected)


def test_other_inputs_are_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states_cuda, "limits_of", lambda device: H100)
    x, low, weight = in_bfloat16(1, 4, 4, 40, 4, 2)[:3]
    assert states_cuda.plan(x, low, weight, 4, 2, True, False) is not None
    assert states_cuda.plan(x.float(), low, weight, 4, 2, True, False) is None
    assert states_cuda.plan(x[..., :36], low, weight, 4, 2, True, False) is None
    assert states_cuda.plan(x, low[..., :28], weight, 3, 2, True, False) is None
    assert states_cuda.plan(x, low, weight, 3, 2, True, False) is None
    assert states_cuda.plan(x, low, weight, 3, 2, True, True) is not None
    assert states_cuda.plan(x.expand(2**22, -1, -1, -1), low, weight, 4, 2, True, False) is None
    monkeypatch.setattr(states_cuda, "limits_of", lambda device: None)
    assert states_cuda.plan(x, low, weight, 4, 2, True, False) is None


def test_without_nvrtc_the_triton_kernels_run_after_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise OSError("libnvrtc.so: cannot open shared object file")

    monkeypatch.setattr(torch.cuda._utils, "_get_gpu_rtc_library", missing, raising=False)
    with pytest.warns(RuntimeWarning, match="NVRTC cannot be used .* slower Triton kernels"):
        assert not cuda.has_compiler.__wrapped__("90")


@pytest.fixture(scope="module")
def nvrtc() -> Any:
    nvidia = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in nvidia.submodule_search_locations or []] if nvidia else []
    found = [path for place in places for path in place.glob("cu*/lib/libnvrtc.so.*")]
    if not found:
        pytest.skip("needs nvidia-cuda-nvrtc")
    ctypes.CDLL(str(next(found[0].parent.glob("libnvrtc-builtins.so.*"))))  # which nvrtc then finds
    return ctypes.CDLL(str(found[0]))


def test_a_gpu_that_nvrtc_does_not_know_is_left_to_triton(nvrtc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda._utils, "_get_gpu_rtc_library", lambda: nvrtc, raising=False)
    assert cuda.has_compiler.__wrapped__("90")
    with pytest.warns(RuntimeWarning, match="NVRTC cannot be used .*gpu-architecture"):
        assert not cuda.has_compiler.__wrapped__("999")


@pytest.mark.slow
@pytest.mark.parametrize("capability", LIMITS)
def test_kernels_compile_without_a_gpu_and_spill_little(
    capability: str, nvrtc: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Compile by NVRTC for the first and last blocks of XL with 16 states, for fewer and more states, and for one."""
    monkeypatch.setattr(states_cuda, "limits_of", lambda device: LIMITS[capability])
    cuobjdump, compiled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump", set()
    shapes = [(32, 640, 20, 16), (8, 2560, 80, 16), (16, 96, 6, 4), (8, 640, 20, 64)]
    for side, channels, rank, num_states in [*shapes, (32, 128, 4, 1), (16, 1024, 32, 1), (8, 2560, 80, 1)]:
        x = torch.empty(1, side, side, channels, dtype=torch.bfloat16, device="meta")
        low = torch.empty(1, side, side, 4 * (rank + 2 * num_states), dtype=torch.bfloat16, device="meta")
        of_backward = states_cuda.one_state_kernel if num_states == 1 else states_cuda.backward_kernel
        for backward, kernel in enumerate((states_cuda.forward_kernel, of_backward)):
            plan = states_cuda.plan(x, low, x, rank, num_states, True, bool(backward))
            if plan is None:
                continue
            source = kernel.source({name: value for name, value in plan.constants.items() if name.isupper()})
            cubin = tmp_path / "kernel.cubin"
            cubin.write_bytes(cuda.compile_source(source, capability, nvrtc))
            used = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True)
            stack = re.search(r"STACK:(\d+)", used.stdout + used.stderr)
            assert stack is not None
            assert int(stack[1]) <= 128, (kernel.name, channels, num_states)
            compiled.add((kernel.name, num_states))
    assert ("states_backward", 4) in compiled
    everything = {("states_forward", 16), ("states_backward", 16), ("one_state_backward", 1)}
    assert capability not in ("90", "100") or everything <= compiled
