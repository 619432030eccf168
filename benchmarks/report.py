"""Make docs/performance.md, and the plots it shows, from the records of benchmarks/results/.

    python benchmarks/report.py             from the newest file of each device
    python benchmarks/report.py FILE...     from these files

No number on the page is typed by hand. What the profile means is said in benchmarks/profile_notes.md, which the page
takes in where there is a profile.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import RESULTS, ROOT, Record

DOCS = ROOT / "docs"
NOTES = Path(__file__).with_name("profile_notes.md")
PROFILE = "profile_train_xl_256"


@dataclass(frozen=True)
class Run:
    """One file of results: the records of one device."""

    day: str
    records: list[Record]

    @property
    def device(self) -> str:
        return self.records[0].gpu

    @property
    def on_cpu(self) -> bool:
        return self.device.endswith("threads")

    @property
    def slug(self) -> str:
        return re.sub(r"[^A-Za-z0-9]+", "-", self.device).strip("-")


def read_run(path: Path) -> Run:
    """Read a file of results; its name begins with the day."""
    return Run(path.name.split("_")[0], [Record(**record) for record in json.loads(path.read_text())])


def newest_runs(paths: Iterable[Path]) -> list[Run]:
    """Read the newest file of each device; of two on one day, the one written last. GPUs first."""
    newest = {}
    for path in sorted(paths, key=lambda path: (path.name.split("_")[0], path.stat().st_mtime)):
        run = read_run(path)
        newest[run.device] = run
    return sorted(newest.values(), key=lambda run: (run.on_cpu, run.device))


def find(records: list[Record], case: str, provider: str, metric: str, batch: int | None = None) -> Record | None:
    """Look one record up; None if it was not measured."""
    for record in records:
        if (record.case, record.provider, record.metric) == (case, provider, metric) and batch in (None, record.batch):
            return record
    return None


def fastest_dit(records: list[Record], case: str, batch: int | None = None) -> str:
    """Name the provider of the fastest DiT-XL/2 in a case."""
    times = [
        (record.value, record.provider)
        for record in records
        if (record.case, record.metric) == (case, "ms") and batch in (None, record.batch)
        if record.provider.startswith("dit")
    ]
    return min(times)[1] if times else "dit-xl-2"


def against_dit(case: str, metric: str, batch: int) -> Callable[[list[Record]], float | None]:
    """Make a function of records: lamamba's value over that of the fastest DiT-XL/2."""

    def ratio(records: list[Record]) -> float | None:
        ours = find(records, case, "lamamba", metric, batch)
        theirs = find(records, case, fastest_dit(records, case, batch), metric, batch)
        return ours.value / theirs.value if ours and theirs else None

    return ratio


def share_of_copy(stage: str) -> Callable[[list[Record]], float | None]:
    """Make a function of records: bytes the scan must move over its time, as a share of the copy bandwidth."""

    def share(records: list[Record]) -> float | None:
        ours = find(records, f"scan_forward_{stage}", "lamamba", "gb_per_s")
        copy = find(records, "copy", "pytorch", "gb_per_s")
        return ours.value / copy.value if ours and copy else None

    return share


def growth(provider: str) -> Callable[[list[Record]], float | None]:
    """Make a function of records: the time of a pixel at the worst size up to 2048 px, over that at 256 px."""

    def ratio(records: list[Record]) -> float | None:
        found = [find(records, f"resolution_{size}", provider, "ns_per_pixel") for size in (256, 512, 1024, 2048)]
        times = [record.value for record in found if record]
        return max(times) / times[0] if len(times) == len(found) else None

    return ratio


@dataclass(frozen=True)
class Asked:
    """A ratio that is asked for: at least `must`, or at most where `aim` is below it."""

    what: str
    measure: Callable[[list[Record]], float | None]
    must: float
    aim: float

    def verdict(self, value: float) -> str:
        """Say whether a value meets what must be, or also what is aimed at."""
        sign = 1 if self.aim > self.must else -1
        return "aim met" if sign * value >= sign * self.aim else "met" if sign * value >= sign * self.must else "missed"


