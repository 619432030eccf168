"""Generate docs/performance.md and its plots from the records in benchmarks/results/.

    python benchmarks/report.py             from the newest file of each device
    python benchmarks/report.py FILE...     from these files

All tables except those in the notes are computed from records. The page includes benchmarks/target_notes.md after the
targets of the first GPU, and benchmarks/profile_notes.md after the profile.
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
NOTES, TARGET_NOTES = (Path(__file__).with_name(name) for name in ("profile_notes.md", "target_notes.md"))
PROFILE = "profile_train_xl_256"


@dataclass(frozen=True)
class Run:
    """The records of one file, all from one device."""

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
    """Read a file of records, whose name begins with the date."""
    return Run(path.name.split("_")[0], [Record(**record) for record in json.loads(path.read_text())])


def newest_runs(paths: Iterable[Path]) -> list[Run]:
    """Read the newest file of each device, GPUs first, new runs first; on the same day, the file written last."""
    newest = {}
    for path in sorted(paths, key=lambda path: (path.name.split("_")[0], path.stat().st_mtime)):
        run = read_run(path)
        newest[run.device] = run
    by_date = sorted(newest.values(), key=lambda run: (run.day, run.device), reverse=True)
    return sorted(by_date, key=lambda run: run.on_cpu)


def find(records: list[Record], case: str, provider: str, metric: str, batch: int | None = None) -> Record | None:
    """Return one record, or None if it was not measured."""
    for record in records:
        if (record.case, record.provider, record.metric) == (case, provider, metric) and batch in (None, record.batch):
            return record
    return None


def fastest_dit(records: list[Record], case: str, batch: int | None = None) -> str:
    """Return the provider of the fastest DiT in a case."""
    times = [
        (record.value, record.provider)
        for record in records
        if (record.case, record.metric) == (case, "ms") and batch in (None, record.batch)
        if record.provider.startswith("dit")
    ]
    return min(times)[1] if times else "dit"


def against_dit(
    case: str, metric: str, batch: int, provider: str = "lamamba"
) -> Callable[[list[Record]], float | None]:
    """Return a function of records that divides a network's value by the fastest DiT's of the same size and commit.

    It takes the first commit that has both.
    """

    def ratio(records: list[Record]) -> float | None:
        for commit in dict.fromkeys(record.commit for record in records):
            same_run = [record for record in records if record.commit == commit]
            ours = find(same_run, case, provider, metric, batch)
            theirs = find(same_run, case, fastest_dit(same_run, case, batch), metric, batch)
            if ours and theirs:
                return ours.value / theirs.value
        return None

    return ratio


def growth(provider: str) -> Callable[[list[Record]], float | None]:
    """Return a function of records: the longest time per pixel up to 2048 px, over the time per pixel at 256 px."""

    def ratio(records: list[Record]) -> float | None:
        found = [find(records, f"resolution_{size}", provider, "ns_per_pixel") for size in (256, 512, 1024, 2048)]
        times = [record.value for record in found if record]
        return max(times) / times[0] if len(times) == len(found) else None

    return ratio


@dataclass(frozen=True)
class Target:
    """A ratio to reach: at least `must`, or at most `must` if `aim` is smaller than it."""

    what: str
    measure: Callable[[list[Record]], float | None]
    must: float
    aim: float

    def verdict(self, value: float) -> str:
        """Return "goal met", "target met" or "not yet"."""
        sign = 1 if self.aim > self.must else -1
        if sign * value >= sign * self.aim:
            return "goal met"
        return "target met" if sign * value >= sign * self.must else "not yet"


# Each is the images/s of LaMamba over the images/s of DiT: above 1, LaMamba is faster.
_SPEEDS = (
    ("16-states", "xl_256", 128, "training", 1.15, 1.4), ("16-states", "xl_256", 128, "inference", 1.3, 1.6),
    ("16-states", "l_256", 128, "training", 0.9, 1.2), ("16-states", "l_256", 128, "inference", 1.1, 1.5),
    ("16-states", "b_256", 128, "training", 0.65, 0.95), ("16-states", "b_256", 128, "inference", 0.8, 1.2),
    ("16-states", "s_256", 256, "training", 0.5, 0.8), ("16-states", "s_256", 256, "inference", 0.6, 1.0),
    ("", "xl_256", 128, "training", 1.9, 2.3), ("", "xl_256", 128, "inference", 2.05, 2.5),
    ("", "xl_512", 32, "training", 2.2, 2.7), ("", "xl_512", 32, "inference", 2.35, 2.8),
    ("", "l_256", 128, "training", 1.8, 2.2), ("", "l_256", 128, "inference", 1.95, 2.4),
    ("", "b_256", 128, "training", 1.4, 1.9), ("", "b_256", 128, "inference", 1.6, 2.2),
    ("", "s_256", 256, "training", 1.2, 1.7), ("", "s_256", 256, "inference", 1.4, 2.2),
    ("", "s_256", 32, "training", 1.0, 1.5), ("", "b_256", 32, "training", 1.0, 1.5),
    ("", "s_256", 1, "inference", 1.0, 1.5), ("", "b_256", 1, "inference", 1.0, 1.5),
    ("", "l_256", 1, "inference", 1.0, 1.5), ("", "xl_256", 1, "inference", 1.0, 1.5),
    ("", "s_256", 8, "inference", 1.0, 1.6), ("", "b_256", 8, "inference", 1.0, 1.6),
    ("", "xl_256", 8, "inference", 1.5, 1.6),
)  # fmt: skip
_MEMORY = (("xl_512", 32), ("xl_256", 128), ("l_256", 128), ("b_256", 128), ("s_256", 256))


def _speed_target(states: str, case: str, batch: int, kind: str, must: float, aim: float) -> Target:
    size, pixels = case.split("_")
    provider = f"lamamba-{states}" if states else "lamamba"
    counted = "16 states" if states else "1 state"
    prefix = {"training": "train", "inference": "infer"}[kind]
    measure = against_dit(f"{prefix}_{case}", "images_per_s", batch, provider)
    return Target(f"{size.upper()}, {pixels} px, {counted}, {kind}, batch {batch}: speed over DiT", measure, must, aim)


TARGETS = (
    *(_speed_target(*target) for target in _SPEEDS),
    *(
        Target(
            f"{case.replace('_', ', ').upper()} px, 1 state, training, batch {batch}: peak memory over DiT",
            against_dit(f"train_{case}", "peak_gib", batch), 1.0, 2 / 3,
        )
        for case, batch in _MEMORY
    ),
    Target("XL, inference: longest time per pixel up to 2048 px, over that at 256 px", growth("lamamba"), 1.08, 1.0),
)  # fmt: skip


def table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Format a Markdown table with the first column left-aligned and the others right-aligned."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] + ["---:"] * (len(header) - 1), *rows)] + [""]


def number(value: float) -> str:
    """Format a number with three significant digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cell(record: Record | None) -> str:
    """Format a value and its spread, if there is one."""
    if record is None:
        return ""
    value, low, high = (number(x) for x in (record.value, record.p20, record.p80))
    return value if low == high else f"{value} ({low} to {high})"


