"""The objectives against recorded numbers of the process they come from, and against what is known in closed form."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lamamba.diffusion import Diffusion, schedule_arrays

GOLDEN = load_file(Path(__file__).parent / "golden" / "golden_diffusion.safetensors")


def closed_form(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The denoiser that the recorded numbers were made with."""
    t, y = t.float()[:, None, None, None], y.float()[:, None, None, None]
    noise = 0.9 * x + 0.1 * torch.sin(3 * x + t / 1000 + 0.01 * y)
    return torch.cat([noise, 0.5 * torch.cos(2 * x - t / 1000)], dim=1)


def assert_close(value: Tensor, reference: Tensor, tolerance: float = 1e-5) -> None:
    error = (value.double() - reference.double()).norm() / reference.double().norm()
    assert float(error) < tolerance


def test_schedule_agrees() -> None:
    ours = schedule_arrays()
    assert_close(ours["beta"], GOLDEN["full.betas"], 1e-12)
    assert_close(ours["alpha_bar"], GOLDEN["full.alphas_cumprod"], 1e-12)
    assert_close(ours["posterior_variance"], GOLDEN["full.posterior_variance"], 1e-12)
    assert_close(ours["posterior_log_variance"], GOLDEN["full.posterior_log_variance_clipped"], 1e-12)


def test_loss_terms_agree() -> None:
    x_0, t, y, noise = (GOLDEN[f"train.{name}"] for name in ("x0", "t", "y", "noise"))
    assert 0 in t, "the recorded timesteps should reach the decoder's likelihood"
    assert_close(Diffusion().noise_image(x_0, t, noise), GOLDEN["train.x_t"])
    terms = Diffusion().losses(closed_form, x_0, t, y, noise)
    for name in ("mse", "vb", "loss"):
        for ours, recorded in zip(terms[name], GOLDEN[f"train.{name}"], strict=True):
            assert_close(ours, recorded)


@pytest.mark.parametrize("steps", ["25", "250", "ddim20"])
def test_samples_agree(steps: str) -> None:
    scheduler = Diffusion().scheduler("ddim" if steps == "ddim20" else "ancestral")
    scheduler.set_timesteps(int(steps.removeprefix("ddim")))
    assert sorted(scheduler.timesteps.tolist()) == sorted(GOLDEN[f"respace.{steps}.timesteps"].tolist())
    x, y, noises = (GOLDEN[f"sample.{steps}.{name}"] for name in ("x_T", "y", "noise"))
    for t, noise in zip(scheduler.timesteps, noises, strict=True):
        out = closed_form(x, t.expand(len(x)), y)
        if steps == "ddim20":
            x = scheduler.step(out.chunk(2, dim=1)[0], t, x, return_dict=False)[0]
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, n=noise, **__: n)
                x = scheduler.step(out, t, x, return_dict=False)[0]
    assert_close(x, GOLDEN[f"sample.{steps}.x_0"])
