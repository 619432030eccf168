"""The objectives against recorded numbers of the process they come from, and against what is known in closed form."""

import math
from itertools import pairwise
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from known_data import GAUSSIAN, TWO_HILLS, KnownDenoiser, Mixture, levels, mixture
from lamamba.config import GuidanceOptions
from lamamba.diffusion import (
    OBJECTIVES,
    Diffusion,
    FlowMatching,
    VPrediction,
    XPredictionFlow,
    schedule_arrays,
    training_losses,
)
from lamamba.errors import ConfigError
from lamamba.sampling import sample
from lamamba.sampling.guidance import guide
from lamamba.sampling.schedulers import make_scheduler, set_timesteps

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
    scheduler = make_scheduler(Diffusion(), "ddim" if steps == "ddim20" else "ancestral", num_steps)
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


def deviation(objective: Diffusion | FlowMatching, sampler: str, num_steps: int) -> float:
    """How far a deterministic sampler's mean and spread are from the data's.

    With this denoiser the sampler is a straight line from noise to image, its offset the mean, its slope the spread.
    """
    denoiser = KnownDenoiser(objective)
    x = sample(denoiser, objective, [0], [5], sampler=sampler, num_steps=num_steps)  # type: ignore[arg-type]
    start = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(5)).double().flatten()
    line = torch.stack([start, torch.ones_like(start)], dim=1)
    coefficients = torch.linalg.lstsq(line, x.double().flatten()).solution
    torch.testing.assert_close(line @ coefficients, x.double().flatten(), atol=1e-4, rtol=0)
    spread, mean = coefficients.tolist()
    return max(abs(spread - GAUSSIAN.spread), abs(mean - GAUSSIAN.mean))


@pytest.mark.parametrize(
    ("objective", "sampler", "few", "many", "limit"),
    [
        ("diffusion", "ddim", 20, 200, 0.01),
        ("diffusion", "ddim", 30, 600, 0.005),
        ("diffusion", "ddim-cosine", 16, 128, 0.01),
        ("diffusion-v-zero-snr", "ddim-cosine", 16, 128, 0.01),
        ("diffusion", "dpm++", 10, 100, 0.002),
        ("diffusion", "dpm++", 10, 1000, 0.002),
        ("diffusion", "unipc", 10, 100, 0.002),
        ("diffusion", "unipc", 10, 1000, 0.002),
        ("diffusion-v", "dpm++", 10, 100, 0.002),
        ("diffusion-v-zero-snr", "ddim", 20, 200, 0.01),
        ("diffusion-v-zero-snr", "dpm++", 20, 400, 0.002),
        ("diffusion-v-zero-snr", "unipc", 20, 400, 0.002),
        ("flow", "unipc", 10, 100, 0.002),
        ("flow", "euler", 10, 100, 0.01),
        ("flow", "heun", 5, 50, 0.0005),
        ("flow-x", "unipc", 10, 100, 0.002),
        ("flow-x", "euler", 10, 100, 0.01),
        ("flow-x", "heun", 5, 50, 0.0005),
    ],
)
def test_samplers_reach_the_distribution_of_the_data(
    objective: str, sampler: str, few: int, many: int, limit: float
) -> None:
    errors = deviation(OBJECTIVES[objective], sampler, few), deviation(OBJECTIVES[objective], sampler, many)
    assert errors[1] < limit
    assert errors[1] < errors[0] / 5


@pytest.mark.parametrize("sampler", Diffusion.samplers)
def test_any_number_of_steps_goes_down_from_noise(sampler: str) -> None:
    for num_steps in (*range(1, 101), *range(109, 1001, 9)):
        timesteps = make_scheduler(Diffusion(), sampler, num_steps).timesteps.tolist()
        assert len(timesteps) == num_steps
        apart = sampler in ("ancestral", "ddim") or num_steps < 79  # or the nearest to two levels can be the same
        assert timesteps == sorted(set(timesteps) if apart else timesteps, reverse=True)
        published = sampler == "ddim" and num_steps >= 20
        assert timesteps[0] == (round(1000 - 1000 / num_steps) if published else 999), num_steps
        assert timesteps[-1] == 0 or num_steps == 1 or sampler.endswith("cosine")


