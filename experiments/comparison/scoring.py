"""Sample a trained network, and score the samples with the shipped clothes features."""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lamamba.captured import CapturedNetwork
from lamamba.data import to_uint8
from lamamba.diffusion import OBJECTIVES
from lamamba.evaluation.features import open_features
from lamamba.evaluation.metrics import Gaussian, Moments, compare_neighbours, frechet_distance
from lamamba.sampling import sample
from setting import Setting, rounded

# Second order, so that the error of the steps is far smaller than the differences between networks.
SAMPLERS = {"diffusion": "dpm++", "flow": "unipc"}


class InAutocast(nn.Module):
    """A network that computes in bf16 as in training, for a sampler in float32."""

    def __init__(self, network: Any, autocast: AbstractContextManager[Any]) -> None:
        super().__init__()
        self.network, self.autocast = network, autocast
        self.config, self.null_label, self.device = network.config, network.null_label, network.device

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with self.autocast:
            out: Tensor = self.network(x_t, t, y)
        return out.float()


@dataclass(frozen=True)
class Denoiser:
    """A network to sample from, and its objective."""

    network: InAutocast
    objective: str

    def draw(
        self,
        setting: Setting,
        number: int,
        guidance: float = 1.0,
        sampler: str | None = None,
        steps: int | None = None,
        clip_sample: bool = False,
    ) -> Tensor:
        """Sample uint8 images (n, c, h, w) on the device, the classes in turn. Image i has seed i.

        Raises:
            OutOfTimeError: there is not enough time.
        """
        sampler = sampler or SAMPLERS[self.objective]
        steps = steps or setting.scale.steps
        images, network = [], CapturedNetwork(self.network)  # recorded once for all batches
        for start in range(0, number, setting.scale.sample_batch_size):
            seeds = range(start, min(number, start + setting.scale.sample_batch_size))
            labels = [seed % self.network.config.num_classes for seed in seeds]
            x = sample(
                network, OBJECTIVES[self.objective], labels, list(seeds), sampler=sampler, num_steps=steps,
                guidance_scale=guidance, clip_sample=clip_sample, callback=setting.clock.check,
            )  # fmt: skip
            images.append(to_uint8(x))
        return torch.cat(images)

    def score(self, setting: Setting, number: int, **options: Any) -> dict[str, Any]:
        """Compare samples with the test images; options as for `draw`.

        Returns:
            The distance, precision, recall, density and coverage, and the seconds that sampling took.
        """
        options = {"sampler": SAMPLERS[self.objective], "steps": setting.scale.steps, **options}
        start = time.perf_counter()
        images = self.draw(setting, number, **options)
        seconds = time.perf_counter() - start
        return {**score(setting, images), "num_samples": number, **options, "sampling_s": rounded(seconds, 4)}


def score(setting: Setting, images: Tensor) -> dict[str, float]:
    """Compare uint8 images with the test images."""
    features, gaussian = extract(setting, images)
    reference, reference_gaussian = _reference(setting)
    neighbours = compare_neighbours(features, reference)
    scores = {"distance": frechet_distance(gaussian, reference_gaussian), **vars(neighbours)}
    return {name: rounded(value) for name, value in scores.items()}


def extract(setting: Setting, images: Tensor) -> tuple[Tensor, Gaussian]:
    """Return features, (n, 64) float64 on the device, and their statistics."""
    network = _features(setting.device)
    features = torch.cat([network(part.to(setting.device)).features for part in images.split(500)]).double()
    moments = Moments()
    moments.add(features)
    return features, moments.gaussian()


@lru_cache(maxsize=1)
def _features(device: torch.device) -> Any:
    return open_features("clothes", device)


_references: dict[int, tuple[Tensor, Gaussian]] = {}


def _reference(setting: Setting) -> tuple[Tensor, Gaussian]:
    """Extract the test images' features, once."""
    key = id(setting)
    if key not in _references:
        _references.clear()
        _references[key] = extract(setting, torch.from_numpy(setting.test_images.images))
    return _references[key]