def target_table(records: list[Record]) -> list[str]:
    """Compare the records with the targets; empty if no target was measured."""
    rows = []
    for target in TARGETS:
        value = target.measure(records)
        if value is not None:
            bound = "at least" if target.aim > target.must else "at most"
            must, aim, verdict = f"{bound} {target.must:.2f}", f"{target.aim:.2f}", target.verdict(value)
            digits = 3 if verdict == "not yet" and round(value, 2) == target.must else 2
            rows.append([target.what, f"{value:.{digits}f}", must, aim, verdict])
    return table(["", "measured", "target", "goal", "status"], rows) if rows else []


def _size_and_batch(record: Record) -> tuple[int, int, int]:
    _, size, pixels = record.case.split("_")
    return ("s", "b", "l", "xl").index(size), int(pixels), -record.batch


def network_tables(records: list[Record]) -> list[str]:
    """Make the tables of training and inference for all networks."""
    lines = []
    is_of_several = len({record.commit for record in records}) > 1
    for title, prefix in (("Training", "train"), ("Inference", "infer")):
        pattern = rf"{prefix}_(s|b|l|xl)_\d+"
        timed = [record for record in records if re.fullmatch(pattern, record.case) and record.metric == "ms"]
        if not timed:
            continue
        rows = []
        for record in sorted(timed, key=_size_and_batch):
            same_run = [other for other in records if other.commit == record.commit]

            def other(metric: str, record: Record = record, same_run: list[Record] = same_run) -> str:
                return cell(find(same_run, record.case, record.provider, metric, record.batch))

            _, size, pixels = record.case.split("_")
            rows.append(
                [record.provider, size.upper(), pixels, str(record.batch), other("images_per_s"), cell(record),
                 other("peak_gib"), other("first_step_s"), *([record.commit] if is_of_several else [])]
            )  # fmt: skip
        lines += [f"### {title}", ""]
        if prefix == "train":
            lines += ["`dit-xl-2` is DiT-XL/2 from diffusers, compiled. The first step includes compiling.", ""]
        header = ["network", "size", "px", "batch", "images/s", "ms", "peak GiB", "first step, s"]
        lines += table([*header, *(["commit"] if is_of_several else [])], rows)
    return lines


