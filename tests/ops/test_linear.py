"""Linear layers against those of PyTorch, with and without autocast."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lamamba.config import NetworkConfig
from lamamba.model import Block
from lamamba.ops.linear import (
    Linear,
    RoundedWeights,
    _is_faster_as_convolution,
    _Linear,
    linear,
    linear_in_halves,
    rounded,
)

# A matrix product may be the first operation of a thread on a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Layer = Callable[..., tuple[Tensor, ...]]

# Our layers and the same in plain PyTorch, as functions of (x, weight, bias).
LAYERS: dict[str, tuple[Layer, Layer]] = {
    "halves": (lambda x, w, b: linear_in_halves(x, w), lambda x, w, b: F.linear(x, w).chunk(2, dim=-1)),
    "bias": (lambda x, w, b: (_Linear.apply(x, w, b),), lambda x, w, b: (F.linear(x, w, b),)),
    "no bias": (lambda x, w, b: (_Linear.apply(x, w, None),), lambda x, w, b: (F.linear(x, w),)),
    "as chosen": (lambda x, w, b: (linear(x, w, b),), lambda x, w, b: (F.linear(x, w, b),)),
}


def make_inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((2, 3, 16), (8, 16), (8,))]


def outputs_and_gradients(layer: Layer, inputs: list[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    x = leaves[0] if dtype is None else leaves[0].to(dtype)
    with torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None):
        outs = layer(x, *leaves[1:])
    torch.manual_seed(1)
    grads = [torch.randn(out.shape).to(out) for out in outs]
    gradients = torch.autograd.grad(outs, leaves, grads, allow_unused=True)
    return [*(out.detach() for out in outs), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("name", LAYERS)
def test_in_float32_they_are_the_same(name: str) -> None:
    ours, plain = (outputs_and_gradients(layer, make_inputs(), None) for layer in LAYERS[name])
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_a_single_vector_is_mapped_too(name: str) -> None:
    x, weight, bias = make_inputs()
    inputs = [x[0, 0], weight, bias]
    ours, plain = (outputs_and_gradients(layer, inputs, None) for layer in LAYERS[name])
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_in_autocast_they_are_as_exact(name: str) -> None:
    """Allow the error of PyTorch against float64; both round x to bfloat16 first."""
    layer, plain_layer = LAYERS[name]
    inputs = make_inputs()
    inputs[0] = inputs[0].bfloat16().float()
    exact = outputs_and_gradients(plain_layer, [tensor.double() for tensor in inputs], None)
    ours, plain = (outputs_and_gradients(which, inputs, torch.bfloat16) for which in (layer, plain_layer))
    assert len(ours) == len(plain) == len(exact)
    for value, reference, wanted in zip(ours, plain, exact, strict=True):
        assert value.dtype == reference.dtype
        assert (value - wanted).norm() <= 1.1 * (reference - wanted).norm() + 1e-6 * wanted.norm()


@pytest.mark.parametrize("name", ["halves", "bias"])
def test_autocast_in_the_backward_pass_alone_rounds_nothing(name: str) -> None:
    layer, plain_layer = LAYERS[name]
    leaves = [tensor.requires_grad_() for tensor in make_inputs()]
    grads = [torch.randn_like(out) for out in plain_layer(*leaves)]
    wanted = torch.autograd.grad(plain_layer(*leaves), leaves, grads, allow_unused=True)
    outs = layer(*leaves)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = torch.autograd.grad(outs, leaves, grads, allow_unused=True)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)


# --- pixels of a grid on a CPU, which oneDNN multiplies as a 1x1 convolution -------------------------------------

GRIDS = {
    "contiguous": lambda x: x,
    "strided": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one image": lambda x: x[:1],
    "one channel": lambda x: x[..., :1],
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["halves", "as chosen"])
def test_pixels_of_a_grid_are_as_exact(name: str, grid: str) -> None:
    """Allow twice the error of PyTorch against float64."""
    layer, plain_layer = LAYERS[name]
    generator = torch.Generator().manual_seed(0)
    x = GRIDS[grid](torch.randn(2, 9, 11, 40, generator=generator))
    weight, bias = torch.randn(48, x.shape[-1], generator=generator), torch.randn(48, generator=generator)
    inputs = [x, weight, bias]
    exact = outputs_and_gradients(plain_layer, [tensor.double() for tensor in inputs], None)
    ours, plain = (outputs_and_gradients(which, inputs, None) for which in (layer, plain_layer))
    for value, reference, wanted in zip(ours, plain, exact, strict=True):
        assert value.shape == wanted.shape
        assert (value - wanted).norm() <= 2 * (reference - wanted).norm() + 1e-7 * wanted.norm()


def test_only_float32_pixels_of_a_grid_on_a_cpu_are_convolved() -> None:
    x = torch.randn(2, 4, 4, 8)
    there = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    assert _is_faster_as_convolution(x) == there
    assert not any(map(_is_faster_as_convolution, (x[0], x.double(), x.bfloat16(), x.to("meta"))))
    assert linear(x, torch.randn(5, 8)).is_contiguous()
    assert all(half.is_contiguous() for half in linear_in_halves(x, torch.randn(6, 8)))


def test_weights_are_rounded_together_while_in_use() -> None:
    """Copies are found for a weight and its views, anew in each use, and only in their dtype."""
    layer = Linear(16, 8)
    copies = RoundedWeights(layer, torch.bfloat16)
    pointers = [copy.data_ptr() for copy in copies.copies]
    for _ in range(2):
        layer.weight.data.normal_()
        with copies.in_use():
            found = rounded(layer.weight, torch.bfloat16), rounded(layer.bias, torch.bfloat16)
            assert sorted(tensor.data_ptr() for tensor in found) == sorted(pointers)
            assert torch.equal(found[0], layer.weight.bfloat16())
            flat = rounded(layer.weight.flatten(), torch.bfloat16)
            assert flat.shape == (128,)
            assert flat.data_ptr() == found[0].data_ptr()
            for other in (rounded(layer.weight, torch.float16), rounded(layer.weight[:4], torch.bfloat16)):
                assert other.data_ptr() not in pointers
            assert rounded(layer.weight, torch.float32) is layer.weight
        assert rounded(layer.weight, torch.bfloat16).data_ptr() not in pointers


def test_layers_compute_the_same_from_weights_that_were_rounded_together() -> None:
    inputs = make_inputs()
    layer = torch.nn.Module()
    layer.rounded_parameters = ("weight", "bias")  # type: ignore[assignment]
    for name in ("halves", "bias", "no bias"):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        layer.weight, layer.bias = torch.nn.Parameter(leaves[1]), torch.nn.Parameter(leaves[2])
        results = []
        for copies in (None, RoundedWeights(layer, torch.bfloat16)):
            with torch.autocast(DEVICE, torch.bfloat16), copies.in_use() if copies else nullcontext():
                outs = LAYERS[name][0](leaves[0].bfloat16(), layer.weight, layer.bias)
                loss = sum(out.float().square().sum() for out in outs)
            used = [layer.weight, layer.bias] if name == "bias" else [layer.weight]
            results.append([*outs, *torch.autograd.grad(loss, used)])  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), name


def test_modules_name_what_they_round() -> None:
    """Every matrix of a block but the norms', the convolution's and the table of biases."""
    block = Block(NetworkConfig(embed_dim=8, num_heads=2), 8, shifted=False, project=True)
    found = {weight.data_ptr() for weight in RoundedWeights(block, torch.bfloat16).weights()}
    names = {name for name, weight in block.named_parameters() if weight.data_ptr() in found}
    layers = (
        "condition_projection",
        "modulation",
        "attention.qkv",
        "attention.out_proj",
        "mlp.linear_1",
        "mlp.linear_2",
    )
    wanted = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert names == wanted | {
        f"ssm.{name}" for name in ("in_proj.weight", "out_proj.weight", "x_proj_weight", "dt_weight")
    }


def test_networks_without_such_weights_have_no_copies() -> None:
    for network in (torch.nn.Linear(4, 4), Linear(4, 4).bfloat16()):
        copies = RoundedWeights(network, torch.bfloat16)
        assert not copies.copies
        with copies.in_use():
            assert torch.equal(rounded(network.weight, torch.bfloat16), network.weight.bfloat16())


def test_copies_of_an_outer_use_come_back() -> None:
    layer = Linear(4, 4)
    outer, inner = (RoundedWeights(layer, torch.bfloat16) for _ in range(2))
    with outer.in_use():
        with inner.in_use():
            assert rounded(layer.weight, torch.bfloat16).data_ptr() in [copy.data_ptr() for copy in inner.copies]
        assert rounded(layer.weight, torch.bfloat16).data_ptr() in [copy.data_ptr() for copy in outer.copies]


def test_weights_that_are_not_contiguous_are_rounded_as_they_are() -> None:
    layer = Linear(4, 4, bias=False)
    layer.weight = torch.nn.Parameter(torch.randn(4, 4).T)
    with RoundedWeights(layer, torch.bfloat16).in_use():
        assert torch.equal(rounded(layer.weight.mT, torch.bfloat16), layer.weight.mT.bfloat16())
