"""Measure lamamba against its peers, after the tests of its operations have passed.

    python benchmarks/run.py                    everything this machine can run
    python benchmarks/run.py train_xl infer_xl  the cases that begin so
    python benchmarks/run.py --quick            tiny sizes, to see that it works: the numbers mean nothing

On a GPU: XL against diffusers' DiT-XL/2, both compiled, in bf16 autocast; the scan by itself against the bytes it must
move. On a CPU: the scan and `nano` against the naive ways. Writes results/DATE_DEVICE_COMMIT.json.
"""

import argparse
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

import lamamba.ops.selective_scan as scan_module
from lamamba.model import LaMambaDiff
from lamamba.ops.selective_scan import scan_grid, selective_scan
from lamamba.ops.selective_scan.reference import selective_scan_reference
from measure import ROOT, Results, measure_step, milliseconds

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


class Xl(nn.Module):
    """LaMamba-XL as the benchmarks call every network: (x_t, t, y) -> (b, 2c, h, w)."""

    def __init__(self, size: int, quick: bool) -> None:
        super().__init__()
        options = {"embed_dim": 32, "depths": (1, 1, 1, 1), "bottleneck_depth": 1} if quick else {}
        self.network = LaMambaDiff.from_preset("xl-512" if size == 64 else "xl-256", **options)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.network(x_t, t, y)
        return out


class DiT(nn.Module):
    """DiT-XL/2 (Peebles & Xie 2023, arXiv 2212.09748) as diffusers has it, 675 M parameters; attention by SDPA."""

    def __init__(self, size: int, quick: bool) -> None:
        super().__init__()
        from diffusers import DiTTransformer2DModel

        self.network = DiTTransformer2DModel(
            num_attention_heads=2 if quick else 16, attention_head_dim=8 if quick else 72, in_channels=4,
            out_channels=8, num_layers=2 if quick else 28, sample_size=size, patch_size=2,
        )  # fmt: skip

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.network(x_t, timestep=t, class_labels=y, return_dict=False)[0]
        return out


NETWORKS: dict[str, Callable[[int, bool], nn.Module]] = {"lamamba": Xl, "dit-xl-2": DiT}


def batch_of(number: int, size: int, channels: int = 4, num_classes: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(number, channels, size, size, device=DEVICE),
        torch.randint(0, 1000, (number,), device=DEVICE),
        torch.randint(0, num_classes, (number,), device=DEVICE),
    )


@contextmanager
def cleared() -> Iterator[None]:
    """Give memory and compiled code back, so that one case does not weigh on the next."""
    yield
    gc.collect()
    torch.compiler.reset()
    if CUDA:
        torch.cuda.empty_cache()


def training_step(network: nn.Module, batch: tuple[Tensor, Tensor, Tensor], autocast: bool) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    run = torch.compile(network) if CUDA else network

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            out = run(*batch)
        out.float().square().mean().backward()
        optimizer.step()

    return step


