"""Make docs/results.md, its plots and pictures, from the records in results/. No number on the page is typed by hand.

    python experiments/comparison/make_page.py

Without records nothing is written; what has no record yet is named on the page. What the numbers mean is said in
notes.md, which the page takes in where it is there.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from pieces import LISTS, Clipping, Memorisation, Speed, Steps, Training
from setting import HERE, RESULTS

PAGE = HERE.parents[1] / "docs" / "results.md"
NOTES = HERE / "notes.md"

_NEAREST = """\
Distances to the nearest training image: root mean squares of the differences of pixels, in levels of 0 to 255, and of
features. Nearer: the share that is nearer than one in a hundred of the images that were not trained on: 1 % is to be
expected of a network that copies nothing. Emoji have no test images: there it is the share that is nearer than one in a
hundred of the training images is to another."""
_IMAGENET = """\
No network of this package has been trained on ImageNet; whether what is above holds there is not known. From the
official files to a score ([imagenet.md](imagenet.md) has the whole recipe), for 256 px and 512 px:

    lamamba prepare imagenet --out imagenet --train ILSVRC2012_img_train.tar \\
        --validation ILSVRC2012_img_val.tar --devkit ILSVRC2012_devkit_t12.tar.gz
"""
_AT_SIZE = """\
    torchrun --nproc-per-node 8 -m lamamba encode --data imagenet/train --vae sd-vae-ft-ema \\
        --image-size {size} --out latents-{size}
    torchrun --nproc-per-node 8 -m lamamba train --preset xl-{size} --data latents-{size} --horizontal-flip \\
        --batch-size 256 --num-images 400000000 --out runs/xl-{size} --resume
    torchrun --nproc-per-node 8 -m lamamba generate runs/xl-{size} --sampler ancestral --steps 250 \\
        --guidance 1.5 --out samples-{size}
    lamamba evaluate samples-{size} {reference} --out scores-{size}.json
"""
_REFERENCES = {256: "VIRTUAL_imagenet256_labeled.npz", 512: "VIRTUAL_imagenet512.npz"}

Content = dict[str, Any]
Records = Mapping[str, Content]
Draw = Callable[[Figure], None]
_INTRODUCTION = """\
Made by `experiments/comparison/make_page.py` from the records in `experiments/comparison/results/`; the README there
says how these came about. The distance is the Fréchet distance of the shipped clothes features to the 10,000 test
images, not to be compared with an FID; precision, recall, density and coverage are of the same features
([evaluation.md](evaluation.md)). Loss is the mean of the last tenth of training; that of flow matching is of another
quantity than the others. Of several seeds: the mean (least to largest). Images/s and GiB are of one GPU, also where
several trained together, each with its part of a batch. Samples are drawn in 50 steps, by DPM-Solver++ or, of flow
matching, UniPC, where nothing else is said. Guidance is swept at 1, 1.25, 1.5, 2 and 3; "s for 10,000" are one GPU's
seconds of sampling as many images without guidance; of ablations, which were scored only once, they include compiling
kernels. Scores are of samples that were not clipped on the way; those of `lamamba sample` are."""


def read_records(folder: Path, quick: bool = False) -> dict[str, Content]:
    """Read the finished records by their pieces' names: those of experiments, or those of a quick look."""
    contents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {
        content["piece"]: content
        for content in contents
        if content["finished"] and content["settings"]["scale"]["quick"] == quick
    }


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lay out a Markdown table: the first column to the left, the others to the right."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] + ["---:"] * (len(header) - 1), *rows)] + [""]


