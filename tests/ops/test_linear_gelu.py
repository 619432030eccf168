"""Linear layer and GELU: kernels against the plain version, both against float64."""

import math

import pytest
import torch
from torch import Tensor

from lamamba.ops.backend import Backend
from lamamba.ops.linear_gelu import gelu_mlp, linear_gelu
from small_network import relative_error

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NAMES = ("out", "x", "weight", "bias")
Shape = tuple[int, ...]


def make_inputs(shape: Shape) -> list[Tensor]:
    """Draw inputs for (..., i, c); the input of GELU has a standard deviation of about 2."""
    *batch, width, hidden = shape
    generator = torch.Generator().manual_seed(sum(shape))
    shapes = ((*batch, width), (hidden, width), (hidden,))
    x, weight, bias = (torch.randn(size, dtype=torch.float64, generator=generator) for size in shapes)
    return [tensor.to(DEVICE) for tensor in (x, 2 * width**-0.5 * weight, bias)]


def output_and_gradients(inputs: list[Tensor], backend: Backend) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = linear_gelu(*leaves, backend=backend)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def check(inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Allow twice the error of the plain version in the same dtype, plus half a unit in the last place."""
    inputs = [tensor.to(dtype) for tensor in inputs]
    exact = output_and_gradients([tensor.double() for tensor in inputs], "pytorch")
    plain = output_and_gradients(inputs, "pytorch")
    ours = output_and_gradients(inputs, "triton")
    rounding = torch.finfo(torch.float32).eps
    for name, value, reference, wanted in zip(NAMES, ours, plain, exact, strict=True):
        assert value.dtype == reference.dtype, name
        assert value.shape == wanted.shape, name
        assert relative_error(value, wanted) <= 2 * relative_error(reference, wanted) + rounding, name


TINY = {
    "two blocks of columns": (2, 3, 5, 12, 128),
    "five blocks, of a width that is five times 64": (3, 3, 8, 320),
    "wide blocks": (9, 8, 512),
    "masked columns": (2, 5, 7, 4, 97),
    "fewer channels than a block": (3, 7, 5, 33),
    "one row": (6, 20),
    "no axis but its own": (5, 12),
    "one channel": (4, 3, 3, 1),
}


@pytest.mark.parametrize("case", TINY)
def test_kernels_agree_with_float64(case: str) -> None:
    check(make_inputs(TINY[case]), torch.float32)


def test_half_precision_agrees_with_float64() -> None:
    check(make_inputs((2, 3, 5, 20, 40)), torch.float16)


def test_the_plain_version_is_a_layer_and_gelu() -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs((2, 3, 4, 5))]
    assert torch.autograd.gradcheck(lambda *tensors: linear_gelu(*tensors, backend="pytorch"), inputs)
    x, weight, bias = inputs
    z = x @ weight.T + bias
    torch.testing.assert_close(linear_gelu(*inputs), 0.5 * z * (1 + torch.erf(z / math.sqrt(2))))


@pytest.mark.parametrize("width", [64, 128, 192, 256, 320])
@pytest.mark.parametrize("num_rows", [70, 5])
def test_the_second_layer_with_gelu_in_its_kernel(num_rows: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run both kernels, or only the backward kernel if the width is not a power of two. The last tile is not full."""
    from lamamba.ops.linear_gelu import products

    launched = []
    launch = products.launch
    monkeypatch.setattr(
        products, "launch", lambda kernel, *rest, **c: launched.append(kernel) or launch(kernel, *rest, **c)
    )
    monkeypatch.setattr(products, "MIN_ROWS", 5)
    x, weight_1, bias_1 = make_inputs((num_rows, 16, 192))
    weight_2 = torch.randn(width, 192, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    inputs = [tensor.half() for tensor in (x, weight_1, bias_1, weight_2 / 14)]
    ours, plain = (mlp_and_gradients(inputs, backend) for backend in ("triton", "pytorch"))
    exact = mlp_and_gradients([tensor.double() for tensor in inputs], "pytorch")
    with torch.no_grad():
        without_gradients = gelu_mlp(*inputs, backend="triton")
    for name, value, reference, wanted in zip(("out", "x", "1", "bias", "2"), ours, plain, exact, strict=True):
        assert value.dtype == reference.dtype, name
        assert relative_error(value, wanted) <= 2 * relative_error(reference, wanted) + 1e-5, name
    assert relative_error(without_gradients, exact[0]) <= 2 * relative_error(plain[0], exact[0]) + 1e-5
    forward = 2 if width in (64, 128, 256) else 0  # with and without gradients
    assert len(launched) == forward + 1


@pytest.mark.parametrize("warps", [1, 3])
def test_programs_share_the_rows(warps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program takes all rows, or many programs share them and the last one has fewer rows."""
    from lamamba.ops.linear_gelu import triton as host

    inputs = [tensor.float() for tensor in make_inputs((2, 5, 7, 8, 512))]
    wanted = output_and_gradients(inputs, "triton")
    monkeypatch.setattr(host, "FORWARD_WARPS", 2 * warps)
    monkeypatch.setattr(host, "BACKWARD_WARPS", 2 * warps)
    for name, a, b in zip(NAMES, output_and_gradients(inputs, "triton"), wanted, strict=True):
        assert relative_error(a, b.double()) < 1e-6, name


@pytest.mark.usefixtures("poisoned_memory")
def test_every_value_is_written() -> None:
    x, weight_1, bias_1 = (tensor.half() for tensor in make_inputs((70, 16, 128)))
    assert all(bool(value.isfinite().all()) for value in mlp_and_gradients([x, weight_1, bias_1, weight_1.T], "triton"))
    inputs = [tensor.float() for tensor in make_inputs((2, 5, 7, 4, 97))]
    for name, value in zip(NAMES, output_and_gradients(inputs, "triton"), strict=True):
        assert bool(value.isfinite().all()), name


def test_strided_inputs_mean_the_same() -> None:
    from lamamba.ops.linear_gelu.triton import bias_gelu_triton

    grad_out, x, bias = (tensor.float() for tensor in make_inputs((5, 5, 5)))
    apart = bias.repeat_interleave(2)[::2]
    found = []
    for inputs in ((x, bias, grad_out), (x.T.contiguous().T, apart, grad_out.T.contiguous().T)):
        leaves = [tensor.requires_grad_() for tensor in inputs[:2]]
        out = bias_gelu_triton(*leaves)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, inputs[2])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy: the square of z may be infinite
def test_large_inputs_neither_overflow_nor_vanish() -> None:
    x, weight, bias = make_inputs((4, 4, 8, 16))
    check([x, 10 * weight, 10 * bias], torch.float32)
    x, weight, bias = (tensor.float() for tensor in (x, 1e20 * weight, bias))
    assert all(bool(value.isfinite().all()) for value in output_and_gradients([x, weight, bias], "triton"))


def test_only_some_inputs_need_gradients() -> None:
    inputs = [tensor.float() for tensor in make_inputs((3, 3, 4, 8))]
    weights = torch.randn(3, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(inputs[0])
    for index, wanted in enumerate(output_and_gradients(inputs, "triton")[1:]):
        leaf = inputs[index].detach().requires_grad_()
        out = linear_gelu(*inputs[:index], leaf, *inputs[index + 1 :], backend="triton")
        assert torch.equal(torch.autograd.grad(out, leaf, weights)[0], wanted)


def test_autocast_rounds_the_product_and_nothing_else() -> None:
    inputs = [tensor.float() for tensor in make_inputs((3, 3, 8, 40))]
    low = [tensor.to(torch.bfloat16) for tensor in inputs]
    with torch.autocast(DEVICE, torch.bfloat16):
        out, *gradients = output_and_gradients(inputs, "triton")
    assert out.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    z = torch.nn.functional.linear(low[0], low[1]).float() + inputs[2]
    torch.testing.assert_close(out, torch.nn.functional.gelu(z).to(torch.bfloat16), rtol=1e-2, atol=3e-5)  # of the fit


@ON_GPU
@pytest.mark.parametrize(("mean", "deviation"), [(0, 2), (0, 0.2), (-2, 0.5), (-4, 1)])
@pytest.mark.parametrize("autocast", [False, True])
def test_cublas_applies_gelu_without_gradients(mean: float, deviation: float, autocast: bool) -> None:
    """Its GELU is an approximation, but applied before rounding. For results close to 0, it is less exact."""
    x, weight, bias = make_inputs((3, 50, 8, 64, 256))
    tensors = [tensor.bfloat16() for tensor in (x, weight * deviation / 2, 0 * bias + mean)]
    exact = linear_gelu(*(tensor.double() for tensor in tensors))
    identity = torch.eye(256, device=DEVICE, dtype=torch.bfloat16)  # the second layer of an MLP
    given, last = (tensors, identity) if not autocast else ([tensor.float() for tensor in tensors], identity.float())
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        plain = linear_gelu(*given, backend="pytorch")
        with torch.profiler.profile() as profile:
            both = linear_gelu(*given), gelu_mlp(*given, last)
    assert not any("bias_gelu" in event.key for event in profile.key_averages())
    for ours in both:
        assert ours.dtype == torch.bfloat16
        assert ours.shape == exact.shape
        assert bool(((ours - exact).abs() <= 4.8e-4 + 2**-8 * exact.abs()).all())
        if mean > -4:
            assert relative_error(ours, exact) <= 1.2 * relative_error(plain, exact)


def test_compiles_as_one_graph() -> None:
    inputs = [tensor.float().requires_grad_() for tensor in make_inputs((2, 3, 4, 8))]

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_gelu(2 * x, weight, bias, backend="triton")

    out = torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs)
    eager = run(*inputs)
    assert torch.equal(out, eager)
    ours, wanted = (torch.autograd.grad(y.square().sum(), inputs) for y in (out, eager))
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_what_cannot_be_is_an_error_that_says_why() -> None:
    x, weight, bias = make_inputs((2, 4, 8, 12))
    with pytest.raises(ValueError, match=r"linear_gelu: .* do not take torch\.float64: use float32"):
        linear_gelu(x, weight, bias, backend="triton")
    with pytest.raises(ValueError, match=r"x is \(0, 4, 8\): give \(\.\.\., i\), none of them 0"):
        linear_gelu(x[:0], weight, bias)
    with pytest.raises(ValueError, match=r"weight is \(12, 7\): with x \(2, 4, 8\) it must be \(12, 8\)"):
        linear_gelu(x, weight[:, 1:], bias)
    with pytest.raises(ValueError, match=r"bias is \(11,\): with weight \(12, 8\) it must be \(12,\)"):
        linear_gelu(x, weight, bias[1:])


MLP_NAMES = ("out", "x", "weight_1", "bias_1", "weight_2")


def mlp_and_gradients(inputs: list[Tensor], backend: Backend) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = gelu_mlp(*leaves, backend=backend)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def make_mlp_inputs(shape: Shape) -> list[Tensor]:
    x, weight_1, bias_1 = make_inputs(shape)
    generator = torch.Generator().manual_seed(2)
    weight_2 = torch.randn(6, shape[-1], dtype=torch.float64, generator=generator) * shape[-1] ** -0.5
    return [x, weight_1, bias_1, weight_2.to(DEVICE)]


def check_mlp(inputs: list[Tensor], dtype: torch.dtype) -> None:
    inputs = [tensor.to(dtype) for tensor in inputs]
    exact = mlp_and_gradients([tensor.double() for tensor in inputs], "pytorch")
    plain, ours = (mlp_and_gradients(inputs, backend) for backend in ("pytorch", "triton"))
    rounding = torch.finfo(torch.float32).eps
    for name, value, reference, wanted in zip(MLP_NAMES, ours, plain, exact, strict=True):
        assert value.dtype == reference.dtype, name
        assert relative_error(value, wanted) <= 2 * relative_error(reference, wanted) + rounding, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", ["masked columns", "five blocks, of a width that is five times 64", "one row"])
def test_an_mlp_agrees_with_float64(case: str, dtype: torch.dtype) -> None:
    check_mlp(make_mlp_inputs(TINY[case]), dtype)


def test_an_mlp_saves_no_hidden_values() -> None:
    """It saves x, the product before GELU, and the parameters; two layers would save the result of GELU, too."""
    saved: list[int] = []
    inputs = [tensor.float().requires_grad_() for tensor in make_mlp_inputs((5, 7, 8, 40))]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()), lambda _: None):
        gelu_mlp(*inputs, backend="triton")
    assert sum(saved) == sum(tensor.numel() for tensor in inputs) + 5 * 7 * 40


def test_an_mlp_in_autocast_has_gradients_of_its_weights_dtype() -> None:
    inputs = [tensor.float() for tensor in make_mlp_inputs((3, 3, 8, 40))]
    with torch.autocast(DEVICE, torch.bfloat16):
        out, *gradients = mlp_and_gradients(inputs, "triton")
    assert out.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_an_mlp_drops_hidden_values() -> None:
    inputs = [tensor.float() for tensor in make_mlp_inputs((3, 3, 8, 40))]
    torch.manual_seed(0)
    found = gelu_mlp(*inputs, dropout=0.5, backend="triton")
    torch.manual_seed(0)
    hidden = torch.nn.functional.dropout(linear_gelu(*inputs[:3], backend="triton"), 0.5)
    torch.testing.assert_close(found, hidden @ inputs[3].T)
    assert not torch.equal(found, gelu_mlp(*inputs, backend="triton"))


def test_an_mlp_compiles_as_one_graph() -> None:
    inputs = [tensor.float().requires_grad_() for tensor in make_mlp_inputs((2, 3, 4, 8))]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return gelu_mlp(2 * x, *parameters, backend="triton")

    out, eager = torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs), run(*inputs)
    assert torch.equal(out, eager)
    ours, wanted = (torch.autograd.grad(y.square().sum(), inputs) for y in (out, eager))
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


# On a GPU only: real sizes, and arithmetic that the interpreter does not support.
LARGE = {
    "XL, first stage": (4, 32, 32, 320, 1280),
    "XL, second stage": (4, 16, 16, 640, 2560),
    "XL, third stage": (8, 8, 8, 1280, 5120),
    "XL, large batch": (32, 32, 32, 320, 1280),
    "one image": (1, 64, 64, 80, 320),
    "odd sides": (3, 37, 21, 50, 203),
    "widest": (1, 5, 3, 16, 30000),
}


@ON_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", LARGE)
def test_real_sizes_agree_with_float64(case: str, dtype: torch.dtype) -> None:
    check(make_inputs(LARGE[case]), dtype)
    check_mlp(make_mlp_inputs(LARGE[case]), dtype)


@ON_GPU
def test_results_are_equal_from_run_to_run() -> None:
    inputs = [tensor.to(torch.bfloat16) for tensor in make_inputs((16, 32, 32, 320, 1280))]
    first = output_and_gradients(inputs, "triton")
    for _ in range(3):
        again = output_and_gradients(inputs, "triton")
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
