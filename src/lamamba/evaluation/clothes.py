"""The shipped network for grey clothes: a small classifier of Fashion-MNIST, and its 64 features."""

import torch.nn.functional as F
from torch import Tensor, nn


class ClothesNetwork(nn.Module):
    """Grey uint8 (b, 1, 32, 32), or 28 x 28, padded with black -> features (b, 64), logits (b, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            *(nn.Conv2d(1, 32, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 96, 3, padding=1, bias=False), nn.BatchNorm2d(96), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Dropout(0.3)),
        )
        self.features = nn.Linear(96 * 16, 64)
        self.classes = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.float() / 127.5 - 1
        if x.shape[-1] == 28:
            x = F.pad(x, (2, 2, 2, 2), value=-1.0)
        features = self.features(self.stages(x))
        return features, self.classes(F.relu(features))
