"""The networks that are compared, all called as (x_t, t, y) -> (b, 2c, h, w).

s, b            LaMamba-S and -B, on pixels
dit-s-2, ...    DiT-S/2 and DiT-B/2 in their authors' layout, made of diffusers' modules
unet            diffusers' UNet2DModel, about as large as LaMamba-S
s-...           LaMamba-S with one change
b-shallow       the widths of LaMamba-B, and 13 blocks instead of 22: 3 on 32x32, 3 on 16x16, and 7 on 8x8
b-fine          the widths of LaMamba-B, and 13 blocks: 4 on 32x32, 4 on 16x16, and 5 on 8x8
s-fine          b-fine with three quarters of its width: about as many parameters as LaMamba-S
nano            the shipped network for 32x32
emoji-64        the shipped network for 64x64: narrower, and deeper where the grid is small
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lamamba.checkpoints.dit import DiT as SampledDiT
from lamamba.checkpoints.dit import DiTConfig
from lamamba.config import NetworkConfig, preset
from lamamba.model import LaMambaDiff
from lamamba.training.cost import count


@dataclass(frozen=True)
class DiTGeometry:
    """Depth, width and heads of a DiT (Peebles & Xie 2022, arXiv 2212.09748, table 1), all with patches of 2."""

    depth: int
    width: int
    heads: int


LAMAMBA: Mapping[str, NetworkConfig] = {
    "s": preset("s-256"),
    "b": preset("b-256"),
    "s-scan-only": replace(preset("s-256"), use_attention=False),
    "s-attention-only": replace(preset("s-256"), use_ssm=False),
    "s-raster": replace(preset("s-256"), scan="raster"),
    "s-state-16": replace(preset("s-256"), ssm_state_size=16),
    "s-window-4": replace(preset("s-256"), window_size=4),
    "b-shallow": replace(preset("b-256"), depths=(1, 1, 1, 1), bottleneck_depth=1),
    "b-fine": replace(preset("b-256"), depths=(2, 2, 1, 1), bottleneck_depth=1, decoder_extra_depth=0),
    "s-fine": replace(
        preset("b-256"), embed_dim=96, num_heads=6, depths=(2, 2, 1, 1), bottleneck_depth=1, decoder_extra_depth=0
    ),
    "nano": preset("nano"),
    "emoji-64": replace(preset("nano"), embed_dim=32, num_heads=2, depths=(2, 2, 4, 2)),
}
DIT: Mapping[str, DiTGeometry] = {"dit-s-2": DiTGeometry(12, 384, 6), "dit-b-2": DiTGeometry(12, 768, 12)}
NAMES = (*LAMAMBA, *DIT, "unet")
COMPILED = (*DIT, "unet")
"""Networks without kernels of their own, which torch.compile makes faster."""

_QUICK_LAMAMBA = {
    "embed_dim": 8,
    "num_heads": 2,
    "depths": (1, 1, 1, 1),
    "bottleneck_depth": 1,
    "decoder_extra_depth": 0,
}
_QUICK_DIT = DiTGeometry(2, 16, 2)
_UNET: dict[str, Any] = {"block_out_channels": (128, 256, 256), "layers_per_block": 2, "attention_head_dim": 64}
_QUICK_UNET: dict[str, Any] = {"block_out_channels": (32, 32, 64), "layers_per_block": 1, "attention_head_dim": 16}


class _Given(nn.Module):
    """Replaces the embedding in a DiT block, and returns the one that all blocks share."""

    def forward(self, timestep: Tensor, class_labels: Tensor, hidden_dtype: torch.dtype | None = None) -> Tensor:
        return timestep


class DiT(SampledDiT):
    """DiT in its authors' layout and initialization, made of diffusers' modules; attention by SDPA.

    In diffusers, every block has its own embedding of timestep and label. In the authors' layout all blocks share one,
    as the paper's parameter counts show. diffusers also keeps PyTorch's initialization, with which a DiT trains badly;
    here blocks start as the identity (adaLN-Zero), as in the paper. The trainer drops labels, not the network.
    """

    def __init__(self, geometry: DiTGeometry, in_channels: int, sample_size: int, num_classes: int) -> None:
        super().__init__(
            DiTTransformer2DModel(
                num_attention_heads=geometry.heads, attention_head_dim=geometry.width // geometry.heads,
                in_channels=in_channels, out_channels=2 * in_channels, num_layers=geometry.depth,
                sample_size=sample_size, patch_size=2, num_embeds_ada_norm=num_classes,
            )
        )  # fmt: skip
        self.embedding = CombinedTimestepLabelEmbeddings(num_classes, geometry.width)
        # Otherwise it would drop labels a second time. The table keeps its row for "no label".
        self.embedding.class_embedder.dropout_prob = 0.0
        for block in self.transformer.transformer_blocks:
            block.norm1.emb = _Given()
        # The convolution returns a transposed tensor, for which the first block would be compiled again.
        self.transformer.pos_embed.register_forward_hook(lambda module, inputs, tokens: tokens.contiguous())
        self.reset_parameters()

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        condition = self.embedding(t, y, hidden_dtype=torch.float32)
        return super().forward(x_t, condition, y)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Linear layers and patches: Xavier uniform; tables: normal(0, 0.02); modulation, output, biases: 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        timestep = self.embedding.timestep_embedder
        for table in (timestep.linear_1, timestep.linear_2, self.embedding.class_embedder.embedding_table):
            nn.init.normal_(table.weight, std=0.02)
        modulations = [block.norm1.linear for block in self.transformer.transformer_blocks]
        for layer in (*modulations, self.transformer.proj_out_1, self.transformer.proj_out_2):
            nn.init.zeros_(layer.weight)

    def compile_blocks(self) -> None:
        """Compile one block, which serves all of them: as fast as compiling the network, but quicker to compile."""
        _compile(self.transformer.transformer_blocks, self.device)


class UNet(nn.Module):
    """diffusers' UNet2DModel with labels, in the shape of DDPM's U-Net for CIFAR-10, with diffusers' initialization.

    It has residual blocks of convolutions on grids of 32, 16 and 8, and attention on 16 (Ho et al. 2020, arXiv
    2006.11239, appendix B). DDPM's fourth grid, 4x4, is left out, so that it is about as large as LaMamba-S.
    """

    def __init__(self, in_channels: int, sample_size: int, num_classes: int, **geometry: Any) -> None:
        super().__init__()
        self.unet = UNet2DModel(
            sample_size=sample_size, in_channels=in_channels, out_channels=2 * in_channels,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), num_class_embeds=num_classes + 1, **geometry,
        )  # fmt: skip
        self.config = DiTConfig(in_channels, sample_size, num_classes)

    @property
    def null_label(self) -> int:
        """The label that means "no label"."""
        return self.config.num_classes

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.unet.device

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.unet(x_t, t, y, return_dict=False)[0]

    def compile_blocks(self) -> None:
        """Compile each block; all are different."""
        _compile((*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks), self.device)


def _compile(blocks: Iterable[nn.Module], device: torch.device) -> None:
    # On a CPU, tracing is enough to show that a block compiles.
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, backend="inductor" if device.type == "cuda" else "eager")


def network_config(name: str, channels: int, size: int, num_classes: int, quick: bool = False) -> NetworkConfig:
    """Return the options of a network; for DiT and U-Net, those that trainer and sampler need."""
    config = LAMAMBA.get(name, NetworkConfig())
    small = _QUICK_LAMAMBA if quick else {}
    return replace(config, in_channels=channels, sample_size=size, num_classes=num_classes, **small)


def build(name: str, config: NetworkConfig, quick: bool = False) -> Any:
    """Build a network with new parameters, from its name and `network_config`."""
    if name in LAMAMBA:
        return LaMambaDiff(**vars(config))
    if name == "unet":
        geometry = _QUICK_UNET if quick else _UNET
        return UNet(config.in_channels, config.sample_size, config.num_classes, **geometry)
    return DiT(_QUICK_DIT if quick else DIT[name], config.in_channels, config.sample_size, config.num_classes)


@lru_cache
def cost(name: str, config: NetworkConfig, quick: bool = False) -> dict[str, int]:
    """Count parameters, and the multiply-adds of one image's forward pass."""
    with torch.device("meta"):
        network = build(name, config, quick)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        side = config.sample_size
        if name in LAMAMBA:
            return {"parameters": parameters, "multiply_adds": count(network, side, side)["all"][1]}
        inputs = torch.empty(1, config.in_channels, side, side), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            network(*inputs)
    return {"parameters": parameters, "multiply_adds": counter.get_total_flops() // 2}
