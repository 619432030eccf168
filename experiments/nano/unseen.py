"""Does a network predict better in its training images than in other images?

python experiments/nano/unseen.py --number 2000 20 100 200 400 600 800

Both get the same noise at each timestep. A much smaller loss on training images would indicate memorization.
"""

import argparse

import torch
from torch import Tensor

from lamamba import load_checkpoint
from lamamba.data import load_fashion_mnist, to_float
from lamamba.diffusion import OBJECTIVES, Objective
from lamamba.model import LaMambaDiff

BATCH = 100


@torch.inference_mode()
def losses(network: LaMambaDiff, objective: Objective, split: str, number: int, timestep: int) -> Tensor:
    """Return the mean squared error of the prediction in each of the first images, float64 (number,)."""
    source, each = load_fashion_mnist(split), []
    for first in range(0, number, BATCH):
        rows = slice(first, first + BATCH)
        x_0, y = to_float(torch.from_numpy(source.images[rows])), torch.from_numpy(source.labels[rows]).long()
        noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(first))
        t = torch.full((len(x_0),), timestep)
        each.append(objective.losses(network, x_0, t, y, noise)["mse"])
    return torch.cat(each).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("timesteps", type=int, nargs="+")
    parser.add_argument("--network", default="nano")
    parser.add_argument("--number", type=int, default=2000, help="images of each set, in hundreds")
    arguments = parser.parse_args()
    loaded = load_checkpoint(arguments.network)
    objective = OBJECTIVES[loaded.info.objective]
    for timestep in arguments.timesteps:
        known, unseen = (
            losses(loaded.network, objective, split, arguments.number, timestep) for split in ("train", "test")
        )
        ratio = float(unseen.mean() / known.mean())
        error = ratio * sum(float(x.var() / len(x) / x.mean() ** 2) for x in (known, unseen)) ** 0.5
        sigma = float(objective.sigma(torch.tensor([timestep])))
        print(
            f"t {timestep:3}, noise {sigma:6.3g} of signal   loss of trained on {known.mean():.4g}, "
            f"of others {unseen.mean():.4g}   ratio {ratio:.3f} +- {error:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
