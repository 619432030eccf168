"""Which sampler is best for flow matching? Compare samplers with many steps, for a known velocity.

python experiments/nano/flow.py CHECKPOINT --number 30 --steps 5 10 20 40
python experiments/nano/flow.py CHECKPOINT --distances --number 500 --steps 5 10 20 50

CHECKPOINT predicts noise; the record is of the nano that version 0.1.0 ships. It also defines a velocity: the straight
path is the diffusion process with another scale, x / (1 - s) = x_t / alpha where s / (1 - s) = sigma / alpha.
"""

import argparse
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor

from lamamba import FlowMatching, load_checkpoint, to_uint8
from lamamba.data import load_fashion_mnist
from lamamba.diffusion import NUM_TIMESTEPS, Diffusion
from lamamba.evaluation.features import open_features
from lamamba.evaluation.metrics import Gaussian, frechet_distance
from lamamba.sampling.schedulers import make_scheduler

LEVELS = Diffusion().sigma(torch.arange(NUM_TIMESTEPS)).double().log().numpy()  # log of noise over signal


class Velocity:
    """The velocity that a noise-prediction network implies; counts evaluations."""

    def __init__(self, network: Any) -> None:
        self.network, self.evaluations = network, 0

    def __call__(self, x: Tensor, s: float, y: Tensor) -> Tensor:
        self.evaluations += 1
        share = min(max(s, 1e-6), 1 - 1e-6)
        level = float(np.clip(np.log(share / (1 - share)), LEVELS[0], LEVELS[-1]))  # beyond, as at the end
        t = torch.full((len(x),), float(np.interp(level, LEVELS, np.arange(NUM_TIMESTEPS))))
        ratio = float(np.exp(level))
        alpha = (1 + ratio**2) ** -0.5
        x_t = x * (alpha * (1 + ratio))
        noise: Tensor = self.network(x_t, t, y).chunk(2, dim=1)[0]
        return noise - (x_t / alpha - ratio * noise)


def schedulers(num_steps: int) -> dict[str, Any]:
    """Build the package's samplers, diffusers' own ones, and one more. Heun gets half the steps, at equal cost."""
    half, plain = (num_steps + 1) // 2, {}
    for name, kind, steps in (
        ("euler, diffusers'", FlowMatchEulerDiscreteScheduler, num_steps),
        ("heun, diffusers'", FlowMatchHeunDiscreteScheduler, half),
    ):
        plain[name] = kind()
        plain[name].set_timesteps(steps)
    multistep = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    multistep.set_timesteps(num_steps)
    own = {
        name: make_scheduler(FlowMatching(), name, half if name == "heun" else num_steps)
        for name in FlowMatching.samplers
    }
    return {**plain, "dpm++, diffusers'": multistep, **own}


@torch.inference_mode()
def draw(velocity: Velocity, scheduler: Any, number: int, seed: int = 0) -> Tensor:
    """Sample (n, c, h, w), the classes in turn, from the same noise for all schedulers."""
    config = velocity.network.config
    shape = (number, config.in_channels, config.sample_size, config.sample_size)
    x, y = torch.randn(shape, generator=torch.Generator().manual_seed(seed)), torch.arange(number) % config.num_classes
    velocity.evaluations = 0
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, float(t) / NUM_TIMESTEPS, y), t, x, return_dict=False)[0]
    return x


def roughness(x: Tensor) -> float:
    """Return the mean squared difference of neighbors in a column, in levels of 0 to 255."""
    return float((x[:, :, 1:] - x[:, :, :-1]).square().mean()) * 127.5**2


def gaussian(images: Tensor) -> Gaussian:
    """Compute the statistics of the clothes features of uint8 images."""
    network = open_features("clothes", torch.device("cpu"))
    features = torch.cat([network(part).features for part in images.split(500)]).double()
    return Gaussian(features.mean(dim=0), features.T.cov())


def print_distances(velocity: Velocity, number: int, steps: list[int]) -> None:
    """Score the package's samplers with the distance of experiments/comparison."""
    reference = gaussian(torch.from_numpy(load_fashion_mnist("test").images))
    for num_steps in steps:
        for name in FlowMatching.samplers:
            parts = []
            for seed in range(number // 100):  # schedulers have state, so each hundred gets a new one
                scheduler = make_scheduler(FlowMatching(), name, num_steps)
                parts.append(to_uint8(draw(velocity, scheduler, 100, seed)))
            distance = frechet_distance(gaussian(torch.cat(parts)), reference)
            line = f"{num_steps:3} steps, {velocity.evaluations:3} evaluations, {name:6} distance {distance:6.2f}"
            print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--number", type=int, default=30, help="samples")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 40])
    parser.add_argument("--distances", action="store_true", help="to the test images, in place of errors")
    arguments = parser.parse_args()
    if arguments.distances and (arguments.number < 100 or arguments.number % 100):
        parser.error(f"--distances draws hundreds of samples: --number {arguments.number} is none")
    loaded = load_checkpoint(arguments.checkpoint)
    if loaded.info.objective != "diffusion":
        parser.error(f"{arguments.checkpoint} was trained with {loaded.info.objective}: give one that predicts noise")
    velocity = Velocity(loaded.network.eval())
    if arguments.distances:
        print_distances(velocity, arguments.number, arguments.steps)
        return
    exact = draw(velocity, make_scheduler(FlowMatching(), "unipc", 150), arguments.number)
    print(f"unipc of 150 steps: roughness {roughness(exact):.0f}", flush=True)
    for num_steps in arguments.steps:
        for name, scheduler in schedulers(num_steps).items():
            x = draw(velocity, scheduler, arguments.number)
            error = float((x - exact).square().mean().sqrt()) * 127.5
            print(
                f"{velocity.evaluations:3} evaluations, {name:18} error {error:5.2f} roughness {roughness(x):5.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
