"""Add a network in one file: a small convolutional one, trained and sampled like any other.

    python examples/network.py grid.png                        # about a minute on a CPU
    python examples/network.py grid.png --num-images 100000    # longer

A network needs the members of `lamamba.diffusion.Denoiser`. Then losses, samplers, guidance and callbacks can use it.
"""

import argparse
import math
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lamamba
from lamamba.data import batches, load_builtin, to_float
from lamamba.diffusion import Objective
from lamamba.sampling import make_grid


class ConvNet(nn.Module):
    """Residual 3x3 convolutions at half resolution, each modulated by the timestep and the label."""

    def __init__(self, in_channels: int, sample_size: int, num_classes: int, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=in_channels, sample_size=sample_size, num_classes=num_classes)
        self.first = nn.Conv2d(in_channels, width, 2, stride=2)
        self.labels = nn.Embedding(num_classes + 1, width)
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(depth))
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=2**index, dilation=2**index) for index in range(depth)
        )
        self.modulations = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.last = nn.ConvTranspose2d(width, 2 * in_channels, 2, stride=2)

    @property
    def null_label(self) -> int:
        """The label that means "no label"."""
        return int(self.config.num_classes)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.first.weight.device

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict (b, 2c, h, w) from (b, c, h, w) noisy images, (b,) timesteps and (b,) labels."""
        half = self.labels.embedding_dim // 2
        frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=t.device))
        angles = t.float()[:, None] * frequencies
        condition = torch.cat([angles.cos(), angles.sin()], dim=1) + self.labels(y)
        x = self.first(x_t)
        for norm, convolution, modulation in zip(self.norms, self.convolutions, self.modulations, strict=True):
            scale, shift = modulation(F.silu(condition))[:, :, None, None].chunk(2, dim=1)
            x = x + convolution(F.silu(norm(x) * (1 + scale) + shift))
        out: Tensor = self.last(x)
        return out


def train(network: ConvNet, objective: Objective, num_images: int, batch_size: int = 64) -> list[float]:
    """Train on the built-in images, and return the loss of each step."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for (images, labels), _ in zip(
        batches(load_builtin(), batch_size=batch_size, seed=0), range(num_images // batch_size), strict=False
    ):
        x_0, y = to_float(images).to(network.device), labels.to(network.device)
        loss = lamamba.training_losses(
            objective, network, x_0, y, null_label=network.null_label, label_dropout=0.1
        )["loss"].mean()  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def main(out: Path, num_images: int = 20_000) -> list[float]:
    """Train, then sample an image of each class to a PNG file; returns the losses."""
    torch.manual_seed(0)
    network, objective = ConvNet(in_channels=1, sample_size=32, num_classes=10), lamamba.FlowMatching()
    losses = train(network, objective, num_images)
    x = lamamba.sample(network, objective, range(10), range(10), guidance_scale=2.0, clip_sample=True)
    make_grid(lamamba.to_uint8(x).numpy(), columns=10, scale=2).save(out)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num-images", type=int, default=20_000)
    arguments = parser.parse_args()
    print(f"loss {main(arguments.out, arguments.num_images)[-1]:.3f}")
