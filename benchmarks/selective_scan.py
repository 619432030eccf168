"""Time `lamamba.ops.selective_scan_fn` beside `selective_scan_cuda`, the compiled kernel of mamba_ssm, on one GPU.

    python benchmarks/selective_scan.py --out scan.jsonl             # ten shapes, forward and backward
    python benchmarks/selective_scan.py --network --out scan.jsonl   # training steps of a network like VMamba-T
    python benchmarks/selective_scan.py --quick --out scan.jsonl     # tiny shapes, also on a CPU

Each line of the output is one measurement: the median over CUDA graphs that hold several calls, so that the speed of
the host does not matter, and the median of plain calls. Without `selective_scan_cuda`, only ours is measured.
"""

import argparse
import contextlib
import json
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lamamba.ops import selective_scan_fn
from measure import commit, device_name, milliseconds

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import vmamba

try:
    import selective_scan_cuda
except ImportError as error:
    print(f"selective_scan_cuda is not measured: {error}", flush=True)
    selective_scan_cuda = None


class Shape(NamedTuple):
    batch: int
    channels: int
    length: int
    states: int
    dtype: torch.dtype
    groups: int = 1
    gated: bool = False


SHAPES = [
    Shape(64, 384, 3136, 1, torch.bfloat16, groups=4),  # the first stage of VMamba-T at 224 px
    Shape(64, 384, 3136, 1, torch.float32, groups=4),
    Shape(64, 4096, 64, 1, torch.bfloat16, groups=4),
    Shape(16, 1024, 4096, 1, torch.float32),
    Shape(1, 64, 65536, 1, torch.float32),
    Shape(1, 64, 65536, 16, torch.bfloat16),
    Shape(1, 4096, 8192, 16, torch.bfloat16, gated=True),  # Mamba
    Shape(8, 2048, 2048, 16, torch.bfloat16),
    Shape(8, 2048, 2048, 16, torch.float32),
    Shape(64, 768, 197, 16, torch.bfloat16, gated=True),  # Vim-S
]
TINY = [Shape(1, 8, 20, 1, torch.float32, groups=4), Shape(2, 8, 20, 2, torch.bfloat16, gated=True)]
CALLS = 10  # per CUDA graph
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Compiled(torch.autograd.Function):
    """The compiled kernel, called as mamba_ssm calls it."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> Tensor:
        u, delta, A, B, C, D, z, bias = tensors
        out, x, *gated = selective_scan_cuda.fwd(u, delta, A, B, C, D, z, bias, True)
        ctx.save_for_backward(*tensors, x, out)
        return gated[0] if gated else out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, z, bias, x, out = ctx.saved_tensors
        of_u, of_delta, of_A, of_B, of_C, of_D, of_bias, *of_z = selective_scan_cuda.bwd(
            u, delta, A, B, C, D, z, bias, grad.contiguous(), x, None if z is None else out, None, True, False
        )
        return of_u, of_delta, of_A, of_B, of_C, of_D, of_z[0] if of_z else None, of_bias


def ours(*tensors: Tensor | None) -> Tensor:
    return selective_scan_fn(*tensors, True, backend="triton" if DEVICE == "cuda" else "auto")


PROVIDERS: dict[str, Callable[..., Tensor]] = {"lamamba": ours}
if selective_scan_cuda is not None:
    PROVIDERS["selective_scan_cuda"] = Compiled.apply


def make_inputs(shape: Shape) -> list[Tensor | None]:
    b, d, l, n, dtype, g, gated = shape
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, device=DEVICE, dtype=dtype, generator=generator)

    A = -torch.arange(1.0, n + 1, device=DEVICE).repeat(d, 1)
    bias = torch.linspace(-4, -2, d, device=DEVICE)
    tensors = [normal(b, d, l), normal(b, d, l), A, normal(b, g, n, l), normal(b, g, n, l)]
    tensors += [normal(d, dtype=torch.float32), normal(b, d, l) if gated else None, bias]
    return [None if x is None else x.requires_grad_() for x in tensors]


def gigabytes(shape: Shape, backward: bool) -> float:
    """Count each input and output once."""
    b, d, l, n, dtype, g, gated = shape
    sequences = (5 if backward else 3) + (2 if backward else 1) * gated
    weights = 4 if backward else 2
    return (sequences * b * d * l + weights * b * g * n * l) * dtype.itemsize / 1e9


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """Capture several calls as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(CALLS):
            run()
    return graph.replay


