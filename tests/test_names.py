"""Every command works in folders and on classes whose names are no UTF-8, or mean something elsewhere."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lamamba.cli import main
from lamamba.sampling.pipeline import LaMambaDiffPipeline
from lamamba.training.log import TrainingLog
from loss_curves import draw
from small_network import TINY_NETWORK

CLASSES = (b"[red]$a_$", b"_\xff\n|<b>")  # in order, as their names are printed below
SHOWN = ("[red]$a_$", r"_\xff\n|<b>")
TINY = [
    *TINY_NETWORK,
    *("--sample-steps", "1", "--batch-size", "2", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name is no UTF-8, with images of two such classes in `data`."""
    place = tmp_path_factory.mktemp("names") / os.fsdecode(b"r[flow]\xfe\n$x_$\x1b[1m")
    try:
        for index in range(4):
            path = place / "data" / os.fsdecode(CLASSES[index % 2]) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(index).integers(0, 256, (32, 32), dtype=np.uint8)).save(path)
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")
    return place


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    options = ["--image-size", "32", "--channels", "1", "--num-images", "2", "--power-averages", "0.1"]
    main(["train", "--data", str(place / "data"), "--out", str(place / "run"), *options, *TINY])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLog, "_plot", draw)
        main(["train", "--out", str(place / "run"), "--resume", "--num-images", "4"])
    return place / "run"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_is_whole(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = read_json(run / "config.json")
    assert (config["out"], config["data"]) == (str(run), str(run.parent / "data"))
    checkpoint = read_json(run / "checkpoints" / "000000000004" / "checkpoint.json")
    assert checkpoint["class_names"] == [SHOWN[0], "_\\xff\n|<b>"]
    assert (run / "loss.png").is_file()
    shutil.copytree(run / "tensorboard", tmp_path / "tensorboard")  # TensorBoard reads only names in UTF-8
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [point.step for point in board.Scalars("train/loss")] == [2, 4]
    for command in (["plot", str(run), "--out", str(run.parent / "plots")], ["watch", str(run)]):
        main(command)
        shown = capsys.readouterr().out
        assert r"r[flow]\xfe\n$x_$\x1b[1m/" in shown
    assert {path.suffix for path in (run.parent / "plots").iterdir()} == {".png", ".gif"}
    main(["average", str(run), "--sigma-rel", "0.1", "--out", str(run.parent / "averaged")])
    main(["info", str(run.parent / "averaged")])


def test_classes_are_asked_for_as_they_are_and_as_they_are_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grids = []
    for number, name in enumerate((os.fsdecode(CLASSES[1]), SHOWN[1], "1")):
        out = run.parent / f"{number}.png"
        main(["sample", str(run), "--labels", name, "--num-per-label", "1", "--steps", "1", "--out", str(out)])
        grids.append(np.asarray(Image.open(out)))
        assert json.loads(Image.open(out).text["lamamba"])["checkpoint"] == str(run)  # type: ignore[attr-defined]
        assert f"1 image ({SHOWN[1]}) " in capsys.readouterr().out
    assert (grids[0] == grids[1]).all()
    assert (grids[0] == grids[2]).all()


def test_images_are_scored_and_shared(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = run.parent
    samples, scores, card = place / "samples", place / "scores.json", place / "card"
    main(["generate", str(run), "--num-images", "6", "--steps", "1", "--out", str(samples), "--device", "cpu"])
    main(["evaluate", str(samples), str(place / "data"), "--features", "clothes", "--out", str(scores)])
    assert r"6 images of" in capsys.readouterr().out
    assert read_json(scores)["generated"]["name"] == str(samples)
    main(["push", str(run), "--out", str(card), "--scores", str(scores), "--num-per-label", "1", "--device", "cpu"])
    text = (card / "README.md").read_text(encoding="utf-8")
    assert r"| classes | \[red\]\$a\_\$, \_\\xff\\n\|\<b\> |" in text
    pipe = LaMambaDiffPipeline.from_pretrained(card, local_files_only=True)
    assert list(pipe.labels.values()) == [0, 1]
    main(["convert", str(card), str(place / "released.pt")])
    main(["grid", str(samples), "--captions", "--out", str(place / "grid.png")])


def test_latents_are_encoded_and_trained_on(place: Path, autoencoder: Path) -> None:
    vae = Path(shutil.copytree(autoencoder, place / "vae"))
    options = ["--data", str(place / "data"), "--vae", str(vae), "--image-size", "32", "--device", "cpu"]
    main(["encode", *options, "--out", str(place / "latents")])
    main(["train", "--data", str(place / "latents"), "--out", str(place / "of latents"), "--num-images", "2", *TINY])
    main(["sample", str(place / "of latents"), "--steps", "1", "--out", str(place / "latent.png"), "--device", "cpu"])
    assert (place / "latent.png").is_file()
