"""Images as they are denoised: the ones of `lamamba sample`, whoever else paints; and what else a page makes."""

import io
import itertools
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lamamba.checkpoints.checkpoint import CheckpointInfo, write_weights
from lamamba.config import DemoLimits, SampleConfig, SamplingConfig
from lamamba.demo.previews import Models, Pictures, Preview, compare_guidance, inpaint, interpolate, sample
from lamamba.demo.settings import Request, read_request
from lamamba.diffusion import Diffusion, FlowMatching
from lamamba.errors import ConfigError
from lamamba.model import LaMambaDiff
from lamamba.sampling import choose_device
from lamamba.sampling.generate import ImageSampler, encode_png, sample_grid

LIMITS = DemoLimits()
LABELS = {"nano": ("Coat", "Bag"), "emoji-64": ("Flags", "Symbols")}
MOST_ROUGHNESS = {"nano": 40, "emoji-64": 80}  # of early previews; emoji-64 paints at half of its size here
# Every sampler, with a network that was trained for it.
EVERY_SAMPLER = [
    *(("nano", name) for name in FlowMatching.samplers),
    *(("emoji-64", name) for name in Diffusion.samplers),
]


@pytest.fixture(scope="module")
def models() -> dict[str, ImageSampler]:
    return {name: ImageSampler(SamplingConfig(checkpoint=name), choose_device("cpu")) for name in LABELS}


@pytest.fixture
def model(models: dict[str, ImageSampler]) -> ImageSampler:
    return models["nano"]


def ask(model: ImageSampler, **values: Any) -> Request:
    label, _ = LABELS[model.path.name]
    small = {"labels": [label], "steps": 4, "seed": 3, "height": 32, "width": 32}
    return read_request({**small, **values}, model, LIMITS)


def finish(shown: Iterator[Preview | Pictures]) -> tuple[list[Preview], Pictures]:
    *previews, pictures = shown
    assert isinstance(pictures, Pictures)
    assert all(isinstance(preview, Preview) for preview in previews)
    return previews, pictures  # type: ignore[return-value]


def to_pil(image: np.ndarray) -> Image.Image:
    """Convert a (c, h, w) array, gray or in color."""
    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))


def roughness(images: np.ndarray) -> float:
    """Mean difference of neighbours: 105 levels of noise, less of predicted images."""
    return float(np.abs(np.diff(images.astype(int))).mean())


@pytest.mark.parametrize(("name", "sampler"), EVERY_SAMPLER)
def test_images_and_metadata_are_those_of_lamamba_sample(
    models: dict[str, ImageSampler], name: str, sampler: str, tmp_path: Path
) -> None:
    model = models[name]
    previews, made = finish(sample(model, ask(model, sampler=sampler, num_images=2, guidance=3.0)))
    evaluations = 7 if sampler == "heun" else 4
    assert [preview.done for preview in previews] == [count / evaluations for count in range(1, evaluations + 1)]
    config = SampleConfig(
        checkpoint=name, labels=LABELS[name][0].lower(), num_per_label=2, size=(32, 32), steps=4, seed=3,
        guidance=3.0, device="cpu", sampler=sampler, out=tmp_path / "grid.png", images_out=tmp_path / "images",  # type: ignore[arg-type]
    )  # fmt: skip
    sample_grid(config)
    for index, (image, settings) in enumerate(zip(made.images, made.settings, strict=True)):
        wanted = Image.open(tmp_path / "images" / f"{index:06d}.png")
        assert np.array_equal(np.asarray(wanted), np.asarray(to_pil(image)))
        downloaded = Image.open(io.BytesIO(encode_png(image, settings)))
        written = json.loads(downloaded.info["lamamba"])  # type: ignore[attr-defined]
        assert written.items() >= json.loads(wanted.info["lamamba"]).items()  # type: ignore[attr-defined]