def times(run: Callable[[], object]) -> dict[str, float | None]:
    """Return the median milliseconds of a call within a graph, and of a plain call."""
    plain = statistics.median(milliseconds(run, repeats=30, warm_up=5))
    if DEVICE == "cpu":
        return {"ms": None, "plain_ms": plain}
    try:
        in_graph = statistics.median(milliseconds(captured(run), repeats=15, warm_up=2)) / CALLS
    except RuntimeError:
        traceback.print_exc()
        torch.cuda.synchronize()
        in_graph = None
    return {"ms": in_graph, "plain_ms": plain}


def error_of(y: Tensor, inputs: list[Tensor | None], shape: Shape) -> float:
    """Compare a part of y, which depends on nothing else, with the scan in float64."""
    steps, channels = 1024, min(16, shape.channels // shape.groups)
    u, delta, A, B, C, D, z, bias = (None if x is None else x.detach().double() for x in inputs)
    part = [None if x is None else x[:1, :channels, :steps] for x in (u, delta, z)]
    weights = [x[:1, :1, :, :steps] for x in (B, C)]
    exact = selective_scan_fn(
        part[0], part[1], A[:channels], *weights, D[:channels], part[2], bias[:channels], True, backend="pytorch"
    )  # fmt: skip
    found = y.detach()[:1, :channels, :steps].double()
    return float((found - exact).norm() / exact.norm())


def peak_mib(run: Callable[[], object]) -> float | None:
    """Return how much memory a call allocates at most, beyond what is in use before it."""
    if DEVICE == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def measure_shape(shape: Shape) -> Iterator[dict[str, Any]]:
    inputs = make_inputs(shape)
    leaves = [x for x in inputs if x is not None]
    found: dict[str, list[Tensor]] = {}
    name = {**shape._asdict(), "dtype": str(shape.dtype).removeprefix("torch.")}
    for provider, scan in PROVIDERS.items():
        y = scan(*inputs)
        grad = torch.randn(y.shape, device=DEVICE, dtype=y.dtype, generator=torch.Generator(DEVICE).manual_seed(1))
        found[provider] = list(torch.autograd.grad(y, leaves, grad))
        error = error_of(y, inputs, shape)
        del y

        def forward(scan: Callable[..., Tensor] = scan) -> Tensor:
            return scan(*inputs)

        def step(scan: Callable[..., Tensor] = scan, grad: Tensor = grad) -> object:
            return torch.autograd.grad(scan(*inputs), leaves, grad)

        of_forward, of_step = times(forward), times(step)
        of_backward = {
            key: None if None in (of_step[key], of_forward[key]) else of_step[key] - of_forward[key] for key in of_step
        }
        peak = peak_mib(step)
        for direction, of_pass in (("forward", of_forward), ("backward", of_backward), ("both", of_step)):
            moved = {"forward": [False], "backward": [True], "both": [False, True]}[direction]
            ms = of_pass["ms"] or of_pass["plain_ms"]
            speed = sum(gigabytes(shape, backward) for backward in moved) / ms * 1e3
            yield {
                **name, "pass": direction, "provider": provider, **of_pass, "gb_per_s": speed, "error": error,
                "peak_mib": peak,
            }  # fmt: skip
    if len(found) > 1:
        names = ("u", "delta", "A", "B", "C", "D", *(("z",) if shape.gated else ()), "bias")
        gaps = {key: difference(a, b) for key, a, b in zip(names, *found.values(), strict=True)}
        yield {**name, "pass": "gradients", "difference": gaps}


class ScannedAsVMamba(vmamba.CrossScan):
    """Copy the paths, then call a scan of sequences, as VMamba does."""

    function: Callable[..., Tensor] = staticmethod(ours)

    def scan(self, x: Tensor) -> Tensor:
        h, w, d = x.shape[1:]
        rows, columns = x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)
        paths = torch.stack([rows, columns, rows.flip(1), columns.flip(1)], dim=1).mT.contiguous()  # (b, 4, d, l)
        low = torch.einsum("bkdl,kpd->bkpl", paths, self.x_proj_weight.to(x.dtype))
        low, B, C = low.split([low.shape[2] - 2 * self.num_states, self.num_states, self.num_states], dim=2)
        delta = torch.einsum("bkrl,kdr->bkdl", low, self.dt_weight.to(x.dtype)).flatten(1, 2)
        A = -torch.exp(self.A_log.float().flatten(0, 1))
        weights = (A, B.contiguous(), C.contiguous(), self.D.flatten(), None, self.dt_bias.flatten())
        y = self.function(paths.flatten(1, 2), delta, *weights).unflatten(1, (4, d))
        both = y[:, :2] + y[:, 2:].flip(3)
        of_columns = both[:, 1].unflatten(2, (w, h)).mT.flatten(2)
        return (both[:, 0] + of_columns).mT.unflatten(1, (h, w))


