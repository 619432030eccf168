"""Norms and the layers after them in one kernel: against the separate operations, both against float64."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from lamamba.ops.backend import Backend, use_backend
from lamamba.ops.fused_layers import (
    Norm,
    gated_norm_linear,
    norm_attention,
    norm_linear_in_halves,
    norm_mlp,
    tiles,
)
from lamamba.ops.launch import record_launches
from lamamba.ops.residual_norm import Residual
from small_network import relative_error

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Operation = Callable[[dict[str, Tensor], Backend], tuple[Tensor, ...]]
Shape = tuple[int, ...]


def make_inputs(shape: Shape, hidden: int = 40, window: int = 4) -> dict[str, Tensor]:
    """Draw the inputs of all operations for a grid (b, h, w, c)."""
    batch, height, width, c = shape
    generator = torch.Generator().manual_seed(sum(shape))
    shapes: dict[str, Shape] = {
        "x": shape, "branch": shape, "branch_bias": (c,), "norm_weight": (c,), "norm_bias": (c,),
        "modulation": (batch, 3 * c), "in": (4 * c, c), "qkv": (3 * c, c), "qkv_bias": (3 * c,),
        "table": ((2 * window - 1) ** 2, 2), "out": (c, c), "weight_1": (hidden, c), "bias_1": (hidden,),
        "weight_2": (c, hidden), "planes": (4, batch, height, width, 2 * c), "both": (batch, height, width, 4 * c),
        "wide_weight": (2 * c,), "wide_bias": (2 * c,), "narrow": (c, 2 * c),
    }  # fmt: skip
    inputs = {}
    for name, size in shapes.items():
        tensor = torch.randn(size, dtype=torch.float64, generator=generator)
        inputs[name] = (tensor * size[1] ** -0.5 if name in MATRICES else tensor).to(DEVICE)
    return inputs


MATRICES = ("in", "qkv", "out", "weight_1", "weight_2", "narrow")


def norm_of(given: dict[str, Tensor], has_residual: bool) -> Norm:
    """Shift, scale and gate are parts of one tensor, as in a block."""
    shift, scale, gate = given["modulation"].chunk(3, dim=1)
    residual = Residual(given["branch"], gate, given["branch_bias"]) if has_residual else None
    return Norm(given["x"], residual, given["norm_weight"], given["norm_bias"], (shift, scale), 1e-5)


def in_proj(given: dict[str, Tensor], backend: Backend, residual: bool = True) -> tuple[Tensor, ...]:
    return norm_linear_in_halves(norm_of(given, residual), given["in"], backend)


def mlp(given: dict[str, Tensor], backend: Backend, residual: bool = True) -> tuple[Tensor, ...]:
    layers = (given["weight_1"], given["bias_1"], given["weight_2"])
    return norm_mlp(norm_of(given, residual), *layers, backend=backend)


def attention(
    given: dict[str, Tensor], backend: Backend, residual: bool = True, shifted: bool = False, window: int = 4
) -> tuple[Tensor, ...]:
    layers = (given["qkv"], given["qkv_bias"], given["table"], given["out"])
    return norm_attention(norm_of(given, residual), *layers, 2, window, shifted, backend)


def shifted_attention(given: dict[str, Tensor], backend: Backend, residual: bool = True) -> tuple[Tensor, ...]:
    return attention(given, backend, residual, shifted=True)


def out_proj(given: dict[str, Tensor], backend: Backend) -> tuple[Tensor, ...]:
    z = given["both"].chunk(2, dim=-1)[1]
    affine = (given["wide_weight"], given["wide_bias"], 1e-5)
    return (gated_norm_linear(given["planes"], z, *affine, given["narrow"], backend),)


OPERATIONS: dict[str, Operation] = {
    "in_proj": in_proj, "mlp": mlp, "attention": attention, "shifted attention": shifted_attention,
    "out_proj": out_proj,
}  # fmt: skip


@torch.no_grad()
def check(operation: Any, given: dict[str, Tensor], dtype: torch.dtype, **options: bool) -> None:
    """Allow twice the error of separate operations in the same dtype, plus half a unit in the last place."""
    given = {name: tensor.to(dtype) for name, tensor in given.items()}
    exact = operation({name: tensor.double() for name, tensor in given.items()}, "pytorch", **options)
    with use_backend("pytorch"):
        plain = operation(given, "pytorch", **options)
    ours = operation(given, "triton", **options)
    for value, reference, wanted in zip(ours, plain, exact, strict=True):
        assert value.dtype == reference.dtype
        assert value.shape == wanted.shape
        bound = 2 * relative_error(reference, wanted) + torch.finfo(torch.float32).eps
        assert relative_error(value, wanted) <= bound


SHAPES = {
    "windows divide the grid": (2, 8, 4, 16),
    "odd grid, masked channels": (2, 5, 7, 12),
    "a tile has the pixels of several rows": (1, 9, 6, 24),
}


@pytest.mark.parametrize(("name", "shape"), list(product(OPERATIONS, SHAPES)))
def test_fused_layers_agree_with_float64(name: str, shape: str) -> None:
    check(OPERATIONS[name], make_inputs(SHAPES[shape]), torch.float32)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "out_proj"])
def test_without_a_residual_the_stream_is_the_input(name: str) -> None:
    given = make_inputs((2, 4, 6, 8))
    check(OPERATIONS[name], given, torch.float32, residual=False)
    with torch.no_grad():
        single = {key: tensor.float() for key, tensor in given.items()}
        assert OPERATIONS[name](single, "triton", residual=False)[0] is single["x"]  # type: ignore[call-arg]


@pytest.mark.parametrize("name", OPERATIONS)
def test_half_precision_agrees_with_float64(name: str) -> None:
    check(OPERATIONS[name], make_inputs((2, 5, 4, 16)), torch.float16)


@pytest.mark.parametrize("name", OPERATIONS)
def test_many_rows_are_cut_into_other_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "FEW_ROWS", 1)
    check(OPERATIONS[name], make_inputs((2, 5, 7, 12)), torch.float32)


def test_a_program_may_compute_a_part_of_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of them stores the stream, and each its columns."""
    monkeypatch.setattr(tiles, "WANTED_PROGRAMS", 10**6)
    assert tiles.norm_linear_tile(35, 24, 96)["COLUMNS"] == 32
    check(in_proj, make_inputs((1, 5, 7, 24)), torch.float32)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.usefixtures("poisoned_memory")