def inference_step(network: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Callable[[], object]:
    run = torch.compile(network) if CUDA else network

    @torch.no_grad()
    def step() -> object:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return run(*batch)

    return step


def train_xl(results: Results, quick: bool) -> None:
    for pixels, number in ((256, 128), (512, 32)):
        size, number = (8, 2) if quick else (pixels // 8, number)
        for provider, build in NETWORKS.items():
            with cleared():
                step = training_step(build(size, quick).to(DEVICE), batch_of(number, size), autocast=True)
                measure_step(results, f"train_xl_{pixels}", provider, step, number, "bf16", 2 if quick else 10)


def infer_xl(results: Results, quick: bool) -> None:
    for pixels, number in ((256, 128), (512, 32), (256, 8), (256, 1)):
        size, number = (8, min(number, 2)) if quick else (pixels // 8, number)
        for provider, build in NETWORKS.items():
            with cleared():
                step = inference_step(build(size, quick).to(DEVICE).eval(), batch_of(number, size))
                measure_step(results, f"infer_xl_{pixels}", provider, step, number, "bf16", 2 if quick else 30)


def resolution(results: Results, quick: bool) -> None:
    """Inference of one image, from 256 to 2048 px: the time of one pixel."""
    for size in (8, 12) if quick else (32, 64, 128, 256):
        for provider, build in NETWORKS.items():
            with cleared():
                # A batch of as many pixels at every size, so that all fill the GPU alike.
                number = 1 if quick else (256 // size) ** 2
                step = inference_step(build(size, quick).to(DEVICE).eval(), batch_of(number, size))
                times = milliseconds(step, 2 if quick else 10)
                pixels = number * (8 * size) ** 2
                values = [1e6 * ms / pixels for ms in times]
                results.add(f"resolution_{8 * size}", provider, "ns_per_pixel", values, number, "bf16")


def scan(results: Results, quick: bool) -> None:
    """Four scans over the grid of XL's first stage."""
    b, side, e, r = (2, 8, 32, 4) if quick else (128, 32, 640, 20) if CUDA else (2, 32, 640, 20)
    dtype, name = (torch.bfloat16, "bf16") if CUDA else (torch.float32, "float32")
    repeats = 2 if quick else 50 if CUDA else 5
    x = torch.randn(b, side, side, e, device=DEVICE, dtype=dtype)
    low = torch.randn(b, side, side, 4 * (r + 2), device=DEVICE, dtype=dtype)
    weight = torch.randn(4, e, r, device=DEVICE, dtype=dtype) * r**-0.5
    bias, A, D = (torch.randn(*shape, device=DEVICE) for shape in ((4, e), (4, e, 1), (4, e)))
    inputs = (x, low, weight, bias - 4, -A.exp(), D)
    leaves = tuple(tensor.clone().requires_grad_() for tensor in inputs)
    grad = torch.randn_like(x)

    def forward() -> None:
        with torch.no_grad():
            scan_grid(*inputs)

    def both() -> None:
        torch.autograd.grad(scan_grid(*leaves), leaves, grad)

    times = milliseconds(forward, repeats)
    results.add("scan_forward", "lamamba", "ms", times, b, name)
    must_move = (2 * x.numel() + low.numel()) * x.element_size()
    results.add("scan_forward", "lamamba", "gb_per_s", [must_move / ms / 1e6 for ms in times], b, name)
    results.add("scan_both", "lamamba", "ms", milliseconds(both, repeats), b, name)
    copied = torch.empty_like(x)
    times = milliseconds(lambda: copied.copy_(x), repeats)
    results.add("copy", "pytorch", "gb_per_s", [2 * x.numel() * x.element_size() / ms / 1e6 for ms in times], b, name)


def scan_naive(results: Results, quick: bool) -> None:
    """One scan over a sequence against the loop over time that autograd records."""
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


def train_nano(results: Results, quick: bool) -> None:
    number = 2 if quick else 32 if not CUDA else 512
    naive = mock.patch.object(scan_module, "selective_scan", selective_scan_reference)
    for provider in ("lamamba",) if CUDA else ("lamamba", "naive scan"):
        with cleared():
            network = LaMambaDiff.from_preset("nano").to(DEVICE)
            step = training_step(network, batch_of(number, 32, channels=1, num_classes=10), autocast=CUDA)
            if provider == "lamamba":
                measure_step(results, "train_nano", provider, step, number, "bf16" if CUDA else "float32", 5)
            else:
                with naive:
                    measure_step(results, "train_nano", provider, step, number, "float32", 1)


ON_GPU = (scan, train_xl, infer_xl, resolution, train_nano)
ON_CPU = (scan, scan_naive, train_nano)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="run only cases that begin with one of these")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing is written")
    parser.add_argument("--skip-tests", action="store_true", help="do not run the operations' tests first")
    arguments = parser.parse_args()
    chosen = ON_GPU if CUDA else (*ON_CPU, train_xl, infer_xl, resolution) if arguments.quick else ON_CPU
    if arguments.cases:
        chosen = tuple(case for case in chosen if case.__name__.startswith(tuple(arguments.cases)))
        if not chosen:
            names = ", ".join(case.__name__ for case in (ON_GPU if CUDA else ON_CPU))
            parser.error(f"no case begins with {' or '.join(arguments.cases)}: there are {names}")
    untested = arguments.skip_tests or arguments.quick
    if not untested and subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/ops"], cwd=ROOT).returncode:
        sys.exit("the operations' tests fail: a wrong result has no speed")
    torch.manual_seed(0)
    results = Results()
    for case in chosen:
        case(results, arguments.quick)
    if not arguments.quick:
        print(f"written: {results.write()}")


if __name__ == "__main__":
    main()
