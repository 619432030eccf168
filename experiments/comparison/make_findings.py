"""Make docs/results.md, findings.md and distillation.md, with plot and sample grids, from the records in results/.

    python experiments/comparison/make_findings.py

The texts are answer.md, findings.md and distillation.md in this folder, in which names in braces stand for tables and
numbers.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from make_page import Records, number, read_records, speed, table
from plots import number_by_decades
from scoring import FEATURES
from setting import HERE, RESULTS

DOCS = HERE.parents[1] / "docs"
PAGES = {name: name for name in ("findings.md", "distillation.md")} | {"results.md": "answer.md"}
"""Each page, and its text in this folder."""
NAMES = {
    "s": "LaMamba-S", "s-raster": "LaMamba-S, raster paths", "s-scan-only": "LaMamba-S, scan only",
    "s-attention-only": "LaMamba-S, attention only", "s-window-4": "LaMamba-S, windows of 4",
    "s-state-16": "LaMamba-S, 16 states", "dit-s-2": "DiT-S/2", "unet": "U-Net", "b-shallow": "shallow B",
    "b-fine": "fine B", "s-fine": "fine S",
}  # fmt: skip
TITLES = {"cifar-10": "CIFAR-10, JPEG copy", "fashion-mnist": "Fashion-MNIST"}
CIFAR = ("cifar-s-longer-seed-0", "cifar-dit-s-2-longer-seed-0", "cifar-unet-longer-seed-0")
CIFAR_SEEDS = (CIFAR[0], "cifar-s-longer-seed-1", CIFAR[1], "cifar-dit-s-2-longer-seed-1")
DROPOUT = (CIFAR[0], "cifar-s-dropout-longer")
CLOTHES = ("s-flow-decay-longer", "dit-s-2-flow-decay-longer")
CLOTHES_SEEDS = (CLOTHES[0], f"{CLOTHES[0]}-seed-1", CLOTHES[1], f"{CLOTHES[1]}-seed-1")
# A third of the images, with a learning rate that falls three times as fast.
SHORT_CIFAR = ("cifar-s-seed-0", "cifar-dit-s-2-seed-0")
PARTS = (
    SHORT_CIFAR[0], "cifar-s-raster-seed-0", "cifar-s-state-16-seed-0", "cifar-s-window-4-seed-0",
    "cifar-s-scan-only-seed-0", "cifar-s-scan-only-seed-1", "cifar-s-attention-only-seed-0", SHORT_CIFAR[1],
)  # fmt: skip
RATES = (SHORT_CIFAR[0], "cifar-s-adamw-0.003", "cifar-s-muon", "cifar-s-muon-0.003", "cifar-unet-muon")
MUON = ("cifar-s-muon-longer", CIFAR[0], CIFAR[2])
TOGETHER = ("cifar-s-adamw-0.003", "cifar-s-muon-0.003")
"""Records of trainings that shared one GPU. Their seconds say nothing, so tables leave them out."""
WIDER = (SHORT_CIFAR[0], "cifar-s-fine-seed-0", "cifar-b-fine-seed-0", "cifar-b-shallow-seed-0")
SHORT_CLOTHES = ("s-flow-decay", "dit-s-2-flow-decay")
DISTILLED = {
    "distill-nano-flow": "flow matching",
    "distill-nano-flow-guided": "flow matching, guidance 2",
    "distill-nano": "noise prediction",
}
"""Records of distillation by name, with their titles. A record may be missing."""
PROGRESSIVE = RESULTS / "progressive"
"""Records of progressive distillation, which `lamamba distill` did before."""
GRIDS = dict.fromkeys((MUON[0], *CIFAR), "findings") | {
    name: "distillation" for name in DISTILLED if (RESULTS / f"{name}.json").is_file()
}
"""Records whose samples are shown, and the folders of the pictures."""
PLOT = "distance.png"
_SCORES = ("distance", "recall", "coverage")


def title_of(record: dict[str, Any], optimizer: bool = False) -> str:
    """Name a network, with its dropout if it has any, its seed if it is not the first, and if asked its optimizer."""
    settings = record["settings"]
    recipe, seed = settings["recipe"], settings["seed"]
    parts = [NAMES[settings["network"]]]
    parts += [f"dropout {recipe['dropout']:g}"] if recipe.get("dropout") else []
    rate = f"{settings['learning_rate']:.0e}".replace("e-0", "e-")
    parts += [f"{'Muon' if recipe.get('optimizer') == 'muon' else 'AdamW'} at {rate}"] if optimizer else []
    parts += [f"seed {seed}"] if seed else []
    return ", ".join(parts)


def scores_table(
    records: Records, names: Sequence[str], last: int | None = None, halves: bool = False, optimizer: bool = False
) -> list[str]:
    """Lay out a row per score: one network after a number of images, and the training images themselves.

    Args:
        records: all of them.
        names: of the records to show.
        last: show only so many scores of each, the last ones.
        halves: show only the scores after half and all of the images.
        optimizer: name it, with its learning rate.
    """
    data = records[names[0]]["settings"]["data"]
    features = FEATURES[data]
    header = ["", "images", "seconds", *(f"{score}, {feature}" for feature in features for score in _SCORES)]
    rows = []
    for name in names:
        record = records[name]
        for row in record["evaluations"][-last if last else None :]:
            if halves and 2 * row["images"] % record["settings"]["num_images"]:
                continue
            seconds = "" if name in TOGETHER else f"{row['seconds']:.0f}"
            rows.append([title_of(record, optimizer), f"{row['images']:,}", seconds, *_cells(row, features)])
    rows.append(["training images", "", "", *_cells(records[names[0]]["training_images"], features)])
    return table(header, rows)


def _cells(row: dict[str, Any], features: Sequence[str]) -> list[str]:
    """Format the scores of every feature network. A record has the first one's scores outside, the others' by name."""
    of_features = (row if feature == features[0] else row[feature] for feature in features)
    return [number(scores[score]) for scores in of_features for score in _SCORES]


def losses_table(records: Records, names: Sequence[str]) -> list[str]:
    """Lay out, by noise level, how much larger losses are on test images, and with wrong labels."""
    timesteps = records[names[0]]["settings"]["scale"]["loss_timesteps"]
    header = ["", "loss, relative to", *(f"t = {timestep / 1000:g}" for timestep in timesteps)]
    rows = []
    for name in names:
        settings, losses = records[name]["settings"], records[name]["evaluations"][-1]["losses"]
        who = f"{NAMES[settings['network']]}, {settings['data']}"
        pairs = (
            ("test images, training images", "test", "training"),
            ("wrong labels, right labels (test)", "test_with_wrong_labels", "test"),
        )
        for what, above, below in pairs:
            ratios = (a / b for a, b in zip(losses[above], losses[below], strict=True))
            rows.append([who, what, *(f"{ratio:.3f}" for ratio in ratios)])
    return table(header, rows)


def coarse_table(records: Records, names: Sequence[str]) -> list[str]:
    """Lay out the distance of images averaged to 4x4 pixels, at each quarter of the training."""
    header = ["", *(f"{quarter} % of the training" for quarter in (25, 50, 75, 100)), "training images"]
    rows = []
    for name in names:
        record = records[name]
        scored = [*record["evaluations"], record["training_images"]]
        who = f"{NAMES[record['settings']['network']]}, {TITLES[record['settings']['data']]}"
        rows.append([who, *(f"{row['average-4x4']['distance']:.5f}" for row in scored)])
    return table(header, rows)


def answer_table(records: Records, names: Sequence[str]) -> list[str]:
    """Lay out the end of each training."""
    shared = ("vgg16", "squeezenet")
    header = ["", "", "images/s", "seconds", *(f"{score}, {feature}" for score in _SCORES[:2] for feature in shared)]
    rows = []
    for name in names:
        record = records[name]
        data, last = record["settings"]["data"], record["evaluations"][-1]
        scores = {feature: last if feature == FEATURES[data][0] else last[feature] for feature in shared}
        cells = [number(scores[feature][score]) for score in _SCORES[:2] for feature in shared]
        who = title_of(record, optimizer=True)
        rows.append([TITLES[data], who, number(speed(record)), f"{last['seconds']:.0f}", *cells])
    return table(header, rows)


def seeds_table(records: Records, names: Sequence[str]) -> list[str]:
    """Lay out the last two scores of each training."""
    features = FEATURES[records[names[0]]["settings"]["data"]]
    header = ["", "seed", "images", "seconds"]
    header += [f"{score}, {feature}" for score in _SCORES[:2] for feature in features]
    rows = []
    for name in names:
        settings = records[name]["settings"]
        for row in records[name]["evaluations"][-2:]:
            scores = [row, *(row[feature] for feature in features[1:])]
            cells = [number(of_feature[score]) for score in _SCORES[:2] for of_feature in scores]
            start = [NAMES[settings["network"]], str(settings["seed"]), f"{row['images']:,}", f"{row['seconds']:.0f}"]
            rows.append(start + cells)
    return table(header, rows)


class Distilled:
    """The scores of a record of distillation."""

    features = FEATURES["fashion-mnist"]

    def __init__(self, record: dict[str, Any]) -> None:
        points = record["points"]
        self.rows = {(point["who"], point["sampler"], point["steps"]): point for point in points}
        self.default, self.sampler = points[0]["sampler"], points[-1]["sampler"]  # of the teacher and of the students
        self.counts = sorted(record["settings"]["scale"]["few_steps"], reverse=True)
        students = {int(who) for who, _, _ in self.rows if who != "teacher"}
        self.students = sorted(students & set(self.counts), reverse=True)

    def teacher(self, steps: int) -> dict[str, Any]:
        return self.rows["teacher", self.default, steps]

    def by_feature(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the scores on every feature network."""
        return [row if feature == self.features[0] else row[feature] for feature in self.features]

    def distances(self, row: dict[str, Any]) -> list[float]:
        """Return the distance on every feature network."""
        return [scores["distance"] for scores in self.by_feature(row)]


