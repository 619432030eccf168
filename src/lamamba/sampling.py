"""From labels and seeds to images: the loop around a scheduler, and pictures to look at."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lamamba.captured import CapturedNetwork
from lamamba.config import PLAIN_GUIDANCE, GuidanceOptions
from lamamba.config.checks import check, check_seed, is_number
from lamamba.diffusion import Objective, guide
from lamamba.dit import DiT
from lamamba.errors import ConfigError
from lamamba.labels import check_no_label, check_numbers, choose_guidance
from lamamba.model import LaMambaDiff
from lamamba.schedulers import STOCHASTIC_SAMPLERS, make_scheduler
from lamamba.streams import visible

Network = LaMambaDiff | DiT | CapturedNetwork


@torch.inference_mode()
def sample(
    network: Network,
    objective: Objective,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    sampler: str | None = None,
    num_steps: int = 25,
    guidance_scale: float = 1.0,
    guidance_options: GuidanceOptions = PLAIN_GUIDANCE,
    weaker: Network | None = None,
    size: tuple[int, int] | None = None,
    clip_sample: bool = False,
    on_step: Callable[[int], None] | None = None,
    on_preview: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Sample one batch of images or latents.

    Each image has a random generator of its own, so it depends on its seed and label, not on its neighbours.

    Args:
        network: on the device to work on; a GPU samples several batches faster with one `CapturedNetwork` of it.
        objective: what the network was trained with.
        labels: (b,) from 0 to num_classes - 1, or num_classes for "no label".
        seeds: (b,) of the images.
        sampler: one of `objective.samplers`; None is its default.
        num_steps: steps of the sampler. Heun evaluates the network twice in each but the last.
        guidance_scale: 1 is no guidance.
        guidance_options: what else guidance has, see `lamamba.diffusion.guide`.
        weaker: a network to guide away from, with the same label; None is the network itself without a label.
        size: height and width of the grid; None is the network's `sample_size`.
        clip_sample: hold the clean image that each prediction implies between -1 and 1: for pixels, which have specks
            otherwise, not for latents. Euler's and Heun's methods do not.
        on_step: called after each scheduler step with the number of images, for progress.
        on_preview: called before each scheduler step with the clean images that the guided prediction implies,
            (b, c, h, w); what it raises ends the sampling.

    Returns:
        (b, c, h, w) float32, for pixels about -1 to 1, and never further where predictions are clipped.

    Raises:
        ConfigError: a label or the number of steps is out of range, the sampler does not go with the objective,
            the network cannot be guided or has not learned "no label", or the weaker network does not go with it.
    """
    labels = check_numbers(labels, network.config.num_classes)
    if not 0 < len(labels) == len(seeds):
        raise ConfigError(f"there are {len(labels)} labels and {len(seeds)} seeds: give one of each for every image")
    check(is_number(guidance_scale), "guidance_scale", guidance_scale, "a number, 1 for no guidance")
    if network.config.num_classes in labels:
        check_no_label(network.config)
    if weaker is not None:
        _check_weaker(network, weaker)
    choose_guidance(network.config, guidance_scale, by_weaker=weaker is not None)
    height, width = size or (network.config.sample_size, network.config.sample_size)
    device = network.device
    denoiser = guide(
        _captured(network), guidance_scale, network.null_label, guidance_options, sigma=objective.sigma,
        weaker=None if weaker is None else _captured(weaker),
    )  # fmt: skip
    sampler = sampler or objective.default_sampler
    scheduler = make_scheduler(objective, sampler, num_steps, device, clip_sample=clip_sample)
    # Only ancestral sampling knows what to do with the learned variance; for the others it is no part of the noise.
    takes_variance = scheduler.config.get("variance_type") == "learned_range"

    # Noise comes from the CPU's generator, so that every device draws the same.
    generators = [seeded(seed) for seed in seeds]
    shape = (network.config.in_channels, height, width)
    x = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    y = torch.as_tensor(labels, dtype=torch.long, device=device)
    options = {"generator": generators} if sampler in STOCHASTIC_SAMPLERS else {}
    for t in scheduler.timesteps:
        out = denoiser(x, t.expand(len(x)), y)
        if on_preview is not None:
            on_preview(objective.predict_x_0(x, t.expand(len(x)), out.chunk(2, dim=1)[0]))
        prediction = out if takes_variance else out.chunk(2, dim=1)[0]
        x = scheduler.step(prediction, t, x, **options, return_dict=False)[0]
        if on_step is not None:
            on_step(len(x))
    return x


