"""Depthwise convolution and SiLU: kernels against the plain version, both against float64."""

import pytest
import torch
from torch import Tensor

from lamamba.ops.backend import Backend
from lamamba.ops.depthwise_convolution import depthwise_convolution
from small_network import relative_error

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NAMES = ("y", "x", "weight", "bias")
Shape = tuple[int, int, int, int]


def make_inputs(shape: Shape, with_bias: bool = True) -> list[Tensor]:
    """Draw inputs for (b, h, w, e)."""
    channels = shape[3]
    generator = torch.Generator().manual_seed(sum(shape))
    shapes = (shape, (channels, 1, 3, 3), (channels,))[: 3 if with_bias else 2]
    return [torch.randn(size, dtype=torch.float64, generator=generator).to(DEVICE) for size in shapes]


def output_and_gradients(inputs: list[Tensor], backend: Backend) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y = depthwise_convolution(*leaves, backend=backend)
    weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, weights)]


def check(inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Allow twice the error of the plain version in the same dtype, plus half a unit in the last place."""
    inputs = [inputs[0].to(dtype), *(tensor.float() for tensor in inputs[1:])]
    exact = output_and_gradients([tensor.double() for tensor in inputs], "pytorch")
    plain = output_and_gradients(inputs, "pytorch")
    ours = output_and_gradients(inputs, "triton")
    rounding = torch.finfo(torch.float32).eps
    for name, value, reference, wanted in zip(NAMES, ours, plain, exact, strict=False):
        assert value.is_contiguous() or name == "weight"
        assert relative_error(value, wanted) <= 2 * relative_error(reference, wanted) + rounding, name


TINY = {
    "one strip": (2, 4, 6, 8),
    "odd sides": (2, 5, 7, 3),
    "several strips, the last one shorter": (1, 19, 3, 4),
    "several strips and segments, masked channels": (1, 16, 9, 40),
    "two blocks of channels": (2, 3, 2, 72),
    "one row": (1, 1, 5, 4),
    "one column": (1, 6, 1, 4),
    "one pixel": (3, 1, 1, 4),
}


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("case", TINY)
def test_kernels_agree_with_float64(case: str, with_bias: bool) -> None:
    check(make_inputs(TINY[case], with_bias), torch.float32)


def test_the_plain_version_is_a_convolution_and_silu() -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs((1, 3, 4, 2))]
    assert torch.autograd.gradcheck(lambda *tensors: depthwise_convolution(*tensors, backend="pytorch"), inputs)
    x, weight, bias = inputs
    convolution = torch.nn.Conv2d(2, 2, 3, padding=1, groups=2).to(x)
    convolution.load_state_dict({"weight": weight, "bias": bias})
    wanted = torch.nn.functional.silu(convolution(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    torch.testing.assert_close(depthwise_convolution(*inputs), wanted)


def test_programs_share_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few programs, each takes several tiles, and the last ones fewer; tiles may be small or a whole image."""
    from lamamba.ops.depthwise_convolution import triton as host

    inputs = [tensor.float() for tensor in make_inputs((3, 10, 9, 4))]
    alone = output_and_gradients(inputs, "triton")
    for changes in ({"MAX_PROGRAMS": 5}, {"ENOUGH_PROGRAMS": 1, "BACKWARD_ROWS": 10}, {"SMALLEST_SIDE": 1}):
        for name, number in changes.items():
            monkeypatch.setattr(host, name, number)
        for name, a, b in zip(NAMES, output_and_gradients(inputs, "triton"), alone, strict=True):
            assert relative_error(a, b.double()) < 1e-6, (changes, name)


@pytest.mark.usefixtures("poisoned_memory")
def test_every_value_is_written() -> None:
    inputs = [tensor.float() for tensor in make_inputs((2, 11, 9, 5))]
    for name, value in zip(NAMES, output_and_gradients(inputs, "triton"), strict=True):
        assert bool(value.isfinite().all()), name


@pytest.mark.parametrize("half", [0, 1])
def test_half_of_the_channels_is_read_in_place(half: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from lamamba.ops.launch import readable_pixels

    both, weight, bias = (tensor.float() for tensor in make_inputs((2, 10, 5, 8)))
    x, weight, bias = both.chunk(2, dim=-1)[half], weight[:4], bias[:4]
    assert readable_pixels(x)[0] is x
    assert readable_pixels(x)[1] == 8
    wanted = output_and_gradients([x.contiguous(), weight, bias], "triton")
    leaf = both.clone().requires_grad_()
    y = depthwise_convolution(leaf.chunk(2, dim=-1)[half], weight, bias, backend="triton")
    assert torch.equal(y, wanted[0])
    weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y)
    (grad,) = torch.autograd.grad(y, leaf, weights)
    assert torch.equal(grad.chunk(2, dim=-1)[half], wanted[1])


def test_other_strides_are_copied() -> None:
    inputs = [tensor.float() for tensor in make_inputs((2, 4, 5, 6))]
    wanted = depthwise_convolution(*inputs, backend="triton")
    x, *parameters = inputs
    for order in ((0, 3, 1, 2), (0, 2, 1, 3), (3, 2, 1, 0)):
        back = [order.index(axis) for axis in range(4)]
        strided = x.permute(order).contiguous().permute(back)
        assert torch.equal(depthwise_convolution(strided, *parameters, backend="triton"), wanted)
    cut = torch.cat([x, x], dim=2)[:, :, : x.shape[2]]
    assert torch.equal(depthwise_convolution(cut, *parameters, backend="triton"), wanted)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy warns that exp(-z) may be infinite; then y is 0
def test_large_inputs_neither_overflow_nor_vanish() -> None:
    x, weight, bias = (tensor.float() for tensor in make_inputs((1, 4, 4, 4)))
    check([100 * x, weight, bias], torch.float32)


def test_autocast_rounds_nothing() -> None:
    inputs = [tensor.float().requires_grad_() for tensor in make_inputs((1, 4, 4, 8))]
    y = depthwise_convolution(*inputs, backend="triton")
    wanted = [y, *torch.autograd.grad(y.sum(), inputs)]
    with torch.autocast(DEVICE, torch.bfloat16):
        y = depthwise_convolution(*inputs, backend="triton")
        ours = [y, *torch.autograd.grad(y.sum(), inputs)]
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_compiles_as_one_graph(with_bias: bool) -> None:
    inputs = [tensor.float().requires_grad_() for tensor in make_inputs((1, 4, 4, 8), with_bias)]

    def first_half(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return depthwise_convolution(torch.cat([x, x], dim=-1).chunk(2, dim=-1)[0], weight, bias, backend="triton")

    y = torch.compile(first_half, backend="aot_eager", fullgraph=True)(*inputs)
    eager = first_half(*inputs)
    assert torch.equal(y, eager)
    ours, wanted = (torch.autograd.grad(out.square().sum(), inputs) for out in (y, eager))
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_what_cannot_be_is_an_error_that_says_why() -> None:
    x, weight, bias = make_inputs((1, 4, 4, 8))
    with pytest.raises(ValueError, match=r"do not take torch\.float64: use float32"):
        depthwise_convolution(x, weight, bias, backend="triton")
    with pytest.raises(ValueError, match=r"x is \(4, 4, 8\): give \(b, h, w, e\)"):
        depthwise_convolution(x[0], weight, bias)
    with pytest.raises(ValueError, match=r"weight is \(8, 3, 3\): with 8 channels it must be \(8, 1, 3, 3\)"):
        depthwise_convolution(x, weight[:, 0], bias)
    with pytest.raises(ValueError, match=r"bias is \(7,\): with 8 channels it must be \(8,\)"):
        depthwise_convolution(x, weight, bias[1:])


# On a GPU only: real sizes, and arithmetic that the interpreter does not support.
LARGE = {
    "XL, first stage": (4, 32, 32, 640),
    "XL, second stage": (2, 16, 16, 1280),
    "XL, third stage": (4, 8, 8, 2560),
    "XL, large batch": (128, 8, 8, 2560),
    "one image": (1, 64, 64, 160),
    "odd sides": (3, 37, 21, 200),
    "not square": (1, 6, 50, 72),
}


@ON_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", LARGE)
def test_real_sizes_agree_with_float64(case: str, dtype: torch.dtype) -> None:
    check(make_inputs(LARGE[case]), dtype)


@ON_GPU
def test_results_are_equal_from_run_to_run() -> None:
    inputs = [tensor.to(torch.bfloat16) for tensor in make_inputs((16, 32, 32, 640))]
    first = output_and_gradients(inputs, "triton")
    for _ in range(3):
        again = output_and_gradients(inputs, "triton")
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
