"""Compare the speed of lamamba with other networks and scans. The tests of the operations must pass first.

    python benchmarks/run.py                    everything that this machine can run
    python benchmarks/run.py train_s infer      only cases that begin with one of these
    python benchmarks/run.py --quick            a quick check with tiny sizes; ignore its numbers

On a GPU, in bf16:

* LaMamba with one and sixteen states against DiT of the same size (networks.py). Training uses float32 weights,
  autocast and fused AdamW; inference uses bfloat16 weights. Both are replayed as CUDA graphs.
* The scan alone, against a public one (peers.py) and the bytes that it must move.
* A training step by groups of operations (kernel_groups.py).

On a CPU: the scan and `nano` against naive implementations.

The records go to results/DATE_DEVICE_COMMIT.json after every competitor. If a competitor fails, the error is reported,
the others continue, and the exit status is 1. At the end, the targets are printed beside the measured values. report.py
generates docs/performance.md.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import lamamba.ops.selective_scan as scan_module
import networks
import peers
from kernel_groups import limits_by_group, milliseconds_by_group
from lamamba.model import LaMambaDiff
from lamamba.ops.backend import use_backend
from lamamba.ops.selective_scan import scan_grid, selective_scan
from lamamba.ops.selective_scan.reference import selective_scan_reference
from measure import RESULTS, ROOT, Results, captured, measure_step, milliseconds
from networks import CUDA, DEVICE, inference_step, random_batch, to_bfloat16, training_step
from report import target_table

# Bytes: too many for any cache.
LARGE = 2**30 if CUDA else 2**24


# Batch sizes, by size of the network and image size in pixels. The first batch fills the GPU.
TRAINING = {
    ("s", 256): (256, 32), ("b", 256): (128, 32), ("l", 256): (128,), ("xl", 256): (128,), ("xl", 512): (32,),
}  # fmt: skip
INFERENCE = {
    ("s", 256): (256, 8, 1), ("b", 256): (128, 8, 1), ("l", 256): (128, 1), ("xl", 256): (128, 8, 1),
    ("xl", 512): (32,),
}  # fmt: skip


def train(size: str, results: Results, providers: list[str], quick: bool) -> None:
    """Time AdamW steps of one network size."""
    for (of_size, pixels), batches in TRAINING.items():
        for provider in providers if of_size == size else ():
            for number, batch in enumerate(batches):
                side, batch = (8, 2 - number) if quick else (pixels // 8, batch)
                case = f"train_{size}_{pixels}"
                results.attempt(f"{case} {provider} {batch}", _train, case, size, provider, side, batch, quick)


def _train(results: Results, case: str, size: str, provider: str, side: int, batch: int, quick: bool) -> None:
    network = networks.build(size, provider, side, quick)
    step = training_step(network, random_batch(batch, side), autocast=True)
    measure_step(results, case, _named(provider, size), step, batch, "bf16", 2 if quick else 10, capture=True)


def _named(provider: str, size: str) -> str:
    return provider.replace("SIZE", size)


def infer(size: str, results: Results, providers: list[str], quick: bool) -> None:
    """Time forward passes of one network size: large batches, and small ones, which are limited by launches."""
    for (of_size, pixels), batches in INFERENCE.items():
        side, batches = (8, (2, 1)[: len(batches)]) if quick else (pixels // 8, batches)
        for provider in providers if of_size == size else ():
            case = f"infer_{size}_{pixels}"
            results.attempt(f"{case} {provider}", _infer, case, size, provider, side, batches, quick)


def _infer(
    results: Results, case: str, size: str, provider: str, side: int, batches: tuple[int, ...], quick: bool
) -> None:
    network = to_bfloat16(networks.build(size, provider, side, quick).eval())
    for batch in batches:
        step = inference_step(network, random_batch(batch, side, dtype=torch.bfloat16))
        measure_step(results, case, _named(provider, size), step, batch, "bf16", 2 if quick else 20, capture=True)


def resolution(results: Results, providers: list[str], quick: bool) -> None:
    """Time inference per image pixel from 256 to 2048 px, with the same number of pixels per batch."""
    for size in (8, 12) if quick else (32, 64, 128, 256):
        for provider in providers:
            results.attempt(f"resolution_{8 * size} {provider}", _resolution, provider, size, quick)


def _resolution(results: Results, provider: str, size: int, quick: bool) -> None:
    number = 1 if quick else (256 // size) ** 2
    network = to_bfloat16(networks.build("xl", provider, size, quick).eval())
    step = inference_step(network, random_batch(number, size, dtype=torch.bfloat16))
    case, pixels = f"resolution_{8 * size}", number * (8 * size) ** 2
    provider = _named(provider, "xl")
    times = measure_step(results, case, provider, step, number, "bf16", 2 if quick else 10, capture=True)
    results.add(case, provider, "ns_per_pixel", [1e6 * ms / pixels for ms in times], number, "bf16")


def limits(results: Results, providers: list[str], quick: bool) -> None:
    """Measure the copy bandwidth and the matrix product peak of this machine."""
    results.attempt("limits", _limits, quick)


def _limits(results: Results, quick: bool) -> None:
    dtype, name = (torch.bfloat16, "bf16") if CUDA else (torch.float32, "float32")
    repeats = 3 if quick else 20
    source, target = torch.empty(2, LARGE // 2, dtype=torch.uint8, device=DEVICE).zero_()
    times = milliseconds(lambda: target.copy_(source), repeats)
    results.add("copy", "pytorch", "gb_per_s", [LARGE / ms / 1e6 for ms in times], 1, name)
    side = 8192 if CUDA else 256
    left, right = torch.randn(2, side, side, dtype=dtype, device=DEVICE)
    times = milliseconds(lambda: left @ right, repeats)
    results.add("matmul", "pytorch", "tflop_per_s", [2 * side**3 / ms / 1e9 for ms in times], 1, name)


def scan(results: Results, providers: list[str], quick: bool) -> None:
    """Time the four scans over a grid at XL's three widths, and a public scan at the first."""
    number = 2 if quick or not CUDA else 128
    stages = ((8, 32, 2), (4, 64, 4)) if quick else ((32, 640, 20), (16, 1280, 40), (8, 2560, 80))
    for side, channels, rank in stages:
        results.attempt(f"scan {side}x{side}x{channels} lamamba", _scan, number, side, channels, rank, quick)
    if CUDA and peers.is_installed():
        results.attempt(f"scan {peers.NAME}", _scan_peer, number, *stages[0], quick)


