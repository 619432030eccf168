"""Collect the records of scaling.py: write the data of `lamamba plan`, and the tables of docs/scaling.md.

    python benchmarks/scaling_report.py

For each case, the records of the newest day are used. The text of the page is written by hand. Its tables are between
<!-- NAME --> and <!-- end NAME -->, and this program writes all of their numbers.
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from lamamba.commands.plan import MEASURED, Model, network_of, point_plan, predict
from lamamba.config import PlanConfig
from measure import RESULTS, Record
from report import DOCS, number, read_run, table

KINDS = ("all_reduce", "all_gather")
PAGE = DOCS / "scaling.md"
NUM_IMAGES = PlanConfig("xl-512").num_images


Key = tuple[str, str, str, int]


def newest_records(folder: Path = RESULTS / "scaling") -> dict[Key, list[Record]]:
    """Read the records of the newest day for each case, world size, metric and batch, on the GPU measured last.

    Early records of steps lack the memory in use. They are left out.
    """
    newest: dict[Key, tuple[str, list[Record]]] = {}
    runs = [read_run(path) for path in sorted(folder.glob("*.json"))]
    for run in (run for run in runs if run.device == runs[-1].device):
        whole = {(record.case, record.batch) for record in run.records if record.metric == "in_use_gib"}
        for record in run.records:
            if record.case.startswith("scaling_") and (record.case, record.batch) not in whole:
                continue
            key = (record.case, record.provider, record.metric, record.batch)
            day, records = newest.get(key, ("", []))
            newest[key] = (run.day, [*records, record] if run.day == day else [record])
    return {key: records for key, (_, records) in newest.items()}


def measured(records: dict[Key, list[Record]]) -> dict[str, Any]:
    """Collect the values that the model needs, as JSON data; values measured several times become their median."""
    used: list[Record] = []

    def median(case: str, metric: str, provider: str = "", batch: int = 0) -> float:
        found = [
            record
            for key, several in records.items()
            for record in several
            if key[0] == case and key[2] == metric and provider in ("", key[1]) and batch in (0, key[3])
        ]
        if not found:
            raise ValueError(f"there are no records of {case}, {metric}: run benchmarks/scaling.py on one and two GPUs")
        used.extend(found)
        return round(statistics.median(record.value for record in found), 3)

    points = []
    for case, provider, metric, batch in records:
        alike = re.fullmatch(r"processes-(\d+)(-shard)?", provider)
        if alike and case.startswith("scaling_") and metric == "ms":
            gpus = int(alike[1])
            ms, memory = (median(case, metric, provider, batch) for metric in ("ms", "in_use_gib"))
            name = case.removeprefix("scaling_")
            point = {"preset": name, "gpus": gpus, "images": batch // gpus, "ms": ms, "memory_gib": memory}
            points.append({**point, "shard": True} if alike[2] else point)

    def place(point: dict[str, Any]) -> tuple[float, ...]:
        return (network_of(point["preset"]).multiply_adds, "shard" in point, point["gpus"], point["images"])

    points.sort(key=place)
    content = {
        "points": points,
        "sent_gb_per_s": {kind: median(f"{kind}_256_mib", "sent_gb_per_s") for kind in KINDS},
        "noise_numbers_per_ns": median("draw_noise", "numbers_per_ns"),
        "latents_per_s": {side: median(f"read_latents_{side}", "images_per_s") for side in ("32", "64")},
    }
    (gpu,) = {record.gpu for record in used}
    versions = sorted({f"PyTorch {record.torch}, Triton {record.triton}" for record in used})
    commits = sorted({record.commit for record in used})
    return {"gpu": gpu, "versions": f"{'; '.join(versions)}; commit {', '.join(commits)}", **content}


def error(predicted: float, actual: float) -> str:
    """Format the relative error of a prediction."""
    return f"{predicted / actual - 1:+.1%}"


def fit_table(model: Model) -> list[str]:
    """Make a table of predicted and measured values for every step."""
    rows, errors = [], []
    for point in model.points:
        predicted = predict(point_plan(point), model)
        rows.append(
            [point.preset, f"{point.gpus}{', sharded' * point.shard}", str(point.images),
             number(1e3 * point.images * point.gpus / point.ms),
             f"{point.ms:.1f}", f"{predicted.ms:.1f}", error(predicted.ms, point.ms),
             f"{point.memory_gib:.1f}", f"{predicted.memory_gib:.1f}", error(predicted.memory_gib, point.memory_gib)]
        )  # fmt: skip
        errors.append((abs(predicted.ms / point.ms - 1), abs(predicted.memory_gib / point.memory_gib - 1)))
    worst = [f"{max(values):.1%}" for values in zip(*errors, strict=True)]
    header = [
        "network",
        "GPUs",
        "images per GPU",
        "images/s",
        "ms",
        "predicted ms",
        "error",
        "GiB",
        "predicted GiB",
        "error",
    ]
    said = [
        f"The largest error is {worst[0]} in time and {worst[1]} in memory. Networks that were measured with two",
        "numbers of images on one GPU have no error there, because a line fits any two points.",
    ]
    return [f"{model.gpu}, {model.versions}.", "", *table(header, rows), *said, ""]


def constants_table(model: Model) -> list[str]:
    """List the fitted constants, and those measured directly."""
    presets = list(dict.fromkeys(point.preset for point in model.points))
    rows = []
    for name in presets:
        ms, gib, state = model.milliseconds(name), model.other_gib(name), network_of(name).state_bytes
        rows.append(
            [name, f"{state / 1e9:.3f}", *(f"{value:.3g}" for value in (ms.fixed, ms.slope, gib.fixed, gib.slope))]
        )
    alone = [
        *([f"{kind.replace('_', '-')}, GB/s", number(speed)] for kind, speed in model.sent_gb_per_s.items()),
        ["latency: the constant part of the time that communication adds, ms", f"{model.exposed_ms.fixed:.2f}"],
        ["share: the part of the time of an all-reduce alone that adds to a step", f"{model.exposed_ms.slope:.2f}"],
        ["NCCL: additional memory with two GPUs, GiB", f"{model.together_gib:.2f}"],
        ["random numbers drawn for noise, per ns", number(model.noise_numbers_per_ns)],
        *(
            [f"{side}x{side} latents that one process reads, per second", number(speed)]
            for side, speed in model.latents_per_s.items()
        ),
    ]
    header = ["network", "S, GB", "fixed, ms", "slope, ms", "rest, GiB", "slope, GiB"]
    return [*table(header, rows), *table(["measured on one or two GPUs", "value"], alone)]


def prediction_row(model: Model, config: PlanConfig) -> list[str]:
    """Make a row of the predictions."""
    predicted = predict(config, model)
    speed = predicted.images_per_s(config.gpus)
    hours = config.num_images / speed / 3600
    return [
        str(config.gpus), f"{predicted.images * config.gpus:,}", str(predicted.images), "yes" if config.shard else "no",
        f"{speed:,.0f}", f"{predicted.efficiency:.0%}", f"{predicted.exposed_ms:.1f} of {predicted.ms:.0f}",
        f"{predicted.memory_gib:.1f}", f"{1e3 * predicted.read_mb / predicted.ms:,.0f}", f"{hours * config.gpus:,.0f}",
        f"{hours / 24:.2g}", predicted.limit,
    ]  # fmt: skip


def predictions_table(model: Model) -> list[str]:
    """Predict XL-512 with a constant batch per GPU, and with one batch divided among more and more GPUs."""
    header = [
        "GPUs", "batch", "images per GPU", "sharded", "images/s", "efficiency", "communication, ms", "GiB",
        "MB/s per host", "GPU-hours", "days", "limited by",
    ]  # fmt: skip
    lines = []
    for title, batch in (("32 images per GPU", None), ("A batch of 1,024, divided among all GPUs", 1024)):
        configs = [
            PlanConfig("xl-512", gpus=gpus, batch_size=batch, shard=shard)
            for gpus in (8, 64, 512)
            for shard in (False, True)
        ]
        fitting = [config for config in configs if predict(config, model).memory_gib <= config.gpu_memory_gib]
        lines += [f"{title}; GPU-hours and days for {NUM_IMAGES / 1e6:.0f} million images:", ""]
        lines += table(header, [prediction_row(model, config) for config in fitting])
        for config in configs:
            if config not in fitting:
                needed = predict(config, model).memory_gib
                sharded = " with sharding" * config.shard
                lines += [
                    f"This batch does not fit on {config.gpus} GPUs{sharded}: it needs {needed:.0f} GiB per GPU, and "
                    f"an {config.gpu} has {config.gpu_memory_gib:g} GiB.",
                    "",
                ]
    return lines


def network_table(model: Model) -> list[str]:
    """Show how predictions depend on the network speed, the only value that was not measured."""
    speeds = (80.0, 40.0, 20.0, 10.0, 5.0)
    rows = []
    for gpus in (64, 512):
        for images in (32, 2):
            plans = [
                predict(PlanConfig("xl-512", gpus=gpus, batch_size=images * gpus, network_gbytes_per_s=speed), model)
                for speed in speeds
            ]
            rows.append([str(gpus), str(images), *(f"{plan.efficiency:.0%}" for plan in plans)])
    return table(["GPUs", "images per GPU", *(f"{speed:g} GB/s" for speed in speeds)], rows)


TABLES = {
    "fit": fit_table, "constants": constants_table, "predictions": predictions_table, "network": network_table
}  # fmt: skip


def filled(page: str, model: Model) -> str:
    """Replace the tables of a page."""
    for name, lay_out in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        if page.count(start) != 1 or page.count(end) != 1:
            raise ValueError(f"the page has no place for the table {name}: add {start.strip()} and {end}, each once")
        lines = "\n".join(lay_out(model)).rstrip()
        page = re.sub(f"{start}.*{end}", lambda _, new=f"{start}\n{lines}\n\n{end}": new, page, flags=re.DOTALL)
    return page


def main() -> None:
    content = measured(newest_records())
    MEASURED.write_text(json.dumps(content, indent=1) + "\n")
    PAGE.write_text(filled(PAGE.read_text(), Model.read(content)))
    print(f"{len(content['points'])} steps on {content['gpu']}: written {MEASURED}, {PAGE}")


if __name__ == "__main__":
    main()
