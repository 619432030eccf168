"""The scan over a grid: kernels against the PyTorch version, both against float64."""

import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lamamba.ops import selective_scan
from lamamba.ops.backend import Backend
from lamamba.ops.selective_scan import project_and_scan, scan_grid
from small_network import relative_error

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from lamamba.ops.selective_scan.states_kernels import _sum_products  # noqa: E402

triton_host = pytest.importorskip("lamamba.ops.selective_scan.triton")
NAMES = ("x", "low", "dt_weight", "dt_bias", "A_log", "D")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_inputs(b: int, h: int, w: int, e: int, r: int, n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(b + 10 * h + 100 * w + 1000 * e + r + n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(DEVICE)

    return [
        normal(b, h, w, e), normal(b, h, w, 4 * (r + 2 * n)), normal(4, e, r) * r**-0.5,
        normal(4, e) - 2, normal(4, e, n), normal(4, e),
    ]  # fmt: skip


def output_and_gradients(inputs: list[Tensor], backend: Backend, scan: str = "continuous") -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y = scan_grid(*leaves, scan=scan, backend=backend).sum(dim=0)
    weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, weights)]


def check(inputs: list[Tensor], dtype: torch.dtype, scan: str = "continuous") -> None:
    """Allow twice the error of the PyTorch version in the same dtype, plus half a unit in the last place."""
    inputs = [tensor.to(dtype if index < 3 else torch.float32) for index, tensor in enumerate(inputs)]
    exact = output_and_gradients([tensor.double() for tensor in inputs], "pytorch", scan)
    plain = output_and_gradients(inputs, "pytorch", scan)
    ours = output_and_gradients(inputs, "triton", scan)
    rounding = torch.finfo(torch.float32).eps
    for name, value, reference, wanted in zip(("y", *NAMES), ours, plain, exact, strict=True):
        assert relative_error(value, wanted) <= 2 * relative_error(reference, wanted) + rounding, name


# (b, h, w, e, r, n). The interpreter takes seconds for each, so there are few and they are tiny.
TINY = {
    "plain": (2, 4, 4, 8, 3, 1),
    "length not a multiple of the tile, masked channels": (1, 4, 5, 40, 3, 1),
    "several states, rank over one block": (1, 6, 4, 8, 17, 3),
}


@pytest.mark.parametrize("scan", ["continuous", "raster"])
@pytest.mark.parametrize("case", TINY)
def test_kernels_agree_with_float64(case: str, scan: str) -> None:
    check(make_inputs(*TINY[case]), torch.float32, scan)


@pytest.mark.parametrize("num_states", [1, 2])
def test_gradients_may_be_recomputed(num_states: int) -> None:
    """Gradient checkpointing lets a backward pass read its saved tensors once."""
    inputs = [tensor.float() for tensor in make_inputs(1, 2, 4, 8, 3, num_states)]
    found = []
    for recomputed in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        scan = partial(scan_grid, backend="triton")
        y = checkpoint(scan, *leaves, use_reentrant=False) if recomputed else scan(*leaves)
        found.append(torch.autograd.grad(y.square().sum(), leaves))
    assert all(map(torch.equal, *found))


def test_two_turns_of_two_states_agree_with_float64() -> None:
    check(make_inputs(1, 4, 4, 8, 3, 4), torch.float32)