def test_every_value_is_written(name: str) -> None:
    given = {key: tensor.float() for key, tensor in make_inputs((2, 5, 7, 12)).items()}
    with torch.no_grad():
        assert all(bool(value.isfinite().all()) for value in OPERATIONS[name](given, "triton"))


@pytest.mark.parametrize("name", OPERATIONS)
def test_strided_inputs_mean_the_same(name: str) -> None:
    given = {key: tensor.float() for key, tensor in make_inputs((2, 4, 5, 8)).items()}
    apart = {key: tensor.repeat_interleave(2, dim=-1)[..., ::2] for key, tensor in given.items()}
    with torch.no_grad():
        pairs = zip(OPERATIONS[name](given, "triton"), OPERATIONS[name](apart, "triton"), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", OPERATIONS)
def test_weights_may_be_float32_under_autocast(name: str) -> None:
    """The stream is 16-bit, as in mixed precision, and weights are rounded as autocast rounds them."""
    given = {key: tensor.float() for key, tensor in make_inputs((2, 4, 5, 8)).items()}
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter has no bfloat16
    given |= {key: given[key].to(dtype) for key in ("x", "branch", "planes", "both")}
    exact = {key: tensor.to(dtype) if key in MATRICES else tensor for key, tensor in given.items()}
    with torch.no_grad():
        wanted = OPERATIONS[name]({key: tensor.double() for key, tensor in exact.items()}, "pytorch")
        with torch.autocast(DEVICE, dtype):
            found = OPERATIONS[name](given, "triton")
    for value, exactly in zip(found, wanted, strict=True):
        assert value.dtype == dtype
        assert relative_error(value, exactly) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_take_the_separate_operations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lamamba.ops.fused_layers import triton as host

    def launch(*_: object, **__: object) -> None:
        raise AssertionError("a kernel without gradients runs")

    monkeypatch.setattr(host, "launch", launch)
    given = {key: tensor.float().requires_grad_() for key, tensor in make_inputs((2, 4, 4, 8)).items()}
    outputs = OPERATIONS[name](given, "auto")
    sum(value.square().sum() for value in outputs).backward()  # type: ignore[union-attr]
    used = [key for key, tensor in given.items() if tensor.grad is not None]
    assert used == {
        "in_proj": ["x", "branch", "branch_bias", "norm_weight", "norm_bias", "modulation", "in"],
        "out_proj": ["planes", "both", "wide_weight", "wide_bias", "narrow"],
    }.get(name, used)
    assert all(bool((given[key].grad != 0).any()) for key in used)
    with pytest.raises(AssertionError, match="without gradients"), torch.no_grad():
        OPERATIONS[name](given, "triton")


def test_dropout_takes_the_separate_operations() -> None:
    given = {key: tensor.float() for key, tensor in make_inputs((2, 8, 8, 8)).items()}
    layers = (given["weight_1"], given["bias_1"], torch.eye(40, device=DEVICE))
    with torch.no_grad():
        _, out = norm_mlp(norm_of(given, True), *layers, dropout=0.5, backend="triton")
    assert float((out == 0).float().mean()) == pytest.approx(0.5, abs=0.05)


WRONG: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "in_proj": ("in", lambda w: w[:, :-1]),
    "mlp": ("bias_1", lambda b: b[:-1]),
    "attention": ("table", lambda t: t[:-1]),
    "shifted attention": ("qkv_bias", lambda b: b[:-3]),
    "out_proj": ("wide_weight", lambda w: w[:-1]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_shapes_that_disagree_are_refused(name: str) -> None:
    """Kernels would read beyond the end of a tensor."""
    given = {key: tensor.float() for key, tensor in make_inputs((2, 4, 5, 8)).items()}
    wrong, cut = WRONG[name]
    with torch.no_grad(), pytest.raises(ValueError, match=r"is \(.*\): (with .* it must be|give) "):
        OPERATIONS[name]({**given, wrong: cut(given[wrong])}, "triton")
    if name != "out_proj":
        with torch.no_grad(), pytest.raises(ValueError, match=r"shift is \(1, 8\)|gate is \(1, 8\)"):
            OPERATIONS[name]({**given, "modulation": given["modulation"][:1]}, "triton")


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_backend_holds_for_separate_operations_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {key: tensor.float() for key, tensor in make_inputs((2, 4, 5, 8)).items()}
    launched = record_launches(lambda: OPERATIONS[name](given, "triton"))
    assert any("forward" in launch.kernel.fn.__name__ for launch in launched), "with gradients"
    with use_backend("triton"), torch.no_grad():
        assert not record_launches(lambda: OPERATIONS[name](given, "pytorch"))
    double = {key: tensor.double() for key, tensor in given.items()}
    for context in (torch.enable_grad(), torch.no_grad()):
        with context, pytest.raises(ValueError, match=r"the kernels do not take torch\.float64"):
            OPERATIONS[name](double, "triton")


@pytest.mark.parametrize(
    ("rows", "channels"), list(product((64, 512, 2048, 8192, 65536), (40, 64, 128, 256, 512, 1280)))
)
def test_tiles_are_powers_of_two_that_products_accept(rows: int, channels: int) -> None:
    found = [
        (tiles.norm_linear_pays(rows, channels), tiles.norm_linear_tile(rows, channels, 4 * channels)),
        (tiles.norm_mlp_pays(rows, channels), tiles.norm_mlp_tile(rows, channels)),
        (tiles.gated_norm_linear_pays(rows, channels), tiles.gated_norm_linear_tile(rows, channels, channels // 2)),
    ]
    for pays, tile in found:
        sides = [tile[side] for side in ("ROWS", "COLUMNS", "CHUNK") if side in tile]
        assert all(side >= 16 and side & (side - 1) == 0 for side in sides)
        assert not (pays and channels == 1280)
    linear = found[0][1]
    assert linear["COLUMNS"] * linear["TURNS"] >= 4 * channels or linear["TURNS"] == 1


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("shape", [(3, 32, 32, 64), (40, 16, 16, 128), (2, 8, 8, 256), (70, 32, 32, 40)], ids=str)
def test_bf16_on_a_gpu_agrees_with_float64_and_repeats(name: str, shape: Shape) -> None:
    if "attention" in name and not tiles.norm_mlp_pays(shape[0] * shape[1] * shape[2], shape[3]):
        pytest.skip("a window of so many channels does not fit on the chip")
    given = make_inputs(shape, hidden=4 * shape[-1], window=8)
    options: Any = {"window": 8} if name == "attention" else {}
    if name == "shifted attention":
        options, operation = {"window": 8, "shifted": True}, attention
    else:
        operation = OPERATIONS[name]
    check(operation, given, torch.bfloat16, **options)
    short = {key: tensor.bfloat16() for key, tensor in given.items()}
    with torch.no_grad():
        first, second = (operation(short, "triton", **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("name", OPERATIONS)
def test_torch_compile_sees_one_graph(name: str) -> None:
    given = {key: tensor.bfloat16() for key, tensor in make_inputs((2, 8, 8, 16)).items()}
    with torch.no_grad():
        wanted = OPERATIONS[name](given, "triton")
        found = torch.compile(OPERATIONS[name], fullgraph=True)(given, "triton")
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
