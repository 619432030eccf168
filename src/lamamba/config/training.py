"""`lamamba train` and what goes with a run: `finetune`, `average`, `watch`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from lamamba.config.checks import MAX_IMAGES, MAX_SIDE, check, check_option, check_range, check_seed
from lamamba.config.data import WHOLE_DATASET, DatasetOptions
from lamamba.config.network import PRESETS, NetworkConfig, preset
from lamamba.config.options import Option
from lamamba.config.sampling import DEFAULT_GUIDANCE

OBJECTIVES = ("diffusion", "diffusion-v", "diffusion-v-zero-snr", "flow", "flow-x")
Timesteps = Literal["uniform", "logit-normal"]
_OF_PRESET = NetworkConfig()  # this very object stands for the network of the preset
_OF_RECIPE: Any = None  # stands for the value of the recipe
_OF_TEACHER: Any = None  # stands for the value of the run that is distilled

# The options that a recipe decides; `warmup_images` is a share of `num_images`. `paper` is the training of the paper.
# `best` gave the best small images (docs/findings.md).
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "paper": dict(
        objective="diffusion", optimizer="adamw", learning_rate=1e-4, warmup_images=0.0, decay="none",
        horizontal_flip=False,
    ),
    "best": dict(
        objective="flow", optimizer="muon", learning_rate=3e-3, warmup_images=0.05, decay="cosine",
        horizontal_flip=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class DistillationOptions:
    """How a student is distilled; `lamamba.training.distillation` has the method."""

    steps: Literal[1, 2, 4, 8] = 4
    """Sampler steps that the student takes."""
    guidance: float | None = None
    """Scale of classifier-free guidance that the student learns to include. The default is 2, or 1 (off) if the network
    is unconditional or was trained with --label-dropout 0."""
    teacher_objective: Annotated[str, Option(hidden=True)] = ""
    """Objective of RUN; a student of "diffusion" predicts v instead of noise."""

    def __post_init__(self) -> None:
        is_scale = self.guidance is None or math.isfinite(self.guidance)
        check_option(self, "guidance", is_scale, "a number, 1 for no guidance")


@dataclass(frozen=True)
class TrainConfig:
    """Train a network on images; watch it in the run folder's loss.png and samples/."""

    out: Path
    """Run folder for checkpoints, samples, logs and the resolved configuration."""
    preset: str = "nano"
    """The network: nano, or s, b, l or xl with -256 or -512, and -16-states for 16 states."""
    network_class: Annotated[str, Option(hidden=True)] = "LaMambaDiff"
    """Name of the network's class, which code may add to `lamamba.model.NETWORKS`. Classes other than LaMambaDiff take
    only in_channels, sample_size and num_classes."""
    recipe: Literal["paper", "best"] = "paper"
    """paper is the training of the paper; best is what gave the best small images: --objective flow, --optimizer muon,
    --learning-rate 0.003, --decay cosine, a warm-up, and mirrored images. Options that you give take
    precedence."""
    start_from: str | None = None
    """Copy the weights that fit from this run, checkpoint or shipped weights (such as nano), as lamamba finetune
    does; the default is fresh weights."""
    data: str = "builtin"
    """One of: builtin (10,000 Fashion-MNIST images); fashion-mnist (60,000); a folder of images, flat or with one
    subfolder per class; a Hugging Face dataset, as its name on the hub, a folder of save_to_disk, or parquet files; a
    folder of latents that lamamba encode wrote."""
    data_folder: Path | None = None
    """Folder with the files of fashion-mnist; by default Debian's package, or a download from the Hugging Face hub."""
    image_size: int | None = None
    """Crop the images of a folder to this many pixels square; the default with --vae is the preset's size."""
    channels: Literal[1, 3] | None = None
    """1 for gray, 3 for color; the default is color for a folder or with --vae, otherwise gray."""
    skip_bad_images: bool = False
    """Count and report images that cannot be read, instead of stopping at the first."""
    horizontal_flip: bool = _OF_RECIPE
    """Mirror half of the images, chosen at random. The recipe best does; add --no-horizontal-flip for letters and other
    images that a mirror makes wrong."""
    vae: Path | None = None
    """Train on latents of this AutoencoderKL folder, as saved by diffusers; the default is pixels, or the autoencoder
    that encoded --data."""
    objective: Annotated[str, Option(choices=OBJECTIVES)] = _OF_RECIPE
    """diffusion predicts noise with learned variance, diffusion-v predicts v instead, and diffusion-v-zero-snr also
    trains on pure noise; flow is flow matching; flow-x is flow matching whose network predicts the clean image."""
    timesteps: Timesteps = "uniform"
    """Distribution of the timesteps that flow and flow-x train on; logit-normal draws more from the middle."""
    timestep_logits: tuple[float, float] = (0.0, 1.0)
    """Mean and standard deviation of the logit of logit-normal timesteps; higher means train on more noise. JiT uses
    0.8 0.8 with flow-x."""
    contrast: float = 0.0
    """Train flow or flow-x contrastively: subtract the distance from another image's velocity with this weight (the
    paper uses 0.05); 0 turns it off."""
    min_snr_gamma: float = 0.0
    """Weight timesteps by their signal-to-noise ratio, clipped at this value (min-SNR; the paper uses 5); 0 weights all
    equally."""
    num_images: int = 100_000
    """Length of the training, in images seen."""
    batch_size: int = 64
    """Images per optimizer step."""
    accumulate: int = 1
    """Compute each batch in this many parts, one after the other, to save memory; with several ranks, each rank splits
    its share. The gradient is the same."""
    optimizer: Literal["adamw", "muon"] = _OF_RECIPE
    """muon trains the linear layers and convolutions of the blocks, except depthwise ones, with Muon, and all other
    parameters with AdamW."""
    learning_rate: float = _OF_RECIPE
    """Learning rate of the optimizer."""
    warmup_images: int = _OF_RECIPE
    """Images over which the learning rate rises linearly from 0; the default is 0, and with the recipe best 5 % of
    --num-images."""
    decay: Literal["none", "linear", "cosine"] = _OF_RECIPE
    """Shape in which the learning rate falls to 0 between the warmup and --num-images; none keeps it constant."""
    weight_decay: float = 0.0
    """Weight decay of matrices and convolution kernels; biases, norms, embeddings, A_log and D have none."""
    dropout: float = 0.0
    """Probability of dropout in the MLP of each block (EDM uses 0.13 on CIFAR-10); 0 turns it off."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this norm; 0 turns clipping off."""
    max_skipped_steps: int = 10
    """Stop after this many steps in a row whose gradient was not finite; such steps are skipped."""
    ema_decay: float = 0.9999
    """Decay of the EMA of the weights per step; it starts lower, so that short runs are averaged too."""
    power_averages: tuple[float, ...] = ()
    """Keep snapshots of EMAs with these relative lengths, such as 0.05 0.1; lamamba average makes an EMA of any length
    from them. The default keeps none."""
    snapshot_every: int | None = None
    """Images between two of these snapshots; the default is a 20th of the run."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Precision of the network; auto uses bf16 on GPUs that support it. Weights are always float32."""
    shard: bool = False
    """Divide optimizer state and EMAs among the ranks (ZeRO, stage 1), which saves memory; a step takes longer, as
    lamamba plan predicts."""
    cuda_graph: bool = True
    """On CUDA, launch the kernels of a step as one CUDA graph, so that the GPU never waits for Python."""
    compile: bool = False
    """Also compile the network with torch.compile; the first step then takes minutes."""
    gradient_checkpointing: bool = False
    """Save memory by computing activations twice."""
    seed: int = 0
    """Seed of the initial weights, the order of images, and the noise."""
    device: str = "auto"
    """cpu, cuda, cuda:1 or mps; auto uses the fastest one available."""
    num_workers: int = 0
    """Processes that read and decode images of a folder."""
    tracker: Literal["none", "wandb", "trackio"] = "none"
    """Also log to Weights & Biases or trackio, which must be installed; TensorBoard files are always written."""
    project: str = "lamamba"
    """Project name for the tracker."""
    log_every: int | None = None
    """Images between two lines of the log; the default is a 100th of the run."""
    sample_every: int | None = None
    """Images between two sample grids; the default is a 10th of the run, on a CPU a quarter."""
    checkpoint_every: int | None = None
    """Images between two checkpoints; the default is a 10th of the run."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep; 0 keeps all."""
    sample_steps: int = 25
    """Sampler steps for sample grids."""
    sample_guidance: float = DEFAULT_GUIDANCE
    """Guidance scale of sample grids."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint; options that are not given again are those of the run."""
    resume_or_start: bool = False
    """Resume if --out holds a run, otherwise start one: for jobs that a cluster repeats with the same command."""
    allow_changed: tuple[Literal["data", "vae"], ...] = ()
    """Resume even if the data or the autoencoder changed since the start of the run; the default refuses."""
    fall_back: bool = False
    """Resume from the newest intact checkpoint if the last one is damaged."""
    dry_run: bool = False
    """Print the resolved configuration and stop."""
    dataset: DatasetOptions = WHOLE_DATASET
    """Options for a Hugging Face dataset."""
    network: NetworkConfig = _OF_PRESET
    """Network options; --preset sets their defaults."""
    distillation: Annotated[DistillationOptions | None, Option(hidden=True)] = None
    """How the network learns to sample what `start_from` samples, in fewer steps (`lamamba distill`); the default is to
    train on images alone."""

    @property
    def resumes(self) -> bool:
        """Whether a run in --out is continued."""
        return self.resume or self.resume_or_start

    def __post_init__(self) -> None:
        if self.network is _OF_PRESET:
            object.__setattr__(self, "network", preset(self.preset))
        check_option(self, "recipe", self.recipe in RECIPES, " or ".join(RECIPES))
        for name, value in RECIPES[self.recipe].items():
            if getattr(self, name) is None:
                own = round(value * self.num_images) if name == "warmup_images" else value
                object.__setattr__(self, name, own)
        for name in ("out", "data_folder", "vae"):  # in Python, paths may be strings
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, Path(value))
        check_seed(self.seed)
        check_option(self, "sample_guidance", math.isfinite(self.sample_guidance), "a number")
        check_range(self, 1, MAX_IMAGES, "num_images")
        check_range(self, 1, 1_000_000, "batch_size")
        check_range(self, 1, 1000, "sample_steps")
        check_range(self, 1, math.inf, "accumulate", "max_skipped_steps")
        check_range(self, 1, math.inf, "log_every", "sample_every", "checkpoint_every", "snapshot_every")
        check_range(self, -math.inf, MAX_SIDE, "image_size")  # other code says what it has to be at least
        check_range(self, 0, 1024, "num_workers")
        check_range(self, 0, math.inf, "max_grad_norm", "min_snr_gamma", "warmup_images", "weight_decay")
        check_range(self, 0, math.inf, "keep_checkpoints")
        check_option(self, "learning_rate", 0 < self.learning_rate < math.inf, "a number above 0")
        warms_up_in_time = self.decay == "none" or self.warmup_images < self.num_images
        wanted = f"less than num_images {self.num_images}, where the learning rate decays"
        check_option(self, "warmup_images", warms_up_in_time, wanted)
        fits = self.timesteps == "uniform" or self.objective.startswith("flow")
        check_option(self, "timesteps", fits, f"uniform with the objective {self.objective}")
        logits = self.timestep_logits
        fits = tuple(logits) == (0, 1) or self.timesteps == "logit-normal"
        check_option(self, "timestep_logits", fits, f"0 1 with the timesteps {self.timesteps}")
        fits = math.isfinite(logits[0]) and 0 < logits[1] < math.inf
        check_option(self, "timestep_logits", fits, "a mean, and a standard deviation above 0")
        check_range(self, 0, 0.99, "contrast")
        if self.contrast:
            check_option(self, "contrast", self.objective.startswith("flow"), f"0 with the objective {self.objective}")
            # If min-SNR weights the error less than the contrast, the loss has no minimum.
            check_option(self, "contrast", not self.min_snr_gamma, "0 with min_snr_gamma")
            check_option(self, "contrast", self.accumulate == 1, "0 with accumulate above 1")
            check_option(self, "contrast", self.batch_size > 1, "0 with batch_size 1")
        check_option(self, "dropout", 0 <= self.dropout < 1, "from 0 to less than 1")
        # The second computation would drop other activations.
        check_option(
            self, "dropout", not (self.dropout and self.gradient_checkpointing), "0 with gradient_checkpointing"
        )
        if self.distillation:
            check_option(self, "min_snr_gamma", not self.min_snr_gamma, "0 in a distillation")
            check_option(self, "dropout", not self.dropout, "0 in a distillation")
            check_option(self, "optimizer", self.optimizer == "adamw", "adamw in a distillation: Muon has momentum")
        for length in self.power_averages:
            fits = 0 < length <= 0.288 and round(length, 3) == length
            check(fits, "power_averages", length, "from 0.001 to 0.288, with three decimals")
        differ = len(set(self.power_averages)) == len(self.power_averages)
        check_option(self, "power_averages", differ, "different lengths")
        check_option(self, "ema_decay", 0 <= self.ema_decay < 1, "from 0 to less than 1")
        check_option(self, "accumulate", self.accumulate <= self.batch_size, f"at most batch_size {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Train a network, starting from the weights of a checkpoint, which also sets the network options."""

    HIDDEN: ClassVar = ("preset", "recipe")
    start_from: Annotated[str, Option(positional=True, metavar="CHECKPOINT")] = field()
    """A run, a checkpoint, shipped weights (such as nano), a pipeline folder, or user/name on the hub."""
    network: NetworkConfig = PRESETS["nano"]
    """Network options; CHECKPOINT sets their defaults (below: those of nano)."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainConfig):
    """Train a student that samples in a few steps, without guidance, what RUN samples in many steps with guidance."""

    HIDDEN: ClassVar = (  # as in RUN, or of no use to a student
        *("preset", "recipe", "network", "objective", "timesteps", "timestep_logits", "contrast", "min_snr_gamma"),
        *("optimizer", "dropout", "horizontal_flip", "power_averages", "snapshot_every"),
        *("sample_steps", "sample_guidance"),
    )
    start_from: Annotated[str, Option(positional=True, metavar="RUN")] = field()
    """The teacher: a run, a checkpoint, shipped weights (such as nano), a pipeline folder, or user/name on the
    hub."""
    data: str = _OF_TEACHER
    """Images to distill on, as for lamamba train; they need the classes that RUN has. The default is the data of RUN,
    or builtin for nano."""
    image_size: int | None = None
    """Crop the images of a folder to this many pixels square; the default is the size of RUN's images."""
    channels: Literal[1, 3] | None = None
    """1 for gray, 3 for color; by default as in RUN."""
    num_images: int = 400_000
    """Length of the distillation, in images seen."""
    learning_rate: float = 1e-4
    """Learning rate of the optimizer."""
    decay: Literal["none", "linear", "cosine"] = "linear"
    """Shape in which the learning rate falls to 0 between the warmup and --num-images; none keeps it constant."""
    warmup_images: int = _OF_RECIPE
    """Images over which the learning rate rises linearly from 0; the default is 2 % of --num-images."""
    ema_decay: float = 0.9995
    """Decay of the EMA of the weights per step; it starts lower, so that short runs are averaged too."""
    horizontal_flip: bool = _OF_TEACHER
    objective: str = _OF_TEACHER
    network: NetworkConfig = _OF_TEACHER
    vae: Path | None = None
    """AutoencoderKL folder of the latents; by default as in RUN, or as in --data."""
    distillation: DistillationOptions = DistillationOptions()
    """Distillation."""

    def __post_init__(self) -> None:
        flips = self.horizontal_flip
        if self.warmup_images is None:
            object.__setattr__(self, "warmup_images", self.num_images // 50)
        super().__post_init__()
        object.__setattr__(self, "horizontal_flip", flips)  # not the recipe's


@dataclass(frozen=True)
class AverageConfig:
    """Make an EMA of any length from the snapshots of a run (train --power-averages)."""

    run: Annotated[Path, Option(positional=True)]
    """Run folder; the run may still be training."""
    sigma_rel: float
    """Length of the EMA: the standard deviation of its weights over the training so far, such as 0.07."""
    out: Path
    """Folder for the weights, which lamamba sample reads."""
    images: int | None = None
    """Number of images seen at the snapshot to end with; the default is the newest snapshot."""


@dataclass(frozen=True)
class WatchConfig:
    """Show the loss, speed and last checkpoint of a run, and keep them up to date; once if it is not on a terminal."""

    run: Annotated[Path, Option(positional=True)]
    """Run folder."""