def number(value: float) -> str:
    """Write a number with three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    """Write a mean and, of several, the least and the largest."""
    if len(values) == 1:
        return number(values[0])
    return f"{number(statistics.mean(values))} ({number(min(values))} to {number(max(values))})"


def trainings(names: Sequence[str]) -> list[Training]:
    """Choose the trainings of lists."""
    return [piece for name in names for piece in LISTS[name] if isinstance(piece, Training)]


def found(records: Records, names: Sequence[str], network: str | None = None) -> list[Content]:
    """Choose the records of lists' trainings, or of one network's of them."""
    pieces = [piece for piece in trainings(names) if network in (None, piece.network)]
    return [records[piece.name] for piece in pieces if piece.name in records]


def final_loss(record: Content) -> float:
    """Take the mean of the last tenth of the curve."""
    curve = record["curve"]
    return statistics.mean(row["loss"] for row in curve[-max(1, len(curve) // 10) :])


def num_gpus(record: Content, images: int) -> int:
    """Say how many trained together until so many images were seen; records from before there were several do not."""
    begun = [part for part in record["parts"] if part.get("first_image", 0) < images]
    return int(begun[-1].get("processes", 1))


def speed(record: Content) -> float:
    """Take the median of the images in a second of training, over the curve, for each GPU."""
    rows = [row for row in record["curve"] if "images_per_s" in row]
    return statistics.median(row["images_per_s"] / num_gpus(record, row["images"]) for row in rows)


def gpus(record: Content) -> list[int]:
    """Say by how many it was trained, in any of its parts."""
    return sorted({num_gpus(record, row["images"]) for row in record["curve"]})


def at_seconds(record: Content, seconds: float) -> float | None:
    """Interpolate the distance between the scores around a time of training; None before the first."""
    rows = record["evaluations"]
    if not rows or seconds < rows[0]["seconds"]:
        return None
    for before, after in pairwise(rows):
        if seconds <= after["seconds"]:
            share = (seconds - before["seconds"]) / max(after["seconds"] - before["seconds"], 1e-9)
            return float(before["distance"] + share * (after["distance"] - before["distance"]))
    return float(rows[-1]["distance"])


_SCORED = ("distance", "precision", "recall", "density", "coverage")
_SCORES = ["", "seeds", "images/s", "loss", *_SCORED]
_BEST = "seed 0 at its best guidance"
_PERCENTILES = ("percentile_1", "percentile_5", "percentile_50")  # of more that the records have
_COSTS = ["", "M parameters", "G multiply-adds", "GiB", "s for 10,000"]
_NAMES = {"s": "LaMamba-S", "b": "LaMamba-B", "dit-s-2": "DiT-S/2", "dit-b-2": "DiT-B/2"}


def scores_row(name: str, several: Sequence[Content]) -> list[str]:
    """Write a line for trainings that differ in their seeds alone."""
    last = [record["evaluations"][-1] for record in several if record["evaluations"]]
    return [
        name, str(len(several)), spread([speed(record) for record in several]),
        spread([final_loss(record) for record in several]),
        *(spread([row[key] for row in last]) if last else "" for key in _SCORED),
    ]  # fmt: skip


def best_cell(several: Sequence[Content]) -> str:
    """Write the least distance of those that had a sweep of guidance, and where it was."""
    best = [
        min(record["best"], record["evaluations"][-1], key=lambda row: row["distance"])
        for record in several
        if "best" in record
    ]
    guidance = ", ".join(sorted({f"{row['guidance']:g}" for row in best}))
    return f"{spread([row['distance'] for row in best])} at {guidance}" if best else ""


def costs_row(name: str, several: Sequence[Content]) -> list[str]:
    """Write what a network costs."""
    network = several[0]["network"]
    seconds = [record["evaluations"][-1]["sampling_s"] for record in several if record["evaluations"]]
    return [
        name, number(network["parameters"] / 1e6), number(network["multiply_adds"] / 1e9),
        number(network["peak_gib"]) if "peak_gib" in network else "", spread(seconds) if seconds else "",
    ]  # fmt: skip


def comparison(records: Records, draw: Callable[[str, Draw], str]) -> list[str]:
    """Hold LaMamba against DiT, at equal images and at equal seconds of training."""
    lines = []
    for names in _AGAINST:
        networks = list(dict.fromkeys(piece.network for piece in trainings(names)))
        groups = {network: found(records, names, network) for network in networks}
        groups = {network: several for network, several in groups.items() if several}
        if any(gpus(record) != [1] for several in groups.values() for record in several):
            sys.exit(f"{', '.join(names)}: trained by several GPUs, and not to be compared by time: train on one")
        if not groups:
            continue
        images = next(iter(groups.values()))[0]["settings"]["train"]["num_images"]
        named = {_NAMES[network]: several for network, several in groups.items()}
        objective = ", by flow matching" if trainings(names)[0].objective == "flow" else ""
        lines += [f"### {' and '.join(named)}, {images:,} images{objective}", ""]
        best = {name: [cell] for name, several in named.items() if (cell := best_cell(several))}
        rows = [[*scores_row(name, several), *best.get(name, [""] * bool(best))] for name, several in named.items()]
        lines += table([*_SCORES, *([_BEST] if best else [])], rows)
        lines += table(_COSTS, [costs_row(name, several) for name, several in named.items()])
        if len(groups) == len(networks):
            lines += equal_seconds(groups)
        lines += [draw(f"{names[0]}-curves.png", lambda figure, groups=groups: draw_curves(figure, groups)), ""]
        lines += averages(groups)
        firsts = [several[0]["piece"] for several in groups.values()]
        told = ", then of ".join(f"`{piece}`" for piece in firsts)
        grids = " ".join(f"![samples of {piece}](results/{piece}-grid.png)" for piece in firsts)
        lines += [f"Samples of {told}, at guidance 2, a class a row:", "", grids, ""]
    real = next((record["training_images"] for record in records.values() if record.get("training_images")), None)
    if lines and real:
        scores = ", ".join(f"{key} {number(real[key])}" for key in _SCORED)
        lines += [f"As many training images, in place of samples, have {scores}.", ""]
    return lines


def equal_seconds(groups: Mapping[str, Sequence[Content]]) -> list[str]:
    """Read each network's curve where the fastest of all was done; scores are interpolated between quarters."""
    seconds = min(record["curve"][-1]["seconds"] for several in groups.values() for record in several)
    rows = []
    for network, several in groups.items():
        values = [value for record in several if (value := at_seconds(record, seconds)) is not None]
        rows.append([_NAMES[network], spread(values) if values else "not scored so early"])
    return [f"At equal time, after {seconds:,.0f} s of training:", "", *table(["", "distance"], rows)]


