"""The objectives against recorded numbers of the process they come from, and against what is known in closed form."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lamamba.diffusion import OBJECTIVES, Diffusion, FlowMatching, guide, schedule_arrays, training_losses
from lamamba.errors import ConfigError
from lamamba.pipeline import sample

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
    num_steps = int(steps.removeprefix("ddim"))
    scheduler = Diffusion().scheduler("ddim" if steps == "ddim20" else "ancestral", num_steps)
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


class KnownDenoiser:
    """What a perfectly trained network answers where every pixel of the data is drawn from N(MEAN, SPREAD^2)."""

    MEAN, SPREAD = 0.3, 0.5

    def __init__(self, objective: Diffusion | FlowMatching, timesteps: list[int] | None = None) -> None:
        self.config = SimpleNamespace(sample_size=48, in_channels=1, num_classes=0)
        self.null_label, self.device = 0, torch.device("cpu")
        self.objective = objective
        self.earlier = dict(itertools.pairwise(timesteps)) if timesteps else {}

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        time = t[0].double()
        if isinstance(self.objective, FlowMatching):
            signal, noise = 1 - time / 1000, time / 1000
        else:
            alpha_bar = schedule_arrays()["alpha_bar"][int(time)]
            signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        variance = (signal * self.SPREAD) ** 2 + noise**2
        excess = (x.double() - signal * self.MEAN) / variance
        expected_noise, expected_x_0 = noise * excess, self.MEAN + signal * self.SPREAD**2 * excess
        if isinstance(self.objective, FlowMatching):
            prediction, position = expected_noise - expected_x_0, torch.zeros_like(excess)
        else:
            prediction = expected_noise
            position = torch.full_like(excess, self.log_variance_position(int(time)))
        return torch.cat([prediction, position], dim=1).float()

    def log_variance_position(self, t: int) -> float:
        """Where, from -1 to 1, the log of the true variance of x_earlier given x_t lies between the two bounds."""
        alpha_bars = schedule_arrays()["alpha_bar"]
        if t not in self.earlier:
            return 0.0
        alpha_bar, earlier = float(alpha_bars[t]), float(alpha_bars[self.earlier[t]])
        beta = 1 - alpha_bar / earlier
        lower = beta * (1 - earlier) / (1 - alpha_bar)
        variance_of_x_0 = 1 / (1 / self.SPREAD**2 + alpha_bar / (1 - alpha_bar))
        true = lower + (math.sqrt(earlier) * beta / (1 - alpha_bar)) ** 2 * variance_of_x_0
        assert lower < true < beta
        return 2 * math.log(true / lower) / math.log(beta / lower) - 1


def deviation(sampler: str, num_steps: int) -> float:
    """How far a deterministic sampler's mean and spread are from the data's.

    With this denoiser the sampler is a straight line from noise to image, its offset the mean, its slope the spread.
    """
    objective = next(kind for kind in OBJECTIVES.values() if sampler in kind.samplers)
    denoiser = KnownDenoiser(objective)
    x = sample(denoiser, objective, [0], [5], sampler=sampler, num_steps=num_steps)  # type: ignore[arg-type]
    start = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(5)).double().flatten()
    line = torch.stack([start, torch.ones_like(start)], dim=1)
    coefficients = torch.linalg.lstsq(line, x.double().flatten()).solution
    torch.testing.assert_close(line @ coefficients, x.double().flatten(), atol=1e-4, rtol=0)
    spread, mean = coefficients.tolist()
    return max(abs(spread - denoiser.SPREAD), abs(mean - denoiser.MEAN))


@pytest.mark.parametrize(
    ("sampler", "few", "many", "limit"),
    [
        ("ddim", 20, 200, 0.01),
        ("ddim", 30, 600, 0.005),
        ("dpm++", 10, 100, 0.002),
        ("dpm++", 10, 1000, 0.002),
        ("unipc", 10, 100, 0.002),
        ("unipc", 10, 1000, 0.002),
        ("euler", 10, 100, 0.01),
        ("heun", 5, 50, 0.0005),
    ],
)
def test_samplers_reach_the_distribution_of_the_data(sampler: str, few: int, many: int, limit: float) -> None:
    errors = deviation(sampler, few), deviation(sampler, many)
    assert errors[1] < limit
    assert errors[1] < errors[0] / 5


@pytest.mark.parametrize("sampler", Diffusion.samplers)
def test_every_number_of_steps_goes_down_from_noise(sampler: str) -> None:
    for num_steps in range(1, 1001):
        timesteps = Diffusion().scheduler(sampler, num_steps).timesteps.tolist()
        assert len(timesteps) == num_steps
        assert timesteps == sorted(set(timesteps), reverse=True)
        published = sampler == "ddim" and num_steps >= 20
        assert timesteps[0] == (round(1000 - 1000 / num_steps) if published else 999), num_steps
        assert timesteps[-1] >= 0
        assert timesteps[-1] == 0 or num_steps == 1 or sampler in ("dpm++", "unipc")


@pytest.mark.parametrize("sampler", Diffusion.samplers)
def test_a_single_step_answers_the_mean_of_the_data(sampler: str) -> None:
    x = sample(KnownDenoiser(Diffusion()), Diffusion(), [0], [5], sampler=sampler, num_steps=1)  # type: ignore[arg-type]
    # What noise alone says of an image is next to nothing, so the best guess is the same for all.
    torch.testing.assert_close(x, torch.full_like(x, KnownDenoiser.MEAN), atol=0.01, rtol=0)


def test_ancestral_sampling_follows_the_learned_variance() -> None:
    scheduler = Diffusion().scheduler("ancestral", 12)
    learned = KnownDenoiser(Diffusion(), scheduler.timesteps.tolist())
    ignorant = KnownDenoiser(Diffusion())  # claims the middle of the bounds throughout
    x, wrong = (
        sample(denoiser, Diffusion(), [0] * 8, list(range(8)), sampler="ancestral", num_steps=12)  # type: ignore[arg-type]
        for denoiser in (learned, ignorant)
    )
    # 18,432 values know the spread to 0.5 % and the mean to 0.004.
    assert float(x.mean()) == pytest.approx(learned.MEAN, abs=0.015)
    assert float(x.std()) == pytest.approx(learned.SPREAD, rel=0.02)
    assert abs(float(wrong.std()) / learned.SPREAD - 1) > 0.04


@pytest.mark.parametrize(
    ("objective", "sampler", "mend"),
    [("diffusion", "heun", "use ancestral or ddim or dpm++ or unipc"), ("flow", "ddim", "use euler or heun")],
)
def test_a_sampler_of_the_other_objective_is_refused(objective: str, sampler: str, mend: str) -> None:
    with pytest.raises(ConfigError) as error:
        OBJECTIVES[objective].scheduler(sampler, 25)
    assert repr(sampler) in str(error.value)
    assert repr(objective) in str(error.value)
    assert str(error.value).endswith(mend)


def test_dropped_labels_become_the_null_label() -> None:
    seen: list[Tensor] = []

    def denoiser(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(y)
        return torch.cat([x, x], dim=1)

    x_0, y = torch.zeros(2000, 1, 2, 2), torch.full((2000,), 3)
    for label_dropout in (0.0, 0.25):
        training_losses(
            Diffusion(), denoiser, x_0, y, null_label=9, label_dropout=label_dropout, generator=torch.Generator()
        )
    assert bool((seen[0] == 3).all())
    assert set(seen[1].tolist()) == {3, 9}
    assert float((seen[1] == 9).float().mean()) == pytest.approx(0.25, abs=0.04)


def test_guidance_moves_the_prediction_alone() -> None:
    def denoiser(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y, 10 * y], dim=1)[:, :, None, None].float()

    x, t, y = torch.zeros(2, 1, 1, 1), torch.tensor([100, 900]), torch.tensor([1, 2])
    assert guide(denoiser, 3.0, null_label=5)(x, t, y).flatten().tolist() == [5 - 3 * 4, 10, 5 - 3 * 3, 20]
    assert guide(denoiser, 1.0, null_label=5)(x, t, y).flatten().tolist() == [1, 10, 2, 20]
    within = guide(denoiser, 3.0, null_label=5, interval=(0.0, 1.0), sigma=Diffusion().sigma)
    assert within(x, t, y).flatten().tolist() == [5 - 3 * 4, 10, 2, 20], "the second image is too noisy to guide"
    with pytest.raises(ConfigError, match="needs sigma"):
        guide(denoiser, 3.0, null_label=5, interval=(0.0, 1.0))


@pytest.mark.parametrize("objective", list(OBJECTIVES.values()), ids=list(OBJECTIVES))
def test_noise_level_is_noise_over_signal(objective: Diffusion | FlowMatching) -> None:
    t = torch.tensor([1, 500, 990])
    one, zero = torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    signal, noise = objective.noise_image(one, t, zero), objective.noise_image(zero, t, one)
    assert_close(objective.sigma(t), (noise / signal).flatten())