def distillation(records: Records) -> list[str]:
    """Describe what the pieces of distillation reached, as far as there are records: scores, samples, and times."""
    titles = {name: title for name, title in DISTILLED.items() if name in records}
    if not titles:
        return []
    lines: list[str] = []
    for name, title in titles.items():
        record = f"[record](../experiments/comparison/results/{name}.json)"
        lines += [f"{title[0].upper()}{title[1:]} ({record}):", "", *students_table(records, name)]
        lines += [f"![{title}: the same seeds of teacher and student](distillation/{name}.png)", ""]
    lines += ["Distances relative to the teacher's default sampler in 25 steps:", "", *ratios_table(records)]
    return [*lines, "The time in seconds on one GPU, which the record names:", "", *times_table(records)]


def students_table(records: Records, name: str) -> list[str]:
    """Lay out a row for each number of steps of a teacher, by its default sampler, and of its student."""
    scores = Distilled(records[name])
    kinds = ("distance", "precision", "recall")
    header = ["sampled from", "sampler", "steps", *(f"{kind}, {name}" for name in scores.features for kind in kinds)]
    (student,) = scores.students
    several = [("teacher", scores.default, steps, scores.teacher(steps)) for steps in scores.counts]
    several += [
        ("student", scores.sampler, steps, scores.rows[str(student), scores.sampler, steps]) for steps in scores.counts
    ]
    rows = [
        [who, f"`{sampler}`", str(steps), *(number(one[kind]) for one in scores.by_feature(row) for kind in kinds)]
        for who, sampler, steps, row in several
    ]
    return table(header, rows)


