"""The scan over a grid on a CPU: compiled loops against the plain version in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lamamba.ops.selective_scan import scan_grid
from lamamba.ops.selective_scan.cpu import scan_grid_cpu
from small_network import relative_error

compiled = pytest.importorskip("lamamba.ops.compiled")
loops = pytest.importorskip("lamamba.ops.selective_scan.loops")
NAMES = ("y", "x", "low", "dt_weight", "dt_bias", "A_log", "D")
# (b, h, w, e, r, n)
SHAPES = {
    "nano": (3, 32, 32, 40, 3, 1),
    "odd sides": (2, 5, 7, 3, 2, 1),
    "several states": (2, 6, 4, 17, 9, 4),
    "one pixel": (1, 1, 1, 1, 1, 1),
    "a tile and a bit": (1, 5, 13, 4, 1, 2),
}


def make_inputs(b: int, h: int, w: int, e: int, r: int, n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(b + 10 * h + 100 * w + 1000 * e + r + n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return [
        normal(b, h, w, e), normal(b, h, w, 4 * (r + 2 * n)), normal(4, e, r) * r**-0.5,
        normal(4, e) - 2, normal(4, e, n), normal(4, e),
    ]  # fmt: skip


def output_and_gradients(inputs: list[Tensor], **options: str) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    y = scan_grid(*leaves, **options).sum(dim=0)
    weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, weights)]


def check(inputs: list[Tensor], scan: str = "continuous") -> None:
    """Compare in float32, within about the rounding error of a sum over a thousand steps."""
    exact = output_and_gradients([tensor.double() for tensor in inputs], scan=scan)
    for name, value, wanted in zip(NAMES, output_and_gradients(inputs, scan=scan), exact, strict=True):
        assert value.shape == wanted.shape, name
        assert relative_error(value, wanted) < 1e-6, name


@pytest.mark.parametrize("scan", ["continuous", "raster"])
@pytest.mark.parametrize("case", SHAPES)
def test_loops_agree_with_float64(case: str, scan: str) -> None:
    check(make_inputs(*SHAPES[case]), scan)


def test_extreme_steps() -> None:
    """Step sizes from 1e-6 to more than 20, and rates down to -100, give accurate results and no overflow."""
    inputs = make_inputs(1, 4, 8, 8, 3, 1)
    inputs[3] = torch.linspace(-14, 100, 32).view(4, 8)
    inputs[4] = torch.linspace(-3, 2, 32).view(4, 8, 1).flip(0) * math.log(10)
    check(inputs)


@pytest.mark.parametrize(
    ("function", "exact", "low", "high"),
    [(compiled.exp, torch.exp, -86.0, 0.0), (loops.softplus, torch.nn.functional.softplus, -86.0, 100.0)],
    ids=["exp", "softplus"],
)
def test_functions_are_right_to_two_units_in_the_last_place(
    function: Callable[[object], object], exact: Callable[[Tensor], Tensor], low: float, high: float
) -> None:
    x = torch.linspace(low, high, 20_001)
    values = torch.tensor([float(function(value)) for value in x.numpy()], dtype=torch.float64)
    wanted = exact(x.double())
    assert float(((values - wanted) / wanted).abs().max()) < 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("argument", range(6), ids=NAMES[1:])
def test_what_is_not_finite_is_passed_on(argument: int) -> None:
    inputs = make_inputs(1, 2, 2, 3, 2, 1)
    inputs[argument].fill_(math.nan)
    assert bool(scan_grid(*inputs).isnan().all())


def test_results_do_not_depend_on_the_threads() -> None:
    inputs = make_inputs(5, 4, 6, 8, 3, 2)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(output_and_gradients(inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_input_need_not_be_contiguous() -> None:
    inputs = make_inputs(2, 4, 4, 8, 3, 2)
    strided = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in inputs]
    for a, b in zip(output_and_gradients(strided), output_and_gradients(inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("poisoned_memory")
def test_every_value_is_written() -> None:
    for name, value in zip(NAMES, output_and_gradients(make_inputs(2, 6, 6, 8, 3, 2)), strict=True):
        assert bool(value.isfinite().all()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_the_float32_scan_rounded_once(dtype: torch.dtype) -> None:
    inputs = [tensor.to(dtype) for tensor in make_inputs(2, 4, 6, 8, 3, 2)]
    y = scan_grid(*inputs)
    assert y.dtype == dtype
    assert torch.equal(y, scan_grid(*(tensor.float() for tensor in inputs)).to(dtype))


def test_operator_is_registered_as_torch_expects() -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs(2, 4, 6, 8, 3, 2)]
    torch.library.opcheck(scan_grid_cpu, (*inputs, True))


def test_compiles_as_one_graph() -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs(1, 4, 4, 8, 3, 1)]
    torch.compiler.reset()
    compiled = torch.compile(scan_grid, backend="aot_eager", fullgraph=True)
    y = compiled(*inputs)
    assert torch.equal(y, scan_grid(*inputs))
    ours = torch.autograd.grad(y.square().sum(), inputs)
    eager = torch.autograd.grad(scan_grid(*inputs).square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))
    torch.compiler.reset()
