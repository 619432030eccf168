"""Gated residual, norm and modulation: kernels against the plain version, both against float64."""

import itertools

import pytest
import torch
from torch import Tensor

from lamamba.ops.backend import Backend
from lamamba.ops.residual_norm import Residual, add_gated, layer_norm, residual_norm
from small_network import relative_error

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
Shape = tuple[int, int, int, int]
Inputs = dict[str, Tensor]
EVERYTHING = ("branch", "gate", "branch_bias", "weight", "bias", "shift", "scale")
WITHOUT_RESIDUAL = EVERYTHING[3:]


def make_inputs(shape: Shape, names: tuple[str, ...] = EVERYTHING) -> Inputs:
    """Draw inputs for (b, h, w, c); gate, shift and scale are parts of one (b, 3, c) tensor, as in the network."""
    batch, _, _, channels = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64, generator=generator).to(DEVICE)

    inputs = {"x": 2 * draw(*shape) + 0.5, "branch": draw(*shape), "weight": draw(channels), "bias": draw(channels)}
    inputs |= zip(("shift", "scale", "gate"), draw(batch, 3, channels).unbind(1), strict=True)
    inputs["branch_bias"] = draw(channels)
    return {name: tensor for name, tensor in inputs.items() if name in ("x", *names)}


def run(inputs: Inputs, backend: Backend, dtype: torch.dtype | None = None, norm: bool = True) -> dict[str, Tensor]:
    residual = Residual(inputs["branch"], inputs["gate"], inputs.get("branch_bias")) if "branch" in inputs else None
    modulation = (inputs["shift"], inputs["scale"]) if "shift" in inputs else None
    options = {"weight": inputs.get("weight"), "bias": inputs.get("bias"), "modulation": modulation, "dtype": dtype}
    if residual is None:
        return {"normed": layer_norm(inputs["x"], **options, backend=backend)}
    if not norm:
        return {"x_new": add_gated(inputs["x"], residual, backend=backend)}
    x_new, normed = residual_norm(inputs["x"], residual, **options, backend=backend)
    return {"x_new": x_new, "normed": normed}


