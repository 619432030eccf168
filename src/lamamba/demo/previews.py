"""Sample images for the page, with previews: plain, at several guidance scales, interpolated, or inpainted.

Each function is a generator. It yields a `Preview` after every step, less often if decoding latents takes long, and at
last the `Pictures`. Closing the generator ends the sampling at its next step. Several can run at once: they share
nothing but weights.
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
from lamamba.data.latents import Latents, Space
from lamamba.demo.settings import MAX_GUIDANCE, Request, check_pixels, read_number, read_seed, read_whole
from lamamba.errors import ConfigError
from lamamba.sampling import Callback, Start, Step, choose_device
from lamamba.sampling import interpolate as interpolated
from lamamba.sampling.generate import ImageSampler
from lamamba.sampling.labels import why_unguided
from lamamba.terminal.streams import visible


@dataclass(frozen=True)
class Preview:
    """Unfinished images."""

    images: np.ndarray
    """(b, c, h, w) uint8: the clean images that the network predicts at this step."""
    done: float
    """Fraction of the steps that are done, 0 to 1."""


@dataclass(frozen=True)
class Pictures:
    """Finished images and their settings."""

    images: np.ndarray
    """(b, c, h, w) uint8."""
    settings: list[dict[str, Any]]
    """For each image, what `lamamba sample` writes to a PNG's metadata, and what else is needed to make it again. Only
    the last part of each path is shown to visitors."""


Shown = Iterator[Preview | Pictures]


class Models:
    """The loaded checkpoints that visitors can choose from, by the last part of each path. Nothing else is ever opened.

    Raises:
        LamambaError: there are none, two have the same name, one cannot be loaded, or there is no such device.
    """

    def __init__(self, checkpoints: Sequence[str], device: str = "auto") -> None:
        named = {visible(Path(checkpoint).resolve().name): checkpoint for checkpoint in checkpoints}
        if len(named) != len(checkpoints) or not checkpoints:
            raise ConfigError(f"the checkpoints {', '.join(checkpoints) or '(none)'} must be one or more, named apart")
        chosen = choose_device(device)
        self._models = {
            name: ImageSampler(SamplingConfig(checkpoint=checkpoint), chosen) for name, checkpoint in named.items()
        }
        self.names = list(self._models)

    def __getitem__(self, name: Any) -> ImageSampler:
        """Return a checkpoint by name; raises ConfigError for any other name, even if such a file exists."""
        if name not in self.names:
            raise ConfigError(f"no model is named {name!r} here: {nearest(str(name), self.names)}")
        return self._models[name]


def sample(model: ImageSampler, request: Request) -> Shown:
    """Sample the images of a request, as `lamamba sample` does with the same settings."""
    own = model.with_config(request.config)
    images = zip(request.labels, request.seeds, strict=True)
    settings = [_settings(own, label=label, seed=seed) for label, seed in images]
    return _in_steps([lambda callback: own.sample(request.labels, request.seeds, callback)], own.space, settings)


def compare_guidance(model: ImageSampler, request: Request, scales: Sequence[Any], limits: DemoLimits) -> Shown:
    """Sample the first image of a request at several guidance scales, one after another.

    Raises:
        ConfigError: a scale is out of range, there are too many scales, or the model has no labels.
    """
    if why := why_unguided(model.network.config, model.info.distilled):
        raise ConfigError(f"{why}: choose another model")
    number = read_whole("number of scales", len(scales), 1, limits.max_images)
    check_pixels(number, *request.size, limits)
    wanted = [read_number("guidance", scale, 0, MAX_GUIDANCE) for scale in scales]
    label, seed = request.labels[0], request.config.seed
    own = [model.with_config(replace(request.config, guidance=scale, batch_size=1)) for scale in wanted]
    settings = [_settings(one, label=label, seed=seed) for one in own]
    parts = [lambda callback, one=one: one.sample([label], [seed], callback) for one in own]
    return _in_steps(parts, model.space, settings)


def interpolate(
    model: ImageSampler, request: Request, end_seed: int, end_label: int, num_images: int, limits: DemoLimits
) -> Shown:
    """Interpolate from a request's first seed and label to others; `num_images`, 2 or more, includes both ends.

    Raises:
        ConfigError: there are too many images or pixels, or the model takes no mixtures of labels.
    """
    number = read_whole("num_images", num_images, 2, limits.max_images)
    ends = {"label": request.labels[0], "seed": request.config.seed}
    ends |= {"end_label": end_label, "end_seed": read_seed("end_seed", end_seed)}
    check_pixels(number, *request.size, limits)
    own = model.with_config(replace(request.config, batch_size=number))
    settings = [_settings(own, **ends, fraction=fraction) for fraction in torch.linspace(0, 1, number).tolist()]
    rows = torch.tensor([own.labels.weights(ends[name]) for name in ("label", "end_label")])
    seeds = (ends["seed"], ends["end_seed"])
    labels, noise, generators = interpolated(own.network, rows, seeds, number, own.grid_size)
    return _in_steps([lambda callback: own.sample(labels, generators, callback, noise)], own.space, settings)


def inpaint(model: ImageSampler, request: Request, image: Image.Image, mask: Image.Image, strength: float) -> Shown:
    """Repaint the white part of a mask with the first label and seed of a request; the rest of the image stays.

    The image, of any size, is scaled to the size of the request. `strength`, more than 0, up to 1, is how much noise
    the repainted part starts from.

    Raises:
        ConfigError: nothing is masked, or the sizes differ.
    """
    if image.size != mask.size:
        raise ConfigError(f"the mask is {mask.size} and the image {image.size}: draw the mask on the image")
    image, mask = convert_image(image, model.image_channels), convert_image(mask, 1, "black")
    if not np.asarray(mask).any():
        raise ConfigError("nothing is masked: draw over the part to repaint")
    read_number("strength", strength, 0, 1)
    own = model.with_config(request.config)
    height, width = request.size
    pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)).reshape(1, height, width, -1)
    # The mask shrinks with the image: a thin stroke must not fall between the pixels that are kept.
    masked = np.asarray(mask.resize(own.grid_size[::-1], Image.Resampling.BOX)) >= 64
    settings = _settings(own, label=request.labels[0], seed=request.config.seed, strength=strength, inpainted=True)

    def work(callback: Callback) -> np.ndarray:
        x_0 = own.space.encode_float(to_float(torch.tensor(pixels).permute(0, 3, 1, 2).to(own.network.device)))
        start = Start(x_0, strength, torch.from_numpy(masked).float()[None, None])
        return own.sample(request.labels[:1], request.seeds[:1], callback, start=start)

    return _in_steps([work], own.space, [settings])


def _settings(model: ImageSampler, **more: Any) -> dict[str, Any]:
    """Return the settings of an image without the folders of the server, which visitors should not learn."""
    settings = {**model.settings, "size": model.config.size, **more}
    folders = {name: Path(settings[name]).resolve().name for name in ("checkpoint", "vae") if settings[name]}
    return {**settings, **folders}


class _Stopped(Exception):  # noqa: N818 - nothing went wrong
    """The generator was closed."""


def _in_steps(parts: Sequence[Callable[[Callback], np.ndarray]], space: Space, settings: list[dict[str, Any]]) -> Shown:
    """Turn samplings, one after another, into a generator; once that is closed, the next callback ends them."""
    # At most one preview waits for a slow reader.
    shown: queue.Queue[Preview | Pictures | Exception] = queue.Queue(maxsize=1)
    stopped = threading.Event()
    finished: list[np.ndarray] = []
    due = 0.0

    def hand_over(latest: Preview | Pictures | Exception) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                return shown.put(latest, timeout=0.1)
        raise _Stopped

    def show(step: Step) -> None:
        nonlocal due
        if stopped.is_set():
            raise _Stopped
        if step.x.is_cuda:  # or steps would be queued far ahead, and closing the generator could not stop them
            torch.cuda.current_stream(step.x.device).synchronize()
        begun, last = time.monotonic(), step.index + 1 == step.num_steps
        if begun < due and not last:
            return
        images = np.concatenate([*finished, space.decode(step.x_0).cpu().numpy()])
        if isinstance(space, Latents):  # decoding takes longer than a step: spend at most a quarter of the time on it
            due = time.monotonic() + 3 * (time.monotonic() - begun)
        hand_over(Preview(images, (len(finished) + (step.index + 1) / step.num_steps) / len(parts)))

    def run() -> None:
        with suppress(_Stopped):
            try:
                for part in parts:
                    finished.append(part(show))
                hand_over(Pictures(np.concatenate(finished), settings))
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
        stopped.set()  # without waiting: the server closes generators in the thread that answers other visitors
