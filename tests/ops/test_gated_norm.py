"""Sum of planes, norm and gate: kernels against the plain version, both against float64."""

import pytest
import torch
from torch import Tensor

from lamamba.ops.backend import Backend
from lamamba.ops.gated_norm import gated_norm
from small_network import relative_error

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NAMES = ("out", "planes", "z", "weight", "bias")
Shape = tuple[int, int, int, int, int]


def make_inputs(shape: Shape) -> list[Tensor]:
    """Draw inputs for (p, b, h, w, e); z is half of the channels of a tensor, as in the network."""
    channels = shape[4]
    generator = torch.Generator().manual_seed(sum(shape))
    shapes = (shape, (*shape[1:4], 2 * channels), (channels,), (channels,))
    planes, both, weight, bias = (torch.randn(size, dtype=torch.float64, generator=generator) for size in shapes)
    return [tensor.to(DEVICE) for tensor in (2 * planes + 0.5, both.chunk(2, dim=-1)[1], weight, bias)]


def output_and_gradients(inputs: list[Tensor], backend: Backend) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = gated_norm(*leaves, backend=backend)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def check(inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Allow twice the error of the plain version in the same dtype, plus half a unit in the last place."""
    inputs = [*(tensor.to(dtype) for tensor in inputs[:2]), *(tensor.float() for tensor in inputs[2:])]
    exact = output_and_gradients([tensor.double() for tensor in inputs], "pytorch")
    plain = output_and_gradients(inputs, "pytorch")
    ours = output_and_gradients(inputs, "triton")
    rounding = torch.finfo(torch.float32).eps
    for name, value, reference, wanted in zip(NAMES, ours, plain, exact, strict=True):
        assert value.dtype == reference.dtype, name
        assert value.shape == wanted.shape, name
        assert relative_error(value, wanted) <= 2 * relative_error(reference, wanted) + rounding, name


TINY = {
    "one plane": (1, 2, 4, 6, 40),
    "two planes, odd sides, masked channels": (2, 2, 5, 7, 33),
    "four planes": (4, 1, 3, 3, 20),
    "one row at once": (2, 1, 3, 2, 644),
    "fewer channels than a piece": (2, 3, 2, 3, 3),
    "one pixel": (2, 1, 1, 1, 8),
}


@pytest.mark.parametrize("case", TINY)
def test_kernels_agree_with_float64(case: str) -> None:
    check(make_inputs(TINY[case]), torch.float32)


@pytest.mark.parametrize("num_planes", [1, 2, 4])
def test_half_precision_agrees_with_float64(num_planes: int) -> None:
    check(make_inputs((num_planes, 2, 3, 5, 20)), torch.float16)


def test_the_plain_version_is_sum_norm_and_gate() -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs((2, 1, 2, 3, 4))]
    assert torch.autograd.gradcheck(lambda *tensors: gated_norm(*tensors, backend="pytorch"), inputs)
    planes, z, weight, bias = inputs
    normed = torch.nn.functional.layer_norm(planes[0] + planes[1], (4,), weight, bias)
    torch.testing.assert_close(gated_norm(*inputs), normed * z * torch.sigmoid(z))


def test_eps_counts() -> None:
    inputs = [tensor.float() for tensor in make_inputs((2, 1, 2, 3, 8))]
    for eps in (1e-6, 1.0):
        plain = gated_norm(*inputs, eps=eps, backend="pytorch")
        torch.testing.assert_close(gated_norm(*inputs, eps=eps, backend="triton"), plain)
    assert not torch.equal(plain, gated_norm(*inputs, backend="pytorch"))


def test_programs_share_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    from lamamba.ops.gated_norm import triton as host

    inputs = [tensor.float() for tensor in make_inputs((2, 2, 5, 7, 40))]
    wanted = output_and_gradients(inputs, "triton")
    for warps in (1, 4):
        monkeypatch.setattr(host, "FORWARD_WARPS", warps)
        monkeypatch.setattr(host, "BACKWARD_WARPS", warps)
        for name, a, b in zip(NAMES, output_and_gradients(inputs, "triton"), wanted, strict=True):
            assert relative_error(a, b.double()) < 1e-6, (warps, name)


@pytest.mark.parametrize("num_planes", [1, 2])
@pytest.mark.usefixtures("poisoned_memory")
def test_every_value_is_written(num_planes: int) -> None:
    inputs = [tensor.float() for tensor in make_inputs((num_planes, 2, 5, 7, 33))]
    for name, value in zip(NAMES, output_and_gradients(inputs, "triton"), strict=True):
        assert bool(value.isfinite().all()), name


def test_half_of_the_channels_is_read_in_place() -> None:
    from lamamba.ops.launch import readable_pixels

    planes, z, weight, bias = (tensor.float() for tensor in make_inputs((2, 2, 5, 3, 8)))
    both = torch.cat([z + 1, z], dim=-1)
    half = both.chunk(2, dim=-1)[1]
    assert readable_pixels(half)[0] is half
    assert readable_pixels(half)[1] == 16
    wanted = output_and_gradients([planes, z.contiguous(), weight, bias], "triton")
    for name, a, b in zip(NAMES, output_and_gradients([planes, half, weight, bias], "triton"), wanted, strict=True):
        assert torch.equal(a, b), name


def test_other_strides_are_copied() -> None:
    inputs = [tensor.float() for tensor in make_inputs((2, 2, 3, 4, 6))]
    wanted = output_and_gradients(inputs, "triton")

    def backwards(tensor: Tensor) -> Tensor:
        order = tuple(reversed(range(tensor.ndim)))
        return tensor.permute(order).contiguous().permute(order)

    for changed in range(4):
        strided = [backwards(tensor) if index == changed else tensor for index, tensor in enumerate(inputs)]
        ours = output_and_gradients(strided, "triton")
        assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))
    apart = [*inputs[:2], *(tensor.repeat_interleave(2)[::2] for tensor in inputs[2:])]
    assert torch.equal(gated_norm(*apart, backend="triton"), wanted[0])


@pytest.mark.parametrize("num_planes", [1, 2])
def test_the_sum_is_kept_only_for_gradients(num_planes: int) -> None:
    from lamamba.ops.gated_norm.triton import gated_norm_triton

    inputs = [tensor.float() for tensor in make_inputs((num_planes, 1, 2, 3, 8))]
    assert gated_norm_triton(*inputs, 1e-5, False)[1].numel() == 0
    y = gated_norm_triton(*inputs, 1e-5, True)[1]
    if num_planes == 1:
        assert y.numel() == 0
    else:
        torch.testing.assert_close(y, inputs[0].sum(dim=0))


def test_planes_share_their_gradient() -> None:
    planes = output_and_gradients([tensor.float() for tensor in make_inputs((4, 1, 2, 3, 8))], "triton")[1]
    assert planes.stride(0) == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy: exp(-z) may be infinite; the gate is 0 then
def test_large_inputs_neither_overflow_nor_vanish() -> None:
    planes, z, weight, bias = make_inputs((2, 1, 4, 4, 8))
    check([1000 * planes, 100 * z, weight, bias], torch.float32)


def test_autocast_rounds_nothing() -> None:
    inputs = [tensor.float() for tensor in make_inputs((2, 1, 4, 4, 8))]
    wanted = output_and_gradients(inputs, "triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = output_and_gradients(inputs, "triton")
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("num_planes", [1, 2])
def test_compiles_as_one_graph(num_planes: int) -> None:
    inputs = [tensor.float().requires_grad_() for tensor in make_inputs((num_planes, 1, 4, 4, 8))]

    def second_half(planes: Tensor, z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        gate = torch.cat([z, z], dim=-1).chunk(2, dim=-1)[1]
        return gated_norm(2 * planes, gate, weight, bias, backend="triton")

    out = torch.compile(second_half, backend="aot_eager", fullgraph=True)(*inputs)
    eager = second_half(*inputs)
    assert torch.equal(out, eager)
    ours, wanted = (torch.autograd.grad(y.square().sum(), inputs) for y in (out, eager))
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_what_cannot_be_is_an_error_that_says_why() -> None:
    planes, z, weight, bias = make_inputs((2, 1, 4, 4, 8))
    with pytest.raises(ValueError, match=r"do not take torch\.float64: use float32"):
        gated_norm(planes, z, weight, bias, backend="triton")
    with pytest.raises(ValueError, match=r"planes is \(1, 4, 4, 8\): give \(p, b, h, w, e\)"):
        gated_norm(planes[0], z, weight, bias)
    with pytest.raises(ValueError, match=r"z is \(1, 4, 4, 7\): with planes .* it must be \(1, 4, 4, 8\)"):
        gated_norm(planes, z[..., 1:], weight, bias)
    with pytest.raises(ValueError, match=r"weight is \(7,\): with planes \(2, 1, 4, 4, 8\) it must be \(8,\)"):
        gated_norm(planes, z, weight[1:], bias)


# On a GPU only: real sizes, and arithmetic that the interpreter does not support.
LARGE = {
    "XL, first stage": (2, 4, 32, 32, 640),
    "XL, second stage, four planes": (4, 2, 16, 16, 1280),
    "XL, third stage, one plane": (1, 4, 8, 8, 2560),
    "XL, large batch": (2, 128, 8, 8, 2560),
    "one image": (2, 1, 64, 64, 160),
    "odd sides": (2, 3, 37, 21, 200),
    "widest": (2, 1, 5, 3, 8192),
}


@ON_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", LARGE)
def test_real_sizes_agree_with_float64(case: str, dtype: torch.dtype) -> None:
    check(make_inputs(LARGE[case]), dtype)


@ON_GPU
def test_results_are_equal_from_run_to_run() -> None:
    inputs = [tensor.to(torch.bfloat16) for tensor in make_inputs((2, 16, 32, 32, 640))]
    first = output_and_gradients(inputs, "triton")
    for _ in range(3):
        again = output_and_gradients(inputs, "triton")
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
