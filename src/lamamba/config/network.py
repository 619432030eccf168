"""Options of the network, and the table of presets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from lamamba.config.checks import check_option, is_number, is_whole, nearest
from lamamba.config.options import Option
from lamamba.errors import ConfigError

# Limits far beyond any trained network. They prevent a wrong number, in an option or a file, from taking hours or all
# memory.
MAX_BLOCKS = 256
MAX_RATIO = 64
_RANGES = {
    "in_channels": (1, 1024),
    "sample_size": (4, 4096),
    "num_classes": (0, 1_000_000),
    "embed_dim": (4, 8192),
    "bottleneck_depth": (0, MAX_BLOCKS),
    "decoder_extra_depth": (0, MAX_BLOCKS),
    "num_heads": (1, 1024),
    "window_size": (2, 256),
    "ssm_state_size": (1, 1024),
}


@dataclass(frozen=True)
class NetworkConfig:
    """Options of the network; the defaults are the authors' XL at 256 px (LaMamba-Diff, arXiv 2408.02615)."""

    # Training infers these from the data, so they are hidden on the command line.
    in_channels: Annotated[int, Option(hidden=True)] = 4
    """Channels of an image or latent."""
    sample_size: Annotated[int, Option(hidden=True)] = 32
    """Height and width of the grid at training, in pixels of the image or latent."""
    num_classes: Annotated[int, Option(hidden=True)] = 1000
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
    """States of each channel of the scan: 1 in the authors' released code, 16 where the paper counts operations."""
    ssm_dt_rank: int | None = None
    """Rank of the scan's step size; the default is a 16th of the block's width, rounded up."""
    ssm_conv_bias: bool = False
    """Add a bias to the 3x3 convolution of the scan branch."""
    scan: Literal["continuous", "raster"] = "continuous"
    """Paths of the scan: serpentine, or row and column order."""
    mlp_ratio: float = 4.0
    """Hidden channels of the MLP over the width of its block."""
    downsample: Literal["merge", "conv"] = "merge"
    """Merge 2x2 neighbors with a norm and a linear layer, or with a strided convolution."""
    label_dropout: float = 0.1
    """Probability that training replaces a label by "no label", which guidance needs; 0 turns guidance off for good."""
    use_ssm: bool = True
    """Use the scan branch in every block; turn it off for ablations."""
    use_attention: bool = True
    """Use the window attention branch in every block; turn it off for ablations."""

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            check_option(self, name, is_whole(value), "a whole number")
            check_option(self, name, least <= value <= most, f"from {least:,} to {most:,}")
        for name in ("ssm_ratio", "mlp_ratio", "label_dropout"):
            check_option(self, name, is_number(getattr(self, name)), "a number")
        for name in ("ssm_conv_bias", "use_ssm", "use_attention"):
            check_option(self, name, isinstance(getattr(self, name), bool), "True or False")
        check_option(self, "sample_size", self.sample_size % 2 == 0, f"even: {self.sample_size + 1}")
        check_option(self, "embed_dim", self.embed_dim % 4 == 0, "a multiple of 4, for the positional embedding")
        divides = self.embed_dim % self.num_heads == 0
        check_option(self, "num_heads", divides, f"a divisor of embed_dim {self.embed_dim}")
        check_option(self, "window_size", self.window_size % 2 == 0, "even: windows shift by half")
        are_four = isinstance(self.depths, (tuple, list)) and len(self.depths) == 4  # from JSON comes a list
        are_depths = are_four and all(is_whole(depth) and depth >= 1 for depth in self.depths)
        check_option(self, "depths", are_depths, "four whole numbers, each 1 or more")
        blocks = 2 * sum(self.depths) + self.bottleneck_depth + 4 * self.decoder_extra_depth
        fewer = (
            f"smaller: with bottleneck_depth {self.bottleneck_depth} and decoder_extra_depth "
            f"{self.decoder_extra_depth} they are {blocks:,} blocks, and at most {MAX_BLOCKS} are built"
        )
        check_option(self, "depths", blocks <= MAX_BLOCKS, fewer)
        is_rank = self.ssm_dt_rank is None or (is_whole(self.ssm_dt_rank) and 1 <= self.ssm_dt_rank <= 4096)
        check_option(self, "ssm_dt_rank", is_rank, "a whole number from 1 to 4,096, or None")
        wanted = f"above 0, at most {MAX_RATIO}, and give whole channels with embed_dim {self.embed_dim}"
        for name in ("ssm_ratio", "mlp_ratio"):
            ratio = getattr(self, name)
            check_option(self, name, 0 < ratio <= MAX_RATIO and ratio * self.embed_dim % 1 == 0, wanted)
        check_option(self, "scan", self.scan in ("continuous", "raster"), '"continuous" or "raster"')
        check_option(self, "downsample", self.downsample in ("merge", "conv"), '"merge" or "conv"')
        check_option(self, "label_dropout", 0 <= self.label_dropout < 1, "from 0 to less than 1")
        wanted = "True where use_ssm is False: with neither branch no pixel sees another"
        check_option(self, "use_attention", self.use_ssm or self.use_attention, wanted)


SIXTEEN_STATES = "-16-states"  # suffix of presets with 16 states
_SIZES: dict[str, dict[str, Any]] = {
    "s": {"embed_dim": 64, "num_heads": 4},
    "b": {"embed_dim": 128, "num_heads": 8},
    "l": {"embed_dim": 256, "num_heads": 16},
    "xl": {"embed_dim": 320, "num_heads": 16},
}


# The authors' code configures XL only. We chose the widths of S, B and L so that their parameter counts match those of
# DiT-S, -B and -L; everything else follows XL. Images of 256 and 512 px are grids of 32 and 64, because the autoencoder
# divides by 8. The authors' code has one state, but the paper counts operations with 16: presets that end in -16-states
# have 16 and are otherwise the same. `nano` works on pixels, is the built-in demo, and is shaped for a CPU: it has few
# blocks where the grid is large, and a scan no wider than its block.
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
        f"{size}-{pixels}{ending}": NetworkConfig(sample_size=pixels // 8, ssm_state_size=num_states, **options)
        for ending, num_states in (("", 1), (SIXTEEN_STATES, 16))
        for pixels in (256, 512)
        for size, options in _SIZES.items()
    },
}


def preset(name: str) -> NetworkConfig:
    """Look up a preset.

    Raises:
        ConfigError: there is no such preset; the message suggests the nearest.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset is named {name!r}: {nearest(name, PRESETS)}")
    return PRESETS[name]
