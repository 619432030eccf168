"""What samples, scores and shows: `lamamba sample`, `generate`, `evaluate`, the page."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lamamba.config.checks import (
    MAX_IMAGES,
    MAX_SIDE,
    check,
    check_option,
    check_range,
    check_seed,
    check_size,
    is_number,
)
from lamamba.config.options import Option

DEFAULT_STEPS = 25  # of samplers, for networks that were not distilled
DEFAULT_GUIDANCE = 2.0  # scale of classifier-free guidance
Sampler = Literal[
    "ancestral", "ancestral-cosine", "ddim", "ddim-cosine", "dpm++", "sde-dpm++", "unipc", "euler", "heun"
]


@dataclass(frozen=True)
class GuidanceOptions:
    """Options of guidance beyond its scale; `lamamba.guide` has the equations."""

    interval: Annotated[tuple[float, float] | None, Option(name="guidance-interval")] = None
    """Guide only between these two noise levels, given as noise over signal (arXiv 2404.07724); the default guides at
    all levels."""
    cosine_power: Annotated[float, Option(name="guidance-cosine-power")] = 0.0
    """Let guidance grow along a cosine of this power, from none at full noise to its full scale at no noise. Higher
    powers guide later; MDT uses 4 (arXiv 2303.14389). 0 keeps the scale constant."""
    rescale: Annotated[float, Option(name="guidance-rescale")] = 0.0
    """Move the standard deviation of guided predictions toward that of unguided ones, from 0 (off) to 1 (fully)
    (arXiv 2305.08891)."""

    def __post_init__(self) -> None:
        ends = (0.0, 0.0) if self.interval is None else self.interval
        are_two = isinstance(ends, tuple | list) and len(ends) == 2 and all(map(is_number, ends))
        check(are_two and ends[0] <= ends[1], "guidance_interval", ends, "two noise levels, the lower first")
        for name, most, wanted in (("cosine_power", math.inf, "0 or more"), ("rescale", 1, "from 0 to 1")):
            value = getattr(self, name)
            holds = is_number(value) and 0 <= value <= most and value < math.inf
            check(holds, f"guidance_{name}", value, wanted)


PLAIN_GUIDANCE = GuidanceOptions()


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """What to sample from, and how."""

    checkpoint: Annotated[str, Option(positional=True)]
    """A run folder (its newest checkpoint), a checkpoint folder, shipped weights (nano, nano-4-steps, emoji-64); a
    folder that diffusers saved of a LaMambaDiffPipeline, a DiTPipeline or a DiTTransformer2DModel; or user/name, such
    a folder on the Hugging Face hub."""
    sampler: Annotated[Sampler | None, Option(metavar="NAME")] = None
    """For diffusion: ancestral, ancestral-cosine, ddim, ddim-cosine, dpm++ (default), sde-dpm++ or unipc. For flow:
    unipc (default), euler, heun or ancestral. The default of a distilled checkpoint is its own sampler."""
    steps: int | None = None
    """Number of sampler steps. The default is 25, or the steps for which the checkpoint was distilled."""
    guidance: float | None = None
    """Scale of classifier-free guidance; 1 turns it off. The default is 2, or 1 if the network is unconditional, was
    trained with --label-dropout 0, or was distilled."""
    guidance_checkpoint: str | None = None
    """Guide away from this weaker checkpoint, which is smaller or less trained (autoguidance, arXiv 2406.02507). The
    default guides away from the same network without a label."""
    guidance_options: GuidanceOptions = PLAIN_GUIDANCE
    """Guidance beyond its scale."""
    seed: int = 0
    """Seed of the first image; image i uses seed + i, up to 2^64 - 1."""
    size: tuple[int, int] | None = None
    """Height and width in pixels; the default is the training size."""
    batch_size: int = 50
    """Number of images sampled at once."""
    vae: Path | None = None
    """AutoencoderKL folder that decodes latents; the default is the one the run was trained with."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Precision of the network and the autoencoder; auto uses bf16 on GPUs that support it."""
    device: str = "auto"
    """cpu, cuda, cuda:1 or mps; auto uses the fastest one available."""

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "steps", "batch_size")
        check_seed(self.seed)
        check_size("size", self.size)
        is_scale = self.guidance is None or math.isfinite(self.guidance)
        check_option(self, "guidance", is_scale, "a number, 1 for no guidance")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SamplingConfig):
    """Sample images from a run, a checkpoint, shipped weights, or a DiT of diffusers."""

    labels: str | None = None
    """Classes to sample, by name or number from 0, separated by commas. If class names are numbers, a number is a name.
    The default is all classes, at most the first 10."""
    num_per_label: int = 4
    """Number of images of each class."""
    out: Path = Path("grid.png")
    """PNG file for the grid, with one row per class."""
    images_out: Path | None = None
    """Also write each image to this folder, with its settings in the PNG metadata; the default writes only the grid."""

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = "from 1 to 10,000 in one grid; lamamba generate makes any number of images"
        check_option(self, "num_per_label", 1 <= self.num_per_label <= 10_000, wanted)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """Sample any number of images to files, on any number of GPUs. The same command continues an unfinished set."""

    out: Path
    """Folder for the images and for generation.json, which records how they were made."""
    num_images: int = 50000
    """Number of images."""
    labels: str = "balanced"
    """balanced uses all classes in turn; random draws each label from the seed; names or numbers are used in turn."""
    format: Literal["png", "webdataset", "npz"] = "png"
    """PNG files; tars of PNG files; or one .npz with arr_0, (n, h, w, c) uint8, as ADM's evaluation suite reads it."""
    images_per_shard: int = 500
    """Number of images per shard: a rank makes one shard at a time, and a tar holds one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, MAX_IMAGES, "num_images")
        check_seed(self.seed, self.num_images)
        check_range(self, 1, 100_000, "images_per_shard")  # which are in memory at once


@dataclass(frozen=True)
class EvaluateConfig:
    """Score generated images against a reference: FID and its relatives; docs/evaluation.md says what is measured."""

    generated: Annotated[str, Option(positional=True)]
    """A folder of images or a .npz of them (arr_0), as lamamba generate writes."""
    reference: Annotated[str, Option(positional=True)]
    """A folder of images, a .npz of images or of published statistics (mu, sigma), or builtin (10,000 training images),
    fashion-mnist (60,000), fashion-mnist-test (the 10,000 others)."""
    features: str = "inception"
    """inception, the network of 2015, downloaded once; clothes, a small network for gray clothes of 28 or 32 pixels;
    or a TorchScript file that turns images into features."""
    pixels: Literal["uint8", "float"] = "uint8"
    """What a TorchScript file takes: 0 to 255, or float32 from 0 to 1."""
    data_folder: Path | None = None
    """Folder with the files of fashion-mnist and fashion-mnist-test; by default Debian's package, or a download."""
    image_size: int | None = None
    """Crop the images of a folder to this many pixels square; the default is their own size."""
    nearest_images: int = 50_000
    """Images of each set, at most, for precision, recall, density and coverage: a choice by the seed."""
    seed: int = 0
    """Seed of the subsets for KID and of the splits for the Inception score."""
    batch_size: int = 50
    """Images in the network at once."""
    out: Path = Path("scores.json")
    """JSON file for the scores and everything that affects them."""
    device: str = "auto"
    """cpu, cuda, cuda:1 or mps; auto uses the fastest one available."""

    def __post_init__(self) -> None:
        named = any(name.startswith("fashion-mnist") for name in (self.generated, self.reference))
        check(self.data_folder is None or named, "data_folder", str(self.data_folder), "left out without fashion-mnist")
        check_range(self, 1, math.inf, "batch_size")
        check_range(self, 6, math.inf, "nearest_images")
        check_seed(self.seed)
        check_range(self, 1, MAX_SIDE, "image_size")


