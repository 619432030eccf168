"""Latents: the autoencoder's own scale, and a run on them from the images to the samples."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lamamba.checkpoints.checkpoint import load_checkpoint
from lamamba.cli import main
from lamamba.data import to_float, to_uint8
from lamamba.data.latents import Latents, Pixels, in_parts, open_space
from lamamba.errors import CheckpointError, ConfigError
from tiny_autoencoder import CPU, TINY, write_autoencoder


def some_pixels() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def some_noise(seed: int) -> torch.Tensor:
    return torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_scale_and_shift_are_the_autoencoders(autoencoder: Path, tmp_path: Path) -> None:
    scaled, plain = Latents.open(autoencoder, CPU), Latents.open(write_autoencoder(tmp_path, 1.0, None), CPU)
    encoded, unscaled = (space.encode(some_pixels(), some_noise(2)) for space in (scaled, plain))
    assert encoded.shape == (3, 2, 8, 8)
    assert encoded.dtype == torch.float32
    torch.testing.assert_close(encoded, (unscaled - 0.3) * 0.5)
    difference = scaled.decode(encoded).int() - plain.decode(unscaled).int()
    assert scaled.decode(encoded).shape == (3, 3, 16, 16)
    assert int(difference.abs().max()) <= 1


def test_latents_are_drawn_from_the_encoders_distribution(autoencoder: Path) -> None:
    space = Latents.open(autoencoder, CPU)
    draws = torch.stack([space.encode(some_pixels(), some_noise(seed)) for seed in range(400)])
    distribution = space.autoencoder.encode(to_float(some_pixels())).latent_dist
    # 400 draws know a mean to a twentieth of the spread; the largest of 384 deviations is below five times that.
    assert float(((draws.mean(0) - (distribution.mean - 0.3) * 0.5) / (0.5 * distribution.std)).abs().max()) < 0.25
    assert float((draws.std(0) / (0.5 * distribution.std)).mean()) == pytest.approx(1, abs=0.02)
    assert torch.equal(draws[7], space.encode(some_pixels(), some_noise(7)))


def test_encoding_neither_uses_nor_disturbs_the_global_generator(autoencoder: Path) -> None:
    torch.manual_seed(1)
    space = Latents.open(autoencoder, CPU)
    before = torch.get_rng_state()
    space.encode(some_pixels(), some_noise(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_sizes_and_channels_that_do_not_fit_are_named(autoencoder: Path) -> None:
    space = Latents.open(autoencoder, CPU)
    assert (space.grid_size(16), space.channels(3)) == (8, 2)
    with pytest.raises(ConfigError, match=r"size 18 is not a multiple of 4 from 8 up \(2 for the .*use 16 or 20"):
        space.grid_size(18)
    with pytest.raises(ConfigError, match=r"size 4 .*: use 8 or 12"):
        space.grid_size(4)
    with pytest.raises(ConfigError, match=r"1 channels, the autoencoder takes 3: set channels"):
        space.channels(1)


def test_the_autoencoder_works_in_parts_that_fit_in_memory(autoencoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = Latents.open(autoencoder, CPU)
    pixels = to_float(some_pixels())
    x = space.encode_float(pixels)
    torch.testing.assert_close(x, (space.moments(pixels)[0] - 0.3) * 0.5)
    images = space.decode_float(x)
    assert torch.equal(space.decode(x), to_uint8(images))
    for name in ("encode", "decode"):
        plain = getattr(space.autoencoder, name)

        def in_little_memory(batch: torch.Tensor, plain: Callable[[torch.Tensor], Any] = plain) -> Any:
            if len(batch) > 1:
                raise torch.OutOfMemoryError("no more")
            return plain(batch)

        monkeypatch.setattr(space.autoencoder, name, in_little_memory)
    torch.testing.assert_close(space.encode_float(pixels), x)
    torch.testing.assert_close(space.decode_float(x), images)


@pytest.mark.parametrize("number", [1, 2, 5, 6, 7])
def test_a_compiled_decoder_is_called_with_as_few_shapes_as_can_be(
    autoencoder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr("lamamba.data.latents._PIXELS_AT_ONCE", 3 * 16**2)
    latents = torch.randn(number, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    space = Latents.open(autoencoder, CPU)
    wanted = space.decode(latents)
    shapes = []
    space.autoencoder.decoder.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    with torch.compiler.set_stance("force_eager"):  # that PyTorch compiles it right, tests/test_on_gpu.py sees
        space.compile()
        difference = space.decode(latents).int() - wanted.int()
    assert int(difference.abs().max()) <= 1  # rounding: the memory's layout is another
    assert len(set(shapes)) == 1
    assert len(shapes) == -(-number // 3)


def test_pixels_go_there_and_back() -> None:
    space = open_space(None, CPU)
    assert isinstance(space, Pixels)
    assert (space.channels(3), space.grid_size(30)) == (3, 30)
    assert torch.equal(space.decode(space.encode(some_pixels(), some_noise(0))), some_pixels())
    assert torch.equal(space.decode(torch.tensor([-2.0, -1.0, 0.002, 1.0, 2.0])), torch.tensor([0, 0, 128, 255, 255]))
    assert to_uint8(torch.ones(1)).dtype == torch.uint8
    with pytest.raises(ConfigError, match=r"size 31 is not an even number from 4 up: use 32"):
        space.grid_size(31)
    with pytest.raises(ConfigError, match="use 4"):
        space.grid_size(2)


def test_folders_without_an_autoencoder_are_named(autoencoder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=rf"{tmp_path} holds no autoencoder: give .--vae. a folder with its config.json"
    ):
        Latents.open(tmp_path, CPU)
    for name, content, said in (
        ("truncated", None, "/diffusion_pytorch_model.safetensors cannot be read as safetensors"),
        ("foreign", {"_class_name": "UNet2DModel"}, " holds a UNet2DModel, and no AutoencoderKL"),
    ):
        folder = shutil.copytree(autoencoder, tmp_path / name)
        weights = folder / "diffusion_pytorch_model.safetensors"
        if content is None:
            weights.write_bytes(weights.read_bytes()[:-50])
        else:
            (folder / "config.json").write_text(json.dumps(content))
            weights.unlink()
        with pytest.raises(CheckpointError, match=f"{folder}{said}") as error:
            Latents.open(folder, CPU)
        assert "\n" not in str(error.value)


def test_a_run_on_latents_from_images_to_samples(
    autoencoder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae, run, out = shutil.copytree(autoencoder, tmp_path / "vae"), tmp_path / "run", tmp_path / "grid.png"
    main(["train", "--data", str(images), "--image-size", "16", "--vae", str(vae), "--out", str(run), *TINY])
    network = json.loads((run / "config.json").read_text())["network"]
    assert (network["in_channels"], network["sample_size"], network["num_classes"]) == (2, 8, 2)
    info = load_checkpoint(run).info
    assert (info.class_names, info.vae) == (("bird", "fish"), str(vae))
    assert Image.open(run / "samples" / f"{4:012d}.png").mode == "RGB"

    options = ["--labels", "fish", "--num-per-label", "2", "--steps", "2", "--device", "cpu", "--out", str(out)]
    main(["sample", str(run), *options, "--images-out", str(tmp_path / "images"), "--size", "24", "16"])
    assert Image.open(tmp_path / "images" / "000001.png").size == (16, 24)
    assert Image.open(tmp_path / "images" / "000001.png").mode == "RGB"

    main(["train", "--out", str(run), "--resume", "--num-images", "8"])
    assert load_checkpoint(run).info.images == 8

    vae.rename(tmp_path / "moved")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["sample", str(run), *options])
    assert f"{vae} holds no autoencoder" in capsys.readouterr().err
    main(["sample", str(run), *options, "--vae", str(tmp_path / "moved")])
    assert json.loads(Image.open(out).info["lamamba"])["vae"] == str(tmp_path / "moved")


def test_the_built_in_grey_images_fit_an_autoencoder_of_colour(autoencoder: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "grid.png"
    main(["train", "--data", "builtin", "--vae", str(autoencoder), "--out", str(run), *TINY])
    network = json.loads((run / "config.json").read_text())["network"]
    assert (network["in_channels"], network["sample_size"], network["num_classes"]) == (2, 16, 10)
    main(["train", "--out", str(run), "--resume", "--num-images", "8"])
    main(["sample", str(run), "--labels", "bag", "--steps", "1", "--device", "cpu", "--out", str(out)])
    assert Image.open(out).mode == "RGB"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-size", "18"], "image size 18 is not a multiple of 4"),
        (["--image-size", "16", "--channels", "1"], "1 channels, the autoencoder takes 3"),
        (["--image-size", "16", "--vae", "nowhere"], "nowhere holds no autoencoder"),
    ],
)
def test_what_does_not_fit_the_autoencoder_is_one_line(
    autoencoder: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(
            ["train", "--data", str(images), "--vae", str(autoencoder), "--out", str(tmp_path / "run"), *TINY, *options]
        )
    shown = capsys.readouterr().err
    assert shown.startswith("lamamba: error: ")
    assert message in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_parts_are_halved_until_they_fit() -> None:
    asked: list[int] = []

    def double(part: slice) -> torch.Tensor:
        asked.append(part.stop - part.start)
        if asked[-1] > 2:
            raise torch.OutOfMemoryError("no more")
        return 2 * torch.arange(7)[part]

    assert torch.cat(list(in_parts(double, 7, 100))).tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert asked == [7, 4, 2, 2, 2, 1]
    with pytest.raises(torch.OutOfMemoryError):
        list(in_parts(lambda part: double(slice(0, 3)), 1, 1))
