"""Which timesteps are best for DPM-Solver++(2M)? Compare distances to the test images, for the same noise.

python experiments/nano/timesteps.py CHECKPOINT --number 400 power-1.5:100 linspace:20 karras:20 lu:20 power-1:20

CHECKPOINT predicts noise; the record is of the nano that version 0.1.0 ships, and of S.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from lamamba import load_checkpoint
from lamamba.data import load_fashion_mnist, to_uint8
from lamamba.evaluation.features import open_features
from lamamba.evaluation.metrics import Gaussian, compare_neighbours, frechet_distance

FLAGS = {"karras": "use_karras_sigmas", "lu": "use_lu_lambdas", "exponential": "use_exponential_sigmas"}
BATCH = 100


def scheduler(kind: str, num_steps: int) -> Any:
    """Build the scheduler with a flag or a spacing of diffusers, or `power-p` for timesteps 999 (1 - i/(n-1))^p."""
    options: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 0.02, "algorithm_type": "dpmsolver++"}
    if kind.startswith("power-"):
        left = np.arange(num_steps)[::-1]
        timesteps = np.maximum(np.round(999 * (left / max(1, num_steps - 1)) ** float(kind[6:])), left)  # all distinct
        built = DPMSolverMultistepScheduler(**options)
        built.set_timesteps(timesteps=timesteps.astype(int).tolist())
        return built
    options |= {FLAGS[kind]: True} if kind in FLAGS else {"timestep_spacing": kind}
    built = DPMSolverMultistepScheduler(**options)
    built.set_timesteps(num_steps)
    return built


@torch.inference_mode()
def draw(network: Any, kind: str, num_steps: int, number: int) -> Tensor:
    """Sample (n, c, h, w), the classes in turn. Image i has seed i."""
    config, parts = network.config, []
    shape = (config.in_channels, config.sample_size, config.sample_size)
    for seeds in torch.arange(number).split(BATCH):
        steps = scheduler(kind, num_steps)
        x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])
        for t in steps.timesteps:
            noise = network(x, t.expand(len(x)), seeds % config.num_classes).chunk(2, dim=1)[0]
            x = steps.step(noise, t, x, return_dict=False)[0]
        parts.append(x)
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("kinds", nargs="+", metavar="KIND:STEPS")
    parser.add_argument("--number", type=int, default=400, help="samples")
    arguments = parser.parse_args()
    loaded = load_checkpoint(arguments.checkpoint)
    if loaded.info.objective != "diffusion":
        parser.error(f"{arguments.checkpoint} was trained with {loaded.info.objective}: give one that predicts noise")
    network = loaded.network.float()
    extract = open_features("clothes", torch.device("cpu")).extract

    def features(images: Tensor) -> Tensor:
        return torch.cat([extract(part).features for part in images.split(500)]).detach().double()

    reference = features(torch.from_numpy(load_fashion_mnist("test").images))
    first = None
    for name in arguments.kinds:
        kind, _, num_steps = name.partition(":")
        begun = time.perf_counter()
        x = draw(network, kind, int(num_steps), arguments.number)
        seconds = time.perf_counter() - begun
        first = x if first is None else first
        ours = features(to_uint8(x))
        own = compare_neighbours(ours, reference)
        distance = frechet_distance(*(Gaussian(part.mean(dim=0), part.T.cov()) for part in (ours, reference)))
        rms = float((x - first).square().mean().sqrt())
        scores = f"{own.precision:.4f} {own.recall:.4f} {own.density:.3f}"
        print(f"{name} rms {rms:.4f} FD {distance:.3f} {scores} {seconds:.0f}s", flush=True)


if __name__ == "__main__":
    main()
