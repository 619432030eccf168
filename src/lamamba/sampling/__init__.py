"""From labels and seeds to images: the one loop over a scheduler's steps, interpolation, and grids of images."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lamamba.config import PLAIN_GUIDANCE, GuidanceOptions
from lamamba.config.checks import check, check_seed, is_number
from lamamba.diffusion import Denoiser, Objective, Predict
from lamamba.errors import ConfigError, first_line
from lamamba.sampling.captured import capture, device_of
from lamamba.sampling.guidance import guide
from lamamba.sampling.labels import check_no_label, check_numbers, choose_guidance
from lamamba.sampling.schedulers import Steps, choose_scheduler
from lamamba.terminal.streams import visible


@dataclass
class Step:
    """A step of sampling, as a callback sees it once it is taken."""

    index: int
    """Number of the step, from 0."""
    num_steps: int
    """Steps in all."""
    t: Tensor
    """Timestep at which the step began, a scalar."""
    x: Tensor
    """(b, c, h, w) after the step. A callback may replace it."""
    predict_x_0: Callable[[], Tensor]
    ends: bool = False
    """A callback may set this to end sampling with `x`."""

    @cached_property
    def x_0(self) -> Tensor:
        """The clean images that the step's prediction implies, (b, c, h, w)."""
        return self.predict_x_0()


Callback = Callable[[Step], object]


def denoise(
    denoiser: Predict,
    steps: Steps,
    x: Tensor,
    y: Tensor,
    generators: Sequence[torch.Generator],
    callback: Callback | None = None,
) -> Tensor:
    """Take all steps of a scheduler, from noise or a noised image to clean images.

    Args:
        denoiser: `(x_t, t, y) -> (b, 2c, h, w)`, with guidance if wanted.
        steps: of the scheduler, for this batch.
        x: (b, c, h, w) what `steps.begin` returned.
        y: (b,) labels, or (b, n) weights of labels.
        generators: one for each image, for samplers that add noise.
        callback: called after each step. What it raises ends the sampling.

    Returns:
        (b, c, h, w) images or latents.
    """
    for index, t in enumerate(steps.timesteps):
        x_t, times = steps.scaled(x, t), t.expand(len(x))
        out = denoiser(x_t, times, y)
        if steps.needs_clipping:
            out = steps.clipped(x_t, t, out)

        def predict_x_0(x_t: Tensor = x_t, t: Tensor = t, out: Tensor = out) -> Tensor:
            prediction = steps.clipped(x_t, t, out).chunk(2, dim=1)[0]
            return steps.objective.predict_x_0(x_t, t.expand(len(x_t)), prediction)

        step = Step(index, len(steps.timesteps), t, steps.step(out, t, x, generators), predict_x_0)
        if callback is not None:
            callback(step)
        x = step.x
        if step.ends:
            break
    return x


@dataclass(frozen=True)
class Start:
    """Images to start from, instead of noise alone."""

    x_0: Tensor
    """(b, c, h, w) clean images or latents, as the network sees them."""
    strength: float = 1.0
    """How much noise they start with, more than 0, up to 1 (SDEdit, Meng et al. 2021, arXiv 2108.01073)."""
    mask: Tensor | None = None
    """(b, 1, h, w), 1 where the image is repainted. Where it is 0, the image is put back at the noise level of each
    step (Lugmayr et al. 2022, arXiv 2201.09865, eq. 8)."""

    def __post_init__(self) -> None:
        check_strength(self.strength)

    def __getitem__(self, part: slice) -> "Start":
        return Start(self.x_0[part], self.strength, None if self.mask is None else self.mask[part])


def check_strength(strength: Any) -> None:
    """Raise ConfigError unless a strength is more than 0, up to 1."""
    if not (is_number(strength) and 0 < strength <= 1):
        raise ConfigError(f"strength {strength} is out of range: give more than 0, up to 1")


