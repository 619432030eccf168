"""Every option of lamamba in one place: the network's, its presets, and the commands'.

Imports neither torch nor diffusers, so that `lamamba --help` answers at once.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lamamba.errors import ConfigError

Objective = Literal["diffusion", "flow"]
Sampler = Literal["ancestral", "ddim", "dpm++", "sde-dpm++", "unipc", "euler", "heun"]


@dataclass(frozen=True)
class NetworkConfig:
    """Geometry of the network; the defaults are the released XL at 256 px (LaMamba-Diff, arXiv 2408.02615)."""

    # What a training run takes from its data is not an option of the command line.
    in_channels: Annotated[int, tyro.conf.Suppress] = 4
    """Channels of an image or latent."""
    sample_size: Annotated[int, tyro.conf.Suppress] = 32
    """Height and width of the grid at training, in pixels of the image or latent."""
    num_classes: Annotated[int, tyro.conf.Suppress] = 1000
    """Classes; 0 is an unconditional network."""
    embed_dim: int = 320
    """Width of the first stage; the stages are 1, 2, 4 and 4 times as wide."""
    depths: tuple[int, int, int, int] = (2, 2, 2, 2)
    """Blocks of each encoder stage."""
    bottleneck_depth: int = 2
    """Blocks between encoder and decoder."""
    decoder_extra_depth: int = 1
    """Blocks that each decoder stage has more than its encoder mirror."""
    num_heads: int = 16
    """Attention heads, the same in every stage."""
    window_size: int = 8
    """Side of an attention window."""
    ssm_ratio: float = 2.0
    """Inner channels of the scan over the width of its block."""
    ssm_state_size: int = 1
    """States of each channel of the scan; 16 is what the paper's GFLOPs correspond to."""
    ssm_dt_rank: int | None = None
    """Rank of the scan's step size; None is a 16th of the block's width, rounded up."""
    ssm_conv_bias: bool = False
    """Bias of the scan branch's 3x3 convolution."""
    scan: Literal["continuous", "raster"] = "continuous"
    """Paths of the scan: serpentine, or row and column order."""
    mlp_ratio: float = 4.0
    """Hidden channels of the MLP over the width of its block."""
    downsample: Literal["merge", "conv"] = "merge"
    """Merge 2x2 neighbours by norm and linear layer, or by a strided convolution."""
    label_dropout: float = 0.1
    """Probability that training replaces a label by "no label", which guidance needs."""
    use_ssm: bool = True
    """The scan branch of every block; off for ablations."""
    use_attention: bool = True
    """The window attention branch of every block; off for ablations."""

    def __post_init__(self) -> None:
        at_least = {
            "in_channels": 1, "sample_size": 4, "num_classes": 0, "embed_dim": 4, "bottleneck_depth": 0,
            "decoder_extra_depth": 0, "num_heads": 1, "window_size": 2, "ssm_state_size": 1,
        }  # fmt: skip
        for name, least in at_least.items():
            _check(_is_whole(getattr(self, name)), name, getattr(self, name), "a whole number")
            _check(getattr(self, name) >= least, name, getattr(self, name), f"{least} or more")
        for name in ("ssm_ratio", "mlp_ratio", "label_dropout"):
            _check(_is_number(getattr(self, name)), name, getattr(self, name), "a number")
        for name in ("ssm_conv_bias", "use_ssm", "use_attention"):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        _check(self.sample_size % 2 == 0, "sample_size", self.sample_size, f"even: {self.sample_size + 1}")
        _check(self.embed_dim % 4 == 0, "embed_dim", self.embed_dim, "a multiple of 4, for the positional embedding")
        _check(
            self.embed_dim % self.num_heads == 0,
            "num_heads",
            self.num_heads,
            f"a divisor of embed_dim {self.embed_dim}",
        )
        _check(self.window_size % 2 == 0, "window_size", self.window_size, "even: windows shift by half")
        _check(
            # A list is what a configuration read from JSON has.
            isinstance(self.depths, (tuple, list)) and len(self.depths) == 4
            and all(_is_whole(depth) and depth >= 1 for depth in self.depths),
            "depths", self.depths, "four whole numbers, each 1 or more",
        )  # fmt: skip
        _check(
            self.ssm_dt_rank is None or (_is_whole(self.ssm_dt_rank) and self.ssm_dt_rank >= 1),
            "ssm_dt_rank", self.ssm_dt_rank, "a whole number, 1 or more, or None",
        )  # fmt: skip
        for name in ("ssm_ratio", "mlp_ratio"):
            channels = getattr(self, name) * self.embed_dim
            _check(
                channels >= 1 and channels % 1 == 0, name, getattr(self, name),
                f"a positive number that gives whole channels with embed_dim {self.embed_dim}",
            )  # fmt: skip
        _check(self.scan in ("continuous", "raster"), "scan", self.scan, '"continuous" or "raster"')
        _check(self.downsample in ("merge", "conv"), "downsample", self.downsample, '"merge" or "conv"')
        _check(0 <= self.label_dropout < 1, "label_dropout", self.label_dropout, "from 0 to less than 1")
        _check(
            self.use_ssm or self.use_attention, "use_attention", self.use_attention,
            "True where use_ssm is False: with neither branch no pixel sees another",
        )  # fmt: skip


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # to Python, True is 1


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _check(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value!r}: it must be {wanted}")


