"""Options of the commands beside training and sampling: convert, export, push, info, plan, doctor, plot and grid."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lamamba.config.checks import MAX_IMAGES, check, check_option, check_range, check_size
from lamamba.config.network import PRESETS, NetworkConfig
from lamamba.config.options import Option
from lamamba.errors import ConfigError


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a checkpoint of the authors' released code to a folder for lamamba sample and finetune, or back."""

    checkpoint: Annotated[str, Option(positional=True)]
    """A released checkpoint, from whose pickle only tensors are read. Or, to write one: a run folder (its newest
    checkpoint), a checkpoint folder, or shipped weights (such as nano)."""
    out: Annotated[Path, Option(positional=True)]
    """The folder to write; the .pt file if CHECKPOINT is one of this package's."""
    preset: str = "xl-256"
    """Preset of a released checkpoint: nano, or s, b, l or xl with -256 or -512, and -16-states for 16 states. Classes,
    channels and grid are read from the file."""
    vae: Path | None = None
    """AutoencoderKL folder that decodes the latents of a released checkpoint; by default lamamba sample needs --vae."""
    network: NetworkConfig = PRESETS["xl-256"]
    """Network options; --preset sets their defaults."""


@dataclass(frozen=True)
class ExportConfig:
    """Export a network for other runtimes: ONNX for onnxruntime, and a torch.export program for C++."""

    checkpoint: Annotated[str, Option(positional=True)]
    """A run folder (its newest checkpoint), a checkpoint folder, shipped weights (such as nano), or a pipeline."""
    out: Path
    """Folder for network.onnx and network.pt2."""
    format: Literal["both", "onnx", "pt2"] = "both"
    """What to write. ONNX takes seconds; torch.export takes a minute or more."""
    guidance: bool = False
    """Include guidance: adds the input guidance, a scale, and evaluates every image with and without its label."""
    precision: Literal["float32", "float16", "float16-weights"] = "float32"
    """float16 computes in float16, except for the state of the scan. float16-weights rounds only the stored weights,
    and computes in float32."""
    size: tuple[int, int] | None = None
    """Height and width that the network takes: in pixels, or in latents for a network of latents. The default is the
    training size."""

    def __post_init__(self) -> None:
        check_size("size", self.size)


@dataclass(frozen=True)
class PushConfig:
    """Upload a diffusers pipeline with a model card to the Hugging Face hub, or write it to a folder."""

    checkpoint: Annotated[str, Option(positional=True)]
    """A run folder (its newest checkpoint), a checkpoint folder, shipped weights (such as nano), or a pipeline
    folder, which is uploaded unchanged if it has a model card."""
    repository: Annotated[str | None, Option(positional=True, metavar="[USER/NAME]")] = None
    """Model repository on the hub, created if missing. Without it nothing is uploaded, and --out is required."""
    out: Path | None = None
    """Folder to write the pipeline to; the default is a temporary one."""
    private: bool = False
    """Create a private repository."""
    branch: str | None = None
    """Branch to upload to, created if missing; the default is main."""
    license: str | None = None
    """License for the model card, such as mit, apache-2.0 or cc-by-nc-4.0; by default the card names none."""
    dataset: str | None = None
    """Hub name of the training dataset, for the model card; by default only the built-in images are named."""
    scores: Path | None = None
    """scores.json of this checkpoint from lamamba evaluate, for the model card; by default the card has no scores."""
    vae: Path | None = None
    """AutoencoderKL folder to include; the default is the one that the run was trained with."""
    half: bool = False
    """Write float16 weights, half the size. By default weights are float32 and reproduce the checkpoint exactly."""
    num_per_label: int = 4
    """Samples of each class (the first 10) in the model card's picture; 0 leaves the picture out, which is faster."""
    device: str = "auto"
    """Device for the picture: cpu, cuda, cuda:1 or mps; auto uses the fastest one available."""

    def __post_init__(self) -> None:
        if self.out is None and self.repository is None:
            raise ConfigError("give --out FOLDER to write the pipeline there, or USER/NAME of a repository on the hub")
        check_range(self, 0, math.inf, "num_per_label")


@dataclass(frozen=True)
class InfoConfig:
    """Count parameters and multiply-adds, stage by stage; for students of lamamba distill, also print their steps."""

    network: Annotated[str, Option(positional=True)]
    """A preset, a run folder, a checkpoint folder, shipped weights (such as nano), a pipeline folder, or user/name on
    the hub."""
    size: tuple[int, int] | None = None
    """Height and width of the network's input, in latents or pixels; the default is the training size."""
    ssm_state_size: int | None = None
    """States of each channel of the scan, for a preset; the default is the preset's."""

    def __post_init__(self) -> None:
        check_size("size", self.size, most=4096)  # for larger sizes, the scan order alone takes gigabytes


