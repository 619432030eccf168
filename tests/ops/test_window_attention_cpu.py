"""Window attention on a CPU, in compiled loops, against the reference."""

import pytest
import torch
from torch import Tensor

from lamamba.ops.window_attention import window_attention
from lamamba.ops.window_attention.cpu import window_attention_cpu
from lamamba.ops.window_attention.reference import window_attention_reference
from small_network import relative_error

NAMES = ("out", "qkv", "bias")
# (b, h, w, heads, c, window_size)
SHAPES = {
    "whole windows": (3, 8, 12, 2, 5, 4),
    "padding": (2, 10, 6, 1, 16, 4),
    "odd sides": (2, 5, 7, 2, 3, 4),
    "one window": (2, 3, 5, 2, 4, 8),
    "one row of windows": (1, 4, 12, 1, 20, 4),
    "more queries than lanes": (2, 9, 20, 1, 7, 9),
}
Shape = tuple[int, int, int, int, int, int]


def make_inputs(shape: Shape, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    b, h, w, heads, c, window_size = shape
    generator = torch.Generator().manual_seed(sum(shape))
    qkv = torch.randn(b, h, w, 3 * heads * c, dtype=torch.float64, generator=generator)
    bias = torch.randn((2 * window_size - 1) ** 2, heads, dtype=torch.float64, generator=generator)
    return [qkv.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()]


def output_and_gradients(attend: object, inputs: list[Tensor], shape: Shape, shifted: bool) -> list[Tensor]:
    out = attend(*inputs, shape[3], shape[5], shifted)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, weights)]


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("case", SHAPES)
def test_float32_error_is_at_most_twice_the_reference_s(case: str, shifted: bool) -> None:
    shape = SHAPES[case]
    single = make_inputs(shape, torch.float32)
    exact = output_and_gradients(
        window_attention_reference, [x.detach().double().requires_grad_() for x in single], shape, shifted
    )
    ours = output_and_gradients(window_attention, single, shape, shifted)
    plain = output_and_gradients(window_attention_reference, single, shape, shifted)
    rounding = torch.finfo(torch.float32).eps
    for name, value, reference, wanted in zip(NAMES, ours, plain, exact, strict=True):
        assert relative_error(value, wanted) <= 2 * relative_error(reference, wanted) + rounding, name


def test_nan_stays_in_its_window() -> None:
    shape = SHAPES["whole windows"]
    inputs = make_inputs(shape, torch.float32)
    with torch.no_grad():
        inputs[0][1, 5, 2, 0] = torch.nan  # a query of the first head
    out, grad_qkv, _ = output_and_gradients(window_attention, inputs, shape, False)
    assert bool(out[1, 5, 2, :5].isnan().all())
    assert int(out.isnan().sum()) == 5
    assert bool(grad_qkv[1, 5, 2, :5].isnan().all())
    assert bool(grad_qkv[0].isfinite().all())
    assert bool(grad_qkv[1, :4].isfinite().all())


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_share_the_windows(threads: int) -> None:
    shape = SHAPES["padding"]
    inputs = make_inputs(shape, torch.float32)
    exact = output_and_gradients(window_attention_reference, inputs, shape, True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = output_and_gradients(window_attention, inputs, shape, True)
    finally:
        torch.set_num_threads(before)
    for name, value, wanted in zip(NAMES, ours, exact, strict=True):
        assert relative_error(value, wanted) < 1e-6, name


@pytest.mark.usefixtures("poisoned_memory")
def test_every_value_is_written() -> None:
    shape = SHAPES["odd sides"]
    values = output_and_gradients(window_attention, make_inputs(shape, torch.float32), shape, True)
    for name, value in zip(NAMES, values, strict=True):
        assert bool(value.isfinite().all()), name


def test_input_need_not_be_contiguous() -> None:
    shape = SHAPES["whole windows"]
    inputs = make_inputs(shape, torch.float32)
    strided = [x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in inputs]
    exact = output_and_gradients(window_attention, inputs, shape, True)
    for value, wanted in zip(output_and_gradients(window_attention, strided, shape, True), exact, strict=True):
        assert relative_error(value, wanted) < 1e-6


def test_autocast_rounds_nothing() -> None:
    shape = SHAPES["whole windows"]
    inputs = make_inputs(shape, torch.float32)
    exact = output_and_gradients(window_attention, inputs, shape, True)
    with torch.autocast("cpu", torch.bfloat16):
        again = output_and_gradients(window_attention, inputs, shape, True)
    assert all(torch.equal(a, b) for a, b in zip(again, exact, strict=True))


def test_half_precision_takes_the_plain_way() -> None:
    shape = SHAPES["whole windows"]
    inputs = make_inputs(shape, torch.bfloat16)
    out = window_attention(*inputs, shape[3], shape[5], True)
    assert torch.equal(out, window_attention_reference(*inputs, shape[3], shape[5], True))


def test_operator_is_registered_as_torch_expects() -> None:
    shape = SHAPES["odd sides"]
    torch.library.opcheck(window_attention_cpu, (*make_inputs(shape, torch.float32), shape[3], shape[5], True))


def test_compiles_as_one_graph() -> None:
    shape = SHAPES["whole windows"]
    inputs = make_inputs(shape, torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(window_attention, backend="aot_eager", fullgraph=True)
    eager = output_and_gradients(window_attention, inputs, shape, True)
    for value, wanted in zip(output_and_gradients(compiled, inputs, shape, True), eager, strict=True):
        assert torch.equal(value, wanted)
    torch.compiler.reset()
