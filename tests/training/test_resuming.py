"""The same data and autoencoder are recognized wherever they lie, and others are refused unless they are allowed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lamamba.cli import main
from lamamba.data import ArraySource, FolderSource
from lamamba.data.latents import identify_autoencoder
from lamamba.errors import CheckpointError
from lamamba.training import run as training
from lamamba.training.resuming import compare_origin
from refusals import refusal

TINY = [
    *("--embed-dim", "4", "--num-heads", "1", "--depths", "1", "1", "1", "1", "--bottleneck-depth", "0"),
    *("--batch-size", "2", "--num-images", "2", "--device", "cpu", "--sample-steps", "1", "--image-size", "16"),
]


def digest(folder: Path) -> str:
    return FolderSource(folder, image_size=16).identify()


@pytest.fixture
def photos(images: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(images, tmp_path / "photos"))
    Image.new("RGB", (16, 16)).save(folder / "bird" / "0.png")  # the only one of its size
    return folder


def rename_image(folder: Path) -> None:
    (folder / "bird" / "0.png").rename(folder / "bird" / "00.png")


def rename_class(folder: Path) -> None:
    (folder / "bird").rename(folder / "zebra")


def grow_image(folder: Path) -> None:
    with (folder / "bird" / "0.png").open("ab") as file:
        file.write(b"x")


def add_image(folder: Path) -> None:
    shutil.copy(folder / "bird" / "0.png", folder / "bird" / "9.png")


def swap_images(folder: Path) -> None:
    for name in ("2.png", "0.png"):
        (folder / "bird" / name).rename(folder / "bird" / f"new-{name}")
    (folder / "bird" / "new-2.png").rename(folder / "bird" / "0.png")
    (folder / "bird" / "new-0.png").rename(folder / "bird" / "2.png")


@pytest.mark.parametrize("change", [rename_image, rename_class, grow_image, add_image, swap_images])
def test_a_digest_tells_folders_apart(photos: Path, change: Callable[[Path], None]) -> None:
    before = digest(photos)
    change(photos)
    assert digest(photos) != before


def test_a_digest_does_not_depend_on_place_time_order_or_links(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = digest(photos)
    linked = tmp_path / "linked"
    for path in sorted(photos.rglob("*.png"), reverse=True):
        (linked / path.parent.name).mkdir(parents=True, exist_ok=True)
        (linked / path.parent.name / path.name).symlink_to(path)
    os.utime(photos / "bird" / "0.png", (1, 1))
    (photos / "bird" / "notes.txt").write_text("no image")
    monkeypatch.chdir(photos)
    for folder in (photos, linked, Path("."), Path("../photos")):
        assert digest(folder) == wanted
    assert digest(photos.rename(tmp_path / "elsewhere")) == wanted


def test_a_digest_of_arrays_is_of_pixels_and_labels() -> None:
    images, labels = np.arange(8, dtype=np.uint8).reshape(2, 1, 2, 2), np.array([0, 1])
    digests = [
        ArraySource("a", images, labels, ()).identify(),
        ArraySource("a", images[::-1], labels, ()).identify(),
        ArraySource("a", images, labels[::-1], ()).identify(),
        ArraySource("a", images.reshape(2, 1, 1, 4), labels, ()).identify(),
    ]
    assert len(set(digests)) == 4
    assert ArraySource("b", images.copy(), labels.astype(np.uint8), ()).identify() == digests[0]


def test_a_digest_of_an_autoencoder_is_of_weights_and_configuration(autoencoder: Path, tmp_path: Path) -> None:
    wanted = identify_autoencoder(autoencoder)
    moved = Path(shutil.copytree(autoencoder, tmp_path / "moved"))
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({"_name_or_path": "elsewhere", **config}))
    assert identify_autoencoder(moved) == wanted
    (moved / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.25}))
    assert identify_autoencoder(moved) != wanted
    (moved / "config.json").unlink()
    with pytest.raises(CheckpointError, match="moved cannot be read as an AutoencoderKL"):
        identify_autoencoder(moved)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Start a run, of which only the first checkpoint matters: when it is resumed, nothing is computed."""

    def train(run: Path, *options: str) -> None:
        main(["train", "--out", str(run), *options, *TINY])
        monkeypatch.setattr(training, "_run", lambda *arguments: None)

    return train


def resume(run: Path, *options: str) -> None:
    main(["train", "--out", str(run), "--resume", *options])


def refused(capsys: pytest.CaptureFixture[str], run: Path, *options: str) -> str:
    return refusal(capsys, lambda: resume(run, *options))


