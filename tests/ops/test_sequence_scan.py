"""The scan of sequences with mamba_ssm's signature: every version against the reference in float64."""

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lamamba.ops import selective_scan_2d, selective_scan_fn, sequence_scan
from lamamba.ops.grid import Scan, path_order
from lamamba.ops.sequence_scan import selective_scan_cuda
from lamamba.ops.sequence_scan.reference import selective_scan_fn_reference
from small_network import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
OPTIONAL = ("D", "z", "delta_bias", "initial_state")
# Shapes of B and C: constant, variable, and variable in two groups.
WEIGHTS = [("bnl", "bnl"), ("bgnl", "bgnl"), ("dn", "dn"), ("dn", "bgnl"), ("bgnl", "bnl")]


def make_inputs(
    b: int = 2, d: int = 4, l: int = 5, n: int = 2, weights: tuple[str, str] = ("bnl", "bnl"), without: Any = ()
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(b + 10 * d + 100 * l + n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    shapes = {"bnl": (b, n, l), "bgnl": (b, 2, n, l), "dn": (d, n)}
    inputs = {
        "u": normal(b, d, l), "delta": normal(b, d, l), "A": -torch.exp(0.5 * normal(d, n)),
        "B": normal(*shapes[weights[0]]), "C": normal(*shapes[weights[1]]), "D": normal(d), "z": normal(b, d, l),
        "delta_bias": normal(d), "initial_state": normal(b, d, n),
    }  # fmt: skip
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items() if name not in without}


def results(
    scan: Any, inputs: dict[str, Tensor], softplus: bool = True, with_last: bool = True, **options: Any
) -> dict[str, Tensor]:
    """Return y, the last state, and all gradients of a random weighted sum of both."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    y, last = scan(**leaves, delta_softplus=softplus, **options)
    # All dtypes represent these weights.
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(x) for x in (y, last)]
    outputs = (y, last)[: 1 + with_last]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights[: 1 + with_last])
    return {"y": y.detach(), "last": last.detach(), **dict(zip(leaves, gradients, strict=True))}


def ours(backend: str = "auto") -> dict[str, Any]:
    return {"return_last_state": True, "backend": backend}


def rounded_reference(u: Tensor, *tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    y, last = selective_scan_fn_reference(u, *tensors, **options)
    return y.to(u.dtype), last


def check(inputs: dict[str, Tensor], backend: str = "auto", dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """Allow twice the error of the reference in the same dtype, plus a unit in the last place.

    From 16-bit inputs, float32 results may be off by 2^-19.
    """
    wide = ("A", "D", "delta_bias", "initial_state")
    inputs = {name: x.to(torch.float32 if name in wide else dtype) for name, x in inputs.items()}
    exact = results(selective_scan_fn_reference, {name: x.double() for name, x in inputs.items()}, **options)
    plain = results(rounded_reference, inputs, **options)
    found = results(selective_scan_fn, inputs, **options, **ours(backend))
    for name, wanted in exact.items():
        assert found[name].shape == wanted.shape, name
        allowed = 2 * relative_error(plain[name], wanted) + 2 * torch.finfo(torch.float32).eps
        if dtype.itemsize == 2 and found[name].dtype == torch.float32:
            allowed += 2**-19
        assert relative_error(found[name], wanted) <= allowed, name
        assert found[name].dtype == (torch.float32 if name == "last" else plain[name].dtype), name


@pytest.mark.parametrize("softplus", [False, True])
def test_reference_is_the_recurrence_of_the_docstring(softplus: bool) -> None:
    inputs = {name: tensor.cpu() for name, tensor in make_inputs(d=2, l=3, weights=("bgnl", "dn")).items()}
    y, last = selective_scan_fn_reference(**inputs, delta_softplus=softplus)
    u, delta, A, B, C, D, z, bias, start = (tensor.tolist() for tensor in inputs.values())
    for b in range(2):
        for d in range(2):
            h = start[b][d]
            for t in range(3):
                step = delta[b][d][t] + bias[d]
                step = math.log1p(math.exp(step)) if softplus else step
                h = [math.exp(step * A[d][n]) * h[n] + step * B[b][d][n][t] * u[b][d][t] for n in range(2)]
                gate = z[b][d][t] / (1 + math.exp(-z[b][d][t]))
                wanted = (sum(C[d][n] * h[n] for n in range(2)) + D[d] * u[b][d][t]) * gate
                assert float(y[b, d, t]) == pytest.approx(wanted, rel=1e-12)
            assert last[b, d].tolist() == pytest.approx(h, rel=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_plain_pytorch_agrees_in_float64(weights: tuple[str, str]) -> None:
    inputs = make_inputs(l=70, n=3, weights=weights)
    wanted = results(selective_scan_fn_reference, inputs)
    for name, value in results(selective_scan_fn, inputs, **ours()).items():
        assert relative_error(value, wanted[name]) < 1e-12, name


def test_plain_pytorch_passes_gradcheck() -> None:
    tensors = [x.requires_grad_() for x in make_inputs(b=1, d=2, l=3, weights=("bgnl", "dn")).values()]
    *tensors, start = tensors

    def scan(*tensors: Tensor) -> tuple[Tensor, ...]:
        return selective_scan_fn(*tensors[:8], True, True, initial_state=tensors[8])

    assert torch.autograd.gradcheck(scan, (*tensors, start))


@pytest.mark.parametrize(("length", "states"), [(1, 1), (64, 2), (65, 4), (130, 8), (33, 16)])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_loops_agree_with_float64(weights: tuple[str, str], length: int, states: int) -> None:
    pytest.importorskip("numba")
    check({name: x.cpu() for name, x in make_inputs(d=64, l=length, n=states, weights=weights).items()})


@pytest.mark.parametrize("without", [OPTIONAL, ("z",), ("delta_bias", "D")], ids=str)
@pytest.mark.parametrize("softplus", [False, True])
def test_arguments_may_be_missing(softplus: bool, without: tuple[str, ...]) -> None:
    inputs = make_inputs(d=32, l=40, without=without)
    inputs["delta"] = inputs["delta"].abs()  # a step below 0 lets states grow
    check(inputs, softplus=softplus)


@pytest.mark.parametrize(("threads", "batch", "channels"), [(3, 1, 96), (4, 1, 100), (8, 2, 64), (2, 1, 40)])
def test_threads_do_not_change_the_result(
    threads: int, batch: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {name: x.float().cpu() for name, x in make_inputs(b=batch, d=channels, l=20).items()}
    one = results(selective_scan_fn, inputs, **ours())
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for name, value in results(selective_scan_fn, inputs, **ours()).items():
        assert relative_error(value, one[name]) < 1e-6, name


def test_a_scan_continues_from_its_last_state() -> None:
    inputs = make_inputs(l=50, n=3)
    y, last = selective_scan_fn(**inputs, return_last_state=True)
    halves = []
    for half in range(2):
        part = {name: x.chunk(2, dim=2)[half] if x.shape[-1] == 50 else x for name, x in inputs.items()}
        out, inputs["initial_state"] = selective_scan_fn(**part, return_last_state=True)
        halves.append(out)
    torch.testing.assert_close(torch.cat(halves, dim=2), y)
    torch.testing.assert_close(inputs["initial_state"], last)


def test_inputs_may_be_strided_and_differ_in_dtype() -> None:
    inputs = make_inputs(l=40, weights=("bgnl", "bnl"))
    strided = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in inputs.items()}
    wanted = results(selective_scan_fn, inputs, **ours())
    for name, value in results(selective_scan_fn, strided, **ours()).items():
        assert relative_error(value, wanted[name]) < 1e-12, name
    narrow = {name: x.to(torch.bfloat16 if name in ("u", "B", "z") else torch.float32) for name, x in inputs.items()}
    exact = results(selective_scan_fn_reference, {name: x.double() for name, x in narrow.items()})
    for name, value in results(selective_scan_fn, narrow, **ours()).items():
        wanted_dtype = {"y": torch.bfloat16, "last": torch.float32}.get(name) or narrow[name].dtype
        assert value.dtype == wanted_dtype, name
        assert relative_error(value, exact[name]) < 1e-2, name


@pytest.mark.parametrize("backend", ["auto", "pytorch"])
def test_autocast_does_not_round_states(backend: str) -> None:
    inputs = {name: x.float().cpu() for name, x in make_inputs(l=70).items()}

    def scan(**inputs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return selective_scan_fn(**inputs)

    found = results(scan, inputs, **ours(backend))
    for name, wanted in results(selective_scan_fn, inputs, **ours(backend)).items():
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=0, msg=name)


def test_complex_weights_are_refused() -> None:
    for name in "ABC":
        inputs = make_inputs()
        inputs[name] = inputs[name].to(torch.complex64)
        with pytest.raises(TypeError, match=f"{name} is complex: give the [25] states as real numbers"):
            selective_scan_fn(**inputs)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *(("u", (2, 4)), ("u", (2, 0, 5)), ("delta", (2, 4, 6)), ("A", (4,)), ("A", (3, 2)), ("B", (2, 5, 2))),
        *(("C", (2, 2, 2, 4)), ("C", (4, 3)), ("D", (5,)), ("z", (2, 4, 1)), ("delta_bias", (1,))),
        ("initial_state", (2, 2, 4)),
    ],
)  # fmt: skip
def test_a_wrong_shape_is_named(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"selective_scan_fn: {name} is \({shape[0]}"):
        selective_scan_fn(**{**make_inputs(), name: torch.ones(shape)})


def test_groups_must_divide_channels() -> None:
    with pytest.raises(ValueError, match="5 channels and groups of B and C"):
        selective_scan_fn(**make_inputs(d=5, weights=("bgnl", "bgnl")))
    inputs = make_inputs()
    with pytest.raises(ValueError, match="4 channels and groups of B and C"):
        selective_scan_fn(**{**inputs, "B": inputs["B"][:, None][:, :0]})


@pytest.mark.parametrize("scan", ["continuous", "raster"])
def test_a_grid_is_scanned_along_four_paths(scan: Scan) -> None:
    b, d, h, w, n = 2, 3, 4, 6, 2
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    inputs = [
        normal(b, d, h, w), normal(b, 4 * d, h, w), normal(4 * d, n), normal(b, 4, n, h, w), normal(b, 4, n, h, w),
        normal(4 * d), normal(4 * d),
    ]  # fmt: skip
    u, delta, A_log, B, C, D, bias = inputs
    A = -torch.exp(A_log)
    y = selective_scan_2d(u, delta, A, B, C, D, bias, True, scan)
    wanted = torch.zeros_like(u.flatten(2))
    for path, order in enumerate(torch.from_numpy(path_order(h, w, scan))):
        of_path = slice(path * d, (path + 1) * d)
        rows = (x.flatten(2)[..., order] for x in (u, delta[:, of_path], B[:, path], C[:, path]))
        u_path, delta_path, B_path, C_path = rows
        out, _ = selective_scan_fn_reference(
            u_path, delta_path, A[of_path], B_path, C_path, D[of_path], None, bias[of_path], True
        )
        wanted = wanted.index_add(2, order, out)
    weights = normal(b, d, h, w)
    gradients = [torch.autograd.grad(x.view_as(u), inputs, weights, retain_graph=True) for x in (y, wanted)]
    for value, exact in zip((y, *gradients[0]), (wanted.view_as(u), *gradients[1]), strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"delta is \(2, 3, 4, 6\): with u"):
        selective_scan_2d(u, u, A, B, C)
    with pytest.raises(ValueError, match=r"u, B, C are \(2, 3, 4, 6\), \(2, 2, 4, 6\)"):
        selective_scan_2d(u, delta, A, B[:, 0], C)


def test_raster_paths_are_a_cross_scan() -> None:
    """Rows, columns, and both flipped: what VMamba gives to a scan of sequences with four groups."""
    u, delta = torch.randn(1, 2, 3, 5), torch.rand(1, 8, 3, 5)
    A, B, C = -torch.rand(8, 1), torch.randn(1, 4, 1, 3, 5), torch.randn(1, 4, 1, 3, 5)

    def cross(x: Tensor) -> Tensor:
        """Bring (b, 4, c, h, w) into the order of the paths."""
        rows, columns = x.flatten(3), x.mT.flatten(3)
        return torch.stack([rows[:, 0], columns[:, 1], rows[:, 2].flip(2), columns[:, 3].flip(2)], dim=1)

    us, deltas = cross(u[:, None].expand(1, 4, 2, 3, 5)), cross(delta.unflatten(1, (4, 2)))
    ys = selective_scan_fn(us.flatten(1, 2), deltas.flatten(1, 2), A, cross(B), cross(C)).unflatten(1, (4, 2))
    rows = (ys[:, 0] + ys[:, 2].flip(2)).unflatten(2, (3, 5))
    columns = (ys[:, 1] + ys[:, 3].flip(2)).unflatten(2, (5, 3)).mT
    torch.testing.assert_close(selective_scan_2d(u, delta, A, B, C, scan="raster"), rows + columns)


def test_importing_the_operations_loads_nothing_else() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); import lamamba.ops; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before}); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["lamamba", "False"]


@pytest.mark.parametrize("without", [("initial_state",), OPTIONAL], ids=str)
def test_the_compiled_module_can_be_replaced(without: tuple[str, ...]) -> None:
    """Call what `mamba_ssm` calls in its compiled module, and compare with autograd."""
    inputs = make_inputs(l=40, n=3, weights=("bgnl", "bgnl"), without=without)
    tensors = [inputs.get(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    out, x, *gated = selective_scan_cuda.fwd(*tensors, True)
    y, last = selective_scan_fn(**inputs, delta_softplus=True, return_last_state=True)
    torch.testing.assert_close(gated[0] if gated else out, y)
    torch.testing.assert_close(x[:, :, -1, 1::2], last)
    dz = None if "z" in without else torch.empty_like(tensors[0])
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y)
    found = selective_scan_cuda.bwd(*tensors, weights, x, out, dz, True, True)
    wanted = results(selective_scan_fn, inputs, with_last=False, **ours())
    names = ("u", "delta", "A", "B", "C", "D", "delta_bias", *(() if dz is None else ("z",)))
    for name, gradient in zip(names, found, strict=False):
        if name in without:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, wanted[name])
    if dz is not None:
        assert found[7] is dz
        torch.testing.assert_close(found[8], y)


# The kernels, in Triton's interpreter if there is no GPU. It takes seconds for each case, so they are few and tiny.
TINY = {
    "1 state": ({"b": 2, "d": 8, "l": 20, "n": 1}, True),
    "2 states, two groups": ({"b": 1, "l": 16, "n": 2, "weights": ("bgnl", "bnl")}, True),
    "3 states, two blocks of channels": ({"b": 1, "d": 33, "l": 10, "n": 3}, True),
    "4 states, constant C": ({"b": 1, "d": 2, "l": 10, "n": 4, "weights": ("bnl", "dn")}, True),
    "nothing optional": ({"b": 1, "d": 8, "l": 17, "n": 1, "without": OPTIONAL}, False),
}


@pytest.mark.parametrize("case", TINY)
def test_kernels_agree_with_float64(case: str) -> None:
    pytest.importorskip("triton")
    sizes, softplus = TINY[case]
    inputs = make_inputs(**sizes)
    inputs["delta"] = inputs["delta"] if softplus else inputs["delta"].abs()
    check(inputs, "triton", softplus=softplus)


@pytest.mark.parametrize(("states", "without"), [(2, OPTIONAL), (3, ())], ids=str)
def test_sequences_cut_into_segments_agree_with_float64(
    states: int, without: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = pytest.importorskip("lamamba.ops.sequence_scan.triton")
    monkeypatch.setattr(host, "SHORTEST_SEGMENT", 1)
    monkeypatch.setattr(host, "_plan", host._make_plan)  # which keeps no plans
    inputs = make_inputs(b=1, d=4, l=40, n=states, without=without)
    assert host._plan(inputs["u"].shape, 1, states, torch.float32, True).num_segments == 3
    check(inputs, "triton", with_last=bool(without))


def test_segments_keep_a_large_gpu_busy() -> None:
    host = pytest.importorskip("lamamba.ops.sequence_scan.triton")

    def segments(batch: int, channels: int, length: int) -> int:
        return host._make_plan((batch, channels, length), 1, 1, torch.bfloat16, True).num_segments

    assert segments(64, 4096, 64) == segments(8, 2048, 4096) == segments(1, 64, 64) == 1
    assert segments(1, 64, 65536) == 512
    assert segments(1, 1024, 4096) == 64
    assert segments(4, 2048, 4096) == 9


def test_too_many_states_are_refused() -> None:
    host = pytest.importorskip("lamamba.ops.sequence_scan.triton")
    with pytest.raises(ValueError, match="16 states along 134217728 steps are too many"):
        host._make_plan((1, 1, 2**27), 1, 16, torch.bfloat16, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would take 8 GiB of GPU memory")
def test_states_may_be_far_apart() -> None:
    """Offsets of 2^31 would wrap around in 32 bits, and zeros would be read."""
    pytest.importorskip("triton")
    inputs = {name: x.half() for name, x in make_inputs(b=1, d=2, l=6, n=3).items()}
    far = torch.empty(2**32, dtype=torch.float16).as_strided((1, 3, 6), (1, 2**30, 1), 2**31 - 8)
    y = selective_scan_fn(**{**inputs, "B": far.copy_(inputs["B"])}, backend="triton")
    torch.testing.assert_close(y, selective_scan_fn(**inputs, backend="triton"), rtol=0, atol=0)


def test_kernels_take_channels_that_are_contiguous() -> None:
    pytest.importorskip("triton")
    inputs = {name: x.float() for name, x in make_inputs(b=1, d=4, l=20, n=1).items()}
    last = {name: x.mT.contiguous().mT if x.ndim == 3 else x for name, x in inputs.items()}
    y = selective_scan_fn(**last, backend="triton")
    assert y.stride()[1:] == last["u"].stride()[1:] == (1, 4)
    torch.testing.assert_close(y, selective_scan_fn(**inputs, backend="triton"), rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("poisoned_memory")
def test_every_value_is_written() -> None:
    pytest.importorskip("triton")
    inputs = {name: x.float() for name, x in make_inputs(b=1, d=2, l=20, n=3).items()}
    for backend in ("auto", "triton"):
        for name, value in results(selective_scan_fn, inputs, **ours(backend)).items():
            assert bool(value.isfinite().all()), (backend, name)


@pytest.mark.parametrize("weights", [("bnl", "bnl"), ("bgnl", "bgnl")], ids=str)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_the_result_may_be_modified_and_the_scan_checkpointed(backend: str, weights: tuple[str, str]) -> None:
    inputs = {name: tensor.float() for name, tensor in make_inputs(weights=weights).items()}

    def doubled(**inputs: Any) -> tuple[Tensor, Tensor]:
        y, last = selective_scan_fn(**inputs)
        y += y.detach()  # in place
        return y, last

    def checkpointed(**inputs: Any) -> Any:
        return checkpoint(selective_scan_fn, **inputs, use_reentrant=False)

    wanted = results(selective_scan_fn, inputs, **ours(backend))
    for name, value in results(checkpointed, inputs, **ours(backend)).items():
        torch.testing.assert_close(value, wanted[name], msg=name)
    found = results(doubled, inputs, **ours(backend))
    torch.testing.assert_close(found["y"], 2 * wanted["y"])
    torch.testing.assert_close(found["u"], wanted["u"])


@pytest.mark.parametrize("power", [1, 2])
def test_the_kernels_have_no_second_derivative(power: int) -> None:
    """Also if the gradient of y is a constant, as in a penalty on the gradient of its sum."""
    pytest.importorskip("triton")
    inputs = {name: tensor.float().requires_grad_() for name, tensor in make_inputs().items()}
    y = selective_scan_fn(**inputs, backend="triton")
    (gradient,) = torch.autograd.grad(y.pow(power).sum(), inputs["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        (y.sum() + gradient.square().sum()).backward()


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_views_that_are_negated_lazily_are_read_as_they_are(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    inputs = {name: x.float() for name, x in make_inputs(b=1, d=2, l=6, n=1).items()}

    def lazily(x: Tensor) -> Tensor:
        return torch.complex(torch.zeros_like(x), -x).conj().imag

    def scan(delta_softplus: bool, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        lazy = {name: lazily(x) for name, x in inputs.items()}
        y, last = selective_scan_fn(**lazy, delta_softplus=delta_softplus, **ours(backend))
        return (torch.complex(torch.zeros_like(y), y).conj() * 1j).real, last  # negates the gradient of y lazily

    assert lazily(inputs["u"]).is_neg()
    wanted = results(selective_scan_fn, inputs, **ours(backend))
    for name, value in results(scan, inputs).items():
        torch.testing.assert_close(value, wanted[name], msg=name)


@pytest.mark.parametrize("mapped", ["u", "A"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_the_scan_can_be_mapped(backend: str, mapped: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    inputs = {name: x.float() for name, x in make_inputs(b=1, d=2, l=6, n=1).items()}
    x = inputs.pop(mapped)

    def scan(x: Tensor) -> Any:
        return selective_scan_fn(**inputs, **{mapped: x}, backend=backend)

    wanted = torch.stack([scan(x), scan(2 * x)])
    torch.testing.assert_close(torch.func.vmap(scan)(torch.stack([x, 2 * x])), wanted)


@pytest.mark.parametrize(("backend", "without"), [("auto", ()), ("triton", ()), ("triton", OPTIONAL)], ids=str)
def test_the_scan_compiles_as_one_graph(backend: str, without: tuple[str, ...]) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    inputs = {name: x.float() for name, x in make_inputs(b=1, d=2, l=6, n=1, without=without).items()}
    compiled = torch.compile(selective_scan_fn, backend="aot_eager", fullgraph=True)
    eager = results(selective_scan_fn, inputs, **ours(backend))
    for name, value in results(compiled, inputs, **ours(backend)).items():
        torch.testing.assert_close(value, eager[name], rtol=1e-5, atol=1e-6)


def test_operators_are_registered_as_torch_expects() -> None:
    host = pytest.importorskip("lamamba.ops.sequence_scan.triton")
    inputs = {name: x.float().requires_grad_() for name, x in make_inputs(b=1, d=2, l=6, n=1).items()}
    u, delta, A, B, C, D, z, bias, start = inputs.values()
    grouped = [x[:, None] if x.ndim == 3 else x[None] for x in (u, delta, A, B, C, D, z, bias, start)]
    for tensors, num_groups in ((inputs.values(), 1), (grouped, None)):
        operands = (*tensors, num_groups, True, True)
        torch.library.opcheck(host.scan_sequences_triton, operands, test_utils="test_faketensor")
    sequences = (u.mT, delta.mT, A.mT[None], B.mT, C.mT, start.mT)
    torch.library.opcheck(sequence_scan.scan_sequences_cpu, tuple(x.detach().cpu().requires_grad_() for x in sequences))


# On a GPU only: real sizes, and arithmetic that the interpreter does not support.
LARGE = {
    "1 state": {"b": 4, "d": 192, "l": 1024, "n": 1, "weights": ("bgnl", "bgnl")},
    "2 states": {"b": 2, "d": 100, "l": 513, "n": 2},
    "4 states": {"b": 2, "d": 64, "l": 300, "n": 4},
    "8 states": {"b": 2, "d": 64, "l": 300, "n": 8, "weights": ("dn", "bnl")},
    "16 states": {"b": 2, "d": 256, "l": 512, "n": 16},
    "7 states": {"b": 1, "d": 48, "l": 197, "n": 7},
    "16,384 steps": {"b": 1, "d": 64, "l": 16384, "n": 1},
    "16 states, 4,096 steps": {"b": 1, "d": 32, "l": 4096, "n": 16},
}


@ON_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE)
def test_real_sizes_agree_with_float64(case: str, dtype: torch.dtype) -> None:
    check(make_inputs(**LARGE[case]), "triton", dtype)


@ON_GPU
@pytest.mark.parametrize("states", [1, 2, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_gradients_of_16_bit_inputs_are_precise(dtype: torch.dtype, states: int) -> None:
    """Only u, delta and z are rounded, as in the tests of mamba_ssm and VMamba."""
    inputs = make_inputs(b=2, d=96, l=300, n=states, weights=("bgnl", "bgnl"))
    inputs = {name: x.to(dtype if name in ("u", "delta", "z") else torch.float32) for name, x in inputs.items()}
    wanted = results(selective_scan_fn_reference, {name: x.double() for name, x in inputs.items()})
    found = results(selective_scan_fn, inputs, **ours("triton"))
    for name in ("A", "B", "C", "D", "delta_bias", "initial_state", "last"):
        assert relative_error(found[name], wanted[name]) < 2**-17, name


@pytest.mark.parametrize("constant", ["B", "C"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_variable_weights_are_rounded_once(dtype: torch.dtype, constant: str) -> None:
    """A constant B or C has as many groups as channels, over which gradients of the other one are summed."""
    inputs = make_inputs(b=2, d=64, l=40, n=2, weights=("dn", "bnl") if constant == "B" else ("bnl", "dn"))
    wide = ("A", "D", "delta_bias", "initial_state")
    inputs = {name: x.to("cpu", torch.float32 if name in wide else dtype) for name, x in inputs.items()}
    wanted = results(selective_scan_fn_reference, {name: x.double() for name, x in inputs.items()})
    found = results(selective_scan_fn, inputs, **ours())
    variable = "C" if constant == "B" else "B"
    assert found[variable].dtype == dtype
    rounded_once = relative_error(wanted[variable].to(dtype), wanted[variable])
    assert relative_error(found[variable], wanted[variable]) < 1.1 * rounded_once


def test_long_sums_in_loops_lose_few_digits() -> None:
    """The gradient of A is a sum over 4,096 steps of large terms with both signs."""
    pytest.importorskip("numba")
    inputs = {name: x.float().cpu() for name, x in make_inputs(b=2, d=256, l=4096, n=1, without=("z",)).items()}
    inputs |= {name: inputs[name].abs() / 8 for name in ("delta", "delta_bias")}
    wide = {name: x.double() for name, x in inputs.items()}
    wanted = results(selective_scan_fn, wide, softplus=False, **ours())  # plain PyTorch in blocks
    found = results(selective_scan_fn, inputs, softplus=False, **ours())
    assert relative_error(found["A"], wanted["A"]) < 5e-7


@ON_GPU
@pytest.mark.parametrize("states", [1, 16])
def test_results_are_equal_from_run_to_run(states: int) -> None:
    inputs = {name: x.bfloat16() for name, x in make_inputs(b=2, d=96, l=4096, n=states).items()}
    first = results(selective_scan_fn, inputs, **ours("triton"))
    for _ in range(3):
        again = results(selective_scan_fn, inputs, **ours("triton"))
        assert all(torch.equal(again[name], value) for name, value in first.items())


def test_softplus_is_that_of_pytorch() -> None:
    """Large step sizes pass through, small ones stay positive."""
    inputs = {name: x.float() for name, x in make_inputs(d=32, l=64, without=OPTIONAL).items()}
    inputs["delta"] = torch.linspace(-80, 80, 64, device=DEVICE).expand(2, 32, 64)
    steps = F.softplus(inputs["delta"].double()).float()
    torch.testing.assert_close(
        selective_scan_fn(**inputs, delta_softplus=True), selective_scan_fn(**{**inputs, "delta": steps})
    )