def outputs_and_gradients(
    inputs: Inputs, backend: Backend, dtype: torch.dtype | None = None, norm: bool = True
) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    outputs = run(leaves, backend, dtype, norm)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out) for out in outputs.values()]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), weights)
    return {name: out.detach() for name, out in outputs.items()} | {
        f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def check(inputs: Inputs, stream: torch.dtype, others: torch.dtype, norm: bool = True) -> None:
    """Allow twice the error of the plain version in the same dtypes, plus half a unit in the last place."""
    dtypes = {"x": stream} | dict.fromkeys(("weight", "bias", "branch_bias"), torch.float32)
    inputs = {name: tensor.to(dtypes.get(name, others)) for name, tensor in inputs.items()}
    exact = outputs_and_gradients({name: tensor.double() for name, tensor in inputs.items()}, "pytorch", norm=norm)
    plain = outputs_and_gradients(inputs, "pytorch", others, norm)
    ours = outputs_and_gradients(inputs, "triton", others, norm)
    rounding = torch.finfo(torch.float32).eps
    assert ours.keys() == plain.keys() == exact.keys()
    for name, wanted in exact.items():
        assert ours[name].dtype == plain[name].dtype, name
        assert ours[name].shape == wanted.shape, name
        assert relative_error(ours[name], wanted) <= 2 * relative_error(plain[name], wanted) + rounding, name


SMALL = (1, 3, 5, 12)  # three pieces, masked rows; for what does not depend on the shape
TINY = {
    "several rows at once, five pieces": (2, 4, 6, 40),
    "odd sides, masked channels": (2, 5, 7, 33),
    "one piece": (1, 3, 3, 4),
    "one row at once": (1, 3, 2, 644),
    "fewer channels than a piece": (3, 2, 3, 3),
    "one pixel": (3, 1, 1, 8),
    "three channels": (2, 2, 2, 3),
}


@pytest.mark.parametrize("case", TINY)
def test_kernels_agree_with_float64(case: str) -> None:
    check(make_inputs(TINY[case]), torch.float32, torch.float32)


AFFINE = ((), ("weight",), ("bias",), ("weight", "bias"))
RESIDUALS = (("branch", "gate"), ("branch", "gate", "branch_bias"))
COMBINATIONS = list(itertools.product(((), *RESIDUALS), AFFINE, ((), ("shift", "scale"))))


@pytest.mark.parametrize("names", [sum(names, ()) for names in COMBINATIONS], ids=" ".join)
def test_every_combination_agrees_with_float64(names: tuple[str, ...]) -> None:
    check(make_inputs(SMALL, names), torch.float32, torch.float32)


@pytest.mark.parametrize("names", RESIDUALS, ids=" ".join)
def test_residual_alone_agrees_with_float64(names: tuple[str, ...]) -> None:
    check(make_inputs(SMALL, names), torch.float32, torch.float32, norm=False)


@pytest.mark.parametrize("others", [torch.float32, torch.float16])
@pytest.mark.parametrize("stream", [torch.float32, torch.float16])
def test_stream_and_branches_have_dtypes_of_their_own(stream: torch.dtype, others: torch.dtype) -> None:
    check(make_inputs(SMALL), stream, others)


@pytest.mark.parametrize("undefined", ["x_new", "normed"])
def test_one_result_may_go_unused(undefined: str) -> None:
    inputs = {name: tensor.float() for name, tensor in make_inputs(SMALL).items()}
    found = []
    for backend in ("triton", "pytorch"):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
        outputs = run(leaves, backend)
        del outputs[undefined]
        (out,) = outputs.values()
        found.append(torch.autograd.grad(out.square().sum(), list(leaves.values()), allow_unused=True))
    for name, ours, wanted in zip(inputs, *found, strict=True):
        assert (ours is None) == (wanted is None), name
        if ours is not None:
            assert relative_error(ours, wanted.double()) < 1e-6, name


def test_only_some_inputs_need_gradients() -> None:
    inputs = {name: tensor.float() for name, tensor in make_inputs((1, 2, 3, 4)).items()}
    wanted = outputs_and_gradients(inputs, "triton")
    for name in inputs:
        leaf = inputs[name].detach().requires_grad_()
        outputs = run({**inputs, name: leaf}, "triton")
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out) for out in outputs.values()]
        (gradient,) = torch.autograd.grad([out for out in outputs.values() if out.requires_grad], leaf, weights)
        assert torch.equal(gradient, wanted[f"gradient of {name}"])