@pytest.mark.parametrize("objective", [Diffusion(), VPrediction(), VPrediction(True)], ids=lambda kind: kind.name)
@pytest.mark.parametrize("sampler", Diffusion.samplers)
def test_a_single_step_answers_the_mean_of_the_data(objective: Diffusion, sampler: str) -> None:
    x = sample(KnownDenoiser(objective), objective, [0], [5], sampler=sampler, num_steps=1)  # type: ignore[arg-type]
    # What noise alone says of an image is next to nothing, so the best guess is the same for all.
    torch.testing.assert_close(x, torch.full_like(x, GAUSSIAN.mean), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("objective", "sampler", "order", "steps"),
    [
        (Diffusion(), "ddim", 1, (24, 32, 48, 64, 96)),
        (Diffusion(), "ddim-cosine", 1, (8, 16, 32, 64)),
        # From a hundred steps on, what counts is the last one, which is of first order and always goes to no noise.
        (Diffusion(), "dpm++", 2, (24, 32, 48, 64, 96)),
        (Diffusion(), "unipc", 3, (32, 48, 64)),
        (FlowMatching(), "unipc", 2, (8, 16, 32, 64)),
        (FlowMatching(), "euler", 1, (8, 16, 32, 64)),
        (FlowMatching(), "heun", 2, (8, 16, 32, 64)),
    ],
)
def test_samplers_converge_with_their_order(
    objective: Diffusion | FlowMatching, sampler: str, order: int, steps: tuple[int, ...]
) -> None:
    errors = []
    for num_steps in steps:
        x = sample(KnownDenoiser(objective, TWO_HILLS), objective, [0], [5], sampler=sampler, num_steps=num_steps)  # type: ignore[arg-type]
        start = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(5)).double()
        first = float(make_scheduler(objective, sampler, num_steps).timesteps[0])
        exact = TWO_HILLS.destination(start, *levels(objective, first))
        errors.append(float((x[0].double() - exact).square().mean().sqrt()))
    slope, _ = np.polyfit(np.log(steps), np.log(errors), 1)
    assert -slope == pytest.approx(order, abs=0.3)
    assert errors[-1] < (0.02 if order == 1 else 0.002)


def draw(denoiser: KnownDenoiser, sampler: str, num_steps: int) -> Tensor:
    """36,864 values, which know a mean to half a percent of the spread and the spread to 0.4 %."""
    return sample(denoiser, denoiser.objective, [0] * 16, list(range(16)), sampler=sampler, num_steps=num_steps)  # type: ignore[arg-type]


@pytest.mark.parametrize(("data", "num_steps"), [(GAUSSIAN, 12), (TWO_HILLS, 40)], ids=["Gaussian", "two hills"])
def test_ancestral_sampling_follows_the_learned_variance(data: Mixture, num_steps: int) -> None:
    timesteps = make_scheduler(Diffusion(), "ancestral", num_steps).timesteps.tolist()
    learned = KnownDenoiser(Diffusion(), data, timesteps)
    ignorant = KnownDenoiser(Diffusion(), data)  # claims the middle of the bounds throughout
    x, wrong = draw(learned, "ancestral", num_steps), draw(ignorant, "ancestral", num_steps)
    assert float(x.mean()) == pytest.approx(data.mean, abs=0.02 * data.spread)
    assert float(x.std()) == pytest.approx(data.spread, rel=0.015)
    assert abs(float(wrong.std()) / data.spread - 1) > 0.03


@pytest.mark.parametrize("objective", [VPrediction(), VPrediction(zero_terminal_snr=True)], ids=lambda kind: kind.name)
@pytest.mark.parametrize(("sampler", "num_steps"), [("ancestral", 12), ("sde-dpm++", 200)])
def test_v_prediction_is_sampled_with_noise(objective: VPrediction, sampler: str, num_steps: int) -> None:
    timesteps = make_scheduler(objective, sampler, num_steps).timesteps.tolist() if sampler == "ancestral" else None
    x = draw(KnownDenoiser(objective, GAUSSIAN, timesteps), sampler, num_steps)
    assert float(x.mean()) == pytest.approx(GAUSSIAN.mean, abs=0.02 * GAUSSIAN.spread)
    assert float(x.std()) == pytest.approx(GAUSSIAN.spread, rel=0.015)