def averages(groups: Mapping[str, Sequence[Content]]) -> list[str]:
    """Tabulate the distances of averages of several lengths."""
    scored = {_NAMES[network]: record["averages"] for network, several in groups.items() for record in several
              if "averages" in record}  # fmt: skip
    if not scored:
        return []
    lengths = [f"{row['sigma_rel']:g}" for row in next(iter(scored.values()))]
    rows = [[name, *(number(row["distance"]) for row in rows)] for name, rows in scored.items()]
    told = "Averages of the weights, by the standard deviation of the steps they are of, as a share of all:"
    return [told, "", *table(["distance at", *lengths], rows)]


def number_by_decades(*several: Axis) -> None:
    """Number a logarithmic axis plainly, at 1, 2 and 5 of each decade."""
    for axis in several:
        axis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")


def draw_curves(figure: Figure, groups: Mapping[str, Sequence[Content]]) -> None:
    """Plot loss and distance against images and against seconds of training, a colour a network, a line a seed."""
    axes = figure.subplots(2, 2, sharey="row")
    for column, (key, scale, label) in enumerate(
        (("images", 1e6, "million images seen"), ("seconds", 1.0, "seconds of training"))
    ):
        for colour, (network, several) in enumerate(groups.items()):
            for index, record in enumerate(several):
                name = _NAMES[network] if index == 0 else None
                for row, curve, value in ((0, "curve", "loss"), (1, "evaluations", "distance")):
                    axes[row][column].plot(
                        [point[key] / scale for point in record[curve]], [point[value] for point in record[curve]],
                        color=f"C{colour}", label=name, marker="o" if row else None, linewidth=1, alpha=0.8,
                    )  # fmt: skip
        for row in (0, 1):
            axes[row][column].set(xlabel=label, yscale="log")
            number_by_decades(axes[row][column].yaxis)
            axes[row][column].grid(alpha=0.3)
    axes[0][0].set_ylabel("loss")
    axes[1][0].set_ylabel("Fréchet distance, no guidance")
    axes[0][0].legend()


