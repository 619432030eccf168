"""Every option of lamamba in one place: the network's, its presets, and the commands'.

Imports neither torch nor diffusers, so that `lamamba --help` answers at once.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lamamba.errors import ConfigError

Objective = Literal["diffusion", "flow"]
Sampler = Literal["ancestral", "ddim", "dpm++", "unipc", "euler", "heun"]


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
            _check(isinstance(getattr(self, name), int), name, getattr(self, name), "a whole number")
            _check(getattr(self, name) >= least, name, getattr(self, name), f"{least} or more")
        _check(self.sample_size % 2 == 0, "sample_size", self.sample_size, f"even: {self.sample_size + 1}")
        _check(self.embed_dim % 4 == 0, "embed_dim", self.embed_dim, "a multiple of 4, for the positional embedding")
        _check(
            self.embed_dim % self.num_heads == 0, "num_heads", self.num_heads, f"a divisor of embed_dim {self.embed_dim}"
        )
        _check(self.window_size % 2 == 0, "window_size", self.window_size, "even: windows shift by half")
        _check(
            len(self.depths) == 4 and all(isinstance(depth, int) and depth >= 1 for depth in self.depths),
            "depths", self.depths, "four numbers, each 1 or more",
        )  # fmt: skip
        _check(
            self.ssm_dt_rank is None or self.ssm_dt_rank >= 1, "ssm_dt_rank", self.ssm_dt_rank, "1 or more, or None"
        )
        for name in ("ssm_ratio", "mlp_ratio"):
            channels = getattr(self, name) * self.embed_dim
            _check(
                channels >= 1 and channels == int(channels), name, getattr(self, name),
                f"a positive number that gives whole channels with embed_dim {self.embed_dim}",
            )  # fmt: skip
        _check(self.scan in ("continuous", "raster"), "scan", self.scan, '"continuous" or "raster"')
        _check(self.downsample in ("merge", "conv"), "downsample", self.downsample, '"merge" or "conv"')
        _check(0 <= self.label_dropout < 1, "label_dropout", self.label_dropout, "from 0 to less than 1")
        _check(
            self.use_ssm or self.use_attention, "use_attention", self.use_attention,
            "True where use_ssm is False: with neither branch no pixel sees another",
        )  # fmt: skip


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
# grids of 32 and 64 behind an autoencoder that divides by 8. `nano` works on pixels and is the built-in demo.
PRESETS: Mapping[str, NetworkConfig] = {
    "nano": NetworkConfig(
        in_channels=1, num_classes=10, embed_dim=32, depths=(1, 2, 1, 1), bottleneck_depth=1, num_heads=4
    ),
    **{
        f"{size}-{pixels}": NetworkConfig(sample_size=pixels // 8, **options)
        for pixels in (256, 512)
        for size, options in _SIZES.items()
    },
}


def nearest(name: str, names: Iterable[str]) -> str:
    """Phrase a hint for a name that does not exist: the likeliest meant, or all there are."""
    names = list(names)
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"


def preset(name: str) -> NetworkConfig:
    """Look up a preset.

    Raises:
        ConfigError: there is none of that name; the message says the nearest.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset is named {name!r}: {nearest(name, PRESETS)}")
    return PRESETS[name]


_ = Path  # used by the commands' configurations