def seeded(seed: int) -> torch.Generator:
    """Make the random generator of a seed; raises ConfigError unless that is a whole number from 0 to 2^64 - 1."""
    return torch.Generator().manual_seed(check_seed(seed))


def _captured(network: Network) -> CapturedNetwork:
    return network if isinstance(network, CapturedNetwork) else CapturedNetwork(network)


def _check_weaker(network: Network, weaker: Network) -> None:
    for name in ("in_channels", "num_classes"):
        ours, other = getattr(network.config, name), getattr(weaker.config, name)
        if ours != other:
            raise ConfigError(
                f"the weaker network has {name} {other} and this one {ours}: guide by one trained on the same data"
            )


def choose_device(name: str) -> torch.device:
    """Turn a device's name into a device; "auto" is CUDA, else MPS, else the CPU.

    Raises:
        ConfigError: the name is unknown or the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]}): try cpu") from error
    return device


def uses_bf16(precision: Literal["auto", "float32", "bf16"], device: torch.device) -> bool:
    """Say whether to compute in bfloat16: "auto" does on GPUs that have it."""
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16" or (precision == "auto" and has_it)


def slerp(first: Tensor, second: Tensor, fractions: Sequence[float]) -> Tensor:
    """Interpolate spherically: along an arc, where noise stays as long as noise is (Shoemake 1985).

    Args:
        first: any shape, (...).
        second: of the same shape.
        fractions: (n,) of the way to the second, 0 to 1.

    Returns:
        (n, ...), in the dtype of `first`.
    """
    weights = slerp_weights(first, second, fractions).view(len(fractions), 2, *(1,) * first.dim())
    return (weights[:, 0] * first.double() + weights[:, 1] * second.double()).to(first.dtype)


def slerp_weights(first: Tensor, second: Tensor, fractions: Sequence[float]) -> Tensor:
    """Compute what `slerp` multiplies the two by, float64 (n, 2)."""
    a, b = first.double().flatten(), second.double().flatten()
    angle = torch.acos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
    way = torch.as_tensor(fractions, dtype=torch.float64, device=first.device)
    if angle.sin().abs() < 1e-6:  # one direction, or opposite ones, which no arc is the shortest between
        return torch.stack([1 - way, way], dim=1)
    return torch.stack([((1 - way) * angle).sin(), (way * angle).sin()], dim=1) / angle.sin()


MAX_ROW_NAME = 24  # characters


def make_grid(
    images: np.ndarray, columns: int, padding: int = 2, scale: int = 1, row_names: Sequence[str] = ()
) -> Image.Image:
    """Arrange images in rows on white.

    Args:
        images: (n, c, h, w) uint8, 1 or 3 channels.
        columns: images in a row.
        padding: white pixels around each.
        scale: how many times larger each pixel is drawn.
        row_names: what to write to the left of each row; long names are cut off.
    """
    number, channels, height, width = images.shape
    rows = -(-number // columns)
    shape = (rows * (height + padding) + padding, columns * (width + padding) + padding, channels)
    canvas = np.full(shape, 255, dtype=np.uint8)
    for index, image in enumerate(images):
        places = zip(divmod(index, columns), (height, width), strict=True)
        top, left = (padding + place * (side + padding) for place, side in places)
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    picture = Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    if not row_names:
        return picture
    font, texts = ImageFont.load_default(), [visible(name)[:MAX_ROW_NAME] for name in row_names]
    left = round(max(map(font.getlength, texts))) + 10
    named = Image.new(picture.mode, (left + picture.width, picture.height), "white")
    named.paste(picture, (left, 0))
    for row, text in enumerate(texts):
        middle = scale * (padding + row * (height + padding) + height / 2)
        ImageDraw.Draw(named).text((5, middle), text, fill="black", font=font, anchor="lm")
    return named