def ablations(records: Records, draw: Callable[[str, Draw], str]) -> list[str]:
    """Hold S with one thing changed against S."""
    changed: dict[str, list[Content]] = {}
    for record in [*found(records, ["flow"], "s"), *found(records, ["ablations", "more-ablations"])]:
        several = f", by {' and '.join(map(str, gpus(record)))} GPUs" if gpus(record) != [1] else ""
        changed.setdefault(record["piece"].split("-seed-")[0] + several, []).append(record)
    if not changed:
        return []
    whole = found(records, ["seed-0", "more-seeds"], "s")
    rows = [scores_row("S: scan and attention, continuous paths, 1 state, windows of 8", whole)] if whole else []
    rows += [scores_row(name, several) for name, several in changed.items()]
    costs = [costs_row("S", whole)] if whole else []
    costs += [costs_row(name, several) for name, several in changed.items()]
    return [
        *table(_SCORES, rows),
        *table(_COSTS, costs),
    ]


def steps(records: Records, draw: Callable[[str, Draw], str]) -> list[str]:
    """Tabulate and plot the distance over steps, a sampler a line."""
    lines = []
    for name in ("steps-s", "steps-s-flow"):
        if name not in records:
            continue
        points = records[name]["points"]
        samplers = list(dict.fromkeys(point["sampler"] for point in points))
        counts = sorted({point["steps"] for point in points})
        value = {(point["sampler"], point["steps"]): point["distance"] for point in points}
        of = records[name]["settings"]["of"]
        twice = "; Heun evaluates twice a step" if "heun" in samplers else ""
        lines += [f"Of {of['name']}, without guidance, {points[0]['num_samples']:,} samples of each{twice}:", ""]
        header = ["distance at", *(f"{count} steps" for count in counts)]
        lines += table(header, [[s, *(number(value[s, count]) for count in counts)] for s in samplers])
        lines += [draw(f"{name}.png", lambda figure, points=points: draw_steps(figure, points)), ""]
    return lines


def clipping(records: Records, draw: Callable[[str, Draw], str]) -> list[str]:
    """Tabulate what clipping changes."""
    keys = ("distance", "precision", "recall")
    pieces = [piece for several in LISTS.values() for piece in several if isinstance(piece, Clipping)]
    rows = [
        [_NAMES.get(piece.of.network, piece.of.network),
         *(number(point[key]) for key in keys for point in records[piece.name]["points"])]
        for piece in pieces if piece.name in records
    ]  # fmt: skip
    header = [f"{key}{clipped}" for key in keys for clipped in ("", ", clipped")]
    return table(["", *header], rows) if rows else []


def draw_steps(figure: Figure, points: Sequence[Content]) -> None:
    """Plot the distance over the evaluations of the network."""
    axes = figure.subplots()
    for sampler in dict.fromkeys(point["sampler"] for point in points):
        own = [point for point in points if point["sampler"] == sampler]
        axes.plot([p["evaluations"] for p in own], [p["distance"] for p in own], marker="o", label=sampler, linewidth=1)
    axes.set(xlabel="evaluations of the network", ylabel="Fréchet distance", xscale="log", yscale="log")
    number_by_decades(axes.xaxis, axes.yaxis)
    axes.grid(alpha=0.3)
    axes.legend()