ASKED = (
    Asked("XL-256 training, images/s, over DiT-XL/2", against_dit("train_xl_256", "images_per_s", 128), 1.5, 2.3),
    Asked("XL-256 inference, images/s, over DiT-XL/2", against_dit("infer_xl_256", "images_per_s", 128), 1.6, 2.3),
    Asked("XL-512 training, images/s, over DiT-XL/2", against_dit("train_xl_512", "images_per_s", 32), 1.8, 2.6),
    Asked("XL-512 inference, images/s, over DiT-XL/2", against_dit("infer_xl_512", "images_per_s", 32), 1.8, 2.6),
    Asked("XL-256 training, peak memory, over DiT-XL/2", against_dit("train_xl_256", "peak_gib", 128), 1.0, 2 / 3),
    Asked("XL-512 training, peak memory, over DiT-XL/2", against_dit("train_xl_512", "peak_gib", 32), 1.0, 2 / 3),
    Asked("scan forwards, share of copy bandwidth, 32x32x640", share_of_copy("32x32x640"), 0.5, 0.8),
    Asked("scan forwards, share of copy bandwidth, 16x16x1280", share_of_copy("16x16x1280"), 0.5, 0.8),
    Asked("scan forwards, share of copy bandwidth, 8x8x2560", share_of_copy("8x8x2560"), 0.5, 0.8),
    Asked("time of a pixel, worst up to 2048 px, over 256 px", growth("lamamba"), 1.15, 1.0),
    Asked("XL-256 inference, batch 8, ms, over DiT-XL/2", against_dit("infer_xl_256", "ms", 8), 1.0, 0.5),
    Asked("XL-256 inference, batch 1, ms, over DiT-XL/2", against_dit("infer_xl_256", "ms", 1), 1.0, 0.5),
)


def table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Lay out a Markdown table: the first column to the left, the others to the right."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] + ["---:"] * (len(header) - 1), *rows)] + [""]


