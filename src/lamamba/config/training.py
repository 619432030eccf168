"""`lamamba train` and what goes with a run: `finetune`, `average`, `watch`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from lamamba.config.checks import MAX_IMAGES, MAX_SIDE, check, check_seed
from lamamba.config.network import PRESETS, NetworkConfig

Objective = Literal["diffusion", "flow"]


@dataclass(frozen=True)
class TrainConfig:
    """Train a network on images; watch it in the run folder's loss.png and samples/."""

    out: Path
    """Run folder: checkpoints, samples, logs and the resolved configuration."""
    preset: str = "nano"
    """The network: nano, or s, b, l or xl at -256 or -512, with 16 states if -16-states follows."""
    start_from: str | None = None
    """A run, a checkpoint or shipped weights (nano, emoji-64) to begin with, as far as they fit: see lamamba
    finetune."""
    data: str = "builtin"
    """builtin (10,000 Fashion-MNIST images), fashion-mnist (60,000), or a folder: of images, one subfolder a class or
    flat, or of latents, by lamamba encode."""
    data_folder: Path | None = None
    """Where the files of fashion-mnist are; else Debian's package, else the Hugging Face hub."""
    image_size: int | None = None
    """Crop a folder's images to this many pixels square."""
    channels: Literal[1, 3] | None = None
    """1 is grey, 3 colour; the default is colour for a folder or with --vae, else grey."""
    skip_bad_images: bool = False
    """Count and report images that cannot be read, instead of stopping at the first."""
    horizontal_flip: bool = False
    """Mirror every other image, at random."""
    vae: Path | None = None
    """Train on latents of this AutoencoderKL folder, as diffusers saves it; the default is pixels, or what --data was
    encoded with."""
    objective: Objective = "diffusion"
    """Noise prediction with learned variance, or flow matching."""
    min_snr_gamma: float = 0.0
    """Weigh timesteps by their signal-to-noise ratio, up to this one (min-SNR, 5 in the paper); 0 weighs all alike."""
    num_images: int = 100_000
    """Length of the training: images seen in all."""
    batch_size: int = 64
    """Images in a step of the optimizer."""
    accumulate: int = 1
    """Parts a batch is computed in, one after the other, to save memory; with several ranks, parts of each rank's
    share. The gradient is the same."""
    learning_rate: float = 1e-4
    """Of AdamW."""
    warmup_images: int = 0
    """Images over which the learning rate rises from nothing, in equal steps."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How the learning rate falls from the end of its warm-up, to nothing at num_images; none keeps it."""
    weight_decay: float = 0.0
    """AdamW weight decay of matrices and convolution kernels; biases, norms, embeddings, A_log and D have none."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this norm; 0 never clips."""
    max_skipped_steps: int = 10
    """Steps are left out whose gradient is not finite; after so many in a row the run stops."""
    ema_decay: float = 0.9999
    """Of the averaged weights, per step; starts lower, so that short runs average too."""
    power_averages: tuple[float, ...] = ()
    """Keep snapshots of averages of these relative lengths; say 0.05 0.1, of which lamamba average makes any other."""
    snapshot_every: int | None = None
    """Images between two of these snapshots; the default is a 20th of the run."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Of the network's arithmetic; auto is bf16 on GPUs that have it. Weights are always float32."""
    shard: bool = False
    """Leave each process a part of the weights, their gradients, moments and averages (FSDP2), for networks that do not
    fit one GPU otherwise; slower, and without CUDA graphs."""
    cuda_graph: bool = True
    """On CUDA, launch a step's kernels all at once, so that the GPU never waits for Python; --no-cuda-graph launches
    them one by one."""
    compile: bool = False
    """torch.compile the network too; the first step then takes minutes."""
    gradient_checkpointing: bool = False
    """Keep fewer activations and compute them twice."""
    seed: int = 0
    """Of initialisation, order of the images, and noise."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the best there is."""
    num_workers: int = 0
    """Processes that read and decode the images of a folder."""
    tracker: Literal["none", "wandb", "trackio"] = "none"
    """Log to Weights & Biases or trackio too, where that is installed; TensorBoard's files are always written."""
    project: str = "lamamba"
    """The tracker's project."""
    log_every: int | None = None
    """Images between two lines of the log; the default is a 100th of the run."""
    sample_every: int | None = None
    """Images between two sample grids; the default is a 10th of the run."""
    checkpoint_every: int | None = None
    """Images between two checkpoints; the default is a 10th of the run."""
    keep_checkpoints: int = 2
    """Checkpoints to keep, the newest; 0 keeps all."""
    sample_steps: int = 25
    """Steps of the sampler for sample grids."""
    sample_guidance: float = 2.0
    """Guidance scale of sample grids."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, if there is one; options not given again are the run's."""
    allow_changed: tuple[Literal["data", "vae"], ...] = ()
    """Resume although the data, or the autoencoder, differ from those at the start of the run."""
    fall_back: bool = False
    """Resume from the newest checkpoint that is whole, where the last one is damaged."""
    dry_run: bool = False
    """Print the resolved configuration and stop."""
    network: tyro.conf.OmitArgPrefixes[NetworkConfig] = PRESETS["nano"]
    """The preset's options, each of which can be given."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check(math.isfinite(self.sample_guidance), "sample_guidance", self.sample_guidance, "a number")
        for name in ("batch_size", "accumulate", "max_skipped_steps", "sample_steps", "num_images"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        limits = {
            "num_images": MAX_IMAGES, "batch_size": 1_000_000, "sample_steps": 1000, "image_size": MAX_SIDE,
            "num_workers": 1024,
        }  # fmt: skip
        for name, most in limits.items():  # other code says what image_size has to be at least
            check((getattr(self, name) or 0) <= most, name, getattr(self, name), f"at most {most:,}")
        for name in ("log_every", "sample_every", "checkpoint_every", "snapshot_every"):
            check(getattr(self, name) is None or getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in (
            "max_grad_norm",
            "min_snr_gamma",
            "warmup_images",
            "weight_decay",
            "num_workers",
            "keep_checkpoints",
            "seed",
        ):
            check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        check(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "a number above 0")
        check(
            self.decay == "none" or self.warmup_images < self.num_images, "warmup_images", self.warmup_images,
            f"less than num_images {self.num_images}, where the learning rate decays",
        )  # fmt: skip
        for length in self.power_averages:
            fits = 0 < length <= 0.288 and round(length, 3) == length
            check(fits, "power_averages", length, "from 0.001 to 0.288, with three decimals")
        check(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "from 0 to less than 1")
        check(
            self.accumulate <= self.batch_size, "accumulate", self.accumulate,
            f"at most batch_size {self.batch_size}",
        )  # fmt: skip


@dataclass(frozen=True)
class AverageConfig:
    """Make an average of the weights of any length from a run's snapshots (train --power-averages)."""

    run: tyro.conf.Positional[Path]
    """The run folder; the run may still go on."""
    sigma_rel: float
    """Standard deviation of the average's profile over the training up to there, such as 0.07."""
    out: Path
    """Folder for the weights, for lamamba sample."""
    images: int | None = None
    """Images seen at one of the snapshots; the default is the newest."""


@dataclass(frozen=True)
class WatchConfig:
    """Follow a run: its loss, speed and last checkpoint."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    every: float = 2.0
    """Seconds between two looks at it."""
    once: bool = False
    """Show it once and stop."""

    def __post_init__(self) -> None:
        check(0 < self.every <= 86400, "every", self.every, "above 0, at most 86,400")