def memorisation(records: Records, draw: Callable[[str, Draw], str]) -> list[str]:
    """Tabulate distances to the nearest training image."""
    pieces = [piece.name for several in LISTS.values() for piece in several if isinstance(piece, Memorisation)]
    of_each = {name: records[name] for name in pieces if name in records}
    if not of_each:
        return []
    lines = [_NEAREST, ""]
    for name, record in of_each.items():
        of = record["settings"]["of"]
        lines += [f"### {_NAMES.get(of['network'], of['network'])}", ""]
        for space, rows in record["distances"].items():
            header = [space, "images", "least", *(key.replace("_", " ") for key in _PERCENTILES), "nearer"]
            cells = [
                [of, f"{row['number']:,}", number(row["least"]), *(number(row[key]) for key in _PERCENTILES),
                 f"{row['share_nearer_than_percentile_1']:.1%}" if "share_nearer_than_percentile_1" in row else ""]
                for of, row in rows.items()
            ]  # fmt: skip
            lines += table(header, cells)
        shown = " and ".join(f"by {space}" for space in record["distances"])
        lines += [f"The samples nearest to a training image, and below them its neighbours {shown}:", ""]
        lines += [f"![nearest](results/{name}-nearest.png)", "", "The first samples, likewise:", ""]
        lines += [f"![first](results/{name}-first.png)", ""]
    return lines


def speeds(records: Records, draw: Callable[[str, Draw], str]) -> list[str]:
    """Tabulate how fast a training step is, by how it is launched."""
    if "speed" not in records:
        return []
    rows = [
        [_NAMES[case["network"]], "yes" if case["compile"] else "no", "yes" if case["cuda_graph"] else "no",
         *([number(case["images_per_s"]), number(case["slowest"]), number(case["fastest"]),
            "" if case["peak_gib"] is None else number(case["peak_gib"])]
           if "images_per_s" in case else ["failed", "", "", ""])]
        for case in records["speed"]["cases"]
    ]  # fmt: skip
    return table(["", "compiled", "CUDA graph", "images/s", "slowest", "fastest", "GiB"], rows)


def rates(records: Records, draw: Callable[[str, Draw], str]) -> list[str]:
    """Tabulate short trainings at several learning rates."""
    rows = [
        [_NAMES[record["settings"]["network"]], f"{record['settings']['learning_rate']:g}", number(final_loss(record)),
         number(record["evaluations"][-1]["distance"])]
        for record in found(records, ["rates"])
    ]  # fmt: skip
    lines = []
    if rows:
        images = found(records, ["rates"])[0]["settings"]["train"]["num_images"]
        lines += [f"{images:,} images of each, scored with steps of DPM-Solver++ even in time, before the default's",
                  "were as Karras' are: distances to be compared with one another alone.", ""]  # fmt: skip
        lines += table(["", "learning rate", "loss", "distance"], rows)
    whole = found(records, ["high-rate"])
    if whole:
        lines += [
            draw("high-rate.png", lambda figure: draw_losses(figure, whole)),
            "",
            "The loss at 0.001 to the end.",
            "",
        ]
    return lines