def resolution_table(records: list[Record]) -> list[str]:
    """Make the table of the time per pixel by image size."""
    timed = [record for record in records if record.metric == "ns_per_pixel"]
    sizes = sorted({int(record.case.removeprefix("resolution_")) for record in timed})
    rows = []
    for provider in dict.fromkeys(record.provider for record in timed):
        found = [find(timed, f"resolution_{size}", provider, "ns_per_pixel") for size in sizes]
        rows.append([provider, *(cell(record) for record in found)])
    return table(["ns per image pixel", *(f"{size} px" for size in sizes)], rows) if rows else []


def scan_table(records: list[Record]) -> list[str]:
    """Make the table of the scan alone."""
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
    """Make the table of a training step by group of operations, the longest first."""
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
    return lines + ([f"Measured as a whole, the step takes {number(whole.value)} ms.", ""] if whole else [])


def cpu_table(records: list[Record]) -> list[str]:
    """Make the table of each case's providers, with their time as a multiple of the time of lamamba."""
    rows = []
    for record in records:
        if record.metric == "ms":
            ours = find(records, record.case, "lamamba", "ms")
            times = f"{record.value / ours.value:.1f}" if ours and ours is not record else ""
            rows.append([record.case, record.provider, str(record.batch), record.dtype, cell(record), times])
    said = [
        "`scan_both_sequence` is the forward and backward pass of one scan over a sequence, and `train_nano` is a",
        "training step of `nano`. The naive implementations compute the scan step by step in a Python loop.",
        "",
    ]
    return said + table(["case", "implementation", "batch", "dtype", "ms", "times as long as lamamba"], rows)


def plot_speed(records: list[Record], path: Path) -> bool:
    """Plot the speed over DiT by size, with one and sixteen states; return False if there is no data."""
    from matplotlib.figure import Figure

    largest = {("s", "256"): 256, ("b", "256"): 128, ("l", "256"): 128, ("xl", "256"): 128, ("xl", "512"): 32}
    states = {"lamamba": "1 state", "lamamba-16-states": "16 states"}
    states = {key: name for key, name in states.items() if any(record.provider == key for record in records)}
    measured = {record.case for record in records if record.provider in states}
    largest = {
        (size, pixels): batch
        for (size, pixels), batch in largest.items()
        if {f"train_{size}_{pixels}", f"infer_{size}_{pixels}"} & measured
    }
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    drawn = False
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("train", "infer"), strict=True):
        for index, (provider, name) in enumerate(states.items()):
            for place, ((size, pixels), batch) in enumerate(largest.items()):
                ratio = against_dit(f"{kind}_{size}_{pixels}", "images_per_s", batch, provider)(records)
                if ratio is not None:
                    drawn = True
                    bars = axes.bar(
                        place + 0.4 * (index - (len(states) - 1) / 2), ratio, 0.38, color=f"C{index}", label=name
                    )
                    axes.bar_label(bars, [f"{ratio:.2f}"], fontsize=7)
        names = [f"{size.upper()}, {pixels} px\nbatch {batch}" for (size, pixels), batch in largest.items()]
        axes.set_xticks(range(len(largest)), names, fontsize=7)
        axes.set_title({"train": "training", "infer": "inference"}[kind], fontsize=9)
        axes.axhline(1, color="gray", linewidth=0.8, linestyle=":")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("speed over DiT of the same size", fontsize=8)
    handles = {
        text: handle for axes in figure.axes for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), frameon=False, loc="outside upper left", ncols=2, fontsize=8)
    if drawn:
        _save(figure, path)
    return drawn


