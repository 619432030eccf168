"""Latents encoded once: complete, the same whoever encoded them, and as good to train on as the images."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lamamba.commands.encode
from forked import run_ranks
from lamamba.cli import main
from lamamba.commands.encode import encode
from lamamba.config import EncodeConfig, TrainConfig
from lamamba.data import LatentSource, batches, open_source
from lamamba.data.latents import Latents
from lamamba.errors import ConfigError, DataError
from lamamba.training.run import resolve
from tiny_autoencoder import CPU, TINY, write_autoencoder

FIRST = np.array([0])
AS_THEY_ARE = np.zeros(6, dtype=bool)


def encoded(images: Path, autoencoder: Path, out: Path, **options: Any) -> Path:
    chosen = {"image_size": 16, "images_per_shard": 4, "batch_size": 3, "device": "cpu", **options}
    encode(EncodeConfig(data=str(images), vae=autoencoder, out=out, **chosen))
    return out


@pytest.fixture(scope="module")
def latents(images: Path, autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoded(images, autoencoder, tmp_path_factory.mktemp("encoded") / "latents")


def all_moments(folder: Path, mirrored: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    moments, labels = LatentSource(folder).gather(np.arange(6), np.full(6, mirrored))
    return torch.from_numpy(moments), torch.from_numpy(labels)


@pytest.mark.parametrize("mirrored", [False, True])
def test_moments_are_those_of_every_image(images: Path, autoencoder: Path, latents: Path, mirrored: bool) -> None:
    pixels, labels = open_source(str(images), image_size=16).gather(np.arange(6), np.full(6, mirrored))
    space = Latents.open(autoencoder, CPU)
    moments, their_labels = all_moments(latents, mirrored)
    torch.testing.assert_close(
        moments.float(), torch.cat(space.moments(torch.from_numpy(pixels)), dim=1), atol=2e-3, rtol=2e-3
    )
    assert labels.tolist() == their_labels.tolist() == [0, 0, 0, 1, 1, 1]
    noise = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn, wanted = (space.encode(x, noise) for x in (moments, torch.from_numpy(pixels)))
    torch.testing.assert_close(drawn, wanted, atol=2e-3, rtol=2e-3)


def test_drawing_gives_the_distribution_of_encoding_on_the_fly(images: Path, autoencoder: Path, latents: Path) -> None:
    """Thousands of draws of each: equal in mean and spread at every place, as far as so many draws can tell."""
    pixels, _ = open_source(str(images), image_size=16).gather(FIRST, AS_THEY_ARE[:1])
    distribution = Latents.open(autoencoder, CPU).autoencoder.encode(torch.from_numpy(pixels) / 127.5 - 1).latent_dist
    torch.manual_seed(0)
    wanted = torch.cat([distribution.sample() for _ in range(4000)])
    wanted = (wanted - 0.3) * 0.5  # as the autoencoder is scaled
    moments = all_moments(latents)[0][:1].expand(4000, -1, -1, -1)
    drawn = Latents.open(autoencoder, CPU).encode(moments, torch.randn(4000, 2, 8, 8))
    spread = wanted.std(dim=0)
    assert ((drawn.mean(dim=0) - wanted.mean(dim=0)).abs() < 6 * spread / 4000**0.5 + 2e-3).all()
    assert ((drawn.std(dim=0) / spread - 1).abs() < 0.1).all()


def test_the_index_says_what_is_in_it(autoencoder: Path, latents: Path) -> None:
    index = json.loads((latents / "latents.json").read_text())
    assert [shard["images"] for shard in index["shards"]] == [4, 2]
    settings = index["settings"]
    assert (settings["shape"], settings["class_names"], settings["images"]) == ([2, 8, 8], ["bird", "fish"], 6)
    moments = torch.cat([all_moments(latents, mirrored)[0].double() for mirrored in (False, True)])
    mean, deviation = moments.chunk(2, dim=1)
    statistics = {name: torch.tensor(value).double() for name, value in index["channel_statistics"].items()}
    torch.testing.assert_close(statistics["mean"], mean.mean((0, 2, 3)), atol=1e-3, rtol=1e-3)
    square = (mean**2 + deviation**2).mean((0, 2, 3)) - mean.mean((0, 2, 3)) ** 2
    torch.testing.assert_close(statistics["standard_deviation"], square.sqrt(), atol=1e-3, rtol=1e-3)


def test_processes_share_the_shards(images: Path, autoencoder: Path, latents: Path, tmp_path: Path) -> None:
    """Each is written by one of them, and they are those that a single process writes, to the byte."""
    options = ["--image-size", "16", "--images-per-shard", "4", "--batch-size", "3", "--device", "cpu"]
    paths = ["--data", str(images), "--vae", str(autoencoder), "--out", str(tmp_path / "two")]
    done = run_ranks(2, "-m", "lamamba", "encode", *paths, *options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("train with --data") == 1
    for path in sorted(latents.glob("shard-*")):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert (tmp_path / "two" / "latents.json").read_text() == (latents / "latents.json").read_text()


def test_encoding_goes_on_where_it_was_interrupted(
    images: Path,
    autoencoder: Path,
    latents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode_batch, calls = lamamba.commands.encode._encode_batch, []

    def fail_at_third(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode_batch(*arguments)

    monkeypatch.setattr(lamamba.commands.encode, "_encode_batch", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        encoded(images, autoencoder, tmp_path / "latents")
    assert [path.name for path in (tmp_path / "latents").glob("shard-*")] == ["shard-00000.safetensors"]
    with pytest.raises(DataError, match="is incomplete: run the same lamamba encode again"):
        LatentSource(tmp_path / "latents")
    encoded(images, autoencoder, tmp_path / "latents")
    assert len(calls) == 4  # the last shard's batch; not those of the first
    for path in latents.glob("shard-*"):
        assert path.read_bytes() == (tmp_path / "latents" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mirrored": False}, "mirrored was True, now False"),
        ({"image_size": 8}, "image_size was 16, now 8; shape was"),
        ({"images_per_shard": 3}, "images_per_shard was 4, now 3"),
    ],
)
def test_other_options_do_not_mix(
    images: Path,
    autoencoder: Path,
    latents: Path,
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(DataError, match=message):
        encoded(images, autoencoder, latents, **options)


def test_shards_of_which_nothing_is_known_do_not_mix(images: Path, autoencoder: Path, tmp_path: Path) -> None:
    (tmp_path / "shard-00000.safetensors").touch()
    with pytest.raises(DataError, match=f"{tmp_path} contains shard-00000.safetensors but no settings.json"):
        encoded(images, autoencoder, tmp_path)


def test_another_autoencoder_does_not_mix(images: Path, latents: Path, tmp_path: Path) -> None:
    other = write_autoencoder(tmp_path / "other")
    weights = other / "diffusion_pytorch_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(DataError, match="the autoencoder has other weights"):
        encoded(images, other, latents)
    with pytest.raises(SystemExit):
        main(["train", "--data", str(latents), "--vae", str(other), "--out", str(tmp_path / "run"), *TINY])


@pytest.mark.parametrize("fault", ["flipped bit", "truncated", "empty"])
def test_a_damaged_shard_is_named(latents: Path, tmp_path: Path, fault: str) -> None:
    shutil.copytree(latents, tmp_path / "latents")
    shard = tmp_path / "latents" / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    if fault == "truncated":
        content = content[:-100]
    elif fault == "empty":
        content.clear()
    else:  # in the last moments; behind them lie checksums and labels, of 8 bytes each
        values = load_file(shard)["moments"].numpy()[-1, -1].tobytes()
        content[content.rindex(values) + 3] ^= 4
    shard.write_bytes(content)
    said = r"shard-00001\.safetensors is damaged .*run the same lamamba encode again"
    if fault != "flipped bit":  # it cannot be opened, and training would stop in the middle
        with pytest.raises(DataError, match=said):
            LatentSource(tmp_path / "latents")
        return
    source = LatentSource(tmp_path / "latents")
    source.gather(np.arange(4), AS_THEY_ARE[:4])
    with pytest.raises(DataError, match=said):
        source.gather(np.array([5]), np.ones(1, dtype=bool))


def test_a_missing_shard_is_named(latents: Path, tmp_path: Path) -> None:
    shutil.copytree(latents, tmp_path / "latents")
    (tmp_path / "latents" / "shard-00000.safetensors").unlink()
    with pytest.raises(DataError, match=r"shard-00000\.safetensors is missing"):
        LatentSource(tmp_path / "latents")


@pytest.mark.parametrize("image_size", [8, 32])
def test_latents_of_another_size_than_the_index_says_are_refused(
    latents: Path, tmp_path: Path, image_size: int
) -> None:
    shutil.copytree(latents, tmp_path / "latents")
    path = tmp_path / "latents" / "latents.json"
    index = json.loads(path.read_text())
    index["settings"]["image_size"] = image_size
    path.write_text(json.dumps(index))
    half = image_size // 2
    said = rf"latents of \(2, 8, 8\), and its autoencoder makes \(2, {half}, {half}\) of images of {image_size}:"
    with pytest.raises(DataError, match=said):
        resolve(TrainConfig(data=str(tmp_path / "latents"), out=tmp_path / "run", device="cpu"))


def set_value(index: Any, key: str, value: Any) -> None:
    """Set what a key such as settings.shape[0] names; ... deletes it."""
    *path, last = (int(part) if part.isdigit() else part for part in key.replace("]", "").replace("[", ".").split("."))
    for part in path:
        index = index[part]
    if value is ...:
        del index[last]
    else:
        index[last] = value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("shards[0].images", -4, "shards[0].images is -4: it should be greater than or equal to 1"),
        ("shards[0].images", 0, "shards[0].images is 0"),
        ("shards[0].images", True, "shards[0].images is True"),
        ("shards[0].images", 4.0, "shards[0].images is 4.0"),
        ("shards[0].images", 3, "shards hold 5 images, and settings.images is 6"),
        ("shards[0].images", float("nan"), "not valid JSON"),
        ("shards", [], "shards is []"),
        ("shards", None, "shards is None"),
        ("shards", ..., "shards is missing"),
        ("shards[1].file", "../shard-00000.safetensors", "shards[1].file is '../shard-00000.safetensors'"),
        ("shards[1].file", "shard-00000.safetensors", "shards name a file twice"),
        ("shards[1].sha256", "x", "shards[1].sha256 is 'x'"),
        ("settings.images", -6, "settings.images is -6"),
        ("settings.images", 10**12, "shards hold 6 images, and settings.images is 1,000,000,000,000"),
        ("settings.images_per_shard", 5, "shards hold [4, 2] images, and settings.images_per_shard is 5"),
        ("settings.images_per_shard", 0, "settings.images_per_shard is 0"),
        ("settings.class_names", ["bird", "bird"], "settings.class_names has a name twice"),
        ("settings.class_names[1]", 3, "settings.class_names[1] is 3"),
        ("settings.class_names", ["bird"], "labels[3] is 1, and the classes are 0 to 0"),
        ("settings.image_size", 0, "settings.image_size is 0"),
        ("settings.channels", 2, "settings.channels is 2"),
        ("settings.mirrored", "yes", "settings.mirrored is 'yes'"),
        (
            "settings.mirrored",
            False,
            "moments is ['F16', [4, 2, 4, 8, 8]], but the index says ['F16', [4, 1, 4, 8, 8]]",
        ),
        ("settings.shape[0]", -2, "settings.shape[0] is -2"),
        ("settings.shape", [2, 8], "settings.shape is"),
        ("settings.autoencoder", "vae", "settings.autoencoder is 'vae'"),
        ("settings.autoencoder.sha256", None, "settings.autoencoder.sha256 is None"),
        ("channel_statistics.standard_deviation[0]", -1.0, "channel_statistics.standard_deviation[0] is -1"),
        ("channel_statistics.mean", [0.0], "channel_statistics are not of the 2 channels"),
        ("format", "1", "format is '1'"),
        ("format", 2, "format 2, this version reads 1"),
        ("settings", [], "settings is []"),
    ],
)
def test_a_wrong_value_of_the_index_is_named(latents: Path, tmp_path: Path, key: str, value: Any, message: str) -> None:
    shutil.copytree(latents, tmp_path / "latents")
    index = json.loads((tmp_path / "latents" / "latents.json").read_text())
    set_value(index, key, value)
    (tmp_path / "latents" / "latents.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=re.escape(message)) as error:
        LatentSource(tmp_path / "latents")
    assert str(tmp_path / "latents") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("labels", lambda labels: labels - 1, "labels[0] is -1, and the classes are 0 to 1"),
        ("labels", lambda labels: labels * 2, "labels[1] is 2, and the classes are 0 to 1"),
        ("labels", lambda labels: labels * math.nan, "labels is ['F32', [2]], but the index says ['I64', [2]]"),
        ("labels", lambda labels: labels[:1], "labels is ['I64', [1]], but the index says"),
        ("labels", lambda labels: None, "labels is missing, but the index says"),
        ("crc32", lambda sums: sums[:, :1].contiguous(), "crc32 is ['I64', [2, 1]]"),
        ("moments", lambda moments: moments.float(), "moments is ['F32', [2, 2, 4, 8, 8]]"),
    ],
)
def test_a_wrong_value_of_a_shard_is_named(
    latents: Path, tmp_path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None], message: str
) -> None:
    shutil.copytree(latents, tmp_path / "latents")
    path = tmp_path / "latents" / "shard-00001.safetensors"
    tensors: dict[str, Any] = {**load_file(path), "labels": torch.tensor([0, 1])}
    tensors[name] = change(tensors[name])
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(DataError, match=re.escape(f"{path}: {message}") + ".*run the same lamamba encode again"):
        LatentSource(tmp_path / "latents")


def test_encoding_goes_on_with_moved_images_and_not_with_others(
    images: Path, autoencoder: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(images, tmp_path / "moved"))
    encoded(images, autoencoder, tmp_path / "latents")
    digest = LatentSource(tmp_path / "latents").identify()
    (tmp_path / "latents" / "latents.json").unlink()
    encoded(moved, autoencoder, tmp_path / "latents")
    assert LatentSource(tmp_path / "latents").identify() == digest
    (moved / "bird" / "0.png").rename(moved / "bird" / "7.png")
    with pytest.raises(DataError, match="the images have other names or sizes"):
        encoded(moved, autoencoder, tmp_path / "latents")


@pytest.mark.parametrize(
    "sums", ["[]", "[[1.0]]", "[[1.0, 2.0], [3.0]]", "[[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]", "7", "x"]
)
def test_a_shard_with_wrong_sums_is_not_listed(
    images: Path, autoencoder: Path, latents: Path, tmp_path: Path, sums: str
) -> None:
    folder = Path(shutil.copytree(latents, tmp_path / "latents"))
    (folder / "latents.json").unlink()
    shard = folder / "shard-00001.safetensors"
    save_file(load_file(shard), shard, {"sums": sums})
    with pytest.raises(DataError, match=rf"^{shard}") as error:
        encoded(images, autoencoder, folder)
    assert "\n" not in str(error.value)


def test_a_shard_with_another_number_of_images_is_not_listed(images: Path, autoencoder: Path, tmp_path: Path) -> None:
    folder = encoded(images, autoencoder, tmp_path / "latents")
    (folder / "latents.json").unlink()
    shutil.copy(folder / "shard-00001.safetensors", folder / "shard-00000.safetensors")
    with pytest.raises(DataError, match=r"shard-00000.safetensors has 2 images, not 4: delete it and run"):
        encoded(images, autoencoder, folder)


def test_workers_read_the_same(latents: Path) -> None:
    source = LatentSource(latents)
    options: dict[str, Any] = {"batch_size": 4, "seed": 3, "horizontal_flip": True}
    alone, shared = batches(source, **options), batches(source, num_workers=2, **options)
    for _ in range(4):
        for a, b in zip(next(alone), next(shared), strict=True):
            assert torch.equal(a, b)


def test_training_on_them_is_training_on_the_images(
    images: Path,
    autoencoder: Path,
    latents: Path,
    tmp_path: Path,
) -> None:
    """The same images, flips and noise: losses differ by the rounding of the moments."""
    options = [*TINY, "--horizontal-flip", "--num-images", "8", "--log-every", "2"]
    main(["train", "--data", str(latents), "--out", str(tmp_path / "latents"), *options])
    pixels = ["--data", str(images), "--image-size", "16", "--vae", str(autoencoder)]
    main(["train", *pixels, "--out", str(tmp_path / "images"), *options])
    curves = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("latents", "images")
    ]
    assert len(curves[0]) == 4
    np.testing.assert_allclose(*curves, rtol=2e-3)
    main(["train", "--resume", "--out", str(tmp_path / "latents"), "--num-images", "10", "--device", "cpu"])
    main(["sample", str(tmp_path / "latents"), "--steps", "1", "--out", str(tmp_path / "grid.png"), "--device", "cpu"])
    assert (tmp_path / "grid.png").is_file()


def test_what_does_not_fit_is_said(images: Path, autoencoder: Path, latents: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="contains latents"):
        encoded(latents, autoencoder, tmp_path / "out")
    with pytest.raises(ConfigError, match="image_size 8 is not that of"):
        open_source(str(latents), image_size=8)
    plain = encoded(images, autoencoder, tmp_path / "plain", mirrored=False)
    with pytest.raises(SystemExit):
        main(["train", "--data", str(plain), "--out", str(tmp_path / "run"), "--horizontal-flip", *TINY])
