"""Add an objective in one file: v-prediction (Salimans & Ho 2022, arXiv 2202.00512).

    python examples/objective.py runs/v                        # trains a small network on the built-in images
    python examples/objective.py runs/v --num-images 200000    # longer

An objective is a class with the members of `lamamba.diffusion.Objective`. Once it is in `OBJECTIVES` under its name,
training, checkpoints, samplers, guidance and the pipeline can use it. Here the network predicts

    v = signal noise - noise_share x_0,        x_t = signal x_0 + noise_share noise

with the noise schedule of `lamamba.Diffusion`.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lamamba
from lamamba.diffusion import NUM_TIMESTEPS, OBJECTIVES, Predict
from lamamba.sampling import make_grid

DIFFUSION = lamamba.Diffusion()


class VPrediction:
    """Predict v on the first c channels; the other channels are not trained."""

    name = "v"
    # In diffusers' terms. Samplers are made from these options, and schedulers of users are checked against them.
    scheduler_options = {**DIFFUSION.scheduler_options, "prediction_type": "v_prediction"}  # noqa: RUF012
    samplers = ("ddim", "dpm++", "sde-dpm++", "unipc")
    default_sampler = "dpm++"

    def draw_timesteps(self, batch: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Draw (b,) integer timesteps, uniform over 0 to 999."""
        return torch.randint(NUM_TIMESTEPS, (batch,), device=device, generator=generator)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the shares of the clean image and of noise in x_t; their squares add up to 1."""
        return DIFFUSION.levels(t)

    def sigma(self, t: Tensor) -> Tensor:
        """Compute noise over signal."""
        return DIFFUSION.sigma(t)

    def predict_x_0(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Compute the clean image that v implies: signal x_t - noise_share v."""
        signal, noise_share = (level[:, None, None, None] for level in self.levels(t))
        return signal * x_t - noise_share * v

    def move_x_0(self, x_t: Tensor, t: Tensor, v: Tensor, x_0: Tensor) -> Tensor:
        """Change v so that it implies the clean image x_0 instead of its own."""
        _, noise_share = (level[:, None, None, None] for level in self.levels(t))
        return v + (self.predict_x_0(x_t, t, v) - x_0) / noise_share

    def min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """Weigh the error of v so that the error of x_0 has the weight min(SNR, gamma)."""
        signal, noise_share = self.levels(t)
        return torch.minimum(signal.square(), gamma * noise_share.square())

    def losses(self, denoiser: Predict, x_0: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Compute the squared error of v, (b,)."""
        signal, noise_share = (level[:, None, None, None] for level in self.levels(t))
        v = denoiser(signal * x_0 + noise_share * noise, t, y).to(x_0.dtype).chunk(2, dim=1)[0]
        mse = (signal * noise - noise_share * x_0 - v).square().flatten(1).mean(1)
        return {"loss": mse, "mse": mse}


OBJECTIVES[VPrediction.name] = VPrediction()


def main(out: Path, num_images: int = 20_000, **options: Any) -> None:
    """Train in a run folder, then sample an image of each class to samples.png in it."""
    config = lamamba.TrainConfig(
        out=out, objective=VPrediction.name, num_images=num_images, learning_rate=1e-3, **options
    )
    lamamba.train(config)
    network = lamamba.load_checkpoint(out).network
    x = lamamba.sample(network, VPrediction(), range(10), range(10), guidance_scale=2.0, clip_sample=True)
    make_grid(lamamba.to_uint8(x).numpy(), columns=10, scale=2).save(out / "samples.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num-images", type=int, default=20_000)
    arguments = parser.parse_args()
    main(arguments.out, arguments.num_images)
