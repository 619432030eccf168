"""Small TorchScript files in the place of large ones."""

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 9, 1)
        self.other = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x).relu(), self.other(x).relu()], dim=1)


class TinyInception(nn.Module):
    """What the standard graph's file is, without its weights: names of layers, options, scaling."""

    def __init__(self, side: int = 17) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        self.layers.add_module("conv", nn.Conv2d(3, 8, 11, stride=288 // (side - 1)))  # 299 -> side
        self.layers.add_module("mixed_6", Mixed())
        self.layers.add_module("pool2", nn.AvgPool2d(side))
        self.output = nn.Linear(12, 5)

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        height, width = img.shape[2], img.shape[3]
        rows = torch.arange(299, dtype=torch.float32) * height / 299
        columns = torch.arange(299, dtype=torch.float32) * width / 299
        grid_rows = (2 * rows + 1) / height - 1
        grid_columns = (2 * columns + 1) / width - 1
        grid = torch.stack([grid_columns.expand(299, 299), grid_rows[:, None].expand(299, 299)], dim=-1)
        grid = grid.expand(img.shape[0], 299, 299, 2)
        x = F.grid_sample(img.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        features = self.layers((x - 128) / 128).flatten(1)
        if return_features:
            return features
        bias = None if no_output_bias else self.output.bias
        return F.linear(features, self.output.weight, bias).softmax(dim=1)


class Means(nn.Module):
    """(b, 3, h, w) -> the means of channels and of rows (b, 4)."""

    def forward(self, images: Tensor) -> Tensor:
        x = images.float()
        return torch.cat([x.mean(dim=(2, 3)), x[:, 0, 0].mean(dim=1, keepdim=True)], dim=1)


class FloatMeans(Means):
    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.float32, "takes floats"
        return images.mean(dim=(2, 3))


class Flat(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float()


class NotANumber(nn.Module):
    """Fails on images that are black."""

    def forward(self, images: Tensor) -> Tensor:
        x = images.float().mean(dim=(2, 3))
        return x / x.max(dim=1, keepdim=True).values


def save(network: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that writing TorchScript will not be supported for ever; reading goes on
        torch.jit.script(network.eval()).save(path)
    return path


def save_tiny_inception(path: Path, side: int = 17) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return save(TinyInception(side), path)
