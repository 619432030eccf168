"""Add a network in one file: a small convolutional one, trained, saved, resumed and sampled like any other.

    python examples/network.py runs/convnet                        # about a minute on a CPU
    python examples/network.py runs/convnet --num-images 100000    # longer

A network is a module of diffusers (`ModelMixin` and `ConfigMixin`, which save and load it) with the members of
`lamamba.diffusion.Denoiser`. Once it is in `NETWORKS` under its class's name, training, checkpoints, EMAs, samplers and
guidance can use it.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

import lamamba
from lamamba.model import NETWORKS
from lamamba.sampling import make_grid


class ConvNet(ModelMixin, ConfigMixin):
    """Residual 3x3 convolutions at half resolution, each modulated by the timestep and the label."""

    @register_to_config  # which makes `config` of the arguments
    def __init__(self, in_channels: int, sample_size: int, num_classes: int, width: int = 32, depth: int = 4) -> None:
        super().__init__()
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


NETWORKS["ConvNet"] = ConvNet


def main(out: Path, num_images: int = 20_000, **options: Any) -> None:
    """Train in a run folder, then sample an image of each class to samples.png in it."""
    config = lamamba.TrainConfig(out=out, network_class="ConvNet", recipe="best", num_images=num_images, **options)
    lamamba.train(config)
    network = lamamba.load_checkpoint(out).network
    x = lamamba.sample(network, lamamba.FlowMatching(), range(10), range(10), guidance_scale=2.0, clip_sample=True)
    make_grid(lamamba.to_uint8(x).numpy(), columns=10).save(out / "samples.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num-images", type=int, default=20_000)
    arguments = parser.parse_args()
    main(arguments.out, arguments.num_images)
