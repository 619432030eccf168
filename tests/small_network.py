"""A network that is fast on a CPU, a batch for it, and how far one result is from another."""

from typing import Any

import torch
from torch import Tensor

from lamamba.model import LaMambaDiff

# One block per stage, for tests that train; and the same as options of a command.
TINY_CONFIG: dict[str, Any] = {
    "embed_dim": 8, "num_heads": 2, "depths": (1, 1, 1, 1), "bottleneck_depth": 1, "decoder_extra_depth": 0,
}  # fmt: skip
TINY_NETWORK = [
    *("--embed-dim", "8", "--num-heads", "2"),
    *("--depths", "1", "1", "1", "1", "--bottleneck-depth", "1", "--decoder-extra-depth", "0"),
]


def relative_error(value: Tensor, reference: Tensor) -> float:
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm().clamp_min(1e-300))


SMALL = {
    "embed_dim": 8,
    "sample_size": 8,
    "num_classes": 3,
    "num_heads": 2,
    "window_size": 4,
    "depths": (2, 1, 1, 1),
    "bottleneck_depth": 1,
    "decoder_extra_depth": 0,
}


def build(seed: int = 0, **options: object) -> LaMambaDiff:
    torch.manual_seed(seed)
    return LaMambaDiff(**{**SMALL, **options}).eval()


@torch.no_grad()
def randomise(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move every parameter off its initial value, so that no gate is closed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return network


def build_random(**options: object) -> LaMambaDiff:
    return randomise(build(**options))


def make_batch(height: int = 8, width: int = 8, channels: int = 4, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x_t = torch.randn(batch, channels, height, width, generator=generator)
    return x_t, torch.tensor([3, 700])[:batch], torch.tensor([1, 3])[:batch]