def ratios_table(records: Records) -> list[str]:
    """Lay out distances relative to the one of the teacher in the most steps of its default sampler."""
    every = {title: Distilled(records[name]) for name, title in DISTILLED.items() if name in records}
    students = next(iter(every.values())).students
    header = ["", "teacher, 4", *(f"student, {steps}" for steps in students)]
    rows = []
    for title, scores in every.items():
        most = scores.distances(scores.teacher(max(scores.counts)))
        own = [scores.teacher(4), *(scores.rows[str(steps), scores.sampler, steps] for steps in students)]
        for place, feature in enumerate(scores.features):
            ratios = (scores.distances(row)[place] / most[place] for row in own)
            rows.append([f"{title}, {feature}", *(f"{ratio:.2f}" for ratio in ratios)])
    return table(header, rows)


def times_table(records: Records) -> list[str]:
    """Lay out the seconds that distillation took."""
    rows = []
    for name, title in DISTILLED.items():
        if name not in records:
            continue
        curve, points = records[name]["curve"], records[name]["points"]
        compilation = sum(row.get("compile_s", 0) for row in curve)
        times = (compilation, curve[-1]["seconds"], sum(row["sampling_s"] for row in points))
        rows.append([title, *(f"{seconds:.0f}" for seconds in times)])
    return table(["", "compilation", "training", "samples for scores"], rows)


