"""The norms on a CPU: compiled loops against the plain version, both against float64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lamamba.ops.backend import Backend
from lamamba.ops.gated_norm import gated_norm
from lamamba.ops.residual_norm import Residual, residual_norm
from small_network import relative_error

pytest.importorskip("numba")
Inputs = dict[str, Tensor]
SHAPES = {"nano": (3, 32, 32, 40), "odd sides": (2, 5, 7, 3), "one pixel": (1, 1, 1, 4)}


def run_residual(inputs: Inputs, backend: Backend) -> tuple[Tensor, ...]:
    residual = Residual(inputs["branch"], inputs["gate"], inputs.get("branch_bias"))
    modulation = (inputs["shift"], inputs["scale"]) if "shift" in inputs else None
    affine = inputs.get("weight"), inputs.get("bias")
    return residual_norm(inputs["x"], residual, *affine, modulation, 1e-6, backend=backend)


def run_gated(inputs: Inputs, backend: Backend) -> tuple[Tensor, ...]:
    return (gated_norm(inputs["x"][None], inputs["branch"], inputs["weight"], inputs["bias"], backend=backend),)


RUNS = {"residual": run_residual, "gated": run_gated}
NEEDED = {"residual": ("x", "branch", "gate"), "gated": ("x", "branch", "weight", "bias")}
OPTIONAL = {"residual": ("branch_bias", "weight", "bias", "shift", "scale"), "gated": ()}


def make_inputs(norm: str, shape: tuple[int, int, int, int], without: tuple[str, ...] = ()) -> Inputs:
    batch, _, _, channels = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    inputs = {"x": 2 * draw(*shape) + 0.5, "branch": draw(*shape), "weight": draw(channels), "bias": draw(channels)}
    inputs |= zip(("shift", "scale", "gate"), draw(batch, 3, channels).unbind(1), strict=True)
    inputs["branch_bias"] = draw(channels)
    return {name: inputs[name] for name in (*NEEDED[norm], *OPTIONAL[norm]) if name not in without}


def outputs_and_gradients(norm: str, inputs: Inputs, backend: Backend = "auto") -> list[Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    outputs = RUNS[norm](leaves, backend)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out) for out in outputs]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, list(leaves.values()), weights)]


def check(norm: str, inputs: Inputs) -> None:
    """Allow twice the error of the plain version, plus one unit in the last place."""
    exact = outputs_and_gradients(norm, {name: tensor.double() for name, tensor in inputs.items()}, "pytorch")
    plain, ours = outputs_and_gradients(norm, inputs, "pytorch"), outputs_and_gradients(norm, inputs)
    for index, (value, other, wanted) in enumerate(zip(ours, plain, exact, strict=True)):
        assert value.shape == wanted.shape, index
        bound = 2 * relative_error(other, wanted) + torch.finfo(torch.float32).eps
        assert relative_error(value, wanted) <= bound, index


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("norm", RUNS)
def test_loops_agree_with_float64(norm: str, shape: tuple[int, int, int, int]) -> None:
    check(norm, make_inputs(norm, shape))


@pytest.mark.parametrize("without", [("branch_bias",), ("weight", "bias"), ("shift", "scale"), OPTIONAL["residual"]])
def test_what_need_not_be_given(without: tuple[str, ...]) -> None:
    check("residual", make_inputs("residual", (2, 4, 6, 40), without))


def test_large_gates_do_not_overflow() -> None:
    inputs = make_inputs("gated", (1, 4, 4, 16))
    inputs["branch"] = torch.linspace(-200, 200, 256).view(1, 4, 4, 16)
    check("gated", inputs)


@pytest.mark.parametrize("norm", RUNS)
def test_the_loops_do_run(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the loops run; otherwise the other tests would compare the plain version with itself."""
    ran = []
    for module, name in (("residual_norm", "ResidualNorm"), ("gated_norm", "GatedNorm")):
        apply: Callable[..., object] = lambda *_: ran.append(1) or (None, None)  # noqa: E731
        monkeypatch.setattr(f"lamamba.ops.{module}.{name}.apply", apply)
    RUNS[norm](make_inputs(norm, (1, 2, 2, 4)), "auto")
    assert ran


@pytest.mark.parametrize("norm", RUNS)
def test_half_precision_and_float64_are_left_to_pytorch(norm: str) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        inputs = {name: tensor.to(dtype) for name, tensor in make_inputs(norm, (1, 2, 2, 8)).items()}
        for ours, plain in zip(RUNS[norm](inputs, "auto"), RUNS[norm](inputs, "pytorch"), strict=True):
            assert ours.dtype == dtype
            assert torch.equal(ours, plain)


@pytest.mark.parametrize("norm", RUNS)
def test_results_do_not_depend_on_the_threads(norm: str) -> None:
    inputs, before, results = make_inputs(norm, (5, 4, 6, 8)), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(norm, inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("norm", RUNS)
def test_input_need_not_be_contiguous(norm: str) -> None:
    inputs = make_inputs(norm, (2, 4, 6, 8))
    strided = {name: tensor.transpose(0, -1).contiguous().transpose(0, -1) for name, tensor in inputs.items()}
    for a, b in zip(outputs_and_gradients(norm, strided), outputs_and_gradients(norm, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm", RUNS)
def test_what_is_not_finite_is_passed_on(norm: str) -> None:
    for name in ("x", "branch"):
        inputs = make_inputs(norm, (1, 2, 2, 3))
        inputs[name].fill_(math.nan)
        assert bool(RUNS[norm](inputs, "auto")[-1].isnan().all()), name


@pytest.mark.parametrize("norm", RUNS)
@pytest.mark.usefixtures("poisoned_memory")
def test_every_value_is_written(norm: str) -> None:
    for value in outputs_and_gradients(norm, make_inputs(norm, (2, 4, 6, 8))):
        assert bool(value.isfinite().all())


@pytest.mark.parametrize("norm", RUNS)
def test_compiles_as_one_graph(norm: str) -> None:
    inputs = make_inputs(norm, (1, 4, 4, 8))
    torch.compiler.reset()
    compiled = torch.compile(lambda: RUNS[norm](inputs, "auto"), backend="aot_eager", fullgraph=True)
    for ours, eager in zip(compiled(), RUNS[norm](inputs, "auto"), strict=True):
        assert torch.allclose(ours, eager, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("norm", RUNS)
def test_second_derivatives_are_refused_not_wrong(norm: str) -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in make_inputs(norm, (1, 2, 2, 4)).items()}
    (grad,) = torch.autograd.grad(RUNS[norm](inputs, "auto")[-1].square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("norm", RUNS)
def test_tensors_without_memory_are_left_to_pytorch(norm: str) -> None:
    with FakeTensorMode() as mode:
        inputs = {name: mode.from_tensor(tensor) for name, tensor in make_inputs(norm, (1, 2, 2, 4)).items()}
        assert RUNS[norm](inputs, "auto")[-1].shape == (1, 2, 2, 4)
