"""`lamamba generate`: sets of images that depend on their place alone, whoever makes them and however often."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_generate import CLASS_NAMES, write_run

from forked import run_ranks
from lamamba.checkpoints.checkpoint import CheckpointInfo, write_weights
from lamamba.cli import main
from lamamba.config import GenerateConfig
from lamamba.data.latents import Latents
from lamamba.model import LaMambaDiff
from lamamba.sampling import generate as module
from refusals import refusal


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


OPTIONS = ["--steps", "2", "--device", "cpu", "--num-images", "11", "--images-per-shard", "4"]


def generate(run: Path, out: Path, *options: str) -> None:
    main(["generate", str(run), "--out", str(out), *OPTIONS, *options])


def images(out: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))]).astype(int)


def label_of(path: Path) -> int:
    label: int = json.loads(Image.open(path).info["lamamba"])["label"]
    return label


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "images"
    generate(run, out)
    return out


def refused(capsys: pytest.CaptureFixture[str], run: Path, out: Path, *options: str) -> str:
    return refusal(capsys, lambda: generate(run, out, *options))


def test_the_set_is_complete_and_says_how_it_was_made(whole: Path) -> None:
    paths = sorted(whole.glob("*.png"))
    assert [path.name for path in paths] == [f"{place:08d}.png" for place in range(11)]
    assert [label_of(path) for path in paths] == [place % 3 for place in range(11)]
    assert len(np.unique(images(whole).reshape(11, -1), axis=0)) == 11
    made = json.loads((whole / "generation.json").read_text())
    assert (made["num_images"], made["labels"], made["steps"]) == (11, "balanced", 2)
    assert len(made["weights"]) == 64


def test_an_image_depends_on_its_place_alone(run: Path, whole: Path, tmp_path: Path) -> None:
    generate(run, tmp_path / "a", "--images-per-shard", "3", "--batch-size", "2")
    assert np.abs(images(tmp_path / "a") - images(whole)).max() <= 1
    generate(run, tmp_path / "b", "--seed", "4", "--num-images", "3", "--labels", "Dog,Great owl,Cat")
    assert np.abs(images(tmp_path / "b") - images(whole)[4:7]).max() <= 1


def test_processes_share_the_set(run: Path, whole: Path, tmp_path: Path) -> None:
    done = run_ranks(2, "-m", "lamamba", "generate", str(run), "--out", str(tmp_path / "out"), *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("11 images in") == 1
    assert np.abs(images(tmp_path / "out") - images(whole)).max() <= 1


@pytest.mark.parametrize("kind", ["png", "webdataset", "npz"])
def test_what_was_stopped_goes_on(
    run: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    out, options, painted = tmp_path / "out", ["--format", kind], []
    sample = module.ImageSampler.sample

    def count(model: module.ImageSampler, labels: list[int], *arguments: object) -> np.ndarray:
        painted.append(len(labels))
        if len(painted) == 3:
            raise KeyboardInterrupt
        return sample(model, labels, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module.ImageSampler, "sample", count)
    with pytest.raises(SystemExit, match="130"):
        generate(run, out, *options)
    assert painted == [4, 4, 3]
    generate(run, out, *options)
    assert painted == [4, 4, 3, 3], "what is there is not made again"
    generate(run, out, *options)
    assert painted == [4, 4, 3, 3]
    assert np.abs(read(out, kind) - images(whole)).max() <= 1
    assert not [path for path in out.iterdir() if path.name.startswith(".incomplete")]


def read(out: Path, kind: str) -> np.ndarray:
    if kind == "png":
        return images(out)
    if kind == "npz":
        with np.load(out / "samples.npz") as content:
            assert content["arr_0"].dtype == np.uint8
            assert content["arr_1"].tolist() == [place % 3 for place in range(11)]
            assert not list(out.glob("shard-*"))
            return content["arr_0"][..., 0].astype(int)
    found: dict[str, bytes] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    assert [found[f"{place:08d}.cls"] for place in range(11)] == [str(place % 3).encode() for place in range(11)]
    pictures = [Image.open(io.BytesIO(found[f"{place:08d}.png"])) for place in range(11)]
    return np.stack([np.asarray(picture) for picture in pictures]).astype(int)


def test_labels_are_drawn_at_random_from_the_seed(run: Path, tmp_path: Path) -> None:
    drawn = {}
    for name, options in {"a": [], "again": ["--batch-size", "3"], "b": ["--seed", "1"]}.items():
        generate(run, tmp_path / name, "--labels", "random", "--num-images", "40", "--steps", "1", *options)
        drawn[name] = [label_of(path) for path in sorted((tmp_path / name).glob("*.png"))]
    assert drawn["a"] == drawn["again"] != drawn["b"]
    assert set(drawn["a"]) == {0, 1, 2}
    assert drawn["a"][:9] != [place % 3 for place in range(9)]


def test_random_labels_of_a_part_are_those_of_the_whole() -> None:
    config = GenerateConfig(checkpoint="nano", out=Path("out"), labels="random", seed=3)
    labels_of = module._labels_of_set(config, SimpleNamespace(num_classes=7))  # type: ignore[arg-type]
    raw = np.random.Philox(key=np.array([3, 0], dtype=np.uint64)).random_raw(40)
    assert labels_of(range(40)) == [int(number % 7) for number in raw]
    for start in range(9):
        assert labels_of(range(start, 23)) == labels_of(range(40))[start:23]


class _EnoughError(Exception):
    pass


@pytest.mark.parametrize("labels", ["balanced", "random", "0,2"])
@pytest.mark.parametrize("seed", [0, 2**64 - 10**12])
def test_a_set_begins_at_once_however_large_it_is(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: str, seed: int
) -> None:
    def sample(model: Any, labels: list[int], seeds: range, on_step: Any) -> None:
        assert len(labels) == len(seeds) == 4
        assert seeds[0] == seed
        raise _EnoughError

    monkeypatch.setattr(module.ImageSampler, "sample", sample)
    with pytest.raises(_EnoughError):
        generate(run, tmp_path / "out", "--num-images", "999999999999", "--labels", labels, "--seed", str(seed))


def test_a_set_goes_on_from_weights_and_an_autoencoder_that_have_moved(
    autoencoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, vae, out = tmp_path / "run", tmp_path / "vae", tmp_path / "out"
    network = LaMambaDiff(
        in_channels=2, sample_size=8, num_classes=0, embed_dim=4, num_heads=1, depths=(1, 1, 1, 1), bottleneck_depth=0
    )
    write_weights(run, network, CheckpointInfo())
    shutil.copytree(autoencoder, vae)
    options = ["--out", str(out), "--steps", "1", "--device", "cpu"]
    main(["generate", str(run), "--vae", str(vae), "--num-images", "1", *options])
    run, vae = run.rename(tmp_path / "moved"), vae.rename(tmp_path / "moved-vae")
    main(["generate", str(run), "--vae", str(vae), "--num-images", "2", *options])
    assert len(images(out)) == 2
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.25}))
    with pytest.raises(SystemExit, match="2"):
        main(["generate", str(run), "--vae", str(vae), "--num-images", "2", *options])
    assert "vae_digest was" in capsys.readouterr().err


def test_weights_to_guide_away_from_are_recognized_wherever_they_lie(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weaker, out = tmp_path / "weaker", tmp_path / "out"
    shutil.copytree(write_run(tmp_path / "other", seed=1), weaker)
    generate(run, out, "--num-images", "1", "--guidance-checkpoint", str(weaker))
    moved = weaker.rename(tmp_path / "moved")
    generate(run, out, "--num-images", "2", "--guidance-checkpoint", str(moved))
    assert len(images(out)) == 2
    shutil.copytree(write_run(tmp_path / "third", seed=2), weaker)
    line = refused(capsys, run, out, "--num-images", "2", "--guidance-checkpoint", str(weaker))
    assert "guidance_weights was" in line


def test_a_folder_of_something_else_is_refused(
    run: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, run, whole, "--steps", "3", "--labels", CLASS_NAMES[0])
    assert f"{whole} holds images that were made otherwise, choose another folder: " in line
    assert "steps was 2, now 3; labels was balanced, now Cat" in line
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    assert f"out {tmp_path / 'other'} holds other files" in refused(capsys, run, tmp_path / "other")
    other = write_run(tmp_path / "other run", seed=1)
    assert "weights was" in refused(capsys, other, whole)
    assert "no class is named 'Cow'" in refused(capsys, run, tmp_path / "new", "--labels", "Cow")


def test_a_set_of_files_grows(run: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "images"
    generate(run, out, "--num-images", "6")
    generate(run, out)
    assert np.abs(images(out) - images(whole)).max() <= 1
    assert (out / "generation.json").read_text() == (whole / "generation.json").read_text()
    assert "num_images was 11, now 6" in refused(capsys, run, out, "--num-images", "6")
    assert "steps was 2, now 3; num_images was 11" in refused(capsys, run, out, "--num-images", "20", "--steps", "3")


def test_a_decoder_is_compiled_where_images_are_many(autoencoder: Path) -> None:
    """On a GPU alone, and counted in decoded pixels."""

    def compiled(device: str, grid: int, number: int) -> bool:
        space = Latents.open(autoencoder, torch.device("cpu"))  # of factor 2
        network = SimpleNamespace(device=torch.device(device), config=SimpleNamespace(sample_size=grid))
        model: Any = SimpleNamespace(space=space, network=network, grid_size=(grid, grid))
        module.ImageSampler.prepare(model, number)
        return space._is_compiled

    pytest.importorskip("triton")
    assert compiled("cuda", 128, 10_000)
    assert not compiled("cuda", 128, 9_999)
    assert compiled("cuda", 256, 2_500)
    assert not compiled("cpu", 128, 10_000)