def draw_distances(figure: Figure, records: Records) -> None:
    """Plot the distance on VGG16 features against seconds of training, a panel per set of images."""
    for axes, names in zip(figure.subplots(1, 2), ((MUON[0], *CIFAR), CLOTHES), strict=True):
        for name in names:
            record = records[name]
            rows = record["evaluations"]
            axes.plot(
                [row["seconds"] for row in rows], [row["vgg16"]["distance"] for row in rows],
                marker="o", label=title_of(record, optimizer=True),
            )  # fmt: skip
        axes.set(title=TITLES[record["settings"]["data"]], xlabel="seconds of training", xlim=(0, None), yscale="log")
        number_by_decades(axes.yaxis)
        axes.grid(alpha=0.3)
        axes.margins(y=0.15)
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("Fréchet distance, VGG16 features")


def page(records: Records, text: str) -> str:
    """Fill in the tables."""
    floors = (number(records[names[0]]["training_images"]["vgg16"]["distance"]) for names in (CIFAR, CLOTHES))
    tables = {
        "{distillation}": distillation(records),
        "{progressive}": ratios_table(read_records(PROGRESSIVE)),
        "{plot}": [f"![Distance against seconds of training](findings/{PLOT})"],
        "{table}": answer_table(records, (MUON[0], *CIFAR, *CLOTHES)),
        "{floors}": [" and ".join(floors)],
        "{cifar}": scores_table(records, CIFAR),
        "{seeds}": seeds_table(records, CIFAR_SEEDS),
        "{dropout}": scores_table(records, DROPOUT),
        "{clothes}": scores_table(records, CLOTHES),
        "{clothes seeds}": seeds_table(records, CLOTHES_SEEDS),
        "{short cifar}": scores_table(records, SHORT_CIFAR),
        "{parts}": scores_table(records, PARTS, last=1),
        "{rates}": scores_table(records, RATES, last=1, optimizer=True),
        "{muon}": scores_table(records, MUON, halves=True, optimizer=True),
        "{wider}": scores_table(records, WIDER, last=1),
        "{short clothes}": scores_table(records, SHORT_CLOTHES),
        "{coarse}": coarse_table(records, (*CLOTHES, *CIFAR)),
        "{losses}": losses_table(records, (*CLOTHES, *CIFAR)),
    }
    for mark, lines in tables.items():
        text = text.replace(mark, "\n".join(lines).rstrip())
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder for the pages")
    arguments = parser.parse_args()
    records = read_records(arguments.results)
    pictures = arguments.docs / "findings"
    pictures.mkdir(parents=True, exist_ok=True)
    for name, text in PAGES.items():
        (arguments.docs / name).write_text(page(records, (HERE / text).read_text()))
    for name, folder in GRIDS.items():
        (arguments.docs / folder).mkdir(exist_ok=True)
        shutil.copy(arguments.results / f"{name}-grid.png", arguments.docs / folder / f"{name}.png")
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    draw_distances(figure, records)
    figure.savefig(pictures / PLOT, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
