"""Window attention: kernels against the plain version, both against float64."""

import pytest
import torch
from torch import Tensor

from lamamba.ops.backend import Backend
from lamamba.ops.window_attention import project_and_attend, window_attention
from small_network import relative_error

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NAMES = ("out", "qkv", "bias")
Shape = tuple[int, int, int, int, int, int]


def make_inputs(shape: Shape) -> list[Tensor]:
    """Draw inputs for (b, h, w, heads, c, window_size)."""
    b, h, w, heads, c, window_size = shape
    generator = torch.Generator().manual_seed(sum(shape))
    qkv = torch.randn(b, h, w, 3 * heads * c, dtype=torch.float64, generator=generator)
    bias = torch.randn((2 * window_size - 1) ** 2, heads, dtype=torch.float64, generator=generator)
    return [qkv.to(DEVICE), bias.to(DEVICE)]


def output_and_gradients(inputs: list[Tensor], shape: Shape, shifted: bool, backend: Backend) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = window_attention(*leaves, shape[3], shape[5], shifted, backend)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def check(shape: Shape, shifted: bool, dtype: torch.dtype) -> None:
    """Allow twice the error of the plain version in the same dtype, plus half a unit in the last place."""
    qkv, bias = make_inputs(shape)
    inputs = [qkv.to(dtype), bias.float()]
    exact = output_and_gradients([tensor.double() for tensor in inputs], shape, shifted, "pytorch")
    plain = output_and_gradients(inputs, shape, shifted, "pytorch")
    ours = output_and_gradients(inputs, shape, shifted, "triton")
    rounding = torch.finfo(torch.float32).eps
    for name, value, reference, wanted in zip(NAMES, ours, plain, exact, strict=True):
        assert relative_error(value, wanted) <= 2 * relative_error(reference, wanted) + rounding, name


TINY = {
    "whole windows": (2, 8, 8, 2, 5, 4),
    "padding": (1, 10, 6, 1, 16, 4),
    "odd sides": (2, 5, 7, 2, 3, 4),
    "one window": (2, 3, 5, 2, 4, 8),
    "one row of windows": (1, 4, 12, 1, 20, 4),
    "64 places": (1, 16, 8, 1, 4, 8),
}


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("case", TINY)
def test_kernels_agree_with_float64(case: str, shifted: bool) -> None:
    check(TINY[case], shifted, torch.float32)


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("case", ["whole windows", "odd sides"])
def test_projecting_first_has_the_gradients_of_both(case: str, shifted: bool) -> None:
    b, h, w, heads, c, window_size = TINY[case]
    generator = torch.Generator().manual_seed(0)
    shapes = (b, h, w, 7), (3 * heads * c, 7), (3 * heads * c,), ((2 * window_size - 1) ** 2, heads)
    leaves = [torch.randn(*shape, generator=generator).to(DEVICE).requires_grad_() for shape in shapes]
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    options = (heads, window_size, shifted)
    ours = project_and_attend(*leaves, *options, "triton")
    plain, wanted = (
        window_attention(torch.nn.functional.linear(x, weight, added), bias, *options, "pytorch")
        for x, weight, added, bias in (leaves, exact)
    )
    assert relative_error(ours, wanted) <= 2 * relative_error(plain, wanted) + 1e-7
    weights = torch.randn(ours.shape, generator=generator).to(ours)
    of_ours, of_plain = (torch.autograd.grad(out, leaves, weights) for out in (ours, plain))
    of_exact = torch.autograd.grad(wanted, exact, weights.double())
    for name, value, reference, gradient in zip(
        ("x", "weight", "weight_bias", "bias"), of_ours, of_plain, of_exact, strict=True
    ):
        assert relative_error(value, gradient) <= 2 * relative_error(reference, gradient) + 1e-7, name


def test_projecting_first_compiles_as_one_graph() -> None:
    shapes = (1, 8, 8, 5), (24, 5), (24,), (49, 2)
    inputs = [torch.randn(*shape, device=DEVICE).requires_grad_() for shape in shapes]
    compiled = torch.compile(project_and_attend, backend="aot_eager", fullgraph=True)
    outs = compiled(*inputs, 2, 4, True, "triton"), project_and_attend(*inputs, 2, 4, True, "triton")
    assert torch.equal(*outs)
    ours, eager = (torch.autograd.grad(out.square().sum(), inputs) for out in outs)
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