def test_previews_come_closer_to_the_image(model: ImageSampler) -> None:
    previews, made = finish(sample(model, ask(model, steps=8)))
    distances = [float(np.abs(preview.images.astype(float) - made.images).mean()) for preview in previews]
    assert distances[-1] < 0.1 * distances[0]
    # What the last prediction implies is nearly the image, where x_t would be half noise in the middle.
    assert distances[4] < 0.5 * distances[0]


def test_who_stops_reading_ends_the_sampling(model: ImageSampler) -> None:
    before, evaluations = threading.active_count(), []
    counting = model.network.network.register_forward_hook(lambda *_: evaluations.append(1))
    try:
        shown = sample(model, ask(model, steps=100))
        next(shown)
        shown.close()  # type: ignore[attr-defined]
        until = time.monotonic() + 20
        while threading.active_count() > before and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        counting.remove()
    assert threading.active_count() == before
    assert len(evaluations) < 5


def test_two_at_once_do_not_disturb_each_other(models: dict[str, ImageSampler]) -> None:
    model = models["emoji-64"]
    requests = [
        ask(model, sampler="sde-dpm++", seed=1, guidance=4.0),
        ask(model, labels=["Symbols"], sampler="ancestral", seed=2, steps=6),
    ]
    alone = [finish(sample(model, request))[1].images for request in requests]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda request: finish(sample(model, request))[1].images, requests * 2))
    for wanted, images in zip(itertools.cycle(alone), together, strict=False):
        assert np.array_equal(wanted, images)


def test_an_error_reaches_who_reads(model: ImageSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConfigError("on purpose")

    monkeypatch.setattr("lamamba.sampling.generate.sample", fail)
    with pytest.raises(ConfigError, match="on purpose"):
        list(sample(model, ask(model)))


def test_guidance_is_compared_at_one_seed(model: ImageSampler) -> None:
    request = ask(model, num_images=2)
    previews, strip = finish(compare_guidance(model, request, [1.0, 4.0], LIMITS))
    assert [len(preview.images) for preview in previews] == [1] * 4 + [2] * 4
    assert previews[-1].done == 1
    assert [(own["guidance"], own["seed"]) for own in strip.settings] == [(1.0, 3), (4.0, 3)]
    for scale, image in zip((1.0, 4.0), strip.images, strict=True):
        alone = finish(sample(model, ask(model, guidance=scale)))[1].images
        assert np.array_equal(alone[0], image)
    assert not np.array_equal(strip.images[0], strip.images[1])


@pytest.mark.parametrize("scales", [[], [1.0] * 17, [-1.0], [float("nan")], ["2"]])
def test_scales_are_held_to_the_limits(model: ImageSampler, scales: list[Any]) -> None:
    with pytest.raises(ConfigError):
        list(compare_guidance(model, ask(model), scales, LIMITS))


@pytest.mark.parametrize(("name", "sampler"), EVERY_SAMPLER)
def test_interpolation_goes_from_one_image_to_the_other(
    models: dict[str, ImageSampler], name: str, sampler: str
) -> None:
    model = models[name]
    request = ask(model, guidance=2.0, sampler=sampler)
    previews, made = finish(interpolate(model, request, end_seed=9, end_label=8, num_images=3, limits=LIMITS))
    assert len(previews) == (7 if sampler == "heun" else 4)
    assert roughness(previews[1].images) < MOST_ROUGHNESS[name]
    first = finish(sample(model, request))[1].images[0]
    end = ask(model, labels=[LABELS[name][1]], seed=9, guidance=2.0, sampler=sampler)
    last = finish(sample(model, end))[1].images[0]
    # A batch adds up in another order than a single image: levels may differ by rounding.
    assert np.abs(made.images[0].astype(int) - first).max() <= 2
    if sampler not in (
        "ancestral",
        "ancestral-cosine",
        "sde-dpm++",
    ):  # these add the noise of the first seed throughout
        assert np.abs(made.images[2].astype(int) - last).max() <= 2
    assert [own["fraction"] for own in made.settings] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("number", "seed", "limits"),
    [(17, 1, LIMITS), (1, 1, LIMITS), (3, -1, LIMITS), (3, 1, DemoLimits(max_pixels=2048))],
)
def test_interpolation_is_held_to_the_limits(model: ImageSampler, number: int, seed: int, limits: DemoLimits) -> None:
    with pytest.raises(ConfigError):
        list(interpolate(model, ask(model), end_seed=seed, end_label=8, num_images=number, limits=limits))


