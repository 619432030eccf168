"""Options of `lamamba convert`, `lamamba export` and `lamamba push`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lamamba.config.checks import check_range, check_size
from lamamba.config.network import PRESETS, NetworkConfig
from lamamba.config.options import Option
from lamamba.errors import ConfigError


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a checkpoint of the authors' released code to a folder for lamamba sample and finetune, or back."""

    checkpoint: Annotated[str, Option(positional=True)]
    """A released checkpoint, from whose pickle only tensors are read. Or, to write one: a run folder (its newest
    checkpoint), a checkpoint folder, or shipped weights (nano, emoji-64)."""
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
    """A run folder (its newest checkpoint), a checkpoint folder, shipped weights (nano, emoji-64), or a pipeline."""
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
    """A run folder (its newest checkpoint), a checkpoint folder, shipped weights (nano, emoji-64), or a pipeline
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