_SIZES: dict[str, dict[str, Any]] = {
    "s": {"embed_dim": 64, "num_heads": 4},
    "b": {"embed_dim": 128, "num_heads": 8},
    "l": {"embed_dim": 256, "num_heads": 16},
    "xl": {"embed_dim": 320, "num_heads": 16},
}

# S, B and L were never released: the paper gives widths, the rest follows the released XL. 256 px and 512 px images are
# grids of 32 and 64 behind an autoencoder that divides by 8. `nano` works on pixels, is the built-in demo, and is
# shaped for a CPU: few blocks where the grid is large, and a scan no wider than its block.
PRESETS: Mapping[str, NetworkConfig] = {
    "nano": NetworkConfig(
        in_channels=1,
        num_classes=10,
        embed_dim=40,
        depths=(1, 2, 1, 1),
        bottleneck_depth=1,
        decoder_extra_depth=0,
        num_heads=4,
        ssm_ratio=1.0,
    ),
    **{
        f"{size}-{pixels}": NetworkConfig(sample_size=pixels // 8, **options)
        for pixels in (256, 512)
        for size, options in _SIZES.items()
    },
}


def nearest(name: str, names: Iterable[str]) -> str:
    """Phrase a hint for a name that does not exist: three that begin so, or the likeliest, or all there are."""
    names, name = list(names), name.lower()
    begun = [longer for longer in names if name and longer.startswith(name)][:3]
    close = begun or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names)}"