def _scan_inputs(b: int, side: int, e: int, r: int) -> tuple[Tensor, ...]:
    dtype = torch.bfloat16 if CUDA else torch.float32
    x = torch.randn(b, side, side, e, device=DEVICE, dtype=dtype)
    low = torch.randn(b, side, side, 4 * (r + 2), device=DEVICE, dtype=dtype)
    weight = torch.randn(4, e, r, device=DEVICE, dtype=dtype) * r**-0.5
    bias, A_log, D = (torch.randn(*shape, device=DEVICE) for shape in ((4, e), (4, e, 1), (4, e)))
    return x, low, weight, bias - 4, A_log, D


def _scan(results: Results, b: int, side: int, e: int, r: int, quick: bool) -> None:
    inputs = _scan_inputs(b, side, e, r)
    times = _measure_scan(results, "lamamba", lambda *tensors: scan_grid(*tensors).sum(dim=0), inputs, quick)
    read = sum(x.numel() * x.element_size() for x in inputs)
    written = inputs[0].numel() * inputs[0].element_size()
    # Forward: all inputs, y. Backward: all inputs, the gradient of y, and a gradient of each input.
    for direction, must_move in (("forward", read + written), ("backward", 2 * read + written)):
        case = _scan_case(direction, inputs)
        bandwidths = [must_move / ms / 1e6 for ms in times[direction]]
        results.add(case, "lamamba", "gb_per_s", bandwidths, b, "bf16" if CUDA else "float32")