@pytest.mark.parametrize(("name", "sampler"), EVERY_SAMPLER)
def test_inpainting_changes_what_is_masked_alone(models: dict[str, ImageSampler], name: str, sampler: str) -> None:
    model = models[name]
    made = finish(sample(model, ask(model)))[1].images[0]
    image = to_pil(made).resize((64, 64), Image.Resampling.BOX)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    request = ask(model, labels=[LABELS[name][1]], steps=8, sampler=sampler)
    previews, painted = finish(inpaint(model, request, image, mask, strength=1.0))
    evaluations = 15 if sampler == "heun" else 8
    assert [preview.done for preview in previews] == [count / evaluations for count in range(1, evaluations + 1)]
    assert roughness(previews[1].images) < MOST_ROUGHNESS[name]
    before = np.asarray(image.resize((32, 32), Image.Resampling.LANCZOS)).reshape(32, 32, -1).transpose(2, 0, 1)
    changes = np.abs(painted.images[0].astype(int) - before)
    assert changes[:, :, 16:].max() <= 1
    assert changes[:, :, :16].mean() > 10


def test_latents_are_shown_as_images(autoencoder: Path, tmp_path: Path) -> None:
    channels = int(json.loads((autoencoder / "config.json").read_text())["latent_channels"])
    network = LaMambaDiff(
        in_channels=channels, sample_size=8, num_classes=2, embed_dim=8, num_heads=2, depths=(1, 1, 1, 1)
    )
    write_weights(tmp_path / "latent", network, CheckpointInfo(class_names=("cat", "dog"), vae=str(autoencoder)))
    model = Models([str(tmp_path / "latent")], "cpu")["latent"]
    side = 8 * model.space.factor
    assert side > 8
    request = read_request({"labels": ["dog"], "steps": 2}, model, LIMITS)
    image = Image.new("RGB", (20, 20), "red")
    made = [
        sample(model, request),
        interpolate(model, request, end_seed=1, end_label=0, num_images=2, limits=LIMITS),
        inpaint(model, request, image, Image.new("L", (20, 20), 255), 0.5),
    ]
    for shown, number in zip(made, (1, 2, 1), strict=True):
        previews, pictures = finish(shown)
        assert pictures.images.shape == previews[0].images.shape == (number, 3, side, side)
        # Where the operator keeps files is nobody's business.
        assert pictures.settings[0]["vae"] == autoencoder.name
        assert pictures.settings[0]["checkpoint"] == "latent"
        assert str(tmp_path) not in json.dumps(pictures.settings)
    decode = model.space.decode
    model.space.decode = lambda x: time.sleep(0.2) or decode(x)  # type: ignore[func-returns-value, method-assign]
    previews, _ = finish(sample(model, read_request({"labels": ["dog"], "steps": 8}, model, LIMITS)))
    assert 2 <= len(previews) < 8, "steps do not wait for an autoencoder that takes longer"
    assert previews[-1].done == 1


def test_inpainting_needs_a_mask_of_the_image(model: ImageSampler) -> None:
    image = Image.new("L", (32, 32))
    for mask, said in ((Image.new("L", (32, 32)), "nothing is masked"), (Image.new("L", (16, 32), 255), "the mask is")):
        with pytest.raises(ConfigError, match=said):
            list(inpaint(model, ask(model), image, mask, 1.0))