def preset(name: str) -> NetworkConfig:
    """Look up a preset.

    Raises:
        ConfigError: there is none of that name; the message says the nearest.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset is named {name!r}: {nearest(name, PRESETS)}")
    return PRESETS[name]


@dataclass(frozen=True)
class TrainConfig:
    """Train a network on images; watch it in the run folder's loss.png and samples/."""

    out: Path
    """Run folder: checkpoints, samples, logs and the resolved configuration."""
    preset: str = "nano"
    """Size of the network: nano, or s, b, l or xl at -256 or -512."""
    start_from: str | None = None
    """A run, a checkpoint or a preset whose weights to begin with, as far as they fit; see lamamba finetune."""
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
    """Parts a batch is computed in, one after the other, to save memory."""
    learning_rate: float = 1e-4
    """Of AdamW."""
    warmup_images: int = 0
    """Images over which the learning rate rises from nothing, in equal steps."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How the learning rate falls from the end of its warm-up, to nothing at num_images; none keeps it."""
    weight_decay: float = 0.0
    """Of AdamW."""
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
    """On CUDA, launch a step's kernels all at once, so that the GPU never waits for Python."""
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
    fall_back: bool = False
    """Resume from the newest checkpoint that is whole, where the last one is damaged."""
    dry_run: bool = False
    """Print the resolved configuration and stop."""
    network: tyro.conf.OmitArgPrefixes[NetworkConfig] = PRESETS["nano"]
    """The preset's options, each of which can be given."""

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size", "accumulate", "max_skipped_steps", "sample_steps"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("log_every", "sample_every", "checkpoint_every", "snapshot_every"):
            _check(getattr(self, name) is None or getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in (
            "max_grad_norm",
            "min_snr_gamma",
            "warmup_images",
            "weight_decay",
            "num_workers",
            "keep_checkpoints",
            "seed",
        ):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _check(self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")
        _check(
            self.decay == "none" or self.warmup_images < self.num_images, "warmup_images", self.warmup_images,
            f"less than num_images {self.num_images}, where the learning rate decays",
        )  # fmt: skip
        for length in self.power_averages:
            fits = 0 < length <= 0.288 and round(length, 3) == length
            _check(fits, "power_averages", length, "from 0.001 to 0.288, with three decimals")
        _check(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "from 0 to less than 1")
        _check(
            self.batch_size % self.accumulate == 0, "accumulate", self.accumulate,
            f"a divisor of batch_size {self.batch_size}",
        )  # fmt: skip


@dataclass(frozen=True)
class EncodeConfig:
    """Encode images to latents once, to train on them many times."""

    data: str
    """A folder of images, one subfolder a class or flat; or builtin, fashion-mnist."""
    vae: Path
    """AutoencoderKL folder, as diffusers saves it."""
    out: Path
    """Folder for the latents: shards and an index. Run again, what is missing in it is done."""
    image_size: int | None = None
    """Crop a folder's images to this many pixels square."""
    mirrored: bool = True
    """Encode every image mirrored too, for --horizontal-flip in training; twice as many files and as much time."""
    skip_bad_images: bool = False
    """Leave images out that cannot be read, instead of stopping at the first."""
    images_per_shard: int = 2048
    """Images in a file."""
    batch_size: int = 32
    """Images encoded at once."""
    num_workers: int = 4
    """Threads that read and decode images."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the best there is."""

    def __post_init__(self) -> None:
        for name in ("images_per_shard", "batch_size"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _check(self.num_workers >= 0, "num_workers", self.num_workers, "0 or more")


@dataclass(frozen=True)
class GuidanceOptions:
    """What guidance has beside its scale; the equations are at `lamamba.diffusion.guide`."""

    interval: Annotated[tuple[float, float] | None, tyro.conf.arg(name="guidance-interval")] = None
    """Guide only between these two noise levels, as noise over signal (arXiv 2404.07724)."""
    cosine_power: Annotated[float, tyro.conf.arg(name="guidance-cosine-power")] = 0.0
    """Let guidance grow from none at full noise to its scale at none, along a cosine of this power: the higher, the
    later (MDT, arXiv 2303.14389, by default 4 there); 0 is the same scale throughout."""
    rescale: Annotated[float, tyro.conf.arg(name="guidance-rescale")] = 0.0
    """Bring the deviation of guided predictions back to that of unguided ones, by this much from 0, not at all, to 1
    (arXiv 2305.08891)."""

    def __post_init__(self) -> None:
        low, high = self.interval or (0.0, 0.0)
        _check(low <= high, "guidance_interval", self.interval, "two noise levels, the lower first")
        _check(0 <= self.cosine_power < math.inf, "guidance_cosine_power", self.cosine_power, "0 or more")
        _check(0 <= self.rescale <= 1, "guidance_rescale", self.rescale, "from 0 to 1")


PLAIN_GUIDANCE = GuidanceOptions()


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """What is sampled from, and how."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder (its newest checkpoint), a checkpoint folder, a preset; or a folder that diffusers saved of a
    DiTPipeline or a DiTTransformer2DModel."""
    sampler: Sampler | None = None
    """ancestral, ddim, dpm++, sde-dpm++ or unipc (diffusion); euler or heun (flow). The default is dpm++ or heun."""
    steps: int = 25
    """Steps of the sampler."""
    guidance: float | None = None
    """Scale of classifier-free guidance, 1 is none; the default is 2, or 1 for an unconditional network."""
    guidance_checkpoint: str | None = None
    """Guide away from this weaker checkpoint, smaller or trained for less long, instead of away from the same network
    without a label (autoguidance, arXiv 2406.02507)."""
    guidance_options: tyro.conf.OmitArgPrefixes[GuidanceOptions] = PLAIN_GUIDANCE
    """What guidance has beside its scale."""
    seed: int = 0
    """Of the first image; image i has seed + i."""
    size: tuple[int, int] | None = None
    """Height and width in pixels; the default is the training size."""
    batch_size: int = 50
    """Images sampled at once."""
    vae: Path | None = None
    """AutoencoderKL folder that decodes latents; the default is the one the run was trained with."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Of the network's and the autoencoder's arithmetic; auto is bf16 on GPUs that have it."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the best there is."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _check(self.seed >= 0, "seed", self.seed, "0 or more")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SamplingConfig):
    """Sample images from a run, a checkpoint, a preset whose weights are shipped (nano), or a DiT of diffusers."""

    labels: str | None = None
    """Classes to sample, by name or number from 0, separated by commas; where classes are named by numbers, a number
    is a name. The default is all (the first 10)."""
    num_per_label: int = 4
    """Images of each class."""
    out: Path = Path("grid.png")
    """The grid, a row for each class."""
    images_out: Path | None = None
    """Folder for the single images too, each with its settings in the PNG's metadata."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.num_per_label >= 1, "num_per_label", self.num_per_label, "1 or more")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """Sample any number of images to files, on any number of GPUs; run again, what is missing is done."""

    out: Path
    """Folder for the images, and generation.json, which says how they were made."""
    num_images: int = 50000
    """Images in all."""
    labels: str = "balanced"
    """balanced: the classes in turn; random: each drawn at random, from the seed; or names or numbers, in turn."""
    format: Literal["png", "webdataset", "npz"] = "png"
    """PNG files; tars of PNG files; or one .npz with arr_0, (n, h, w, c) uint8, as ADM's evaluation suite reads it."""
    images_per_shard: int = 500
    """Images that a process makes at a time, and that a tar holds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_images", "images_per_shard"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")


@dataclass(frozen=True)
class DemoLimits:
    """What a visitor of a page can ask for at once, at most."""

    max_images: int = 16
    """Images of a request."""
    max_steps: int = 100
    """Steps of the sampler."""
    max_pixels: int = 1_048_576
    """Pixels of all images of a request together: sixteen of 256 x 256."""

    def __post_init__(self) -> None:
        for name in ("max_images", "max_steps", "max_pixels"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")


@dataclass(frozen=True)
class DemoConfig:
    """Serve a page that samples in the browser and shows what the network sees, until Ctrl-C."""

    checkpoints: tyro.conf.Positional[tuple[str, ...]] = ("nano",)
    """What visitors can choose from, as lamamba sample takes them: runs, checkpoints, nano, DiTs of diffusers."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in, and nobody is asked for a password."""
    port: int = 7860
    """Port to listen at; 0 takes one that is free."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the best there is."""
    at_once: int = 2
    """Requests that run at the same time; others wait their turn."""
    limits: tyro.conf.OmitArgPrefixes[DemoLimits] = DemoLimits()
    """What a visitor can ask for at once."""

    def __post_init__(self) -> None:
        _check(self.at_once >= 1, "at_once", self.at_once, "1 or more")
        _check(0 <= self.port < 1 << 16, "port", self.port, "0 to 65535")


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a checkpoint of the authors' released code to a folder for lamamba sample and finetune, or back."""

    checkpoint: tyro.conf.Positional[str]
    """A released checkpoint, of whose pickle only tensors are read; or what to make one of: a run folder (its newest
    checkpoint), a checkpoint folder, or a preset."""
    out: tyro.conf.Positional[Path]
    """The folder to write; or, of what is this package's, the .pt file."""
    preset: str = "xl-256"
    """Of a released checkpoint: size of its network, s, b, l or xl at -256 or -512; its classes, channels and grid are
    seen in the file."""
    vae: Path | None = None
    """Of a released checkpoint: AutoencoderKL folder that decodes its latents, for lamamba sample to find."""
    network: tyro.conf.OmitArgPrefixes[NetworkConfig] = PRESETS["xl-256"]
    """The preset's options, each of which can be given."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Score generated images against a reference: FID and its relatives; docs/evaluation.md says what is measured."""

    generated: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="GENERATED")]
    """A folder of images, as lamamba sample --images-out writes it, or a .npz of them (arr_0)."""
    reference: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="REFERENCE")]
    """A folder of images, a .npz of images or of published statistics (mu, sigma), or builtin, fashion-mnist."""
    features: str = "inception"
    """inception, the graph of 2015, fetched once; clothes, a small network for grey clothes of 28 or 32 pixels; or a
    TorchScript file that turns images into features."""
    pixels: Literal["uint8", "float"] = "uint8"
    """What a TorchScript file takes: 0 to 255, or float32 from 0 to 1."""
    image_size: int | None = None
    """Crop a folder's images to this many pixels square, as lamamba train does."""
    nearest_images: int = 50_000
    """Images of each set, at most, for precision, recall, density and coverage: a choice by the seed."""
    seed: int = 0
    """Of the subsets for the kernel distance and the parts for the inception score."""
    batch_size: int = 50
    """Images in the network at once."""
    out: Path = Path("scores.json")
    """The scores and what they are of."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the best there is."""

    def __post_init__(self) -> None:
        _check(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        _check(self.nearest_images >= 6, "nearest_images", self.nearest_images, "6 or more")
        _check(self.seed >= 0, "seed", self.seed, "0 or more")
        _check(self.image_size is None or self.image_size >= 1, "image_size", self.image_size, "1 or more")


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
        _check(self.every > 0, "every", self.every, "more than 0")


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
class PrepareImagenetConfig:
    """Extract the official ImageNet files to folders that can be trained on; run again, it goes on."""

    out: Path
    """Folder for train/ and validation/, with a folder for each class."""
    train: Path | None = None
    """ILSVRC2012_img_train.tar."""
    validation: Path | None = None
    """ILSVRC2012_img_val.tar."""
    devkit: Path | None = None
    """ILSVRC2012_devkit_t12.tar.gz, which knows the classes of the validation images."""


@dataclass(frozen=True)
class PrepareDatasetConfig:
    """Write a Hugging Face dataset's images to folders that can be trained on; run again, it goes on."""

    dataset: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME|FOLDER")]
    """A dataset of the hub, or a folder that datasets opens: parquet files, what save_to_disk wrote. A folder of images
    needs no preparing."""
    out: Path
    """Folder for the split, such as train/, with a folder for each class; without classes, images."""
    split: str = "train"
    """The split."""
    subset: str | None = None
    """The subset (configuration), of a dataset that has several."""
    image_column: str | None = None
    """Column with the images; the default is the only one of the type Image."""
    label_column: str | None = "auto"
    """Column with the classes: ClassLabel, strings or integers. auto is the only ClassLabel, if there is any, None is
    no classes."""
    number_classes: bool = False
    """Begin the names of class folders with the dataset's numbers, as 007_cat, which keeps their order."""
    skip_bad_images: bool = False
    """Leave out images that cannot be read, instead of failing once all others are written."""


@dataclass(frozen=True)
class InfoConfig:
    """Count parameters and multiply-adds, stage by stage."""

    network: tyro.conf.Positional[str]
    """A preset, a run folder or a checkpoint folder."""
    size: tuple[int, int] | None = None
    """Height and width of the grid the network sees, in latents or pixels; the default is the training size."""
    ssm_state_size: int | None = None
    """Count a preset with this many states; 16 is what the paper's GFLOPs correspond to."""


@dataclass(frozen=True)
class PlanConfig:
    """Predict the speed, memory and length of a training on a cluster, from what was measured on one and two GPUs."""

    preset: tyro.conf.Positional[str]
    """The network: nano, or s, b, l or xl at -256 or -512."""
    gpus: int = 8
    """GPUs in all."""
    gpus_per_host: int = 8
    """GPUs that NVLink joins."""
    batch_size: int | None = None
    """Images in a step of the optimizer, over all GPUs; the default is 32 a GPU."""
    num_images: int = 400_000_000
    """Length of the training: images seen in all."""
    shard: bool = False
    """Share parameters, moments and averages among all GPUs."""
    power_averages: int = 0
    """Averages that train --power-averages keeps."""
    gpu: str = "H100"
    """Words of the GPU's name; times are scaled by its peak TFLOP/s where it is not the measured one."""
    gpu_memory_gib: float = 79.0
    """Memory of a GPU, of which an H100 of 80 GB has 79."""
    images_per_s: float | None = None
    """Speed of one such GPU with its share of the batch, if you measured it."""
    link_gbytes_per_s: float | None = None
    """What a GPU sends to others in its host in a second; the default was measured, between two."""
    network_gbytes_per_s: float = 40.0
    """What a GPU sends to other hosts in a second; 40 is four fifths of a card of 400 Gbit/s for each GPU."""
    data_gbytes_per_s: float | None = None
    """What a host reads of its disk or network in a second; the default is enough."""

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_host", "num_images"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _check(self.power_averages >= 0, "power_averages", self.power_averages, "0 or more")
        for name in (
            "gpu_memory_gib", "images_per_s", "link_gbytes_per_s", "network_gbytes_per_s", "data_gbytes_per_s",
        ):  # fmt: skip
            _check(getattr(self, name) is None or getattr(self, name) > 0, name, getattr(self, name), "more than 0")
        _check(
            self.gpus <= self.gpus_per_host or self.gpus % self.gpus_per_host == 0, "gpus", self.gpus,
            f"a multiple of gpus_per_host {self.gpus_per_host}, or less than it",
        )  # fmt: skip
        if self.batch_size is not None:
            below = max(1, self.batch_size // self.gpus) * self.gpus
            _check(
                self.batch_size > 0 and self.batch_size % self.gpus == 0, "batch_size", self.batch_size,
                f"a multiple of the {self.gpus} gpus: {below} or {below + self.gpus}",
            )  # fmt: skip

    @property
    def images_of_a_gpu(self) -> int:
        """Images of a step on one GPU."""
        return 32 if self.batch_size is None else self.batch_size // self.gpus

    @property
    def hosts(self) -> int:
        """Hosts that the GPUs are in."""
        return max(1, self.gpus // self.gpus_per_host)

    @property
    def gpus_in_host(self) -> int:
        """GPUs of a host that are used."""
        return self.gpus // self.hosts
