"""How much of the samples' distance comes from predictions at high noise?

python experiments/nano/high_noise.py CHECKPOINT --number 1000 inf 20 5 1.5

CHECKPOINT predicts noise in clothes; the record is of the nano that version 0.1.0 ships.
The best prediction is known: the mean of the class's training images, each weighted by how well it explains the noisy
image. Above a noise-to-signal ratio, where this is not a single image, it replaces the network's prediction.
"""

import argparse

import torch
from torch import Tensor

from flow import gaussian
from lamamba import Diffusion, load_checkpoint, to_uint8
from lamamba.data import load_fashion_mnist, to_float
from lamamba.evaluation.metrics import frechet_distance
from lamamba.model import LaMambaDiff
from lamamba.sampling.schedulers import make_scheduler

BATCH = 100


class Best:
    """The prediction with the smallest squared error, for images like those in training."""

    def __init__(self) -> None:
        source = load_fashion_mnist("train")
        images, labels = to_float(torch.from_numpy(source.images)).flatten(1), torch.from_numpy(source.labels)
        self.of_class = [images[labels == label] for label in range(source.num_classes)]

    def __call__(self, noisy: Tensor, sigma: float, y: Tensor) -> Tensor:
        """Predict clean images (b, c, h, w) from images with noise of this standard deviation."""
        clean = torch.empty_like(noisy)
        for label, images in enumerate(self.of_class):
            own = y == label
            nearness = noisy[own].flatten(1) @ images.T - images.square().sum(1) / 2
            clean[own] = ((nearness / sigma**2).softmax(1) @ images).view_as(clean[own])
        return clean


@torch.inference_mode()
def draw(network: LaMambaDiff, best: Best, threshold: float, seed: int) -> tuple[Tensor, int]:
    """Sample uint8 images with 25 steps of DPM-Solver++; also return in how many steps the network was used."""
    objective, y, asked = Diffusion(), torch.arange(BATCH) % network.config.num_classes, 0
    scheduler = make_scheduler(objective, "dpm++", 25)
    x = torch.randn((BATCH, 1, 32, 32), generator=torch.Generator().manual_seed(seed))
    for step in scheduler.timesteps:
        t = torch.full((BATCH,), float(step))
        sigma = float(objective.sigma(t[:1]))
        noisy = x * (1 + sigma**2) ** 0.5
        if sigma > threshold:
            noise = (noisy - best(noisy, sigma, y)) / sigma
        else:
            noise = network(x, t, y)[:, :1]
            asked += 1
        x = scheduler.step(noise, step, x, return_dict=False)[0]
    return to_uint8(x), asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("thresholds", type=float, nargs="+", help="noise over signal, up to which the network predicts")
    parser.add_argument("--number", type=int, default=1000, help="samples, in hundreds")
    arguments = parser.parse_args()
    loaded, best = load_checkpoint(arguments.checkpoint), Best()
    if loaded.info.objective != "diffusion":
        parser.error(f"{arguments.checkpoint} was trained with {loaded.info.objective}: give one that predicts noise")
    reference = gaussian(torch.from_numpy(load_fashion_mnist("test").images))
    real = torch.from_numpy(load_fashion_mnist("train").images[: arguments.number])
    print(f"as many training images   distance {frechet_distance(gaussian(real), reference):.2f}", flush=True)
    for threshold in arguments.thresholds:
        parts = [draw(loaded.network, best, threshold, seed) for seed in range(arguments.number // BATCH)]
        distance = frechet_distance(gaussian(torch.cat([images for images, _ in parts])), reference)
        print(f"network up to {threshold:4g}, in {parts[0][1]:2} steps   distance {distance:.2f}", flush=True)


if __name__ == "__main__":
    main()
