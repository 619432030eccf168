"""`lamamba sample`: from a checkpoint to PNG files that say how they were made."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lamamba.checkpoints.checkpoint import CheckpointInfo, load_checkpoint
from lamamba.checkpoints.saving import save_checkpoint
from lamamba.cli import main
from lamamba.config import SamplingConfig
from lamamba.data.latents import Pixels
from lamamba.demo.settings import label_names, read_guidance
from lamamba.diffusion import Diffusion
from lamamba.model import LaMambaDiff
from lamamba.sampling import sample as draw
from lamamba.sampling.generate import ImageSampler
from lamamba.sampling.pipeline import LaMambaDiffPipeline
from refusals import refusal
from small_network import TINY_NETWORK

CLASS_NAMES = ("Cat", "Dog", "Great owl")


def write_run(
    folder: Path,
    objective: str = "diffusion",
    class_names: tuple[str, ...] = CLASS_NAMES,
    seed: int = 0,
    label_dropout: float = 0.1,
) -> Path:
    """Write a checkpoint of a tiny network whose output depends on its label."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LaMambaDiff(
            in_channels=1, sample_size=8, num_classes=len(class_names), embed_dim=8, num_heads=2, depths=(1, 1, 1, 1),
            bottleneck_depth=1, decoder_extra_depth=0, window_size=4, label_dropout=label_dropout,
        )  # fmt: skip
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    info = CheckpointInfo(images=640, step=10, objective=objective, class_names=class_names)
    save_checkpoint(folder, info, {"ema": network}, {"random_state": torch.get_rng_state()})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


def sample(run: Path, folder: Path, *options: str) -> None:
    main(["sample", str(run), "--steps", "3", "--device", "cpu", "--out", str(folder / "grid.png"), *options])


def read_images(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]).astype(int)


