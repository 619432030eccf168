"""Add an objective in one file: prediction of the clean image (Salimans & Ho 2022, arXiv 2202.00512, section 4).

    python examples/objective.py runs/x                        # trains a small network on the built-in images
    python examples/objective.py runs/x --num-images 200000    # longer

An objective is a class with the members of `lamamba.diffusion.Objective`. Once it is in `OBJECTIVES` under its name,
training, checkpoints, samplers, guidance and the pipeline can use it. Here the network predicts x_0 of

    x_t = signal x_0 + noise_share noise

with the noise schedule of `lamamba.Diffusion`. Its squared error has the weight max(signal^2 / noise_share^2, 1). Noise
prediction is the same without the 1, so at high noise its weight vanishes.
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


class XPrediction:
    """Predict x_0 on the first c channels; the other channels are not trained."""

    name = "x"
    # In diffusers' terms. Samplers are made from these options, and schedulers of users are checked against them.
    scheduler_options = {**DIFFUSION.scheduler_options, "prediction_type": "sample"}  # noqa: RUF012
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

    def predict_x_0(self, x_t: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Return the prediction, which is the clean image."""
        return x

    def move_x_0(self, x_t: Tensor, t: Tensor, x: Tensor, x_0: Tensor) -> Tensor:
        """Return x_0, which is the prediction that implies it."""
        return x_0

    def min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """Weight `mse` so that the error of x_0 has the weight min(SNR, gamma)."""
        snr = self.sigma(t) ** -2
        return snr.clamp(max=gamma) / snr.clamp(min=1)

    def losses(self, denoiser: Predict, x_0: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Compute the weighted squared error of x_0, (b,)."""
        signal, noise_share = (level[:, None, None, None] for level in self.levels(t))
        x = denoiser(signal * x_0 + noise_share * noise, t, y).to(x_0.dtype).chunk(2, dim=1)[0]
        mse = (x_0 - x).square().flatten(1).mean(1) * (self.sigma(t) ** -2).clamp(min=1)
        return {"loss": mse, "mse": mse}


OBJECTIVES[XPrediction.name] = XPrediction()


def main(out: Path, num_images: int = 20_000, **options: Any) -> None:
    """Train in a run folder, then sample an image of each class to samples.png in it."""
    config = lamamba.TrainConfig(
        out=out, objective=XPrediction.name, num_images=num_images, learning_rate=1e-3, **options
    )
    lamamba.train(config)
    network = lamamba.load_checkpoint(out).network
    x = lamamba.sample(network, XPrediction(), range(10), range(10), guidance_scale=2.0, clip_sample=True)
    make_grid(lamamba.to_uint8(x).numpy(), columns=10).save(out / "samples.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num-images", type=int, default=20_000)
    arguments = parser.parse_args()
    main(arguments.out, arguments.num_images)