@dataclass(frozen=True)
class DemoLimits:
    """Limits of one request of a visitor."""

    max_images: int = 16
    """Largest number of images of a request."""
    max_steps: int = 100
    """Largest number of sampler steps."""
    max_pixels: int = 1_048_576
    """Largest number of pixels of all images of a request; the default allows 16 images of 256 x 256."""

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "max_images", "max_steps", "max_pixels")


@dataclass(frozen=True)
class DemoConfig:
    """Serve a web page that samples images and shows what the network sees, until Ctrl-C."""

    checkpoints: Annotated[tuple[str, ...], Option(positional=True, metavar="[CHECKPOINT ...]")] = (
        "nano-4-steps",
        "nano",
        "emoji-64",
    )
    """Checkpoints that visitors can choose from, as for lamamba sample: runs, checkpoints, shipped weights, a DiT. The
    page begins with the first."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines connect. There is no password."""
    port: int = 7860
    """Port to listen at; 0 chooses a free one."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names of the page, such as demo.example.org, if it is behind another server."""
    device: str = "auto"
    """cpu, cuda, cuda:1 or mps; auto uses the fastest one available."""
    at_once: int = 2
    """Number of requests that run at the same time; others wait in a queue."""
    limits: DemoLimits = DemoLimits()
    """Limits for each visitor."""

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "at_once")
        check_option(self, "port", 0 <= self.port < 1 << 16, "0 to 65535")