def number(value: float) -> str:
    """Write a number with three digits that count."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cell(record: Record | None) -> str:
    """Write a value and, where there is one, its spread."""
    if record is None:
        return ""
    value, low, high = (number(x) for x in (record.value, record.p20, record.p80))
    return value if low == high else f"{value} ({low} to {high})"


def asked_table(records: list[Record]) -> list[str]:
    """Hold what was measured against what is asked for; nothing where none of it was measured."""
    rows = []
    for asked in ASKED:
        value = asked.measure(records)
        if value is not None:
            bound = "at least" if asked.aim > asked.must else "at most"
            rows.append(
                [asked.what, f"{value:.2f}", f"{bound} {asked.must:.2f}", f"{asked.aim:.2f}", asked.verdict(value)]
            )
    return table(["", "measured", "must", "aim", ""], rows) if rows else []


def network_tables(records: list[Record]) -> list[str]:
    """Tabulate training and inference of the networks that are compared."""
    lines = []
    for title, prefix in (("Training", "train_xl_"), ("Inference", "infer_xl_")):
        timed = [record for record in records if record.case.startswith(prefix) and record.metric == "ms"]
        if not timed:
            continue
        rows = []
        for record in sorted(timed, key=lambda record: (record.case, -record.batch)):

            def other(metric: str, record: Record = record) -> str:
                return cell(find(records, record.case, record.provider, metric, record.batch))

            size = record.case.removeprefix(prefix)
            rows.append(
                [record.provider, size, str(record.batch), other("images_per_s"), cell(record), other("peak_gib"),
                 other("first_step_s")]
            )  # fmt: skip
        lines += [f"### {title}", ""]
        lines += table(["network", "px", "batch", "images/s", "ms", "peak GiB", "first step, s"], rows)
    return lines


def resolution_table(records: list[Record]) -> list[str]:
    """Tabulate the time of a pixel over the size of the image."""
    timed = [record for record in records if record.metric == "ns_per_pixel"]
    sizes = sorted({int(record.case.removeprefix("resolution_")) for record in timed})
    rows = []
    for provider in dict.fromkeys(record.provider for record in timed):
        found = [find(timed, f"resolution_{size}", provider, "ns_per_pixel") for size in sizes]
        rows.append([provider, *(cell(record) for record in found)])
    return table(["ns per image pixel", *(f"{size} px" for size in sizes)], rows) if rows else []


def scan_table(records: list[Record]) -> list[str]:
    """Tabulate the scan by itself."""
    timed = [record for record in records if re.match(r"scan_\w+_\d+x", record.case) and record.metric == "ms"]
    copy = find(records, "copy", "pytorch", "gb_per_s")
    rows = []
    for record in sorted(timed, key=lambda record: (record.case.split("_")[1] == "backward", record.batch)):
        _, direction, grid = record.case.split("_")
        moved = find(records, record.case, record.provider, "gb_per_s")
        share = f"{moved.value / copy.value:.0%}" if moved and copy else ""
        rows.append([record.provider, direction, grid, record.dtype, cell(record), cell(moved), share])
    return table(["scan", "", "grid", "dtype", "ms", "GB/s", "of copy bandwidth"], rows) if rows else []


def profile_table(records: list[Record]) -> list[str]:
    """Tabulate a training step by groups of operations, the longest first."""
    groups = [
        record for record in records if record.case.startswith(f"{PROFILE}_") and record.metric == "ms"
    ]  # fmt: skip
    if not groups:
        return []
    whole = find(records, PROFILE, "lamamba", "ms")
    total = sum(record.value for record in groups)
    rows = []
    for record in sorted(groups, key=lambda record: -record.value):
        limit = find(records, record.case, record.provider, "limit_ms")
        name = record.case.removeprefix(f"{PROFILE}_").replace("_", " ")
        row = [name, number(record.value), f"{record.value / total:.0%}"]
        least = limit.value if limit else 0.0
        rows.append(row + ([number(least), f"{record.value / least:.1f}"] if least else ["", ""]))
    rows.append(["all", number(total), "100%", "", ""])
    lines = table(["operations", "ms", "share", "limit, ms", "times the limit"], rows)
    return lines + ([f"The step takes {number(whole.value)} ms by the clock.", ""] if whole else [])


def cpu_table(records: list[Record]) -> list[str]:
    """Tabulate each case's providers, and how many times as long as lamamba the others take."""
    rows = []
    for record in records:
        if record.metric == "ms":
            ours = find(records, record.case, "lamamba", "ms")
            times = f"{record.value / ours.value:.1f}" if ours and ours is not record else ""
            rows.append([record.case, record.provider, str(record.batch), record.dtype, cell(record), times])
    return table(["case", "way", "batch", "dtype", "ms", "times lamamba's"], rows)


def plot_throughput(records: list[Record], path: Path) -> bool:
    """Draw the speed of the networks over that of DiT, a group of bars a case; False if there is nothing to draw."""
    from matplotlib.figure import Figure

    drawn = [record for record in records if "_xl_" in record.case and record.metric == "images_per_s"]
    if not drawn:
        return False
    cases = list(dict.fromkeys((record.case, record.batch) for record in drawn))
    providers = list(dict.fromkeys(record.provider for record in drawn))
    reference = "dit-xl-2" if "dit-xl-2" in providers else providers[0]
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for index, provider in enumerate(providers):
        for place, (case, batch) in enumerate(cases):
            record = find(drawn, case, provider, "images_per_s", batch)
            unit = find(drawn, case, reference, "images_per_s", batch)
            if record and unit:
                x = place + (index - (len(providers) - 1) / 2) * 0.8 / len(providers)
                bars = axes.bar(x, record.value / unit.value, 0.75 / len(providers), color=f"C{index}",
                                label=provider if place == 0 else None)  # fmt: skip
                axes.bar_label(bars, [number(record.value)], fontsize=7)
    names = [f"{case.replace('_xl_', ' ')}\nbatch {batch}" for case, batch in cases]
    axes.set_xticks(range(len(cases)), names, fontsize=8)
    axes.set_ylabel(f"speed, times {reference}; images/s on top", fontsize=8)
    figure.legend(frameon=False, loc="outside upper left", ncols=len(providers))
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
    return True


