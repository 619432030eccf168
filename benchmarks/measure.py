"""Time steps, and write measurements as records."""

import gc
import json
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Record:
    """One measurement: `value` is the median of the repetitions, `p20` and `p80` are percentiles."""

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
    """Return the name of the GPU, or of the processor if there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def commit() -> str:
    """Return the short commit hash of the checkout, with a + if it has changes, or "unknown" without history."""
    run = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


class Results:
    """Collect records, print them as they come, and write them after each competitor.

    Args:
        folder: folder for DATE_DEVICE_COMMIT.json; None writes nothing.
        at_commit: commit to note in the records, for a copy without history; empty takes the checkout's commit.
    """

    def __init__(self, folder: Path | None = None, at_commit: str = "") -> None:
        self.records: list[Record] = []
        self.failures: list[str] = []
        try:
            triton = version("triton")
        except PackageNotFoundError:
            triton = "none"
        self.common = {
            "gpu": device_name(), "torch": torch.__version__, "triton": triton, "commit": at_commit or commit()
        }  # fmt: skip
        device = "-".join(self.common["gpu"].replace("(R)", "").replace(",", "").split())
        name = f"{date.today()}_{device}_{self.common['commit'].replace('+', '-changed')}.json"
        self.path = folder / name if folder else None

    def add(self, case: str, provider: str, metric: str, values: list[float], batch: int, dtype: str) -> float:
        """Record the median and spread of repeated measurements; return the median."""
        middle = statistics.median(values)
        low, high = (quantile(values, share) for share in (0.2, 0.8))
        self.records.append(Record(case, provider, metric, middle, low, high, batch, dtype, **self.common))
        spread = f"({low:.4g} to {high:.4g})"
        print(f"{case:32} {provider:18} {metric:14} {middle:10.4g}   {spread:22} batch {batch}, {dtype}", flush=True)
        return middle

    def write(self) -> None:
        """Write all records so far."""
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps([asdict(record) for record in self.records], indent=1) + "\n")

    def attempt(self, what: str, measure: Callable[..., None], *arguments: object) -> None:
        """Call `measure(self, *arguments)` and free its memory and compiled code; report an error and continue."""
        start = time.perf_counter()
        try:
            measure(self, *arguments)
        except Exception:
            traceback.print_exc()
            print(f"failed: {what}", flush=True)
            self.failures.append(what)
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"{what}: {time.perf_counter() - start:.0f} s in all", flush=True)
        self.write()


def quantile(values: list[float], share: float) -> float:
    """Return the value below which the given share of the values lies."""
    return sorted(values)[round(share * (len(values) - 1))]


def milliseconds(
    step: Callable[[], object], repeats: int, warm_up: int = 3, between: Callable[[], object] | None = None
) -> list[float]:
    """Time a step repeatedly; on CUDA with events, which leave out the time of the host.

    Args:
        step: function to time.
        repeats: number of timed calls.
        warm_up: number of calls before them.
        between: function to call before each step, not timed; for example to empty the cache.
    """
    cuda = torch.cuda.is_available()
    for _ in range(warm_up):
        step()
    if cuda:
        torch.cuda.synchronize()
    pairs = []
    for _ in range(repeats):
        if between:
            between()
        start = _now(cuda)
        step()
        pairs.append((start, _now(cuda)))
    if cuda:
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]
    return [1e3 * (end - start) for start, end in pairs]


def _now(cuda: bool) -> Any:
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """Capture a step as a CUDA graph and return its replay, which does not depend on the speed of the host."""
    if not torch.cuda.is_available():
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def measure_step(
    results: Results,
    case: str,
    provider: str,
    step: Callable[[], object],
    batch: int,
    dtype: str,
    repeats: int,
    capture: bool = False,
) -> list[float]:
    """Record the seconds of the first step (compilation), then milliseconds, images/s and, on CUDA, peak memory.

    Returns the milliseconds. On CUDA, `capture` times the replay of a CUDA graph.
    """
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    results.add(case, provider, "first_step_s", [time.perf_counter() - start], batch, dtype)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times = milliseconds(captured(step) if capture else step, repeats)
    results.add(case, provider, "ms", times, batch, dtype)
    results.add(case, provider, "images_per_s", [1e3 * batch / ms for ms in times], batch, dtype)
    if torch.cuda.is_available():
        results.add(case, provider, "peak_gib", [torch.cuda.max_memory_allocated() / 2**30], batch, dtype)
    return times
