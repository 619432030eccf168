"""Schedulers of diffusers can be swapped, and those that cannot work are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_pipeline import build, latents_of

from lamamba.errors import ConfigError

OTHERS = [
    "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler",
    "KDPM2DiscreteScheduler", "DPMSolverSinglestepScheduler",
]  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_schedulers_of_diffusers_can_be_swapped(name: str) -> None:
    """All solve the same equation: of a network that knows the noise of a single image, all make that image."""
    pipe = build()
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    target = torch.linspace(-0.8, 0.8, 64).reshape(1, 1, 8, 8)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()

    def forward(x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        place = t.float().clamp(0, 999)
        below = place.long()
        level = torch.lerp(alpha_bar[below], alpha_bar[(below + 1).clamp(max=999)], place - below)[:, None, None, None]
        noise = (x_t - level.sqrt() * target) / (1 - level).sqrt()
        return torch.cat([noise, torch.zeros_like(noise)], dim=1)

    pipe.network.forward = forward
    out = latents_of(pipe, ["Coat", "Bag"], 30, guidance_scale=1.0)
    assert (out - target).abs().max() < 0.05


@pytest.mark.parametrize(
    ("objective", "make", "said"),
    [
        ("diffusion", lambda: diffusers.FlowMatchEulerDiscreteScheduler(), "is for flow matching, and this network"),
        ("diffusion", lambda: diffusers.DDIMScheduler(prediction_type="v_prediction", beta_schedule="linear"),
         "takes v_prediction, and this network predicts noise"),
        ("diffusion", lambda: diffusers.DDIMScheduler(beta_schedule="scaled_linear"),
         "other noise levels than the network was trained with (beta_schedule scaled_linear): make it with"),
        ("flow", lambda: diffusers.UniPCMultistepScheduler(use_flow_sigmas=True), "takes epsilon, and this network"),
        ("flow", lambda: diffusers.DDIMScheduler(), "is not for flow matching, which this network was trained with"),
    ],
)  # fmt: skip
def test_a_scheduler_that_cannot_work_is_refused(objective: str, make: Callable[[], Any], said: str) -> None:
    pipe = build(objective)
    pipe.scheduler = make()
    with pytest.raises(ConfigError) as error:
        pipe("Coat", 4)
    assert said in str(error.value)


def test_a_scheduler_that_clips_is_for_pixels(tmp_path: Path) -> None:
    pipe = build()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)  # which clips by default
    assert latents_of(pipe, "Coat").abs().max() <= 1 + 1e-5
    latent = build(in_channels=4)
    assert latents_of(latent, "Coat").abs().max() > 1
    latent.scheduler = pipe.scheduler
    with pytest.raises(ConfigError, match=r"clips to -1 to 1.*from_config\(.*clip_sample=False"):
        latent("Coat", 4, output_type="latent")
    latent.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, thresholding=False)
    assert latents_of(latent, "Coat").abs().max() > 1
    for name in ("UniPCMultistepScheduler", "EulerDiscreteScheduler"):  # keep what they do not know, and do not clip
        diffusers.DDIMScheduler.from_config(latent.scheduler.config, clip_sample=True).save_pretrained(tmp_path)
        latent.scheduler = getattr(diffusers, name).from_pretrained(tmp_path)
        assert latent.scheduler.config["clip_sample"]
        assert latents_of(latent, "Coat").abs().max() > 1


def test_flow_schedulers_can_be_swapped() -> None:
    pipe = build("flow")
    own = latents_of(pipe, "Coat", 40, guidance_scale=1.0)
    for name, steps in (("FlowMatchEulerDiscreteScheduler", 100), ("FlowMatchHeunDiscreteScheduler", 20)):
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        assert (latents_of(pipe, "Coat", steps, guidance_scale=1.0) - own).norm() < 0.05 * own.norm()
    # A configuration keeps what a class does not know, which makes no scheduler one for a flow.
    pipe.scheduler = diffusers.DDIMScheduler.from_config(build("flow").scheduler.config)
    with pytest.raises(ConfigError, match="is not for flow matching"):
        pipe("Coat")