def _scan_case(direction: str, inputs: tuple[Tensor, ...]) -> str:
    return f"scan_{direction}_{'x'.join(str(length) for length in inputs[0].shape[1:])}"


def _measure_scan(
    results: Results, provider: str, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], quick: bool
) -> dict[str, list[float]]:
    """Record milliseconds of the forward and backward pass; the cache is emptied before each."""
    repeats = 2 if quick else 20 if CUDA else 5
    emptied = torch.empty(LARGE, dtype=torch.uint8, device=DEVICE)
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    y = function(*leaves)
    grad = torch.randn_like(y)

    @torch.no_grad()
    def forward() -> object:
        return function(*inputs)

    def backward() -> object:
        return torch.autograd.grad(y, leaves, grad, retain_graph=True)

    between = emptied.zero_ if CUDA else None
    times = {
        "forward": milliseconds(captured(forward), repeats, between=between),
        "backward": milliseconds(backward, repeats, between=between),
    }
    for direction, values in times.items():
        dtype = "float32" if inputs[0].dtype == torch.float32 else "bf16"
        results.add(_scan_case(direction, inputs), provider, "ms", values, inputs[0].shape[0], dtype)
    return times


def _scan_peer(results: Results, b: int, side: int, e: int, r: int, quick: bool) -> None:
    """Time a public recurrence, alone and with everything that `scan_grid` does; check its results first."""

    def whole(*tensors: Tensor) -> Tensor:
        with mock.patch.object(scan_module, "selective_scan", peers.selective_scan):
            return scan_grid(*tensors, backend="pytorch")[0]

    small = _scan_inputs(2, side, 64, r)
    wanted = scan_grid(*(x.float() for x in small), backend="pytorch")[0]
    error = (whole(*small).float() - wanted).norm() / wanted.norm()
    if not error < 0.02:
        raise AssertionError(f"{peers.NAME}: relative error {error:.3g}: too large, so its speed is not measured")
    inputs = _scan_inputs(b, side, e, r)
    _measure_scan(results, f"{peers.NAME}, end to end", whole, inputs, quick)
    repeats = 2 if quick else 20
    emptied = torch.empty(LARGE, dtype=torch.uint8, device=DEVICE)
    log_gates = -torch.rand(4 * b, side * side, e, device=DEVICE, dtype=torch.bfloat16)
    ready_made = log_gates.requires_grad_(), torch.randn_like(log_gates).requires_grad_()
    y = peers.recurrence(*ready_made)
    grad = torch.randn_like(y)

    @torch.no_grad()
    def forward() -> object:
        return peers.recurrence(*ready_made)

    def backward() -> object:
        return torch.autograd.grad(y, ready_made, grad, retain_graph=True)

    for direction, step in (("forward", captured(forward)), ("backward", backward)):
        times = milliseconds(step, repeats, between=emptied.zero_)
        results.add(_scan_case(direction, inputs), f"{peers.NAME}, alone", "ms", times, b, "bf16")


def profile(results: Results, providers: list[str], quick: bool) -> None:
    """Time LaMamba's training step by groups of operations, with the hardware's limit of each."""
    results.attempt("profile", _profile, quick)


def _profile(results: Results, quick: bool) -> None:
    number, size = (2, 8) if quick else (128, 32)
    if not any(record.case == "matmul" for record in results.records):
        _limits(results, quick)
    measured = {record.case: record.value for record in results.records if record.case in ("copy", "matmul")}
    step = training_step(networks.build("xl", "lamamba", size, quick), random_batch(number, size), autocast=True)
    whole = milliseconds(captured(step), 2 if quick else 5)
    case = "profile_train_xl_256"
    results.add(case, "lamamba", "ms", whole, number, "bf16")
    spent = milliseconds_by_group(step)
    at_least = limits_by_group(step, measured["copy"], measured["matmul"])
    for group in sorted(spent, key=lambda group: -spent[group]):
        name = f"{case}_{group.replace(' ', '_')}"
        results.add(name, "lamamba", "ms", [spent[group]], number, "bf16")
        results.add(name, "lamamba", "limit_ms", [at_least.get(group, 0.0)], number, "bf16")