def plot_resolution(records: list[Record], path: Path) -> bool:
    """Plot the time per pixel by image size; return False if there is no data."""
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


def gpu_section(run: Run, docs: Path, notes: str, target_notes: str) -> list[str]:
    """Make the section of a GPU, and draw its plots beside the page."""
    records = run.records
    lines = heading(run)
    picture = docs / "performance" / f"{run.slug}-speed.png"
    if plot_speed(records, picture):
        lines += [f"![Speed over DiT of the same size, in training and inference](performance/{picture.name})", ""]
    targets = target_table(records)
    if targets:
        lines += [
            "### Targets",
            "",
            "Each row compares LaMamba with a DiT of the same size in the same run, or LaMamba at two image sizes. A",
            "speed over DiT of 2 means twice as many images/s. The target is what the project wants to reach next, and",
            'the goal is what it wants in the end. "Not yet" means that the measured value does not reach the target.',
            "",
            *targets,
        ]
        lines += [target_notes.strip(), ""] if target_notes.strip() else []
    lines += network_tables(records)
    resolution = resolution_table(records)
    if resolution:
        picture = docs / "performance" / f"{run.slug}-resolution.png"
        plot_resolution(records, picture)
        said = (
            "Inference time per image pixel. Every batch has the same total number of pixels, whatever the image size."
        )
        lines += ["### Resolution", "", said, "", *resolution]
        lines += [f"![Inference time per pixel by image size](performance/{picture.name})", ""]
    scans = scan_table(records)
    if scans:
        copy = find(records, "copy", "pytorch", "gb_per_s")
        lines += ["### The scan alone", ""]
        lines += [
            "GB/s counts each input and output of all four paths once, the least that a scan has to move. `fla` is",
            "flash-linear-attention's HGRN recurrence. `end to end` does the same work as `lamamba`; `alone` is only",
            "the recurrence, with inputs already in its own layout.",
        ]
        lines += [f"On this machine, a plain copy reaches {cell(copy)} GB/s." if copy else "", "", *scans]
    profiled = profile_table(records)
    if profiled:
        lines += ["### Where a training step's time goes", ""]
        lines += [
            "This is a training step of XL-256 with batch 128, split into groups of operations. The limit of a group",
            "is a lower bound on its time. For matrix products, it is their time at the measured peak. For all other",
            "operations, it is the time to move their inputs and outputs once at the speed of a copy.",
            "",
            *profiled,
        ]
        lines += [notes.strip(), ""] if notes.strip() else []
    return lines


def heading(run: Run) -> list[str]:
    """Make the heading of a device, with date, versions and all commits that its records come from."""
    first = run.records[0]
    commits = ", ".join(dict.fromkeys(record.commit for record in run.records))
    several = "s" if "," in commits else ""
    triton = "" if run.on_cpu else f", Triton {first.triton}"
    return [f"## {run.device}", "", f"{run.day}, PyTorch {first.torch}{triton}, commit{several} {commits}.", ""]


def write_page(runs: list[Run], docs: Path, notes: str = "", target_notes: str = "") -> Path:
    """Write performance.md and its plots into a folder."""
    lines = [
        "# Performance", "",
        "`make performance` generates this page from the records in `benchmarks/results/`, which `make bench` writes.",
        "Values are medians. Brackets show the 20th and 80th percentiles of the repetitions, where they differ. Each",
        "section names the commits that were measured; later changes are not in its tables. A ratio is always of two",
        "measurements of the same commit.", "",
    ]  # fmt: skip
    for index, run in enumerate(runs):
        of_targets = target_notes if index == 0 else ""
        lines += [*heading(run), *cpu_table(run.records)] if run.on_cpu else gpu_section(run, docs, notes, of_targets)
    page = docs / "performance.md"
    page.write_text("\n".join(lines).rstrip() + "\n")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="results to use (the newest of each device)")
    arguments = parser.parse_args()
    runs = newest_runs(arguments.files or RESULTS.glob("*.json"))
    notes = [path.read_text() if path.is_file() else "" for path in (NOTES, TARGET_NOTES)]
    for run in runs:
        print(f"{run.device}: {run.day}, commit {run.records[0].commit}, {len(run.records)} records")
    print(f"written: {write_page(runs, DOCS, *notes)}")


if __name__ == "__main__":
    main()