def settings(path: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads(Image.open(path).info["lamamba"])
    return content


@pytest.mark.parametrize("sampler", ["dpm++", "sde-dpm++", "ancestral"])
def test_the_batch_size_changes_no_image(run: Path, tmp_path: Path, sampler: str) -> None:
    options = ["--labels", "0,2", "--num-per-label", "4", "--sampler", sampler]
    for batch_size in (1, 3, 8):
        folder = tmp_path / str(batch_size)
        sample(run, folder, *options, "--batch-size", str(batch_size), "--images-out", str(folder / "images"))
    together = read_images(tmp_path / "8" / "images")
    assert together.shape == (8, 8, 8)
    assert len({image.tobytes() for image in together}) == 8
    for batch_size in (1, 3):
        assert np.abs(read_images(tmp_path / str(batch_size) / "images") - together).max() <= 1


def test_pixels_are_clipped_on_the_way(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what samples, draws samples of a training, and makes a pipeline: each step's image is, not the last alone."""
    assert LaMambaDiffPipeline.from_checkpoint(run).scheduler.config["thresholding"]
    seen: list[float] = []
    plain = Pixels.decode

    def decode(self: Pixels, x: torch.Tensor) -> torch.Tensor:
        seen.append(float(x.abs().max()))
        return plain(self, x)

    monkeypatch.setattr(Pixels, "decode", decode)
    sample(run, tmp_path)
    length = ["--num-images", "8", "--batch-size", "8", "--sample-every", "8", "--sample-steps", "3"]
    main(["train", "--device", "cpu", "--out", str(tmp_path / "new"), *TINY_NETWORK, *length])
    assert len(seen) >= 2
    assert max(seen) <= 1 + 1e-4
    loaded = load_checkpoint(run)
    unclipped = draw(loaded.network, Diffusion(), [0, 1], [0, 1], num_steps=3)
    assert unclipped.abs().max() > 1.1, "or this would show nothing"


def test_image_i_has_seed_plus_i(run: Path, tmp_path: Path) -> None:
    options = ["--labels", "1", "--sampler", "ancestral"]
    sample(run, tmp_path, *options, "--num-per-label", "4", "--seed", "10", "--images-out", str(tmp_path / "four"))
    sample(run, tmp_path, *options, "--num-per-label", "1", "--seed", "12", "--images-out", str(tmp_path / "third"))
    assert np.abs(read_images(tmp_path / "third")[0] - read_images(tmp_path / "four")[2]).max() <= 1


def test_files_their_sizes_and_their_settings(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "000099.png").touch()
    sample(
        run, tmp_path, "--labels", "dog, 3", "--num-per-label", "3", "--seed", "7", "--images-out", str(tmp_path / "i")
    )
    shown = capsys.readouterr().out
    assert f"images {tmp_path / 'i' / '000000.png'} to 000005.png, beside 1 other" in shown
    (tmp_path / "i" / "000099.png").unlink()
    assert Image.open(tmp_path / "grid.png").size == (8 * (3 * 10 + 2), 8 * (2 * 10 + 2)), "8 times 3 columns, 2 rows"
    assert [path.name for path in sorted((tmp_path / "i").iterdir())] == [f"{index:06d}.png" for index in range(6)]
    grid = settings(tmp_path / "grid.png")
    assert (grid["labels"], grid["num_per_label"], grid["seed"]) == ([1, 3], 3, 7)
    image = settings(tmp_path / "i" / "000004.png")
    assert (image["label"], image["seed"], image["images_seen"]) == (3, 11, 640)
    assert (image["sampler"], image["steps"], image["guidance"]) == ("dpm++", 3, 2.0)
    assert (image["checkpoint"], image["torch"]) == (str(run), torch.__version__)
    assert "6 images (Dog, no label)" in shown
    assert str(tmp_path / "grid.png") in shown


def test_a_size_of_its_own(run: Path, tmp_path: Path) -> None:
    sample(
        run, tmp_path, "--labels", "0", "--num-per-label", "1", "--size", "12", "6", "--images-out", str(tmp_path / "i")
    )
    assert read_images(tmp_path / "i").shape == (1, 12, 6)


def test_all_classes_are_the_default(run: Path, tmp_path: Path) -> None:
    sample(run, tmp_path, "--num-per-label", "1")
    assert settings(tmp_path / "grid.png")["labels"] == [0, 1, 2]


def test_guidance_changes_the_images(run: Path, tmp_path: Path) -> None:
    def draw(name: str, *options: str) -> np.ndarray:
        sample(run, tmp_path, "--labels", "1", *options, "--images-out", str(tmp_path / name))
        return read_images(tmp_path / name)

    none, strong = draw("none", "--guidance", "1"), draw("strong", "--guidance", "6")
    assert np.abs(none - strong).max() > 1
    assert np.array_equal(draw("never", "--guidance", "6", "--guidance-interval", "1e6", "1e7"), none)


def test_the_options_of_guidance_change_the_images_and_are_kept_with_them(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flow, weaker = (
        write_run(tmp_path / name, objective="flow", seed=seed) for seed, name in enumerate(("run", "weaker"))
    )
    variants = [
        [],
        ["--guidance-interval", "0.5", "5"],
        ["--guidance-cosine-power", "2"],
        ["--guidance-rescale", "0.7"],
        ["--guidance-checkpoint", str(weaker)],
    ]
    names = ("guidance_interval", "guidance_cosine_power", "guidance_rescale", "guidance_checkpoint")
    kept, images = [], []
    for index, options in enumerate(variants):
        folder = tmp_path / str(index)
        sample(flow, tmp_path, "--labels", "1", "--guidance", "3", *options, "--images-out", str(folder))
        images.append(read_images(folder).tobytes())
        kept.append([settings(folder / "000000.png")[name] for name in names])
    assert len(set(images)) == len(variants)
    assert kept == [
        [None, 0, 0, None],
        [[0.5, 5], 0, 0, None],
        [None, 2, 0, None],
        [None, 0, 0.7, None],
        [None, 0, 0, str(weaker)],
    ]
    message = f"guidance_checkpoint {flow} has the objective 'flow', this one 'diffusion'"
    refused(capsys, run, tmp_path, "--guidance-checkpoint", str(flow), message=message)


def test_flow_matching_is_sampled_with_its_own_samplers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", objective="flow")
    for sampler in ("unipc", "euler", "heun"):
        sample(run, tmp_path / sampler, "--labels", "0", "--sampler", sampler)
        assert settings(tmp_path / sampler / "grid.png")["sampler"] == sampler
    sample(run, tmp_path, "--labels", "0")
    assert settings(tmp_path / "grid.png")["sampler"] == "unipc"
    refused(capsys, run, tmp_path, "--sampler", "ddim", message="use unipc or euler or heun")


def test_an_unconditional_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", class_names=())
    sample(run, tmp_path, "--num-per-label", "2")
    assert settings(tmp_path / "grid.png")["guidance"] == 1.0
    refused(capsys, run, tmp_path, "--guidance", "2", message="guidance needs labels")
    refused(capsys, run, tmp_path, "--labels", "cat", message="no class is named 'cat': this network is unconditional")


def test_a_run_that_never_dropped_labels_is_not_guided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", label_dropout=0.0)
    sample(run, tmp_path, "--labels", "dog", "--num-per-label", "1")
    off = "guidance is off: this network was trained with label_dropout 0"
    assert off in capsys.readouterr().out
    assert settings(tmp_path / "grid.png")["guidance"] == 1.0
    sample(run, tmp_path, "--labels", "dog", "--num-per-label", "1", "--guidance", "1")
    assert off not in capsys.readouterr().out
    refused(capsys, run, tmp_path, "--guidance", "2", message="label_dropout 0")
    refused(capsys, run, tmp_path, "--labels", "3", message='has never seen "no label": give one of its 3 classes')
    main(["generate", str(run), "--num-images", "2", "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "set")])
    assert off in capsys.readouterr().out
    assert json.loads((tmp_path / "set" / "generation.json").read_text())["guidance"] == 1.0
    main(["push", str(run), "--out", str(tmp_path / "pipe"), "--num-per-label", "1", "--device", "cpu"])
    assert off in capsys.readouterr().out
    assert "| guidance | off: this network was trained with label" in (tmp_path / "pipe" / "README.md").read_text()
    model = ImageSampler(SamplingConfig(checkpoint=str(run)), torch.device("cpu"))
    assert label_names(model) == list(CLASS_NAMES)
    assert read_guidance(7, model) == 1.0, "as the page shows it"


def refused(capsys: pytest.CaptureFixture[str], run: Path, folder: Path, *options: str, message: str) -> None:
    assert message in refusal(capsys, lambda: sample(run, folder, *options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "0,4"], "label 4 is out of range: use 0 to 2, or 3 for no label"),
        (["--labels", "-1"], "label -1 is out of range"),
        (["--labels", "grate owl"], "no class is named 'grate owl': did you mean great owl?"),
        (["--labels", ""], "labels is empty: give names or numbers"),
        (["--guidance", "nan"], "guidance is nan: it must be a number"),
        (["--labels", "²"], "no class is named '²'"),
        (
            ["--sampler", "heun"],
            "use ancestral or ancestral-cosine or ddim or ddim-cosine or dpm++ or sde-dpm++ or unipc",
        ),
        (["--size", "8", "7"], "image size 7 is not an even number from 4 up: use 8"),
        (["--steps", "1001"], "1001 steps are out of range"),
        (["--steps", "0"], "steps is 0: it must be 1 or more"),
        (["--out", "grid.jpg"], "grid.jpg is not a .png file"),
        (["--guidance-interval", "5", "1"], "guidance_interval is (5.0, 1.0)"),
        (["--guidance-cosine-power", "-1"], "guidance_cosine_power is -1.0: it must be 0 or more"),
        (["--guidance-rescale", "1.5"], "guidance_rescale is 1.5: it must be from 0 to 1"),
        (["--guidance-checkpoint", "nanno"], "'nanno' is neither a folder nor a preset: did you mean nano?"),
        (["--guidance-checkpoint", "emoji-64"], "in_channels 3 and this one 1: guide by one trained on the same data"),
        (["--device", "gpu"], "device 'gpu' cannot be used here"),
        (["--num-per-label", "99999999999"], "it must be from 1 to 10,000 in one grid; lamamba generate makes any num"),
        (["--num-per-label", "10000", "--size", "256", "256"], "makes 1,966,080,000 pixels, and a grid has at most"),
        (
            ["--seed", str(2**64)],
            "seed is 18446744073709551616: it must be a whole number from 0 to 18,446,744,073,709,551,615",
        ),
        (["--seed", str(2**64 - 1)], "it must be a whole number from 0 to 18,446,744,073,709,551,"),
        (["--size", "1", "-1"], "size is (1, -1): it must be a height and a width from 1 to 16,384"),
    ],
)
def test_what_cannot_be_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    refused(capsys, run, tmp_path, *options, message=message)
    assert not (tmp_path / "grid.png").exists()


def test_places_that_cannot_be_written_are_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    refused(capsys, run, tmp_path / "file", message=f"folder {tmp_path / 'file'} cannot be made")
    refused(capsys, run, tmp_path, "--images-out", str(tmp_path / "file"), message="cannot be made")
    (tmp_path / "grid.png").mkdir()
    refused(capsys, run, tmp_path, "--labels", "0", message=f"{tmp_path / 'grid.png'} could not be written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "grid.png"], "no temporary file is left"


def test_classes_named_by_numbers_are_shown_with_their_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", class_names=("0", "3", "7"))
    sample(run, tmp_path, "--labels", "7,3,0", "--num-per-label", "1")
    assert settings(tmp_path / "grid.png")["labels"] == [2, 1, 0]
    assert "(7 = label 2, 3 = label 1, 0)" in capsys.readouterr().out


def test_a_class_without_a_name_is_called_by_its_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    sample(next(run.glob("checkpoints/*/ema")), tmp_path, "--labels", "2,3", "--num-per-label", "1")
    assert "(2, no label)" in capsys.readouterr().out
