"""Make docs/findings.md and its sample grids from the records in results/: findings.md in this folder, with tables.

    python experiments/comparison/make_findings.py

In findings.md, the lines {cifar}, {clothes} and {losses} stand for the tables.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from make_page import Records, number, read_records, table
from scoring import FEATURES
from setting import HERE, RESULTS

PAGE = HERE.parents[1] / "docs" / "findings.md"
NAMES = {"s": "LaMamba-S", "dit-s-2": "DiT-S/2", "unet": "U-Net"}
GRIDS = ("cifar-s-seed-0", "cifar-dit-s-2-seed-0")
_SCORES = ("distance", "recall", "coverage")


def scores_table(records: Records, names: Sequence[str]) -> list[str]:
    """Lay out a row per score: one network after a number of images, and the training images themselves."""
    data = records[names[0]]["settings"]["data"]
    features = FEATURES[data]
    header = ["", "images", "seconds", *(f"{score}, {feature}" for feature in features for score in _SCORES)]
    rows = []
    for name in names:
        record = records[name]
        for row in record["evaluations"]:
            start = [NAMES[record["settings"]["network"]], f"{row['images']:,}", f"{row['seconds']:.0f}"]
            rows.append(start + _cells(row, features))
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


def page(records: Records, text: str) -> str:
    """Fill in the tables."""
    cifar, clothes = GRIDS, ("s-flow-decay", "dit-s-2-flow-decay")
    tables = {
        "{cifar}": scores_table(records, cifar),
        "{clothes}": scores_table(records, clothes),
        "{losses}": losses_table(records, (*clothes, *cifar)),
    }
    for mark, lines in tables.items():
        text = text.replace(mark, "\n".join(lines).rstrip())
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    arguments.page.write_text(page(read_records(arguments.results), (HERE / "findings.md").read_text()))
    pictures = arguments.page.with_suffix("")
    pictures.mkdir(exist_ok=True)
    for name in GRIDS:
        shutil.copy(arguments.results / f"{name}-grid.png", pictures / f"{name}.png")


if __name__ == "__main__":
    main()
