"""Time a step, and keep what was measured as records."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Record:
    """One number; `value` is the median of the repetitions, `p20` and `p80` their spread."""

    case: str
    provider: str
    metric: str
    value: float
    p20: float
    p80: float
    batch: int
    dtype: str
    gpu: str
    torch: str
    triton: str
    commit: str


def device_name() -> str:
    """Name the GPU, or the processor where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def commit() -> str:
    """Return the short hash of the checkout, with a + where it has changes; a copy without history says so."""
    run = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


class Results:
    """Collects records, prints them as they come, writes them at the end."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        try:
            triton = version("triton")
        except PackageNotFoundError:
            triton = "none"
        self.common = {"gpu": device_name(), "torch": torch.__version__, "triton": triton, "commit": commit()}

    def add(self, case: str, provider: str, metric: str, values: list[float], batch: int, dtype: str) -> float:
        """Keep the median and spread of repeated measurements; returns the median."""
        middle = statistics.median(values)
        low, high = (quantile(values, share) for share in (0.2, 0.8))
        self.records.append(Record(case, provider, metric, middle, low, high, batch, dtype, **self.common))
        print(
            f"{case:24} {provider:16} {metric:14} {middle:12.4g}   ({low:.4g} to {high:.4g})   batch {batch}, {dtype}"
        )
        return middle

    def write(self) -> Path:
        """Write all records to results/DATE_DEVICE_COMMIT.json."""
        name = "-".join(self.common["gpu"].replace("(R)", "").replace(",", "").split())
        path = RESULTS / f"{date.today()}_{name}_{self.common['commit'].replace('+', '-changed')}.json"
        path.write_text(json.dumps([asdict(record) for record in self.records], indent=1) + "\n")
        return path


def quantile(values: list[float], share: float) -> float:
    """Return the value below which this share of the values lies."""
    return sorted(values)[round(share * (len(values) - 1))]


def milliseconds(step: Callable[[], object], repeats: int, warm_up: int = 3) -> list[float]:
    """Time a step again and again: on CUDA by events, so that the host's own time hides behind the device's."""
    for _ in range(warm_up):
        step()
    if not torch.cuda.is_available():
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairwise(events)]


def measure_step(
    results: Results, case: str, provider: str, step: Callable[[], object], batch: int, dtype: str, repeats: int
) -> None:
    """Record the first step's seconds (compilation), then milliseconds, images/s and, on CUDA, peak memory."""
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    results.add(case, provider, "first_step_s", [time.perf_counter() - start], batch, dtype)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times = milliseconds(step, repeats)
    results.add(case, provider, "ms", times, batch, dtype)
    results.add(case, provider, "images_per_s", [1e3 * batch / ms for ms in times], batch, dtype)
    if torch.cuda.is_available():
        results.add(case, provider, "peak_gib", [torch.cuda.max_memory_allocated() / 2**30], batch, dtype)