def draw_losses(figure: Figure, several: Sequence[Content]) -> None:
    """Plot loss against images."""
    axes = figure.subplots()
    for record in several:
        curve = record["curve"]
        axes.plot(
            [row["images"] / 1e6 for row in curve], [row["loss"] for row in curve], label=record["piece"], linewidth=1
        )
    axes.set(xlabel="million images seen", ylabel="loss", yscale="log")
    number_by_decades(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.legend()


def emoji(records: Records, draw: Callable[[str, Draw], str]) -> list[str]:
    """Tabulate trainings on emoji, for which there is no distance, and of what is shipped, and show their grids."""
    several = found(records, ["emoji", "release"])
    if not several:
        return []
    lines = table(_SCORES, [scores_row(record["piece"], [record]) for record in several])
    lines += table(_COSTS, [costs_row(record["piece"], [record]) for record in several])
    return lines + [f"![{record['piece']}](results/{record['piece']}-grid.png)\n" for record in several]


def imagenet(records: Records, draw: Callable[[str, Draw], str]) -> list[str]:
    """Say how to do what is not shown, and what it will take by the cost model, from the page that has it."""
    plans = (PAGE.parent / "imagenet.md").read_text().split("<!-- plans -->")[1].split("<!-- end plans -->")[0].strip()
    at_sizes = [_AT_SIZE.format(size=size, reference=reference) for size, reference in _REFERENCES.items()]
    return [_IMAGENET, *at_sizes, "What training takes, by `lamamba plan` ([scaling.md](scaling.md)):", "", plans, ""]


_AGAINST = (("seed-0", "more-seeds"), ("longer",), ("b",), ("flow",), ("flow-longer",))
SECTIONS = {
    "LaMamba against DiT on Fashion-MNIST": (comparison, tuple(chain.from_iterable(_AGAINST))),
    "What each part buys": (ablations, ("ablations", "more-ablations")),
    "Samples against steps": (steps, ("more-seeds", "flow")),
    "Clipping": (clipping, ("b", "release")),
    "Nearest training images": (memorisation, ("seed-0", "release")),
    "Emoji, 64x64, and what is small enough to ship": (emoji, ("emoji", "release")),
    "Speed of a training step": (speeds, ("speed",)),
    "Learning rates": (rates, ("rates", "high-rate")),
    "What is not shown: ImageNet": (imagenet, ()),
}
_KINDS = {
    steps: (Steps,),
    clipping: (Clipping,),
    memorisation: (Memorisation,),
    speeds: (Speed,),
}  # of pieces; of others Training


def environments(records: Records) -> list[str]:
    """Say on what it was all measured."""
    parts = [part for record in records.values() for part in record["parts"]]
    rows = sorted({tuple(str(part[key]) for key in ("device", "torch", "triton", "diffusers", "commit"))
                   for part in parts})  # fmt: skip
    return table(["device", "PyTorch", "Triton", "diffusers", "commit"], rows)


def write_page(records: Records, results: Path, page: Path) -> None:
    """Write the page, its plots and the pictures it shows, into the folder `results` beside it."""
    pictures = page.parent / "results"
    pictures.mkdir(parents=True, exist_ok=True)

    def draw(name: str, draw_on: Draw) -> str:
        figure = Figure(figsize=(9, 6), layout="constrained")
        draw_on(figure)
        figure.savefig(pictures / name, dpi=120, metadata={"Software": None})
        return f"![{name.removesuffix('.png')}](results/{name})"

    lines = ["# Results", "", _INTRODUCTION, ""]
    if any(record["settings"]["scale"]["quick"] for record in records.values()):
        lines += ["**Records of a quick look, whose numbers mean nothing.**", ""]
    lines += environments(records)
    if NOTES.is_file():
        lines += [NOTES.read_text().strip(), ""]
    for title, (section, names) in SECTIONS.items():
        kinds = _KINDS.get(section, (Training,))
        pieces = [piece for name in names for piece in LISTS[name] if isinstance(piece, kinds)]
        missing = [piece.name for piece in pieces if piece.name not in records]
        lines += [f"## {title}", "", *section(records, draw)]
        if missing:
            lines += [f"Not measured yet: {', '.join(missing)}.", ""]
    for name in records:
        for picture in sorted(results.glob(f"{name}-*.png")):
            if f"results/{picture.name}" in "\n".join(lines):
                shutil.copy(picture, pictures / picture.name)
    page.write_text("\n".join(lines).rstrip() + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--quick", action="store_true", help="of records of a quick look, to see that it works")
    arguments = parser.parse_args()
    records = read_records(arguments.results, arguments.quick)
    if not records:
        sys.exit(f"{arguments.results} has no finished records: nothing is measured yet, and nothing was written")
    write_page(records, arguments.results, arguments.page)
    print(f"{len(records)} records: written {arguments.page}")


if __name__ == "__main__":
    main()