def test_a_run_goes_on_wherever_its_data_are_and_with_no_others(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    start: Callable[..., None],
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    (photos / "fish" / "notes.txt").write_text("no image")
    start(Path("run"), "--data", "photos")
    assert "left out of photos: 1 .txt\n" in capsys.readouterr().out
    resume(Path("run"), "--data", "./photos")
    monkeypatch.chdir(elsewhere)
    resume(run)
    assert "moved" not in capsys.readouterr().out
    photos.rename(tmp_path / "pictures")
    assert "photos' is neither a known name nor an existing folder" in refused(capsys, run)
    monkeypatch.chdir(tmp_path)
    resume(run, "--data", "pictures")
    assert (
        f"data has moved from {photos} to {tmp_path}/pictures; its contents are the same\n" in capsys.readouterr().out
    )
    rename_class(tmp_path / "pictures")
    error = refused(capsys, run)
    assert "data pictures has no class 'bird' and a new class 'zebra'" in error
    assert "--allow-changed data" in error
    assert json.loads((run / "config.json").read_text())["identity"]["data"]["class_names"] == ["bird", "fish"]
    resume(run, "--allow-changed", "data")
    assert "which is allowed: data pictures has no class 'bird'" in capsys.readouterr().out
    resume(run)  # and need not be allowed again


def test_a_run_goes_on_with_its_autoencoder_wherever_it_is(
    photos: Path, autoencoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], start: Callable[..., None]
) -> None:
    vae, moved, run = tmp_path / "vae", tmp_path / "moved", tmp_path / "run"
    shutil.copytree(autoencoder, vae)
    start(run, "--data", str(photos), "--vae", str(vae))
    vae.rename(moved)
    assert f"{vae} holds no autoencoder" in refused(capsys, run)
    resume(run, "--vae", str(moved))
    assert f"vae has moved from {vae} to {moved}; its contents are the same\n" in capsys.readouterr().out
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.25}))
    assert "--allow-changed vae" in refused(capsys, run)
    assert "--allow-changed vae" in refused(capsys, run, "--allow-changed", "data")
    resume(run, "--allow-changed", "vae")


def test_a_run_of_an_earlier_version_goes_on(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    start: Callable[..., None],
) -> None:
    monkeypatch.chdir(tmp_path)
    start(Path("run"), "--data", "photos")
    path = tmp_path / "run" / "config.json"
    before = {name: value for name, value in json.loads(path.read_text()).items() if name not in ("identity", "paths")}
    path.write_text(json.dumps(before))
    rename_class(photos)
    assert "data photos has no class 'bird' and a new class 'zebra'" in refused(capsys, Path("run"))
    (photos / "zebra").rename(photos / "bird")
    resume(Path("run"))
    assert json.loads(path.read_text())["identity"]["data"]["digest"] == digest(photos)


def origin(
    images: int = 6, class_names: tuple[str, ...] = ("a", "b"), digest: str = "1", **more: Any
) -> dict[str, Any]:
    data = {"images": images, "class_names": list(class_names), "digest": digest}
    content = {"out": "run", "data": "d", "vae": None, "identity": {"data": data, "vae": None}, "paths": {"data": "/d"}}
    return {**content, **more}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"digest": "2"}, "data d has as many images, but their file names or sizes differ"),
        ({"digest": "2", "images": 1234}, "data d has 1,234 images, not 6"),
        ({"digest": "2", "class_names": "ba"}, "data d has its classes in another order"),
        ({"digest": "2", "class_names": ""}, "data d has no class 'a', 'b': give"),
        ({"digest": "2", "class_names": "abcdef"}, "data d has a new class 'c', 'd', 'e', ...: give"),
    ],
)
def test_what_differs_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        compare_origin(origin(), origin(**changes), ("a", "b"), ("vae",))
    if len(changes.get("class_names", "ab")) == 2:
        assert message in compare_origin(origin(), origin(**changes), ("a", "b"), ("data",))[0]
        return
    # A network has a row for each class, so another number of them cannot be allowed.
    for allowed in ((), ("data",)):
        with pytest.raises(CheckpointError, match="or start a run with other classes by lamamba finetune run"):
            compare_origin(origin(), origin(**changes), ("a", "b"), allowed)


def test_runs_of_earlier_versions_go_on_with_the_same_path_and_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {"out": "run", "data": "d", "vae": None}
    for data in ("d", "./d", str(tmp_path / "d")):
        assert compare_origin(before, origin(data=data, paths={"data": str(tmp_path / "d")}), ("a", "b"), ()) == []
    with pytest.raises(CheckpointError, match="data was d, now e: give the original"):
        compare_origin(before, origin(data="e"), ("a", "b"), ())
    with pytest.raises(CheckpointError, match="data d has no class 'x' and a new class 'a'"):
        compare_origin(before, origin(), ("x", "b"), ())