def test_the_mask_is_minus_100_not_infinity() -> None:
    shape = (1, 8, 8, 1, 4, 4)
    qkv, bias = make_inputs(shape)
    inputs = [20 * qkv.float(), bias.float()]
    exact = output_and_gradients([tensor.double() for tensor in inputs], shape, True, "pytorch")
    ours = output_and_gradients(inputs, shape, True, "triton")
    assert relative_error(ours[0], exact[0]) < 1e-4


def test_programs_share_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few programs, each takes several windows, and the last ones fewer."""
    from lamamba.ops.window_attention import triton as host

    shape = (3, 8, 8, 2, 4, 4)
    inputs = [tensor.float() for tensor in make_inputs(shape)]
    alone = output_and_gradients(inputs, shape, True, "triton")
    monkeypatch.setattr(host, "WANTED_PROGRAMS", 5)
    shared = output_and_gradients(inputs, shape, True, "triton")
    for name, a, b in zip(NAMES, shared, alone, strict=True):
        assert relative_error(a, b.double()) < 1e-6, name


@pytest.mark.usefixtures("poisoned_memory")
def test_every_value_is_written() -> None:
    shape = (1, 5, 7, 2, 3, 4)
    inputs = [tensor.float() for tensor in make_inputs(shape)]
    for name, value in zip(NAMES, output_and_gradients(inputs, shape, True, "triton"), strict=True):
        assert bool(value.isfinite().all()), name


def test_input_need_not_be_contiguous() -> None:
    shape = (1, 8, 8, 2, 4, 4)
    inputs = [tensor.float() for tensor in make_inputs(shape)]
    strided = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in inputs]
    ours = output_and_gradients(strided, shape, False, "triton")
    assert all(
        torch.equal(a, b) for a, b in zip(ours, output_and_gradients(inputs, shape, False, "triton"), strict=True)
    )


def test_compiles_as_one_graph() -> None:
    shape = (1, 8, 8, 2, 4, 4)
    inputs = [tensor.float().requires_grad_() for tensor in make_inputs(shape)]
    compiled = torch.compile(window_attention, backend="aot_eager", fullgraph=True)
    out = compiled(*inputs, 2, 4, True, "triton")
    eager = window_attention(*inputs, 2, 4, True, "triton")
    assert torch.equal(out, eager)
    ours, wanted = (torch.autograd.grad(x.square().sum(), inputs) for x in (out, eager))
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_what_cannot_be_is_an_error_that_says_why() -> None:
    qkv, bias = make_inputs((1, 16, 16, 1, 4, 16))
    with pytest.raises(ValueError, match="windows of up to 64 pixels: use a window_size of 8 or less"):
        window_attention(qkv.float(), bias.float(), 1, 16, backend="triton")
    out = window_attention(qkv.float(), bias.float(), 1, 16, backend="auto")
    assert out.shape == (1, 16, 16, 4), "auto does without"
    with pytest.raises(ValueError, match=r"bias is \(961, 1\): with windows of 8 and 1 heads it must be \(225, 1\)"):
        window_attention(qkv, bias, 1, 8)
    with pytest.raises(ValueError, match=r"give \(b, h, w, 3 \* 5 \* c\)"):
        window_attention(qkv, bias, 5, 16)


# On a GPU only: real sizes, and arithmetic that the interpreter does not support.
LARGE = {
    "XL, first stage": (2, 32, 32, 16, 20, 8),
    "XL, second stage": (2, 16, 16, 16, 40, 8),
    "XL, third stage": (4, 8, 8, 16, 80, 8),
    "padded": (2, 20, 36, 4, 10, 8),
    "not square": (1, 6, 50, 4, 24, 8),
}


@ON_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("case", LARGE)
def test_real_sizes_agree_with_float64(case: str, shifted: bool, dtype: torch.dtype) -> None:
    check(LARGE[case], shifted, dtype)


@ON_GPU
def test_results_are_equal_from_run_to_run() -> None:
    shape = (8, 32, 32, 16, 20, 8)
    inputs = [tensor.to(torch.bfloat16) for tensor in make_inputs(shape)]
    first = output_and_gradients(inputs, shape, True, "triton")
    for _ in range(3):
        again = output_and_gradients(inputs, shape, True, "triton")
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
