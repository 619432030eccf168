"""The selective scan: the reference with gradcheck, and the blocked version against the reference."""

import math

import pytest
import torch
from torch import Tensor

from lamamba.ops.selective_scan import blocked, selective_scan
from lamamba.ops.selective_scan.blocked import linear_recurrence_, selective_scan_blocked
from lamamba.ops.selective_scan.reference import selective_scan_reference
from small_network import relative_error

NAMES = ("u", "delta", "A", "B", "C", "D")
LENGTHS = [1, 2, 31, 32, 33, 64, 65, 100, 1056]


def make_inputs(
    b: int = 2, k: int = 2, l: int = 5, d: int = 3, n: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """Draw inputs like those of a network: positive steps, negative rates."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    delta = torch.nn.functional.softplus(normal(b, k, l, d) - 1)
    A = -torch.exp(0.5 * normal(k, d, n))
    inputs = [normal(b, k, l, d), delta, A, normal(b, k, l, n), normal(b, k, l, n), normal(k, d)]
    return [x.to(dtype).requires_grad_() for x in inputs]


def output_and_gradients(scan: object, inputs: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Return the output and the six gradients of a random weighted sum of it."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = scan(*inputs)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), inputs)]


def assert_agree(values: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    for name, value, wanted in zip(("y", *NAMES), values, exact, strict=True):
        assert value.shape == wanted.shape, name
        assert torch.isfinite(value).all(), name
        if wanted.norm() == 0:  # a single step from a zero state does not depend on A
            assert value.norm() == 0, name
        else:
            assert relative_error(value, wanted) < tolerance, name


def test_reference_is_the_recurrence_of_the_docstring() -> None:
    u, delta, A, B, C, D = (x.detach() for x in make_inputs(l=4))
    y = selective_scan_reference(u, delta, A, B, C, D)
    for b in range(2):
        for k in range(2):
            for d in range(3):
                h = [0.0, 0.0]
                for t in range(4):
                    step, value = float(delta[b, k, t, d]), float(u[b, k, t, d])
                    h = [math.exp(step * A[k, d, n]) * h[n] + step * float(B[b, k, t, n]) * value for n in range(2)]
                    wanted = sum(float(C[b, k, t, n]) * h[n] for n in range(2)) + float(D[k, d]) * value
                    assert float(y[b, k, t, d]) == pytest.approx(wanted, rel=1e-12, abs=1e-14)


def test_reference_passes_gradcheck() -> None:
    assert torch.autograd.gradcheck(selective_scan_reference, make_inputs(b=1, k=2, l=3, d=2, n=2))


@pytest.mark.parametrize("length", [1, 3, 7])
def test_blocked_passes_gradcheck(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "CHUNK", 2)  # gives three levels of chunks with few steps
    inputs = make_inputs(b=1, k=2, l=length, d=2, n=2)
    assert torch.autograd.gradcheck(selective_scan, inputs, check_undefined_grad=False)


def test_an_undefined_gradient_of_the_output_is_zero() -> None:
    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> None:
            return None

    inputs = make_inputs()
    gradients = torch.autograd.grad(NoGradient.apply(selective_scan(*inputs)).sum(), inputs, allow_unused=True)
    assert all(gradient is None or gradient.norm() == 0 for gradient in gradients)


@pytest.mark.parametrize("states", [1, 2, 16])
@pytest.mark.parametrize("length", LENGTHS)
def test_blocked_agrees_with_reference_in_output_and_all_gradients(length: int, states: int) -> None:
    inputs = make_inputs(l=length, n=states)
    assert_agree(
        output_and_gradients(selective_scan, inputs), output_and_gradients(selective_scan_reference, inputs), 1e-12
    )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 17, 30, 64])
def test_linear_recurrence_in_chunks_of_two_is_the_loop(
    length: int, reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "CHUNK", 2)
    a, x = torch.rand(2, 1, length, 3, dtype=torch.float64), torch.randn(2, 1, length, 3, dtype=torch.float64)
    wanted = x.clone()
    for t in range(length - 2, -1, -1) if reverse else range(1, length):
        wanted[:, :, t] += a[:, :, t] * wanted[:, :, t + 1 if reverse else t - 1]
    linear_recurrence_(a.clone(), x, reverse)
    torch.testing.assert_close(x, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("argument", range(6), ids=NAMES)
def test_inputs_need_not_be_contiguous(argument: int) -> None:
    inputs = make_inputs(l=40)
    exact = output_and_gradients(selective_scan_reference, inputs)
    strided = list(inputs)
    strided[argument] = inputs[argument].detach().transpose(0, -1).contiguous().transpose(0, -1)
    assert not strided[argument].is_contiguous()
    assert_agree(output_and_gradients(selective_scan, strided), exact, 1e-12)


def test_inputs_may_be_slices_and_expanded() -> None:
    u, delta, A, B, C, D = (x.detach() for x in make_inputs(l=40, n=2))
    wide = torch.cat([B, C], dim=-1)
    strided = [u[:, :1].expand_as(u), delta.flip(2).flip(2), A[:1].expand_as(A), *wide.split(2, dim=-1), D]
    dense = [x.contiguous() for x in strided]
    assert_agree(
        output_and_gradients(selective_scan, strided), output_and_gradients(selective_scan_reference, dense), 1e-12
    )


def test_gradients_need_not_be_contiguous() -> None:
    inputs = make_inputs(l=40)
    weight = torch.randn(3, 40, 2, 2, dtype=torch.float64).permute(3, 2, 1, 0)
    gradients = [
        torch.autograd.grad(scan(*inputs), inputs, grad_outputs=weight)
        for scan in (selective_scan, selective_scan_reference)
    ]
    for name, value, exact in zip(NAMES, *gradients, strict=True):
        assert relative_error(value, exact) < 1e-12, name


# 240 elements per path and image: one tile for all, one path at a time, and tiles that do not divide the batch.
@pytest.mark.parametrize("elements", [10**6, 3 * 240, 2 * 240, 240, 1])
def test_tiles_do_not_change_the_result(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(b=5, k=3, l=40, d=3, n=2)
    whole = output_and_gradients(selective_scan_reference, inputs)
    monkeypatch.setattr(blocked, "TILE_ELEMENTS", elements)
    tiles = list(blocked._tiles(torch.empty(5, 3, 40, 2, 3)))
    assert (len(tiles) == 1) == (elements == 10**6)
    assert_agree(output_and_gradients(selective_scan, inputs), whole, 1e-12)


@pytest.mark.parametrize("step", [1e-6, 1e-3, 1.0, 20.0])
@pytest.mark.parametrize("rate", [-1e-3, -1.0, -100.0])
def test_extreme_steps_and_rates_stay_finite_and_right(step: float, rate: float) -> None:
    inputs = make_inputs(l=100)
    inputs[1] = torch.full_like(inputs[1], step)
    inputs[2] = torch.full_like(inputs[2], rate)
    exact = output_and_gradients(selective_scan_reference, inputs)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        values = output_and_gradients(selective_scan, [x.detach().to(dtype) for x in inputs])
        for name, value, wanted in zip(("y", *NAMES), values, exact, strict=True):
            assert torch.isfinite(value).all(), name
            # If a state decays completely in one step, its gradient is below the smallest float32.
            torch.testing.assert_close(
                value.double(), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()) + 1e-30, msg=name
            )


def test_steps_from_tiny_to_huge_in_one_sequence() -> None:
    inputs = make_inputs(l=100, n=3)
    exponents = torch.empty_like(inputs[1]).uniform_(math.log(1e-6), math.log(20.0))
    inputs[1] = exponents.exp()
    inputs[2] = -torch.tensor([1e-2, 1.0, 100.0], dtype=torch.float64).expand_as(inputs[2])
    exact = output_and_gradients(selective_scan_reference, inputs)
    assert_agree(output_and_gradients(selective_scan, inputs), exact, 1e-12)


@pytest.mark.parametrize(("length", "states"), [(33, 1), (256, 1), (1024, 1), (256, 16)])
def test_float32_error_is_at_most_twice_the_reference_s(length: int, states: int) -> None:
    inputs = make_inputs(b=2, k=4, l=length, d=8, n=states)
    exact = output_and_gradients(selective_scan_reference, inputs)
    single = [x.detach().float() for x in inputs]
    ours = output_and_gradients(selective_scan, single)
    literal = output_and_gradients(selective_scan_reference, single)
    # So small an error depends on the order of a short sum, so allow half a unit in the last place.
    rounding = torch.finfo(torch.float32).eps / 2
    for name, value, reference, wanted in zip(("y", *NAMES), ours, literal, exact, strict=True):
        assert relative_error(value, wanted) <= 2 * relative_error(reference, wanted) + rounding, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_the_float32_scan_rounded_once(dtype: torch.dtype) -> None:
    inputs = [x.detach().to(dtype) for x in make_inputs(l=200)]
    y = selective_scan(*inputs)
    assert y.dtype == dtype
    assert torch.equal(y, selective_scan(*(x.float() for x in inputs)).to(dtype))


def test_state_is_float32_whatever_the_input() -> None:
    """A bfloat16 state would stop growing at 256, where rounding drops an added 1."""
    length = 1024
    u, delta = torch.ones(1, 1, length, 1), torch.ones(1, 1, length, 1)
    A, D = torch.full((1, 1, 1), -1e-9), torch.zeros(1, 1)
    B = C = torch.ones(1, 1, length, 1)
    y = selective_scan(u.bfloat16(), delta, A, B.bfloat16(), C.bfloat16(), D)
    assert y.dtype == torch.bfloat16
    assert float(y[0, 0, -1, 0]) == length


def test_gradients_come_in_the_type_of_each_argument() -> None:
    inputs = make_inputs(l=40, dtype=torch.float32)
    dtypes = [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]
    inputs = [x.detach().to(dtype).requires_grad_() for x, dtype in zip(inputs, dtypes, strict=True)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    selective_scan(*inputs).sum().backward()
    selective_scan_reference(*exact).sum().backward()
    for name, dtype, x, wanted in zip(NAMES, dtypes, inputs, exact, strict=True):
        assert x.grad.dtype == dtype, name
        assert relative_error(x.grad, wanted.grad) < (4e-3 if dtype == torch.bfloat16 else 1e-5), name


def test_only_the_gradients_asked_for_are_needed() -> None:
    inputs = make_inputs(l=40)
    (wanted,) = torch.autograd.grad(selective_scan_reference(*inputs).sum(), inputs[:1])
    frozen = [inputs[0], *(x.detach() for x in inputs[1:])]
    (value,) = torch.autograd.grad(selective_scan(*frozen).sum(), frozen[:1])
    assert relative_error(value, wanted) < 1e-12


def test_a_path_of_one_image_depends_on_nothing_else() -> None:
    inputs = [x.detach() for x in make_inputs(b=3, k=2, l=70)]
    y = selective_scan(*inputs)
    changed = [x.clone() for x in inputs]
    for position in (0, 1, 3, 4):
        changed[position][0, 1] = changed[position][0, 1].flip(0)
    y_changed = selective_scan(*changed)
    assert not torch.equal(y_changed[0, 1], y[0, 1])
    y_changed[0, 1] = y[0, 1]
    assert torch.equal(y_changed, y)


def test_the_future_does_not_reach_the_past() -> None:
    inputs = [x.detach() for x in make_inputs(l=100)]
    y = selective_scan(*inputs)
    for cut in (1, 31, 32, 33, 64, 97):
        changed = [x.clone() for x in inputs]
        for position in (0, 1, 3, 4):
            changed[position][:, :, cut:] = 0.5
        y_changed = selective_scan(*changed)
        assert torch.equal(y_changed[:, :, :cut], y[:, :, :cut])
        assert not torch.equal(y_changed[:, :, cut], y[:, :, cut])


WRONG_SHAPES = [
    ("u", (2, 5, 3)),
    ("u", (2, 2, 0, 3)),
    ("delta", (2, 2, 5, 1)),
    ("delta", (2, 2, 4, 3)),
    ("A", (2, 3)),
    ("A", (2, 3, 0)),
    ("A", (1, 3, 2)),
    ("A", (2, 4, 2)),
    ("B", (2, 2, 5, 3)),
    ("B", (2, 1, 5, 2)),
    ("C", (2, 2, 5, 1)),
    ("C", (1, 2, 5, 2)),
    ("D", (2, 3, 1)),
    ("D", (3,)),
    ("D", (2, 4)),
]


@pytest.mark.parametrize(("name", "shape"), WRONG_SHAPES, ids=lambda value: str(value).replace(" ", ""))
def test_a_wrong_shape_is_refused_by_name(name: str, shape: tuple[int, ...]) -> None:
    arguments = dict(zip(NAMES, make_inputs(), strict=True))
    arguments[name] = torch.ones(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"selective_scan: {name} is \({shape[0]},"):
        selective_scan(**arguments)


@pytest.mark.parametrize("length", [5, 70])
def test_operator_is_registered_as_torch_expects(length: int) -> None:
    inputs = make_inputs(l=length, dtype=torch.float32)
    torch.library.opcheck(selective_scan_blocked, tuple(inputs))
    y, h = selective_scan_blocked(*(x.detach() for x in inputs))
    torch.library.opcheck(blocked._backward, (torch.randn_like(y), h, *(x.detach() for x in inputs)))


@pytest.mark.parametrize("elements", [1, 1 << 20])
@pytest.mark.parametrize("length", [1, 31, 33, 1056])
def test_nothing_reads_memory_before_it_is_written(length: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "TILE_ELEMENTS", elements)
    inputs = make_inputs(l=length)
    exact = output_and_gradients(selective_scan_reference, inputs)
    poisoned = 0

    def poison(make: object) -> object:
        def allocate(*arguments: object, **options: object) -> Tensor:
            nonlocal poisoned
            poisoned += 1
            return make(*arguments, **options).fill_(math.nan)

        return allocate

    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))
    values = output_and_gradients(selective_scan, inputs)
    assert poisoned >= 8  # y, h, and the six gradients
    assert_agree(values, exact, 1e-12)
