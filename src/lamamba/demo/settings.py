"""Checks the settings that a visitor sends. It does not rely on the limits of the page's fields."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from lamamba.config import DemoLimits, GuidanceOptions, Sampler, SamplingConfig, nearest
from lamamba.config.checks import check_seed
from lamamba.errors import ConfigError
from lamamba.sampling.generate import ImageSampler
from lamamba.sampling.labels import NO_LABEL, choose_guidance, why_unguided

MAX_GUIDANCE = 20.0


@dataclass(frozen=True)
class Request:
    """What to sample. `read_request` makes it and checks the limits."""

    config: SamplingConfig
    labels: tuple[int, ...]
    """One label for each image."""
    size: tuple[int, int]
    """Height and width in pixels."""

    @property
    def seeds(self) -> list[int]:
        """Seeds of the images, counted up from the first."""
        return [self.config.seed + index for index in range(len(self.labels))]


def label_names(model: ImageSampler) -> list[str]:
    """List the names of all classes in order, and "no label" at the end if the model was trained with it."""
    names = [model.labels.name(label) for label in range(model.num_classes)]
    return names if names and why_unguided(model.network.config) else [*names, NO_LABEL]


# What a page may send, and the values of what it leaves out; None is the default of the model or of guidance.
DEFAULTS = {
    **dict.fromkeys(("sampler", "steps", "guidance", "interval_low", "interval_high", "height", "width")),
    **{"labels": [NO_LABEL], "rescale": 0.0, "seed": 0, "num_images": 1},
}


def read_request(values: Mapping[str, Any], model: ImageSampler, limits: DemoLimits) -> Request:
    """Check the values that the page sent, and make a request from them.

    Args:
        values: `labels`, names that images take in turn; `sampler`; `steps`; `guidance`; `interval_low` and
            `interval_high`, noise over signal, both None for everywhere; `rescale`; `seed`; `num_images`; `height` and
            `width` in pixels, None for the training size. What is left out has the default of `lamamba sample`, and
            one image is made.
        model: the checkpoint.
        limits: what a visitor can ask for.

    Raises:
        ConfigError: a value is no number, is out of range or beyond a limit, or there is no such label or sampler.
    """
    unknown = sorted(set(values) - set(DEFAULTS))
    if unknown:
        raise ConfigError(f"nothing is named {unknown[0]!r} here: {nearest(unknown[0], DEFAULTS)}")
    asked = {**DEFAULTS, "steps": model.steps, **values}
    number = read_whole("num_images", asked["num_images"], 1, limits.max_images)
    steps = read_whole("steps", asked["steps"], 1, limits.max_steps)
    size = (_read_side("height", asked["height"], model), _read_side("width", asked["width"], model))
    check_pixels(number, *size, limits)
    sampler = asked["sampler"] or model.sampler
    if sampler not in model.objective.samplers:
        hint = nearest(str(sampler), model.objective.samplers)
        raise ConfigError(f"no sampler of this model is named {sampler!r}: {hint}")
    ends = [asked["interval_low"], asked["interval_high"]]
    if ends.count(None) == 1:
        raise ConfigError("the guidance interval has one end: give both noise levels, or neither")
    low, high = (None if end is None else read_number("guidance interval", end, 0, 1e4) for end in ends)
    config = SamplingConfig(
        checkpoint=model.config.checkpoint,
        sampler=cast(Sampler, sampler),
        steps=steps,
        guidance=read_guidance(asked["guidance"], model),
        guidance_options=GuidanceOptions(
            interval=None if low is None or high is None else (low, high),
            rescale=read_number("rescale", asked["rescale"], 0, 1),
        ),
        seed=read_seed("seed", asked["seed"], number),
        size=size,
        batch_size=number,  # all at once, so that a preview shows all
        vae=model.config.vae,
        device=model.config.device,
    )
    names = asked["labels"]
    if not isinstance(names, list | tuple) or not names:
        raise ConfigError("no label is chosen: choose one or more")
    labels = [model.labels.find(str(name)) for name in names]
    return Request(config, tuple(labels[index % len(labels)] for index in range(number)), size)


def read_guidance(value: Any, model: ImageSampler) -> float:
    """Check a guidance scale. None is the model's default; a model that cannot be guided always gets 1."""
    config = model.network.config
    if value is None or why_unguided(config):
        return choose_guidance(config, None)
    return read_number("guidance", value, 0, MAX_GUIDANCE)


def _read_side(name: str, value: Any, model: ImageSampler) -> int:
    """Check a height or width in pixels, also against what the model can sample. None is the training size."""
    default = int(model.network.config.sample_size) * model.space.factor
    pixels = default if value is None else read_whole(name, value, 4, 1 << 16)
    model.space.grid_size(pixels)
    return pixels


def check_pixels(number: int, height: int, width: int, limits: DemoLimits) -> None:
    """Raise ConfigError if all images of a request together have more pixels than the limit."""
    if number * height * width > limits.max_pixels:
        side = math.isqrt(limits.max_pixels // number)
        raise ConfigError(
            f"{number} images of {height} x {width} have {number * height * width:,} pixels together, and this page "
            f"makes at most {limits.max_pixels:,}: ask for fewer, or for at most {side} x {side}"
        )


def read_whole(name: str, value: Any, least: int, most: int) -> int:
    """Check a whole number, which a page may send as a float; raises ConfigError."""
    number = read_number(name, value, least, most)
    if number != int(number):
        raise ConfigError(f"{name} is {value!r}: give a whole number")
    return int(number)


def read_seed(name: str, value: Any, num_images: int = 1) -> int:
    """Check the seed of a first image, which a page may send as a float; raises ConfigError."""
    return check_seed(int(value) if isinstance(value, float) and value.is_integer() else value, num_images, name)


def read_numbers(name: str, text: Any) -> list[float]:
    """Read numbers separated by commas; raises ConfigError."""
    try:
        return [float(part) for part in str(text).split(",")]
    except ValueError:
        raise ConfigError(f"{name} are {text!r}: give numbers separated by commas, as 1, 2, 4") from None


def read_number(name: str, value: Any, least: float, most: float) -> float:
    """Check a finite number from `least` to `most`; raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise ConfigError(f"{name} is {value!r}: give a number")
    if not least <= value <= most:  # before it is converted: no float holds an integer of 400 digits
        shown = f"{value:g}" if abs(value) < 1e15 else "far out of range"
        raise ConfigError(f"{name} is {shown}: give {least:,.0f} to {most:,.0f}")
    return float(value)