def measure_network(batch: int, quick: bool) -> Iterator[dict[str, Any]]:
    side, width, depths, repeats = (32, 16, (1, 1), 2) if quick else (224, 96, (2, 2, 8, 2), 20)
    images = torch.randn(batch, 3, side, side, device=DEVICE)
    labels = torch.randint(0, 1000, (batch,), device=DEVICE)
    original = vmamba.CrossScan
    kinds = {"project_and_scan": (original, True, None), "selective_scan_2d": (original, False, None)}
    for provider, function in PROVIDERS.items():
        kinds[f"paths copied, {provider}"] = (ScannedAsVMamba, False, function)
    for kind, (scan, fused, function) in kinds.items():
        if function is not None:
            ScannedAsVMamba.function = staticmethod(function)
        vmamba.CrossScan = scan
        try:
            torch.manual_seed(0)
            network = vmamba.Network(3, 1000, width, depths, fused=fused).to(DEVICE)
        finally:
            vmamba.CrossScan = original
        optimizer = torch.optim.AdamW(network.parameters(), fused=DEVICE == "cuda")

        def step(network: torch.nn.Module = network, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        loss = float(step())
        ms = statistics.median(milliseconds(step, repeats, warm_up=1 if quick else 5))
        yield {
            "network": "VMamba-T", "kind": kind, "batch": batch, "plain_ms": ms, "images_per_s": 1e3 * batch / ms,
            "peak_mib": peak_mib(step), "first_loss": loss,
        }  # fmt: skip


def summary(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Compare the two providers: above 1, ours is faster."""
    keys = ("batch", "channels", "length", "states", "dtype")
    for direction, time in product(("forward", "backward", "both"), ("ms", "plain_ms")):
        of_pass = [record for record in records if record.get("pass") == direction and record[time] is not None]
        ms = {(*(x[key] for key in keys), x["provider"]): x[time] for x in of_pass}
        ratios = [
            ms[(*shape, "selective_scan_cuda")] / value
            for (*shape, provider), value in ms.items()
            if provider == "lamamba" and (*shape, "selective_scan_cuda") in ms
        ]
        if ratios:
            means = {"mean": statistics.mean(ratios), "geometric_mean": statistics.geometric_mean(ratios)}
            yield {"ratios_of": direction, "of": time, **means, "lowest": min(ratios), "all": ratios}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines to append to")
    parser.add_argument("--network", action="store_true", help="measure a network instead of shapes")
    parser.add_argument("--batch", type=int, default=128, help="images per step of the network")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see whether everything runs")
    options = parser.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = True
    records: list[dict[str, Any]] = []
    with options.out.open("a", encoding="utf-8") as file:

        def write(record: dict[str, Any]) -> None:
            records.append(record)
            line = json.dumps({key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in record.items()})
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()

        triton_version = "?"
        with contextlib.suppress(Exception):
            triton_version = version("triton")
        write({"gpu": device_name(), "torch": torch.__version__, "triton": triton_version, "commit": commit()})
        shapes = TINY if options.quick else SHAPES
        parts = [measure_network(options.batch, options.quick)] if options.network else map(measure_shape, shapes)
        for part in parts:
            try:
                for record in part:
                    write(record)
            except Exception as error:  # the other shapes can still be measured
                traceback.print_exc()
                write({"failed": f"{type(error).__name__}: {error}"})
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
        for record in summary(records):
            write(record)


if __name__ == "__main__":
    main()