def plot_resolution(records: list[Record], path: Path) -> bool:
    """Draw the time of a pixel over the size of the image; False if there is nothing to draw."""
    from matplotlib.figure import Figure

    drawn = [record for record in records if record.metric == "ns_per_pixel"]
    if not drawn:
        return False
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for provider in dict.fromkeys(record.provider for record in drawn):
        points = sorted(
            (int(record.case.removeprefix("resolution_")), record.value)
            for record in drawn
            if record.provider == provider
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=provider)
    sizes = sorted({int(record.case.removeprefix("resolution_")) for record in drawn})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("image side, px")
    axes.set_ylabel("inference, ns per image pixel")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
    return True


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def gpu_section(run: Run, docs: Path, notes: str) -> list[str]:
    """Write what a GPU measured, and draw its plots beside the page."""
    records = run.records
    lines = heading(run)
    asked = asked_table(records)
    if asked:
        lines += ["### What was asked of it", "", *asked]
    lines += network_tables(records)
    picture = docs / "performance" / f"{run.slug}-throughput.png"
    if plot_throughput(records, picture):
        lines += [f"![Images per second of each network](performance/{picture.name})", ""]
    resolution = resolution_table(records)
    if resolution:
        picture = docs / "performance" / f"{run.slug}-resolution.png"
        plot_resolution(records, picture)
        lines += ["### Resolution", "", "Inference of batches with equally many pixels at every size.", "", *resolution]
        lines += [f"![Time of a pixel over the size of the image](performance/{picture.name})", ""]
    scans = scan_table(records)
    if scans:
        copy = find(records, "copy", "pytorch", "gb_per_s")
        lines += ["### The scan alone", ""]
        lines += ["GB/s counts the bytes that must move: every input and output once, over all four paths."]
        lines += [f"A copy moves {cell(copy)} GB/s on this machine." if copy else "", "", *scans]
    profiled = profile_table(records)
    if profiled:
        lines += ["### Where a training step's time goes", ""]
        lines += [
            "XL-256 by groups of operations. A limit is the time to move each operation's inputs and outputs once"
        ]
        lines += ["at the copy bandwidth, or to do its matrix products at the measured peak.", "", *profiled]
        lines += [notes.strip(), ""] if notes.strip() else []
    return lines


def heading(run: Run) -> list[str]:
    """Say where numbers come from, also where a few cases were measured at another commit than the rest."""
    first = run.records[0]
    commits = ", ".join(dict.fromkeys(record.commit for record in run.records))
    several = "s" if "," in commits else ""
    triton = "" if run.on_cpu else f", Triton {first.triton}"
    return [f"## {run.device}", "", f"{run.day}, PyTorch {first.torch}{triton}, commit{several} {commits}.", ""]


def write_page(runs: list[Run], docs: Path, notes: str = "") -> Path:
    """Write performance.md and its plots into a folder."""
    lines = [
        "# Performance", "",
        "Made by `make performance` from the records in `benchmarks/results/`, which `make bench` writes.",
        "Values are medians; in brackets, the 20th and 80th percentile of the repetitions.", "",
    ]  # fmt: skip
    for run in runs:
        lines += [*heading(run), *cpu_table(run.records)] if run.on_cpu else gpu_section(run, docs, notes)
    page = docs / "performance.md"
    page.write_text("\n".join(lines).rstrip() + "\n")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="results to use (the newest of each device)")
    arguments = parser.parse_args()
    runs = newest_runs(arguments.files or RESULTS.glob("*.json"))
    notes = NOTES.read_text() if NOTES.is_file() else ""
    for run in runs:
        print(f"{run.device}: {run.day}, commit {run.records[0].commit}, {len(run.records)} records")
    print(f"written: {write_page(runs, DOCS, notes)}")


if __name__ == "__main__":
    main()
