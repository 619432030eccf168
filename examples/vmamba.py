"""A classifier with blocks like VMamba's (Liu et al. 2024, arXiv 2401.10166), on the operations of lamamba.

    python examples/vmamba.py                          # trains a tiny one on the built-in images, a minute on a CPU
    python examples/vmamba.py --num-images 100000

A block scans the image along rows and columns, in both directions. `fused=True` computes the projection, the cross scan
and the scan in one operation; otherwise `selective_scan_2d` scans step sizes, B and C that lie in memory.
"""

import argparse
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamamba.data import batches, load_builtin, to_float
from lamamba.ops import selective_scan_2d
from lamamba.ops.selective_scan import project_and_scan


class CrossScan(nn.Module):
    """Depthwise convolution, then a selective scan along four paths; on (b, h, w, d)."""

    def __init__(self, width: int, num_states: int = 1, fused: bool = True) -> None:
        super().__init__()
        rank = math.ceil(width / 16)
        self.num_states, self.fused = num_states, fused
        self.in_proj = nn.Linear(width, width, bias=False)
        self.convolution = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.x_proj_weight = nn.Parameter(torch.randn(4, rank + 2 * num_states, width) * width**-0.5)
        self.dt_weight = nn.Parameter((2 * torch.rand(4, width, rank) - 1) * rank**-0.5)
        steps = torch.exp(torch.empty(4, width).uniform_(math.log(1e-3), math.log(0.1)))
        self.dt_bias = nn.Parameter(torch.log(torch.expm1(steps)))
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, num_states + 1)).repeat(4, width, 1))
        self.D = nn.Parameter(torch.ones(4, width))
        self.norm, self.out_proj = nn.LayerNorm(width), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scan (b, h, w, d)."""
        x = self.in_proj(x).permute(0, 3, 1, 2)
        x = F.silu(self.convolution(x)).permute(0, 2, 3, 1)
        out: Tensor = self.out_proj(self.norm(self.scan_fused(x) if self.fused else self.scan(x)))
        return out

    def scan_fused(self, x: Tensor) -> Tensor:
        """Project and scan in one operation. Its results are planes that add up to the scan."""
        return project_and_scan(
            x, self.x_proj_weight, self.dt_weight, self.dt_bias, self.A_log, self.D, scan="raster"
        ).sum(dim=0)  # fmt: skip

    def scan(self, x: Tensor) -> Tensor:
        """Project, then scan (b, d, h, w)."""
        low = torch.einsum("bhwd,kpd->bkphw", x, self.x_proj_weight.to(x.dtype))
        low, B, C = low.split([low.shape[2] - 2 * self.num_states, self.num_states, self.num_states], dim=2)
        delta = torch.einsum("bkrhw,kdr->bkdhw", low, self.dt_weight.to(x.dtype)).flatten(1, 2)
        return selective_scan_2d(
            x.permute(0, 3, 1, 2), delta, -torch.exp(self.A_log.flatten(0, 1)), B, C, self.D.flatten(),
            self.dt_bias.flatten(), delta_softplus=True, scan="raster",
        ).permute(0, 2, 3, 1)  # fmt: skip


class Block(nn.Module):
    """A cross scan and an MLP, each normed and added to the residual stream."""

    def __init__(self, width: int, **options: object) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.scan = CrossScan(width, **options)  # type: ignore[arg-type]
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Transform (b, h, w, d)."""
        x = x + self.scan(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Network(nn.Module):
    """Stages of blocks, each at half the resolution and twice the width of the one before.

    The sizes of VMamba-T are `in_channels=3, num_classes=1000, width=96, depths=(2, 2, 8, 2)`, on images of 224 px.
    """

    def __init__(
        self, in_channels: int, num_classes: int, width: int, depths: Sequence[int], patch: int = 4, **options: object
    ) -> None:
        super().__init__()
        widths = [width * 2**stage for stage in range(len(depths))]
        self.first = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(width, **options) for _ in range(depth)))
            for width, depth in zip(widths, depths, strict=True)
        )
        self.narrower = nn.ModuleList(nn.Conv2d(width, 2 * width, 2, stride=2) for width in widths[:-1])
        self.norm, self.head = nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Classify (b, c, h, w) images: (b, classes) logits."""
        x = self.first(images).permute(0, 2, 3, 1)
        for index, stage in enumerate(self.stages):
            if index:
                x = self.narrower[index - 1](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            x = stage(x)
        logits: Tensor = self.head(self.norm(x.mean(dim=(1, 2))))
        return logits


def main(num_images: int) -> list[float]:
    """Train on the built-in images, print how many labels were right, and return the loss of each step."""
    torch.manual_seed(0)
    network = Network(in_channels=1, num_classes=10, width=32, depths=(1, 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    losses, right, batch_size = [], [], 64
    steps = range(num_images // batch_size)
    for (images, labels), _ in zip(batches(load_builtin(), batch_size=batch_size, seed=0), steps, strict=False):
        logits = network(to_float(images))
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        right.append(float((logits.argmax(dim=1) == labels).float().mean()))
    last = right[-20:]
    print(f"right among the last {batch_size * len(last)} images, before training on them: {sum(last) / len(last):.1%}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=4000)
    main(parser.parse_args().num_images)