@torch.no_grad()
def sample(
    network: Denoiser,
    objective: Objective,
    labels: Sequence[int] | Tensor,
    seeds: Sequence[int | torch.Generator],
    *,
    sampler: Any = None,
    num_steps: int = 25,
    guidance_scale: float = 1.0,
    guidance_options: GuidanceOptions = PLAIN_GUIDANCE,
    weaker: Denoiser | None = None,
    size: tuple[int, int] | None = None,
    clip_sample: bool = False,
    noise: Tensor | None = None,
    start: Start | None = None,
    callback: Callback | None = None,
    on_step: Callable[[int], object] | None = None,
    on_preview: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Sample one batch of images or latents.

    Each image has a random generator of its own, so it depends on its seed and label, not on its neighbors.

    Args:
        network: the network, on the device to compute on. On a GPU, several batches are faster with one
            `CapturedNetwork`.
        objective: what the network was trained with.
        labels: (b,) from 0 to num_classes - 1, or num_classes for "no label"; or (b, num_classes + 1) floating point
            weights of the label embeddings, for a network that supports them.
        seeds: (b,) of the images, or generators.
        sampler: one of `objective.samplers`, None being its default; or a scheduler of diffusers, which is tried on
            known data first.
        num_steps: steps of the sampler. Heun evaluates the network twice in each but the last.
        guidance_scale: 1 is no guidance.
        guidance_options: see `lamamba.guide`.
        weaker: a network to guide away from, with the same label; None is the same network without a label.
        size: height and width of the grid; None is the network's `sample_size`.
        clip_sample: clip the clean image that each prediction implies to -1 to 1. Set this for pixels, which may have
            specks otherwise, but not for latents. `euler` and `heun` do not clip. A scheduler of diffusers may clip
            only if this is set.
        noise: (b, c, h, w) standard normal noise to begin with; None draws it from the seeds.
        start: images to start from; None starts from noise alone.
        callback: called after each step with a `Step`; what it raises ends the sampling.
        on_step: deprecated: called after each step with the number of images.
        on_preview: deprecated: called after each step with `x_0` of the `Step`.

    Returns:
        (b, c, h, w) float32. Pixels go from about -1 to 1, and never further if predictions are clipped.

    Raises:
        ConfigError: a label or the number of steps is out of range, the sampler does not go with the objective,
            the network cannot be guided or has not learned "no label", or the weaker network does not go with it.
    """
    y = _read_labels(labels, network.config)
    if not 0 < len(y) == len(seeds):
        raise ConfigError(f"there are {len(y)} labels and {len(seeds)} seeds: give one of each for every image")
    check(is_number(guidance_scale), "guidance_scale", guidance_scale, "a number, 1 for no guidance")
    if weaker is not None:
        _check_weaker(network, weaker)
    choose_guidance(network.config, guidance_scale, by_weaker=weaker is not None)
    height, width = size or (network.config.sample_size, network.config.sample_size)
    device, channels = device_of(network), int(network.config.in_channels)
    worse = None if weaker is None else capture(weaker)
    denoiser = guide(
        capture(network), guidance_scale, network.null_label, guidance_options, sigma=objective.sigma, weaker=worse
    )
    strength = 1.0 if start is None else start.strength
    scheduler = choose_scheduler(sampler, objective, channels, num_steps, strength, clip_sample)
    steps = Steps(scheduler, objective, num_steps, strength, device)

    generators = [seeded(seed) for seed in seeds]
    if noise is None:  # from the CPU's generators, so that every device draws the same
        noise = seeded_noise(generators, (channels, height, width))
    noise = noise.to(device, torch.float32)
    x_0 = None if start is None else start.x_0.to(device)
    mask = None if start is None or start.mask is None else start.mask.to(device)

    def after(step: Step) -> None:
        if x_0 is not None and mask is not None:
            is_last = step.index + 1 == step.num_steps
            known = x_0 if is_last else steps.noised(x_0, noise, steps.timesteps[step.index + 1])
            step.x = mask * step.x + (1 - mask) * known
        if callback is not None:
            callback(step)
        if on_step is not None:
            on_step(len(step.x))
        if on_preview is not None:
            on_preview(step.x_0)

    if on_step is not None or on_preview is not None:
        warnings.warn("on_step and on_preview are deprecated: give callback", DeprecationWarning, stacklevel=3)
    return denoise(denoiser, steps, steps.begin(noise, x_0), y.to(device), generators, after)


def seeded(seed: int | torch.Generator) -> torch.Generator:
    """Make the random generator of a seed; raises ConfigError unless that is a whole number from 0 to 2^64 - 1."""
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(check_seed(seed))


def seeded_noise(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal noise (b, *shape) on the CPU, each image's from its own generator."""
    return torch.stack([torch.randn(shape, generator=own, device=own.device).to("cpu") for own in generators])


def _read_labels(labels: Sequence[int] | Tensor, config: Any) -> Tensor:
    """Check labels or weights of labels; a network looks up labels that are not mixed."""
    if not (isinstance(labels, Tensor) and labels.is_floating_point()):
        y = torch.tensor(check_numbers(labels, config.num_classes), dtype=torch.long)  # type: ignore[arg-type]
        unlabeled = bool((y == config.num_classes).any())
    else:
        if labels.ndim != 2 or labels.shape[1] != config.num_classes + 1 or not labels.isfinite().all():
            raise ConfigError(
                f"weights of labels are {tuple(labels.shape)}: give (b, {config.num_classes + 1}) finite ones"
            )
        is_one = (labels == 1).sum(1).eq(1) & (labels != 0).sum(1).eq(1)
        unlabeled = bool(labels[:, -1].any())
        y = labels.argmax(dim=1) if bool(is_one.all()) else labels.float()
    if unlabeled:
        check_no_label(config)
    return y


def _check_weaker(network: Denoiser, weaker: Denoiser) -> None:
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
        raise ConfigError(f"device {name!r} cannot be used here ({first_line(error)}): try cpu") from error
    return device


def uses_bf16(precision: Literal["auto", "float32", "bf16"], device: torch.device) -> bool:
    """Say whether to compute in bfloat16: "auto" does on GPUs that have it."""
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16" or (precision == "auto" and has_it)


def interpolate(
    network: Denoiser, labels: Tensor, seeds: Sequence[int], num_images: int, size: tuple[int, int]
) -> tuple[Tensor, Tensor, list[torch.Generator]]:
    """Interpolate spherically between two images' noise and labels, for `sample`.

    Args:
        network: which the labels belong to. For two different ones it must have a table `label_embedding`.
        labels: (2, num_classes + 1) weights of labels, of the first and the last image.
        seeds: of the first and the last image.
        num_images: with both ends, 2 or more.
        size: height and width of the grid.

    Returns:
        Weights of labels (num_images, num_classes + 1), noise (num_images, c, h, w), and a generator for each image,
        all alike: a sampler that adds noise adds that of the first seed to all.

    Raises:
        ConfigError: the network takes no mixtures of labels.
    """
    fractions = [index / (num_images - 1) for index in range(num_images)]
    ends = [seeded(seed) for seed in seeds]
    first, last = seeded_noise(ends, (int(network.config.in_channels), *size))
    noise = slerp(first, last, fractions)
    generators = [ends[0].clone_state() for _ in fractions]
    if labels[0].equal(labels[1]):
        return labels[0].expand(num_images, -1), noise, generators
    embedding = getattr(getattr(network, "network", network), "label_embedding", None)
    if embedding is None:
        raise ConfigError("this network takes no mixtures of labels: interpolate between two images of one label")
    table = embedding.weight.detach().float().cpu()
    weights = slerp_weights(labels[0] @ table, labels[1] @ table, fractions).float()
    return weights @ labels, noise, generators


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
    images: np.ndarray, columns: int, padding: int = 2, scale: int | None = None, row_names: Sequence[str] = ()
) -> Image.Image:
    """Arrange images in rows on white.

    Args:
        images: (n, c, h, w) uint8, 1 or 3 channels.
        columns: images in a row.
        padding: white pixels around each.
        scale: how many times larger each pixel is drawn; by default, images up to 32 pixels wide are enlarged, to 64 at
            most.
        row_names: what to write to the left of each row; long names are cut off.
    """
    number, channels, height, width = images.shape
    scale = scale or max(1, 64 // width)
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
