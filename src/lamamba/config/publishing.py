"""What turns weights into other layouts: `lamamba convert` and `lamamba push`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lamamba.config.checks import check
from lamamba.config.network import PRESETS, NetworkConfig
from lamamba.errors import ConfigError


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a checkpoint of the authors' released code to a folder for lamamba sample and finetune, or back."""

    checkpoint: tyro.conf.Positional[str]
    """A released checkpoint, of whose pickle only tensors are read; or what to make one of: a run folder (its newest
    checkpoint), a checkpoint folder, or shipped weights (nano, emoji-64)."""
    out: tyro.conf.Positional[Path]
    """The folder to write; or, of what is this package's, the .pt file."""
    preset: str = "xl-256"
    """For a released checkpoint: its network, nano, or s, b, l or xl at -256 or -512, with 16 states if -16-states
    follows; classes, channels and grid are read from the file."""
    vae: Path | None = None
    """Of a released checkpoint: AutoencoderKL folder that decodes its latents, for lamamba sample to find."""
    network: tyro.conf.OmitArgPrefixes[NetworkConfig] = PRESETS["xl-256"]
    """The preset's options, each of which can be given."""


@dataclass(frozen=True)
class PushConfig:
    """Send a pipeline of diffusers, with a model card, to the Hugging Face hub; or write it to a folder."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """A run folder (its newest checkpoint), a checkpoint folder, shipped weights (nano, emoji-64); or a pipeline's
    folder, which is sent as it is where it has a model card."""
    repository: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[USER/NAME]")] = None
    """The model on the hub, made if there is none. Without it nothing is sent, and --out is needed."""
    out: Path | None = None
    """Folder to write, to look at or keep; the default is a temporary one."""
    private: bool = False
    """Make it a private repository."""
    branch: str | None = None
    """Branch to send to, made if there is none; the default is main."""
    license: str | None = None
    """For the card, as the hub knows it: mit, apache-2.0, cc-by-nc-4.0; the default says nothing of a license."""
    dataset: str | None = None
    """For the card, the hub's name of the dataset trained on; the default is what a run on built-in images says."""
    scores: Path | None = None
    """For the card, what lamamba evaluate wrote of this checkpoint; the default says nothing of its quality."""
    vae: Path | None = None
    """AutoencoderKL folder to put in; the default is the one the run was trained with."""
    half: bool = False
    """Write weights in float16, half as large. By default they are float32, and images are exactly the checkpoint's."""
    num_per_label: int = 4
    """Samples of each class (the first 10) in the card's picture, which takes time; 0 is no picture."""
    device: str = "auto"
    """For the picture: cpu, cuda, cuda:1, mps; auto takes the best there is."""

    def __post_init__(self) -> None:
        if self.out is None and self.repository is None:
            raise ConfigError("give --out FOLDER to write the pipeline there, or USER/NAME of a repository on the hub")
        check(self.num_per_label >= 0, "num_per_label", self.num_per_label, "0 or more")
