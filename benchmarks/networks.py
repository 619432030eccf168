"""The networks that are compared, all called as (x_t, t, y) -> (b, 2c, h, w), and their training and inference steps.

Each has four sizes: s, b, l and xl. For example, `dit-b-2` is DiT-B/2.

lamamba              LaMamba with one state, as installed
lamamba-16-states    LaMamba with 16 states, as in the operation counts of the paper
lamamba-compiled     LaMamba with one state and torch.compile
dit-SIZE-2           DiT in the layout of its authors, with compiled blocks
dit-SIZE-2-whole     the same with the whole network compiled, to check that compiling blocks is enough
dit-SIZE-2-diffusers DiT in the layout of diffusers, with compiled blocks
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lamamba.model import LaMambaDiff
from lamamba.ops.launch import precompile
from lamamba.ops.linear import RoundedWeights
from lamamba.sampling.captured import modulations_ahead

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# On a CPU, tracing is enough to show that a network compiles; the speed of inductor there does not matter.
COMPILE = {"fullgraph": True, "dynamic": False, "backend": "inductor" if CUDA else "eager"}
# DiT of each size: layers, attention heads and channels per head (arXiv 2212.09748, table 1).
SIZES = {"s": (12, 6, 64), "b": (12, 12, 64), "l": (24, 16, 64), "xl": (28, 16, 72)}
PROVIDERS = ("lamamba", "lamamba-16-states", "dit-SIZE-2")
MORE_PROVIDERS = ("lamamba-compiled", "dit-SIZE-2-whole", "dit-SIZE-2-diffusers")
Batch = tuple[Tensor, Tensor, Tensor]


class Given(nn.Module):
    """Replaces the embedding of a DiT block, and returns the embedding that all blocks share."""

    def forward(self, timestep: Tensor, class_labels: Tensor, hidden_dtype: torch.dtype) -> Tensor:
        return timestep


class DiT(nn.Module):
    """DiT (Peebles & Xie 2023, arXiv 2212.09748) built from the modules of diffusers; attention uses SDPA.

    In diffusers every block has its own embedding of timestep and label, and XL/2 has 750 M parameters. In the layout
    of the authors all blocks share one embedding, and XL/2 has 675 M parameters. It does less work, so we compare with
    it.
    """

    def __init__(self, size: str, side: int, quick: bool, own_embeddings: bool) -> None:
        super().__init__()
        from diffusers import DiTTransformer2DModel
        from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings

        layers, heads, head_dim = (2, 2, 8) if quick else SIZES[size]
        self.network = DiTTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=head_dim, in_channels=4, out_channels=8,
            num_layers=layers, sample_size=side, patch_size=2,
        )  # fmt: skip
        # The convolution returns transposed patches, for which the block would be compiled once more.
        self.network.pos_embed.register_forward_hook(lambda module, inputs, tokens: tokens.contiguous())
        self.embedding = None
        if not own_embeddings:
            self.embedding = CombinedTimestepLabelEmbeddings(1000, heads * head_dim)
            for block in self.network.transformer_blocks:
                block.norm1.emb = Given()

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.embedding is not None:
            t = self.embedding(t, y, hidden_dtype=self.network.pos_embed.proj.weight.dtype)
        out: Tensor = self.network(x_t, timestep=t, class_labels=y, return_dict=False)[0]
        return out


def build(size: str, provider: str, side: int, quick: bool) -> nn.Module:
    """Build a network with new parameters for side x side latents, on the device."""
    with DEVICE:
        if provider.startswith("lamamba"):
            options: dict[str, Any] = {"ssm_state_size": 16 if provider == "lamamba-16-states" else 1}
            if quick:
                options |= {"embed_dim": 32, "num_heads": 4, "depths": (1, 1, 1, 1)}
                options |= {"bottleneck_depth": 0, "decoder_extra_depth": 0}
            network: nn.Module = LaMambaDiff.from_preset(f"{size}-256", sample_size=side, **options)
        else:
            network = DiT(size, side, quick, own_embeddings=provider.endswith("diffusers"))
    network.to(DEVICE)
    if provider.endswith(("-compiled", "-whole")):
        network.compile(**COMPILE)
    elif isinstance(network, DiT):
        # All blocks are alike, so one compilation serves all. It is as fast as a compiled network, and compiles sooner.
        for block in network.network.transformer_blocks:
            block.compile(**COMPILE)
    return network


def random_batch(
    number: int, size: int, channels: int = 4, num_classes: int = 1000, dtype: torch.dtype = torch.float32
) -> Batch:
    """Draw noised images, timesteps and labels."""
    return (
        torch.randn(number, channels, size, size, device=DEVICE, dtype=dtype),
        torch.randint(0, 1000, (number,), device=DEVICE),
        torch.randint(0, num_classes, (number,), device=DEVICE),
    )


def training_step(network: nn.Module, batch: Batch, autocast: bool) -> Callable[[], object]:
    """Make an AdamW step on float32 weights, with or without bf16 autocast; a CUDA graph can capture it.

    As in training, LaMamba's weights are rounded together.
    """
    rounding = RoundedWeights(network, torch.bfloat16).in_use if autocast and CUDA else nullcontext
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True, capturable=CUDA)

    def find_gradients() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast, cache_enabled=False), rounding():
            out = network(*batch)
            out.float().square().mean().backward()

    find_gradients_prepared = prepared(network, find_gradients)

    def step() -> None:
        find_gradients_prepared()
        optimizer.step()

    return step


def inference_step(network: nn.Module, batch: Batch) -> Callable[[], object]:
    """Make a forward pass without gradients."""

    @torch.no_grad()
    def step() -> object:
        # As sampling records it.
        is_recorded = CUDA and torch.cuda.is_current_stream_capturing()
        with modulations_ahead(network) if is_recorded else nullcontext():
            return network(*batch)

    return prepared(network, step)


def prepared(network: nn.Module, function: Callable[[], object]) -> Callable[[], object]:
    """Make a step that precompiles the kernels of LaMamba at its first call, as training and sampling do."""
    waiting = CUDA and isinstance(network, LaMambaDiff)

    def call() -> object:
        nonlocal waiting
        if waiting:
            waiting = False
            precompile(function)
        return function()

    return call


def to_bfloat16(network: nn.Module) -> nn.Module:
    """Convert weights to bfloat16, except A_log, D and dt_bias, as `LaMambaDiff.from_pretrained` does."""
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_floating_point() and not name.endswith((".A_log", ".D", ".dt_bias")):
            tensor.data = tensor.data.to(torch.bfloat16)
    return network
