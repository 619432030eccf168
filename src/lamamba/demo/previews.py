"""What a page shows of sampling: images as they are denoised, guidance compared, interpolation, inpainting.

All of these are generators: a `Preview` for every step, or as often as decoding latents leaves time, then the
`Pictures`. Whoever stops reading ends the sampling at
its next step. Weights are shared and nothing else is, so that several can be read at once.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lamamba.config import DemoLimits, SamplingConfig, nearest
from lamamba.data import to_float
from lamamba.data.decoding import convert_image
from lamamba.demo.settings import MAX_GUIDANCE, Request, check_pixels, read_number, read_seed, read_whole
from lamamba.errors import ConfigError
from lamamba.generate import ImageSampler
from lamamba.labels import why_unguided
from lamamba.latents import Latents, Space
from lamamba.sampling import Callback, Start, Step, choose_device
from lamamba.sampling import interpolate as interpolated
from lamamba.streams import visible


@dataclass(frozen=True)
class Preview:
    """Images that are not finished."""

    images: np.ndarray
    """(b, c, h, w) uint8: the clean images that the network predicts at this step."""
    done: float
    """Fraction of the steps, 0 to 1."""


@dataclass(frozen=True)
class Pictures:
    """Finished images, and for each what it was made by."""

    images: np.ndarray
    """(b, c, h, w) uint8."""
    settings: list[dict[str, Any]]
    """What `lamamba sample` writes to a PNG's metadata, and what else it takes to make the image again; of folders,
    which are the operator's, the last part alone."""


class Models:
    """The checkpoints that the operator allowed, loaded; nothing else is opened, whatever a visitor names.

    Args:
        checkpoints: as `lamamba sample` takes them; the page knows each by the last part of its path.
        device: to work on, see `lamamba.sampling.choose_device`.

    Raises:
        LamambaError: two have the same name, there are none, one cannot be loaded, or the device is not there.
    """

    def __init__(self, checkpoints: Sequence[str], device: str = "auto") -> None:
        named = {visible(Path(checkpoint).resolve().name): checkpoint for checkpoint in checkpoints}
        if len(named) != len(checkpoints) or not checkpoints:
            raise ConfigError(f"the checkpoints {', '.join(checkpoints) or '(none)'} must be one or more, named apart")
        chosen = choose_device(device)
        self._models = {
            name: ImageSampler(SamplingConfig(checkpoint=checkpoint), chosen) for name, checkpoint in named.items()
        }

    @property
    def names(self) -> list[str]:
        """What a visitor can choose from."""
        return list(self._models)

    def __getitem__(self, name: Any) -> ImageSampler:
        """Find a checkpoint by its name; raises ConfigError for any other name, whatever files there are."""
        if not isinstance(name, str) or name not in self._models:
            raise ConfigError(f"no model is named {name!r} here: {nearest(str(name), self._models)}")
        return self._models[name]


def sample(model: ImageSampler, request: Request) -> Iterator[Preview | Pictures]:
    """Sample what is asked for: the images of `lamamba sample` with the same settings.

    Raises:
        LamambaError: an option is at fault.
    """
    own = model.with_config(request.config)
    settings = [
        _settings(own, label=label, seed=seed) for label, seed in zip(request.labels, request.seeds, strict=True)
    ]

    def work(callback: Callback) -> np.ndarray:
        return own.sample(request.labels, request.seeds, callback)

    yield from _in_steps(work, own.space, settings)


def compare_guidance(
    model: ImageSampler, request: Request, scales: Sequence[Any], limits: DemoLimits
) -> Iterator[Preview | Pictures]:
    """Sample the first image of a request at several scales of guidance, one after another.

    Raises:
        ConfigError: a scale is out of range, there are more than images are allowed, or the model has no labels.
    """
    if why := why_unguided(model.network.config):
        raise ConfigError(f"{why}: choose another model")
    number = read_whole("number of scales", len(scales), 1, limits.max_images)
    height, width = request.config.size or (0, 0)
    check_pixels(number, height, width, limits)
    wanted = [read_number("guidance", scale, 0, MAX_GUIDANCE) for scale in scales]
    finished: list[Pictures] = []
    for place, scale in enumerate(wanted):
        config = replace(request.config, guidance=scale, batch_size=1)
        for shown in sample(model, Request(config, request.labels[:1])):
            if isinstance(shown, Pictures):
                finished.append(shown)
            else:
                before = [part.images for part in finished]
                yield Preview(np.concatenate([*before, shown.images]), (place + shown.done) / number)
    yield Pictures(
        np.concatenate([part.images for part in finished]), [own for part in finished for own in part.settings]
    )