@dataclass(frozen=True)
class PlanConfig:
    """Predict the speed, duration and memory of training on a cluster, from measurements on one and two GPUs."""

    preset: Annotated[str, Option(positional=True)]
    """The network: nano, or s, b, l or xl with -256 or -512, and 16 states if -16-states follows."""
    gpus: int = 8
    """Total number of GPUs."""
    gpus_per_host: int = 8
    """GPUs in a host, connected by NVLink."""
    batch_size: int | None = None
    """Images per optimizer step over all GPUs; the default is 32 per GPU."""
    num_images: int = 400_000_000
    """Length of the training, in images seen."""
    shard: bool = False
    """Divide optimizer state and EMAs among all GPUs, as train --shard does."""
    power_averages: int = 0
    """Number of EMAs that train --power-averages keeps."""
    gpu: str = "H200"
    """Part of the GPU's name. For other GPUs than the measured one, times are scaled by peak TFLOP/s."""
    gpu_memory_gib: float = 139.0
    """Memory of a GPU; an H200 has 139 GiB, and an 80 GB H100 has 79 GiB."""
    images_per_s: float | None = None
    """Measured speed of one such GPU with its share of the batch; the default is predicted."""
    link_gbytes_per_s: float | None = None
    """Bandwidth from a GPU to others in its host, in GB/s; the default was measured between two GPUs."""
    network_gbytes_per_s: float = 40.0
    """Bandwidth from a GPU to other hosts, in GB/s; 40 is four fifths of one 400 Gbit/s card per GPU."""
    data_gbytes_per_s: float | None = None
    """Bandwidth of a host's disk or network storage, in GB/s; by default reading is never the limit."""

    def __post_init__(self) -> None:
        check_range(self, 1, 1_000_000, "gpus", "gpus_per_host")
        check_range(self, 1, MAX_IMAGES, "num_images")
        check_range(self, 0, math.inf, "power_averages")
        speeds = ("images_per_s", "link_gbytes_per_s", "network_gbytes_per_s", "data_gbytes_per_s")
        for name in ("gpu_memory_gib", *speeds):
            check_option(self, name, getattr(self, name) is None or getattr(self, name) > 0, "more than 0")
        fills_hosts = self.gpus <= self.gpus_per_host or self.gpus % self.gpus_per_host == 0
        check_option(self, "gpus", fills_hosts, f"a multiple of gpus_per_host {self.gpus_per_host}, or less than it")
        if self.batch_size is not None:
            below = max(1, self.batch_size // self.gpus) * self.gpus
            wanted = f"a multiple of the {self.gpus} gpus: {below} or {below + self.gpus}"
            check_option(self, "batch_size", self.batch_size > 0 and self.batch_size % self.gpus == 0, wanted)

    @property
    def images_of_a_gpu(self) -> int:
        return 32 if self.batch_size is None else self.batch_size // self.gpus

    @property
    def hosts(self) -> int:
        return max(1, self.gpus // self.gpus_per_host)

    @property
    def gpus_in_host(self) -> int:
        return self.gpus // self.hosts


@dataclass(frozen=True)
class DoctorConfig:
    """Check what works on this machine and suggest what would help; the exit code is 1 if something is broken."""

    json: bool = False
    """Print JSON: one object per check, with name, state (ok, note or broken), detail and fix."""


@dataclass(frozen=True)
class PlotConfig:
    """Draw the curves of runs in one picture, and the samples of each run over time as a filmstrip and a GIF."""

    runs: Annotated[tuple[Path, ...], Option(positional=True, metavar="RUN [RUN ...]")]
    """Run folders; the runs may still be training."""
    out: Path = Path("plots")
    """Folder for curves.png and, for each run with samples, samples-NAME.png and samples-NAME.gif."""
    frames: int = 8
    """Largest number of sample grids in a filmstrip."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("give one run folder or more, such as runs/first")
        check_range(self, 2, 1000, "frames")


@dataclass(frozen=True)
class GridConfig:
    """Arrange images of one size in a grid."""

    images: Annotated[tuple[Path, ...], Option(positional=True, metavar="FOLDER|IMAGE ...")]
    """Images, and folders that are searched for images at any depth, sorted by name."""
    out: Path = Path("images.png")
    """The grid, a PNG file."""
    columns: int | None = None
    """Images in a row; by default the grid is about square."""
    rows: int | None = None
    """Rows; images that do not fit are left out. By default all images fit."""
    scale: int = 1
    """Factor by which to enlarge each pixel."""
    captions: bool = False
    """Write each image's name below it."""

    def __post_init__(self) -> None:
        check_option(self, "images", len(self.images) >= 1, "one image or folder, or more")
        check(self.out.suffix == ".png", "out", str(self.out), "a .png file")
        check_range(self, 1, 10_000, "columns", "rows")
        check_range(self, 1, 64, "scale")