@pytest.mark.parametrize("data", [GAUSSIAN, TWO_HILLS], ids=["Gaussian", "two hills"])
@pytest.mark.parametrize(("sampler", "num_steps"), [("ancestral", 100), ("sde-dpm++", 200)])
def test_stochastic_samplers_reach_the_distribution_of_the_data(sampler: str, num_steps: int, data: Mixture) -> None:
    timesteps = make_scheduler(Diffusion(), sampler, num_steps).timesteps.tolist() if sampler == "ancestral" else None
    x = draw(KnownDenoiser(Diffusion(), data, timesteps), sampler, num_steps).double()
    assert float(x.mean()) == pytest.approx(data.mean, abs=0.02 * data.spread)
    assert float(x.std()) == pytest.approx(data.spread, rel=0.015)
    # The largest distance between two distribution functions (Kolmogorov-Smirnov); by chance it is about 0.005.
    ordered = x.flatten().sort().values
    reached = torch.arange(1, len(ordered) + 1) / len(ordered)
    assert float((data.below(ordered, 1, 0) - reached).abs().max()) < 0.01
    # Noise added on the way leaves little of the noise at the start, which alone decides where the others end.
    starts = [torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in range(len(x))]
    both = torch.stack([torch.stack(starts).double().flatten(), x.flatten()])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.2


@pytest.mark.parametrize(("objective", "sampler"), [
    (Diffusion(), "ancestral-cosine"), (VPrediction(True), "ancestral-cosine"), (FlowMatching(), "ancestral"),
])  # fmt: skip
def test_steps_of_students_reach_the_distribution_in_the_limit(
    objective: Diffusion | FlowMatching, sampler: str
) -> None:
    spreads = [float(draw(KnownDenoiser(objective), sampler, number).std()) for number in (4, 20, 200)]
    errors = [1 - spread / GAUSSIAN.spread for spread in spreads]
    assert errors[0] > 0.2
    assert abs(errors[2]) < errors[1] / 5 < errors[0] / 10, "an error of first order"


class ShortSighted(KnownDenoiser):
    """Knows the distribution, but takes no noise for greater than two, as networks do that have seldom seen more."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().__call__(x, t, y).clamp(-2, 2)


@pytest.mark.parametrize("num_steps", [1, 6])
@pytest.mark.parametrize(
    "name", ["UniPCMultistep", "DPMSolverMultistep", "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"]
)
def test_a_scheduler_made_of_a_flows_own_goes_all_the_way(name: str, num_steps: int) -> None:
    kind = getattr(diffusers, f"{name}Scheduler")
    scheduler = kind.from_config(make_scheduler(FlowMatching(), "unipc", 25).config)
    set_timesteps(scheduler, num_steps)
    assert len(scheduler.timesteps) == (2 * num_steps - 1 if "Heun" in name else num_steps)
    assert float(scheduler.timesteps[0]) == pytest.approx(1000, abs=1.5)
    target, x = (torch.linspace(*ends, 7).view(1, 1, 7) for ends in ((-1, 1), (3, -2)))
    for t in scheduler.timesteps:
        x = scheduler.step((x - target) / (t / 1000), t, x, return_dict=False)[0]
    torch.testing.assert_close(x, target, atol=2e-3, rtol=0)


def test_a_scheduler_that_leaves_noise_in_a_flow_is_refused() -> None:
    own = make_scheduler(FlowMatching(), "unipc", 25).config
    for name, options in (("DEISMultistep", {}), ("UniPCMultistep", {"final_sigmas_type": "sigma_min"})):
        scheduler = getattr(diffusers, f"{name}Scheduler").from_config(own, **options)
        with pytest.raises(ConfigError, match="leaves noise in the images of a flow"):
            set_timesteps(scheduler, 10)


class Forgetful(KnownDenoiser):
    """Knows no noise below a tenth of the signal from the image, as networks do that cannot tell it from texture."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out = super().__call__(x, t, y)
        signal, noise = levels(self.objective, float(t[0]))
        return torch.cat([-x / signal, out[:, 1:]], dim=1) if noise < 0.1 * signal else out


@pytest.mark.parametrize("sampler", FlowMatching.samplers)
def test_a_flow_leaves_no_noise_where_it_cannot_be_seen(sampler: str) -> None:
    data = mixture([1.0], [0.3], [0.01])  # flat, so that all that is seen is what is left of the noise
    x = sample(Forgetful(FlowMatching(), data), FlowMatching(), [0], [3], sampler=sampler, num_steps=10)  # type: ignore[arg-type]
    assert float(x.std()) < 0.03