def test_the_plain_version_is_residual_norm_and_modulation() -> None:
    inputs = make_inputs((1, 2, 3, 4))
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}

    def in_order(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(dict(zip(leaves, tensors, strict=True)), "pytorch").values())

    assert torch.autograd.gradcheck(in_order, list(leaves.values()))
    x, branch, gate, branch_bias, weight, bias, shift, scale = (inputs[name] for name in ("x", *EVERYTHING))
    x_new = x + gate[:, None, None] * (branch + branch_bias)
    normed = torch.nn.functional.layer_norm(x_new, (4,), weight, bias)
    normed = normed * (1 + scale[:, None, None]) + shift[:, None, None]
    for ours, wanted in zip(in_order(*inputs.values()), (x_new, normed), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_eps_counts() -> None:
    x = make_inputs((1, 2, 3, 8))["x"].float()
    for eps in (1e-6, 1.0):
        wanted = torch.nn.functional.layer_norm(x, (8,), eps=eps)
        for backend in ("triton", "pytorch"):
            torch.testing.assert_close(layer_norm(x, eps=eps, backend=backend), wanted)


def test_programs_share_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program takes an image, or many programs share it and the last one has fewer pixels."""
    from lamamba.ops.residual_norm import triton as host

    inputs = {name: tensor.float() for name, tensor in make_inputs((1, 5, 7, 40)).items()}
    wanted = outputs_and_gradients(inputs, "triton")
    for warps in (1, 2):
        monkeypatch.setattr(host, "FORWARD_WARPS", warps)
        monkeypatch.setattr(host, "BACKWARD_WARPS", warps)
        for name, value in outputs_and_gradients(inputs, "triton").items():
            assert relative_error(value, wanted[name].double()) < 1e-6, (warps, name)


@pytest.mark.parametrize("names", [EVERYTHING, WITHOUT_RESIDUAL], ids=["residual", "no residual"])
@pytest.mark.usefixtures("poisoned_memory")
def test_every_value_is_written(names: tuple[str, ...]) -> None:
    inputs = {name: tensor.float() for name, tensor in make_inputs((2, 5, 7, 33), names).items()}
    for name, value in outputs_and_gradients(inputs, "triton").items():
        assert bool(value.isfinite().all()), name


def test_strided_inputs_mean_the_same() -> None:
    from lamamba.ops.launch import readable_rows

    inputs = {name: tensor.float() for name, tensor in make_inputs((2, 4, 5, 6)).items()}
    modulation = torch.stack([inputs[name] for name in ("shift", "scale", "gate")], dim=1)
    parts = dict(zip(("shift", "scale", "gate"), modulation.unbind(1), strict=True))
    assert readable_rows(parts["gate"])[0] is parts["gate"]
    assert readable_rows(parts["gate"])[1] == 18
    wanted = outputs_and_gradients({name: tensor.contiguous() for name, tensor in inputs.items()}, "triton")

    def backwards(tensor: Tensor) -> Tensor:
        order = tuple(reversed(range(tensor.ndim)))
        return tensor.permute(order).contiguous().permute(order)

    apart = {name: tensor.repeat_interleave(2)[::2] for name, tensor in inputs.items() if tensor.ndim == 1}
    for changes in (parts, {name: backwards(inputs[name]) for name in inputs}, apart):
        for name, value in outputs_and_gradients({**inputs, **changes}, "triton").items():
            assert torch.equal(value, wanted[name]), name


def test_one_modulation_for_all_images() -> None:
    inputs = {name: tensor.float() for name, tensor in make_inputs((3, 2, 2, 8)).items()}
    inputs |= {name: inputs[name][:1].expand(3, -1) for name in ("gate", "shift", "scale")}
    check({name: tensor.double() for name, tensor in inputs.items()}, torch.float32, torch.float32)


def test_a_large_mean_costs_no_digits() -> None:
    inputs = {name: tensor.float() for name, tensor in make_inputs((1, 3, 3, 40)).items()}
    inputs["x"] += 1000
    wanted = outputs_and_gradients({name: tensor.double() for name, tensor in inputs.items()}, "pytorch")
    for name, value in outputs_and_gradients(inputs, "triton").items():
        assert relative_error(value, wanted[name]) < 2e-4, name  # the mean has an error of 1e-4 standard deviations


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_a_bias_of_zeros_changes_nothing(norm: bool) -> None:
    inputs = {name: tensor.float() for name, tensor in make_inputs(SMALL, RESIDUALS[0]).items()}
    wanted = outputs_and_gradients(inputs, "triton", norm=norm)
    ours = outputs_and_gradients({**inputs, "branch_bias": torch.zeros(12, device=DEVICE)}, "triton", norm=norm)
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


def test_autocast_rounds_nothing() -> None:
    inputs = {name: tensor.float() for name, tensor in make_inputs((1, 4, 4, 8)).items()}
    wanted = outputs_and_gradients(inputs, "triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = outputs_and_gradients(inputs, "triton")
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("names", [EVERYTHING, WITHOUT_RESIDUAL, *RESIDUALS], ids=len)
def test_compiles_as_one_graph(names: tuple[str, ...], norm: bool) -> None:
    inputs = {name: tensor.float().requires_grad_() for name, tensor in make_inputs((2, 4, 4, 8), names).items()}
    if not norm and names not in RESIDUALS:
        pytest.skip("nothing but the residual takes part without the norm")

    def loss(inputs: Inputs) -> Tensor:
        inputs = {name: 2 * tensor for name, tensor in inputs.items()}
        return sum(out.square().sum() for out in run(inputs, "triton", norm=norm).values())

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(inputs)
    eager = loss(inputs)
    assert torch.equal(compiled, eager)
    ours, wanted = (torch.autograd.grad(out, list(inputs.values())) for out in (compiled, eager))
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_what_cannot_be_is_an_error_that_says_why() -> None:
    inputs = make_inputs((2, 4, 4, 8))
    x, residual = inputs["x"], Residual(inputs["branch"], inputs["gate"])
    with pytest.raises(ValueError, match=r"residual_norm: .* do not take torch\.float64: use float32"):
        residual_norm(x, residual, backend="triton")
    with pytest.raises(ValueError, match=r"layer_norm: .* do not take torch\.float64: use float32"):
        layer_norm(x, backend="triton")
    with pytest.raises(ValueError, match=r"add_gated: .* do not take torch\.float64: use float32"):
        add_gated(x, residual, backend="triton")
    with pytest.raises(ValueError, match=r"layer_norm: x is \(4, 4, 8\): give \(b, h, w, c\)"):
        layer_norm(x[0])
    with pytest.raises(ValueError, match=r"branch is \(2, 4, 3, 8\): with x \(2, 4, 4, 8\) it must be \(2, 4, 4, 8\)"):
        add_gated(x, residual._replace(branch=residual.branch[:, :, 1:]))
    with pytest.raises(ValueError, match=r"gate is \(1, 8\): with x \(2, 4, 4, 8\) it must be \(2, 8\)"):
        residual_norm(x, residual._replace(gate=residual.gate[:1]))
    with pytest.raises(ValueError, match=r"bias of the branch is \(7,\): with x \(2, 4, 4, 8\) it must be \(8,\)"):
        residual_norm(x, residual._replace(bias=inputs["branch_bias"][1:]))
    with pytest.raises(ValueError, match=r"scale is \(2, 7\): with x \(2, 4, 4, 8\) it must be \(2, 8\)"):
        layer_norm(x, modulation=(inputs["shift"], inputs["scale"][:, 1:]))
    with pytest.raises(ValueError, match=r"bias is \(7,\): with x \(2, 4, 4, 8\) it must be \(8,\)"):
        layer_norm(x, inputs["weight"], inputs["bias"][1:])


# On a GPU only: real sizes, and arithmetic that the interpreter does not support.
LARGE = {
    "XL, first stage": (4, 32, 32, 320),
    "XL, second stage": (4, 16, 16, 640),
    "XL, third stage": (8, 8, 8, 1280),
    "XL, large batch": (128, 8, 8, 1280),
    "one image": (1, 64, 64, 80),
    "odd sides": (3, 37, 21, 200),
    "widest": (1, 5, 3, 8192),
}


@ON_GPU
@pytest.mark.parametrize("others", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", LARGE)
def test_real_sizes_agree_with_float64(case: str, stream: torch.dtype, others: torch.dtype) -> None:
    check(make_inputs(LARGE[case]), stream, others)


@ON_GPU
def test_results_are_equal_from_run_to_run() -> None:
    inputs = {name: tensor.to(torch.bfloat16) for name, tensor in make_inputs((16, 32, 32, 320)).items()}
    first = outputs_and_gradients(inputs, "triton")
    for _ in range(3):
        again = outputs_and_gradients(inputs, "triton")
        assert all(torch.equal(again[name], first[name]) for name in first)
