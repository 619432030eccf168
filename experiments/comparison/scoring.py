"""Sample a trained network, and score the samples."""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamamba.data import ArraySource, to_float, to_uint8
from lamamba.diffusion import OBJECTIVES
from lamamba.evaluation.features import open_features
from lamamba.evaluation.metrics import Gaussian, Moments, compare_neighbours, frechet_distance
from lamamba.sampling import sample
from lamamba.sampling.captured import CapturedNetwork
from setting import Setting, rounded


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
    """A network to sample from, its objective and its data."""

    network: InAutocast
    objective: str
    data: str

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
        sampler = sampler or OBJECTIVES[self.objective].default_sampler
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
            The scores, see `score`, and the seconds that sampling took.
        """
        options = {"sampler": OBJECTIVES[self.objective].default_sampler, "steps": setting.scale.steps, **options}
        start = time.perf_counter()
        images = self.draw(setting, number, **options)
        seconds = time.perf_counter() - start
        scores = score(setting, self.data, images)
        return {**scores, "num_samples": number, **options, "sampling_s": rounded(seconds, 4)}

    @torch.inference_mode()
    def losses(self, setting: Setting, source: ArraySource) -> dict[str, list[float]]:
        """Compare losses on training images with those on test images, which no training saw.

        Returns:
            For each of `loss_timesteps`, the mean loss of `num_loss_images` images of each set, with the same noise for
            both sets; and the same again with wrong labels, each of the next class.
        """
        objective, device = OBJECTIVES[self.objective], setting.device
        network = CapturedNetwork(self.network)
        found: dict[str, list[float]] = {}
        for name, images in (("training", source), ("test", setting.open_test_images(self.data))):
            x_0, y = spread(images, setting.scale.num_loss_images)
            for wrong in (False, True):
                rows = found.setdefault(f"{name}_with_wrong_labels" if wrong else name, [])
                labels = (y + wrong) % images.num_classes
                for timestep in setting.scale.loss_timesteps:
                    sums = []
                    for first in range(0, len(x_0) - _LOSS_BATCH + 1, _LOSS_BATCH) or (0,):
                        part = slice(first, first + _LOSS_BATCH)
                        clean = to_float(x_0[part].to(device))
                        generator = torch.Generator(device).manual_seed(first)
                        noise = torch.randn(clean.shape, device=device, generator=generator)
                        t = torch.full((len(clean),), timestep, device=device)
                        t = t.float() if objective.name.startswith("flow") else t
                        losses = objective.losses(network, clean, t, labels[part].to(device), noise)
                        sums.append(losses["mse"].mean())
                    rows.append(rounded(float(torch.stack(sums).mean())))
        return found


_LOSS_BATCH = 500
FEATURES = {"fashion-mnist": ("clothes", "squeezenet", "vgg16"), "cifar-10": ("squeezenet", "vgg16")}
"""The first one's scores stand at the top of a row. VGG16's were never used to choose anything."""


def spread(source: ArraySource, number: int) -> tuple[Tensor, Tensor]:
    """Return images and labels at equal distances in the source, whose classes may stand one after the other."""
    rows = torch.linspace(0, len(source) - 1, min(number, len(source))).long().numpy()
    return torch.from_numpy(source.images[rows]), torch.from_numpy(source.labels[rows])


def score(setting: Setting, data: str, images: Tensor) -> dict[str, Any]:
    """Compare uint8 images with the test images.

    Returns:
        `distance`, its part `distance_of_means`, precision, recall, density and coverage; the same with every further
        feature network under its name; and the distance of images that are averaged over 8x8 pixels.
    """
    names = [name for name in FEATURES[data] if name == "clothes" or setting.features]
    rows: dict[str, Any] = {}
    for name in names:
        features, gaussian = extract(setting, name, images)
        reference, reference_gaussian = _reference(setting, data, name)
        neighbours = compare_neighbours(features, reference)
        means = float((gaussian.mean - reference_gaussian.mean).square().sum())
        distance = frechet_distance(gaussian, reference_gaussian)
        scores = {"distance": distance, "distance_of_means": means, **vars(neighbours)}
        rows[name] = {key: rounded(value) for key, value in scores.items()}
    means_of_pixels = _low_frequencies(images.to(setting.device))
    reference_means = _low_frequencies(torch.from_numpy(setting.open_test_images(data).images).to(setting.device))
    rows["average-4x4"] = {"distance": rounded(frechet_distance(means_of_pixels, reference_means))}
    return {**rows.pop(names[0]), **rows}


def _low_frequencies(images: Tensor) -> Gaussian:
    """Average uint8 images over squares, to 4x4 values from -1 to 1 per channel."""
    moments = Moments()
    moments.add(F.adaptive_avg_pool2d(to_float(images), 4).flatten(1).double())
    return moments.gaussian()


def extract(setting: Setting, name: str, images: Tensor) -> tuple[Tensor, Gaussian]:
    """Return features, (n, d) float64 on the device, and their statistics."""
    network = _features(name, setting.features, setting.device)
    features = torch.cat([network(part.to(setting.device)).features for part in images.split(500)]).double()
    moments = Moments()
    moments.add(features)
    return features, moments.gaussian()


@lru_cache(maxsize=4)
def _features(name: str, folder: Path | None, device: torch.device) -> Any:
    return open_features(name if name == "clothes" else f"{folder}/{name}.pt", device)


_references: dict[tuple[int, str, str], tuple[Tensor, Gaussian]] = {}


def _reference(setting: Setting, data: str, name: str) -> tuple[Tensor, Gaussian]:
    """Extract the test images' features, once."""
    key = id(setting), data, name
    if key not in _references:
        _references[key] = extract(setting, name, torch.from_numpy(setting.open_test_images(data).images))
    return _references[key]