@pytest.mark.parametrize("shape", [(1, 4, 10, 8, 3, 1), (1, 6, 4, 8, 3, 2), (3, 4, 6, 8, 3, 1)])
def test_paths_cut_into_segments_give_the_same(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [tensor.float() for tensor in make_inputs(*shape)]
    whole = output_and_gradients(inputs, "triton")
    monkeypatch.setattr(triton_host, "LONG_PATH", 1)
    monkeypatch.setattr(triton_host, "SHORTEST_SEGMENT", 1)
    monkeypatch.setattr(triton_host, "BACKWARD_AT_ONCE", 8)  # two uncut images, and the third in two segments
    assert triton_host._cut_forward(1, 8, 4, 32) == (32, [(1, 4)])
    assert triton_host._cut_backward(3, 8, 3, 32) == (32, [(2, 1), (1, 2)])
    cut = output_and_gradients(inputs, "triton")
    for name, a, b in zip(("y", *NAMES), cut, whole, strict=True):
        assert relative_error(a, b.double()) < 1e-6, name


# (b, h, w, e, r, n). First a projection and step sizes that fit into one kernel, then both too wide for that, in sizes
# that blocks do not divide.
PROJECTED = {"narrow": (1, 4, 6, 40, 3, 1), "wide": (1, 4, 4, 24, 35, 8)}


@pytest.mark.parametrize("filled_up", [False, True], ids=["as it is", "filled up"])
@pytest.mark.parametrize("case", PROJECTED)
def test_projecting_first_has_the_gradients_of_both(
    case: str, filled_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selective_scan, "FILLED_UP_FROM", 0 if filled_up else math.inf)
    check_projection(PROJECTED[case], torch.float32)


def check_projection(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Allow twice the error of the PyTorch version in the same dtype, plus half a unit in the last place."""
    x, _, dt_weight, *others = make_inputs(*shape)
    _, _, _, e, r, n = shape
    projection = torch.randn(4, r + 2 * n, e, generator=torch.Generator().manual_seed(0)).to(DEVICE) * e**-0.5
    leaves = [x.to(dtype), projection.to(dtype), dt_weight.to(dtype), *(tensor.float() for tensor in others)]
    exact = [tensor.double().requires_grad_() for tensor in leaves]
    leaves = [tensor.requires_grad_() for tensor in leaves]
    ours = project_and_scan(*leaves, backend="triton").sum(dim=0)
    with torch.no_grad():  # another kernel, which saves nothing
        without = project_and_scan(*leaves, backend="triton").sum(dim=0)
    plain, wanted = (
        scan_grid(x, x @ projection.flatten(0, 1).mT, *others, backend="pytorch").sum(dim=0)
        for x, projection, *others in (leaves, exact)
    )
    rounding = torch.finfo(torch.float32).eps
    for y in (ours, without):
        assert relative_error(y, wanted) <= 2 * relative_error(plain, wanted) + rounding
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(ours)
    of_ours, of_plain = (torch.autograd.grad(y, leaves, weights) for y in (ours, plain))
    of_exact = torch.autograd.grad(wanted, exact, weights.double())
    names = ("x", "projection", *NAMES[2:])
    for name, value, reference, gradient in zip(names, of_ours, of_plain, of_exact, strict=True):
        assert value.shape == gradient.shape
        assert relative_error(value, gradient) <= 2 * relative_error(reference, gradient) + rounding, name


def test_projecting_first_compiles_as_one_graph() -> None:
    x, _, *others = (tensor.float().requires_grad_() for tensor in make_inputs(1, 4, 4, 8, 3, 1))
    projection = torch.randn(4, 5, 8, device=DEVICE, requires_grad=True)
    inputs = (x, projection, *others)
    compiled = torch.compile(project_and_scan, backend="aot_eager", fullgraph=True)
    ys = compiled(*inputs, backend="triton"), project_and_scan(*inputs, backend="triton")
    assert torch.equal(*ys)
    ours, eager = (torch.autograd.grad(y.square().sum(), inputs) for y in ys)
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


def test_cuts_keep_a_large_gpu_busy_without_walking_twice() -> None:
    """XL's stages with batch 128, batch 32 at 512 px, and batch 1: (images, channels, tiles, channels per program)."""
    assert triton_host._cut_forward(128, 640, 64, 64) == (64, [(128, 1)])
    assert triton_host._cut_forward(32, 640, 256, 64) == (64, [(32, 1)])
    assert triton_host._cut_forward(1, 640, 64, 64) == (64, [(1, 22)])
    assert triton_host._cut_forward(1, 640, 4096, 64) == (64, [(1, 105)])
    assert triton_host._cut_forward(1, 2560, 4, 64) == (32, [(1, 1)])
    assert triton_host._cut_backward(128, 640, 64, 64) == (64, [(128, 1)])
    assert triton_host._cut_backward(32, 640, 256, 64) == (64, [(26, 1), (6, 4)])
    assert triton_host._cut_backward(32, 1280, 64, 64) == (64, [(26, 1), (6, 2)])
    assert triton_host._cut_backward(32, 2560, 16, 64) == (64, [(32, 1)])
    assert triton_host._cut_backward(1, 640, 64, 64) == (64, [(1, 22)])
    assert triton_host._cut_backward(1, 2560, 4, 64) == (32, [(1, 1)])


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy computes both sides of a selection
def test_extreme_steps() -> None:
    """Step sizes from 1e-6 to more than 20, and rates down to -100, give accurate results and no overflow."""
    inputs = make_inputs(1, 4, 8, 8, 3, 1)
    inputs[3] = torch.linspace(-14, 100, 32, dtype=torch.float64, device=DEVICE).view(4, 8)
    inputs[4] = torch.linspace(-3, 2, 32, dtype=torch.float64, device=DEVICE).view(4, 8, 1).flip(0) * math.log(10)
    check(inputs, torch.float32)


def test_input_need_not_be_contiguous() -> None:
    inputs = [tensor.float() for tensor in make_inputs(1, 4, 4, 8, 3, 1)]
    strided = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in inputs]
    for a, b in zip(output_and_gradients(strided, "triton"), output_and_gradients(inputs, "triton"), strict=True):
        assert torch.equal(a, b)


def test_the_parts_may_have_gradients_of_their_own() -> None:
    """The next operation need not be a sum. If it is, all planes share one gradient, which is not copied."""
    inputs = [tensor.float().requires_grad_() for tensor in make_inputs(1, 4, 4, 8, 3, 2)]
    planes = scan_grid(*inputs, backend="triton")
    weights = torch.randn(planes.shape, generator=torch.Generator().manual_seed(0)).to(planes)
    of_sum = torch.autograd.grad(planes.sum(dim=0), inputs, weights[0], retain_graph=True)
    copied = torch.autograd.grad(planes, inputs, weights[:1].repeat(4, 1, 1, 1, 1), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(of_sum, copied, strict=True))
    apart = [torch.autograd.grad(planes[part], inputs, weights[part], retain_graph=True) for part in (0, slice(1, 4))]
    for name, together, *parts in zip(NAMES, torch.autograd.grad(planes, inputs, weights), *apart, strict=True):
        assert relative_error(torch.stack(parts).sum(dim=0), together.double()) < 1e-5, name


@pytest.mark.usefixtures("poisoned_memory")
def test_every_value_is_written() -> None:
    inputs = [tensor.float() for tensor in make_inputs(1, 4, 6, 8, 3, 2)]
    for name, value in zip(("y", *NAMES), output_and_gradients(inputs, "triton"), strict=True):
        assert bool(value.isfinite().all()), name


def test_autocast_rounds_nothing_in_the_backward_pass() -> None:
    inputs = [tensor.float().requires_grad_() for tensor in make_inputs(1, 4, 4, 8, 3, 1)]
    y = scan_grid(*inputs, backend="triton")
    exact = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        again = torch.autograd.grad(y.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(again, exact, strict=True))


@ON_GPU
def test_autocast_leaves_16_bits_in_the_backward_pass() -> None:
    """The gradient of `low` is a sum over three blocks of channels; autocast would return it in float32."""
    tensors = make_inputs(2, 8, 8, 328, 16, 1)
    x, low, weight = (tensor.to(torch.bfloat16) for tensor in tensors[:3])
    inputs = x, low, weight, *(tensor.float() for tensor in tensors[3:]), 16, True
    states = triton_host.scan_grid_triton(*inputs, True)[1]
    exact = triton_host._scan_grid_backward(torch.ones_like(x), states, *inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = triton_host._scan_grid_backward(torch.ones_like(x), states, *inputs)
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_compiles_as_one_graph() -> None:
    inputs = [tensor.float().requires_grad_() for tensor in make_inputs(1, 4, 4, 8, 3, 1)]
    compiled = torch.compile(scan_grid, backend="aot_eager", fullgraph=True)
    y = compiled(*inputs, backend="triton")
    assert torch.equal(y, scan_grid(*inputs, backend="triton"))
    ours = torch.autograd.grad(y.square().sum(), inputs)
    eager = torch.autograd.grad(scan_grid(*inputs, backend="triton").square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


def test_kernels_that_cannot_run_are_an_error_that_says_why() -> None:
    inputs = make_inputs(1, 4, 4, 8, 3, 1)
    with pytest.raises(ValueError, match=r"do not take torch\.float64: use float32"):
        scan_grid(*inputs, backend="triton")
    program = (
        "import torch; from lamamba.ops.selective_scan import scan_grid; n = torch.ones; "
        "scan_grid(n(1,4,4,8), n(1,4,4,20), n(4,8,3), n(4,8), -n(4,8,1), n(4,8), backend='triton')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "the kernels need CUDA tensors, x is on cpu: move it to a GPU" in done.stderr


@pytest.mark.parametrize("scan", ["continuous", "raster"])
@pytest.mark.parametrize("shape", [(2, 6, 10, 5, 3, 1), (2, 4, 4, 5, 2, 3), (1, 20, 18, 3, 1, 2)])
def test_the_version_for_export_agrees(shape: tuple[int, ...], scan: str) -> None:
    """Padded blocks, a single block, and blocks of blocks."""
    inputs = make_inputs(*shape)
    found, wanted = (scan_grid(*inputs, scan=scan, backend=backend).sum(dim=0) for backend in ("portable", "pytorch"))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("block", [32, 64])
def test_sums_over_channels_by_products(block: int) -> None:
    """Use float16, because the interpreter cannot multiply bfloat16, and integers, so that nothing is rounded."""
    generator = torch.Generator().manual_seed(block)
    rows, others = torch.randint(-4, 5, (2, 16, block), generator=generator).to(DEVICE, torch.float16)
    sums = torch.full((16,), math.nan, device=DEVICE)
    _sum_products_kernel[(1,)](rows, others, sums, BLOCK=block, num_warps=1)
    assert torch.equal(sums, (rows.float() * others.float()).sum(dim=1))


@triton.jit
def _sum_products_kernel(p_rows, p_others, p_sums, BLOCK: tl.constexpr):
    rows = ()
    others = ()
    for row in tl.static_range(16):
        o_row = row * BLOCK + tl.arange(0, BLOCK)[None, :]
        rows = rows + (tl.load(p_rows + o_row),)  # noqa: RUF005
        others = others + (tl.load(p_others + o_row),)  # noqa: RUF005
    tl.store(p_sums + tl.arange(0, 16), _sum_products(rows, others, BLOCK))


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (1, 4, 8), "x is"),
        (1, (1, 4, 4, 21), "low is"),
        (2, (4, 8), "dt_weight"),
        (3, (4, 9), "dt_bias is"),
        (4, (4, 8), "A_log is"),
        (5, (8,), "D is"),
    ],
)
def test_a_wrong_shape_is_named(index: int, shape: tuple[int, ...], message: str) -> None:
    inputs = make_inputs(1, 4, 4, 8, 3, 1)
    inputs[index] = torch.ones(shape)
    with pytest.raises(ValueError, match=message):
        scan_grid(*inputs)


# On a GPU only: real sizes, and arithmetic that the interpreter does not support.
LARGE = {
    "XL, first stage": (2, 32, 32, 640, 20, 1),
    "XL, second stage": (2, 16, 16, 1280, 40, 1),
    "XL, third stage": (2, 8, 8, 2560, 80, 1),
    "2 states": (2, 16, 16, 64, 4, 2),
    "4 states": (2, 16, 16, 96, 6, 4),
    "8 states": (1, 10, 6, 72, 6, 8),
    "8 states, odd rank": (1, 10, 6, 72, 5, 8),  # which the kernels in CUDA C++ do not take
    "16 states": (1, 8, 8, 160, 10, 16),
    "16 states, in segments": (1, 32, 32, 160, 10, 16),
    "32 states": (1, 8, 8, 48, 4, 32),
    "64 states": (1, 4, 8, 40, 4, 64),
    "16,384 steps": (1, 128, 128, 64, 4, 1),
    "16 steps": (3, 4, 4, 64, 4, 1),
    "not square": (2, 6, 50, 72, 5, 1),
}


@ON_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE)
def test_real_sizes_agree_with_float64(case: str, dtype: torch.dtype) -> None:
    check(make_inputs(*LARGE[case]), dtype)


@ON_GPU
@pytest.mark.parametrize("case", ["XL, first stage", "XL, second stage", "XL, third stage", "not square"])
def test_projecting_first_at_real_sizes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selective_scan, "FILLED_UP_FROM", 0)
    check_projection(LARGE[case], torch.bfloat16)


@ON_GPU
@pytest.mark.parametrize(
    "shape", [(8, 16, 16, 320, 20, 1), (8, 16, 16, 320, 20, 16), (1, 32, 32, 160, 10, 16)], ids=str
)
def test_results_are_equal_from_run_to_run(shape: tuple[int, ...]) -> None:
    inputs = [tensor.to(torch.bfloat16 if i < 3 else torch.float32) for i, tensor in enumerate(make_inputs(*shape))]
    first = output_and_gradients(inputs, "triton")
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(output_and_gradients(inputs, "triton"), first, strict=True))