def interpolate(
    model: ImageSampler, request: Request, end_seed: int, end_label: int, num_images: int, limits: DemoLimits
) -> Iterator[Preview | Pictures]:
    """Go from a request's first image to that of another seed and label, as `LaMambaDiffPipeline.interpolate` does.

    Args:
        model: the model.
        request: seed and label of the first image, and what else there is to set.
        end_seed: of the last image.
        end_label: of the last image.
        num_images: images in all, 2 or more.
        limits: of images and of pixels.

    Raises:
        ConfigError: there are more images or pixels than are allowed, or the model takes no mixtures of labels.
    """
    config, start_label = request.config, request.labels[0]
    number = read_whole("num_images", num_images, 2, limits.max_images)
    end_seed = read_seed("end_seed", end_seed)
    height, width = config.size or (0, 0)
    check_pixels(number, height, width, limits)
    fractions = torch.linspace(0, 1, number).tolist()
    own = model.with_config(replace(config, batch_size=number))
    settings = [
        _settings(
            own, label=start_label, seed=config.seed, end_label=end_label, end_seed=end_seed, fraction=fraction
        )
        for fraction in fractions
    ]  # fmt: skip
    rows = torch.tensor([own.labels.weights(label) for label in (start_label, end_label)])
    labels, noise, generators = interpolated(own.network, rows, (config.seed, end_seed), number, own.grid_size)

    def work(callback: Callback) -> np.ndarray:
        return own.sample(labels, generators, callback, noise)

    yield from _in_steps(work, own.space, settings)


def inpaint(
    model: ImageSampler, request: Request, image: Image.Image, mask: Image.Image, strength: float
) -> Iterator[Preview | Pictures]:
    """Paint the white part of a mask anew, with the label of a request; the rest of the image stays.

    Args:
        model: the model.
        request: its first label and seed.
        image: of any size; it is scaled to the request's.
        mask: of the image's size, white where it is to be painted.
        strength: how far towards noise the part is taken, more than 0 up to 1.

    Raises:
        ConfigError: nothing is masked, or the sizes differ.
    """
    if image.size != mask.size:
        raise ConfigError(f"the mask is {mask.size} and the image {image.size}: draw the mask on the image")
    image, mask = convert_image(image, model.image_channels), convert_image(mask, 1, "black")
    if not np.asarray(mask).any():
        raise ConfigError("nothing is masked: draw over what is to be painted anew")
    config = request.config
    read_number("strength", strength, 0, 1)
    own = model.with_config(config)
    # Here, since shrinking an image later would take a pixel of it for each of the mask's.
    height, width = config.size or (0, 0)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)).reshape(1, height, width, -1)
    masked = np.asarray(mask.resize(own.grid_size[::-1], Image.Resampling.BOX)) >= 64
    settings = _settings(own, label=request.labels[0], seed=config.seed, strength=strength, inpainted=True)

    def work(callback: Callback) -> np.ndarray:
        x_0 = own.space.encode_float(to_float(torch.tensor(pixels).permute(0, 3, 1, 2).to(own.network.device)))
        start = Start(x_0, strength, torch.from_numpy(masked).float()[None, None])
        return own.sample(request.labels[:1], request.seeds[:1], callback, start=start)

    yield from _in_steps(work, own.space, [settings])


def _settings(model: ImageSampler, **more: Any) -> dict[str, Any]:
    """What an image was made by, without what a visitor has no business to know: where the operator keeps files."""
    settings = {**model.settings, "size": model.config.size, **more}
    folders = {name: Path(settings[name]).resolve().name for name in ("checkpoint", "vae") if settings[name]}
    return {**settings, **folders}


class _Stopped(Exception):  # noqa: N818 - nothing went wrong
    """Nobody reads on."""


def _in_steps(
    work: Callable[[Callback], np.ndarray], space: Space, settings: list[dict[str, Any]]
) -> Iterator[Preview | Pictures]:
    """Turn work that calls back at every step into a generator; closing that makes the next call raise."""
    shown: queue.Queue[Preview | Pictures | Exception] = queue.Queue(maxsize=1)  # a slow reader has no backlog
    stopped = threading.Event()
    due = 0.0

    def hand_over(latest: Preview | Pictures | Exception) -> None:
        while not stopped.is_set():
            try:
                shown.put(latest, timeout=0.1)
            except queue.Full:
                continue
            return
        raise _Stopped

    def show(step: Step) -> None:
        nonlocal due
        done = (step.index + 1) / step.num_steps
        if stopped.is_set():
            raise _Stopped
        if step.x.is_cuda:  # or steps that nobody looks at would be queued far ahead, out of reach of who stops them
            torch.cuda.current_stream(step.x.device).synchronize()
        begun = time.monotonic()
        if begun < due and done < 1:
            return
        images = space.decode(step.x_0).cpu().numpy()
        if isinstance(space, Latents):  # decoding takes longer than a step: a quarter of the time is for it
            due = time.monotonic() + 3 * (time.monotonic() - begun)
        hand_over(Preview(images, done))

    def run() -> None:
        with suppress(_Stopped):
            try:
                hand_over(Pictures(work(show), settings))
            except Exception as error:
                hand_over(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while True:
            latest = shown.get()
            if isinstance(latest, Exception):
                raise latest
            yield latest
            if isinstance(latest, Pictures):
                return
    finally:
        stopped.set()  # and does not wait: a server closes generators where it should answer others