def scan_naive(results: Results, providers: list[str], quick: bool) -> None:
    """Time one scan over a sequence, and a loop over time that autograd records."""
    b, length, d = (1, 64, 8) if quick else (8, 1024, 256)
    u, delta = torch.randn(b, 1, length, d), torch.rand(b, 1, length, d) * 0.1
    A, D = -torch.rand(1, d, 1), torch.randn(1, d)
    B, C = torch.randn(b, 1, length, 1), torch.randn(b, 1, length, 1)
    leaves = tuple(tensor.requires_grad_() for tensor in (u, delta, A, B, C, D))
    grad = torch.randn_like(u)
    for provider, function in (("lamamba", selective_scan), ("naive loop", selective_scan_reference)):

        def step(function: Callable[..., Tensor] = function) -> None:
            torch.autograd.grad(function(*leaves), leaves, grad)

        results.add("scan_both_sequence", provider, "ms", milliseconds(step, 2 if quick else 5), b, "float32")


def train_nano(results: Results, providers: list[str], quick: bool) -> None:
    """Time a training step of `nano`, the network of the demo."""
    for provider in ("lamamba",) if CUDA else ("lamamba", "naive scan"):
        results.attempt(f"train_nano {provider}", _train_nano, provider, quick)


def _train_nano(results: Results, provider: str, quick: bool) -> None:
    number = 2 if quick else 32 if not CUDA else 512
    network = LaMambaDiff.from_preset("nano").to(DEVICE)
    step = training_step(network, random_batch(number, 32, channels=1, num_classes=10), autocast=CUDA)
    if provider == "lamamba":
        measure_step(results, "train_nano", provider, step, number, "bf16" if CUDA else "float32", 5, capture=True)
    else:
        with use_backend("pytorch"), mock.patch.object(scan_module, "selective_scan", selective_scan_reference):
            measure_step(results, "train_nano", provider, step, number, "float32", 1)


Case = Callable[[Results, list[str], bool], None]
NETWORKS: dict[str, Case] = {
    f"{function.__name__}_{size}": partial(function, size) for size in networks.SIZES for function in (train, infer)
}
ON_GPU: dict[str, Case] = {
    "limits": limits, **NETWORKS, "scan": scan, "resolution": resolution, "profile": profile, "train_nano": train_nano
}  # fmt: skip
ON_CPU: dict[str, Case] = {"limits": limits, "scan": scan, "scan_naive": scan_naive, "train_nano": train_nano}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="run only cases that begin with one of these")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, writes nothing")
    parser.add_argument("--skip-tests", action="store_true", help="do not run the tests of the operations first")
    parser.add_argument("--also", nargs="+", default=[], choices=networks.MORE_PROVIDERS, help="more networks")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the records (benchmarks/results)")
    parser.add_argument("--commit", default="", help="commit to note, for a copy without history")
    arguments = parser.parse_args()
    chosen = ON_GPU if CUDA else {**ON_CPU, **ON_GPU} if arguments.quick else ON_CPU
    if arguments.cases:
        there_are = ", ".join(chosen)
        chosen = {name: case for name, case in chosen.items() if name.startswith(tuple(arguments.cases))}
        if not chosen:
            parser.error(f"no case begins with {' or '.join(arguments.cases)}: choose from {there_are}")
    untested = arguments.skip_tests or arguments.quick
    if not untested and subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/ops"], cwd=ROOT).returncode:
        sys.exit("tests of the operations fail: fix them before you measure speed, or pass --skip-tests")
    torch.manual_seed(0)
    results = Results(None if arguments.quick else arguments.out, arguments.commit)
    for name, case in chosen.items():
        results.attempt(name, case, [*networks.PROVIDERS, *arguments.also], arguments.quick)
    if CUDA or arguments.quick:
        print(*target_table(results.records), sep="\n")
    if results.path:
        print(f"written: {results.path}")
    if results.failures:
        sys.exit(f"failed: {'; '.join(results.failures)}")


if __name__ == "__main__":
    main()