@pytest.mark.parametrize("sampler", Diffusion.samplers)
def test_clipping_leaves_no_specks(sampler: str) -> None:
    data = Mixture(torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([0.1]))
    plain, clipped = (
        sample(ShortSighted(Diffusion(), data), Diffusion(), [0], [3], sampler=sampler, clip_sample=clip)  # type: ignore[arg-type]
        for clip in (False, True)
    )
    assert plain.max() > 1.5
    assert clipped.abs().max() <= 1 + 1e-4
    # Where nothing was outside, nothing has changed.
    inside = (plain > 0.4) & (plain < 0.6)
    assert inside.float().mean() > 0.3
    torch.testing.assert_close(clipped[inside].median(), plain[inside].median(), atol=0.02, rtol=0)


@pytest.mark.parametrize(("objective", "sampler", "advice"), [
    ("diffusion", "heun", "use ancestral or ancestral-cosine or ddim or ddim-cosine or dpm++ or sde-dpm++ or unipc"),
    ("flow", "ddim", "use unipc or euler or heun or ancestral"),
])  # fmt: skip
def test_a_sampler_of_the_other_objective_is_refused(objective: str, sampler: str, advice: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_scheduler(OBJECTIVES[objective], sampler, 25)
    assert repr(sampler) in str(error.value)
    assert repr(objective) in str(error.value)
    assert str(error.value).endswith(advice)


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
    options = GuidanceOptions(interval=(0.0, 1.0))
    within = guide(denoiser, 3.0, 5, options, sigma=Diffusion().sigma)
    assert within(x, t, y).flatten().tolist() == [5 - 3 * 4, 10, 2, 20], "the second image is too noisy to guide"
    with pytest.raises(ConfigError, match="needs sigma"):
        guide(denoiser, 3.0, 5, options)


def test_the_scale_of_guidance_follows_a_cosine() -> None:
    def denoiser(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return y[:, None, None, None].float().expand(-1, 2, 1, 1)

    t = torch.tensor([1000, 750, 500, 250, 0])
    x, y = torch.zeros(5, 1, 1, 1), torch.ones(5, dtype=torch.long)

    def scales(cosine_power: float) -> list[float]:
        # From 0, without a label, to 1, with it: what comes out is the scale itself.
        guided = guide(denoiser, 3.0, 0, GuidanceOptions(cosine_power=cosine_power))
        return guided(x, t, y)[:, 0].flatten().tolist()

    assert scales(0.0) == [3.0] * 5
    root = math.sqrt(0.5)
    assert scales(1.0) == pytest.approx([1, 2 - root, 2, 2 + root, 3])
    assert scales(2.0) == pytest.approx([1, 2 - math.cos(math.pi / 16), 2 - root, 2 - math.cos(9 * math.pi / 16), 3])


@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
def test_rescaled_guidance_has_the_deviation_of_no_guidance(rescale: float) -> None:
    labelled, null = torch.randn(2, 2, 6, 4, 4, generator=torch.Generator().manual_seed(0))

    def denoiser(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([labelled, null])[: len(x)]

    x, t, y = torch.zeros(2, 3, 4, 4), torch.tensor([100, 900]), torch.tensor([1, 2])
    plain = guide(denoiser, 4.0, 5)(x, t, y)
    rescaled = guide(denoiser, 4.0, 5, GuidanceOptions(rescale=rescale))(x, t, y)
    assert torch.equal(rescaled[:, 3:], labelled[:, 3:])
    for after, before, unguided in zip(rescaled[:, :3], plain[:, :3], labelled[:, :3], strict=True):
        wanted = rescale * unguided.std() + (1 - rescale) * before.std()
        torch.testing.assert_close(after.std(), wanted)
        torch.testing.assert_close(after / after.std(), before / before.std())


def test_autoguidance_moves_away_from_the_weaker_denoiser_with_the_same_label() -> None:
    def denoiser(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y, 10 * y], dim=1)[:, :, None, None].float()

    def weaker(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return denoiser(x, t, y) + t[:, None, None, None]

    x, t, y = torch.zeros(2, 1, 1, 1), torch.tensor([100, 900]), torch.tensor([1, 2])
    assert guide(denoiser, 3.0, 5, weaker=weaker)(x, t, y).flatten().tolist() == [1 - 2 * 100, 10, 2 - 2 * 900, 20]
    assert guide(denoiser, 1.0, 5, weaker=weaker)(x, t, y).flatten().tolist() == [1, 10, 2, 20]


@pytest.mark.parametrize("objective", [Diffusion(), VPrediction(), FlowMatching(), XPredictionFlow()])
def test_a_true_prediction_implies_the_clean_image(objective: Diffusion | FlowMatching) -> None:
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn((2, 3, 1, 4, 4), generator=generator)
    t = torch.tensor([1, 400, 900])
    signal, noise_share = (level[:, None, None, None] for level in objective.levels(t))
    v = signal * noise - noise_share * x_0
    target = {"diffusion": noise, "diffusion-v": v, "flow": noise - x_0, "flow-x": x_0}[objective.name]
    assert torch.allclose(objective.predict_x_0(objective.noise_image(x_0, t, noise), t, target), x_0, atol=1e-4)


def test_v_prediction_follows_its_equations() -> None:
    """v = alpha noise - sigma x_0, and x_0 = alpha x_t - sigma v (arXiv 2202.00512, appendix D)."""
    kind = VPrediction()
    alpha_bar = GOLDEN["full.alphas_cumprod"]
    x_0, noise, other = torch.randn((3, 4, 1, 6, 6), generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([0, 300, 700, 999]), torch.zeros(4)
    alpha, sigma = (part.sqrt().float()[:, None, None, None] for part in (alpha_bar[t], 1 - alpha_bar[t]))
    x_t, v = alpha * x_0 + sigma * noise, alpha * noise - sigma * x_0
    zero = torch.zeros_like(v)
    losses = kind.losses(lambda x, *_: torch.cat([zero, zero], dim=1), x_0, t, y, noise)
    torch.testing.assert_close(losses["mse"], v.square().flatten(1).mean(1))
    torch.testing.assert_close(kind.predict_x_0(x_t, t, v), x_0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(kind.predict_x_0(x_t, t, kind.move_x_0(x_t, t, v, other)), other, atol=1e-3, rtol=1e-3)
    # The same clean image, predicted through the noise, has the same variational bound.
    wrong = v + 0.1
    as_noise = sigma * x_t + alpha * wrong
    by_v = kind.losses(lambda *_: torch.cat([wrong, zero + 0.3], dim=1), x_0, t, y, noise)
    by_noise = Diffusion().losses(lambda *_: torch.cat([as_noise, zero + 0.3], dim=1), x_0, t, y, noise)
    torch.testing.assert_close(by_v["vb"], by_noise["vb"], atol=1e-4, rtol=1e-2)
    snr = (alpha / sigma).square().flatten()
    error_of_x_0 = (kind.predict_x_0(x_t, t, wrong) - x_0).square().flatten(1).mean(1)
    weighted = kind.min_snr_weight(t, 5.0) * by_v["mse"]
    torch.testing.assert_close(weighted, snr.clamp(max=5.0) * error_of_x_0, atol=1e-5, rtol=1e-2)


def test_zero_terminal_snr_follows_its_algorithm() -> None:
    """Shift sqrt(alpha_bar) so that it ends at 0, and scale it so that it begins where it did (arXiv 2305.08891)."""
    plain, ours = GOLDEN["full.alphas_cumprod"].sqrt(), schedule_arrays(zero_terminal_snr=True)
    scaled = (plain - plain[-1]) * plain[0] / (plain[0] - plain[-1])
    assert_close(ours["sqrt_alpha_bar"], scaled, 1e-12)
    assert (float(ours["alpha_bar"][-1]), float(ours["beta"][-1])) == (0.0, 1.0)
    assert_close((1 - ours["beta"]).cumprod(0)[:-1], ours["alpha_bar"][:-1], 1e-9)
    theirs = diffusers.DDIMScheduler(beta_schedule="linear", beta_end=0.02, rescale_betas_zero_snr=True).alphas_cumprod
    assert_close(ours["alpha_bar"], theirs, 1e-5)
    kind = VPrediction(zero_terminal_snr=True)
    x_0, noise = torch.randn((2, 1, 1, 6, 6), generator=torch.Generator().manual_seed(0))
    last = torch.tensor([999])
    assert torch.equal(kind.noise_image(x_0, last, noise), noise)
    losses = kind.losses(lambda x, *_: torch.cat([-x_0, 0 * x_0], dim=1), x_0, last, last, noise)  # v is -x_0 there
    assert float(losses["mse"]) == 0
    assert all(bool(value.isfinite()) for value in losses.values())
    assert bool(kind.sigma(torch.arange(1000)).isfinite().all())


def test_x_prediction_follows_its_equation() -> None:
    """The loss is that of the velocity (z - x) / t, with t held at 0.05 or more (arXiv 2511.13720); here by hand."""
    x_0 = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])[:, None, :, None]
    x = torch.tensor([[1.5, 0.0], [0.0, 1.0], [-1.0, 0.01]])[:, None, :, None]
    t, zero = torch.tensor([500.0, 1000.0, 10.0]), torch.zeros(3)
    terms = XPredictionFlow().losses(lambda *_: torch.cat([x, x], dim=1), x_0, t, zero, torch.randn(3, 1, 2, 1))
    assert terms["loss"].tolist() == pytest.approx([0.25 / 2 / 0.5**2, 1 / 2, 1e-4 / 2 / 0.05**2], rel=1e-4)
    snr = ((1000 - t) / t).square()
    weight = XPredictionFlow().min_snr_weight(t, 5.0) / (t / 1000).clamp(min=0.05).square()  # of the error of x
    torch.testing.assert_close(weight, snr.clamp(max=5.0))


def test_contrastive_flow_matching_follows_its_equation() -> None:
    """The loss is ||v - u||^2 - 0.05 ||v - u'||^2, u' of another image (arXiv 2506.05350); here by hand, two values."""
    x_0 = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])[:, None, :, None]
    noise = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 1.0]])[:, None, :, None]  # u: (-1, 0), (3, -2), (1, 1)
    terms = FlowMatching(contrast=0.05).losses(
        lambda x_t, t, y: torch.zeros(3, 2, 2, 1), x_0, torch.tensor([100.0, 500.0, 900.0]), torch.zeros(3), noise
    )  # a velocity of 0 everywhere
    assert terms["mse"].tolist() == pytest.approx([0.5, 6.5, 1.0])
    assert terms["mse_other"].tolist() == pytest.approx([1.0, 0.5, 6.5])
    assert terms["loss"].tolist() == pytest.approx([0.5 - 0.05, 6.5 - 0.025, 1.0 - 0.325])


def test_the_contrastive_loss_has_the_minimum_that_the_docs_name() -> None:
    """Averaged over all other images, the best velocity for one image is (u - 0.05 mean) / 0.95."""
    u = torch.randn(200, 1, 2, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = torch.zeros(1, 2, 2, 1, dtype=torch.float64, requires_grad=True)
    objective, zero, t = FlowMatching(contrast=0.05), torch.zeros_like(u[:2]), torch.full((2,), 500.0)
    loss = sum(
        objective.losses(lambda *_: v.expand(2, 2, 2, 1), zero, t, t, torch.stack([other, u[0]]))["loss"][1]
        for other in u
    )
    assert isinstance(loss, Tensor)
    gradient = torch.autograd.grad(loss, v, create_graph=True)[0]
    curvature = torch.autograd.grad(gradient[0, 0, 0, 0], v)[0][0, 0, 0, 0]
    best = -(gradient / curvature)[:, :1]  # the loss is a parabola, and v was 0
    torch.testing.assert_close(best[0].detach(), (u[0] - 0.05 * u.mean(0)) / 0.95)


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (0.8, 0.8)])
def test_logit_normal_timesteps_follow_their_density(mean: float, spread: float) -> None:
    """t/1000 has the density exp(-(logit(t) - m)^2 / 2s^2) / (s sqrt(2 pi) t (1 - t)) (arXiv 2403.03206, sec. 3.1)."""
    kind = FlowMatching("logit-normal", logits=(mean, spread))
    t = kind.draw_timesteps(200_000, torch.device("cpu"), torch.Generator().manual_seed(0))
    edges = torch.linspace(0, 1, 11, dtype=torch.float64)
    points = torch.linspace(0, 1, 100_001, dtype=torch.float64)[1:-1]
    density = torch.exp(-((torch.logit(points) - mean) / spread).square() / 2)
    density /= spread * math.sqrt(2 * math.pi) * points * (1 - points)
    wanted = [float(density[(points > low) & (points <= high)].sum()) / 100_000 for low, high in pairwise(edges)]
    assert sum(wanted) == pytest.approx(1, abs=1e-3)
    assert (torch.histc(t.double() / 1000, 10, 0, 1) / len(t)).tolist() == pytest.approx(wanted, abs=4e-3)


@pytest.mark.parametrize("objective", list(OBJECTIVES.values()), ids=list(OBJECTIVES))
def test_noise_level_is_noise_over_signal(objective: Diffusion | FlowMatching) -> None:
    t = torch.tensor([1, 500, 990])
    one, zero = torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    signal, noise = objective.noise_image(one, t, zero), objective.noise_image(zero, t, one)
    assert_close(objective.sigma(t), (noise / signal).flatten())
