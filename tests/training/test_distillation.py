"""Distillation: the student's samples get the conditional means of the teacher, also after a stop and in parts."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamamba.config import PRESETS, DistillationOptions, TrainConfig
from lamamba.diffusion import OBJECTIVES, Objective, Predict
from lamamba.errors import ConfigError
from lamamba.sampling.schedulers import Steps, make_scheduler
from lamamba.training.distillation import MomentMatching, draw_earlier, student_objective, student_sampler
from lamamba.training.run import resolve
from lamamba.training.trainer import Trainer
from small_network import TINY_CONFIG
from steps import Replayed

CPU = torch.device("cpu")
MEAN, SPREAD = 0.4, 0.5  # of Gaussian data


def make_task(
    name: str, auxiliary: Predict, teacher: Predict | None = None, steps: Any = 4, bounded: bool = False
) -> MomentMatching:
    """Make the task of a teacher's objective; the teacher is the best one for Gaussian data by default."""
    config = TrainConfig(
        Path("out"), objective=student_objective(name), distillation=DistillationOptions(steps, teacher_objective=name),
        num_images=1000,
    )  # fmt: skip
    return MomentMatching(config, teacher or known(OBJECTIVES[name]), auxiliary, CPU, bounded)


def levels(objective: Objective, t: Tensor) -> tuple[Tensor, Tensor]:
    signal, noise_share = (level.view(-1, 1, 1, 1) for level in objective.levels(t))
    return signal, noise_share


def answering(objective: Objective, x_t: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
    """The output of a network that implies a clean image."""
    prediction = objective.move_x_0(x_t, t, torch.zeros_like(x_t), x_0)
    return torch.cat([prediction, torch.zeros_like(prediction)], dim=1)


def known(objective: Objective) -> Predict:
    """What a perfectly trained network answers for Gaussian data."""

    def answer(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        signal, noise_share = levels(objective, t)
        gain = signal * SPREAD**2 / ((signal * SPREAD) ** 2 + noise_share**2)
        return answering(objective, x_t, t, MEAN + gain * (x_t - signal * MEAN))

    return answer


def test_earlier_images_are_drawn_from_the_posterior() -> None:
    x_t, x_0, noise = torch.randn((3, 1, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flow, zeros = OBJECTIVES["flow"], torch.zeros_like(x_t)
    for start, end in ((999.0, 700.0), (600.0, 10.0), (1000.0, 300.0)):
        later, earlier = (levels(flow, torch.tensor([t], dtype=torch.float64)) for t in (start, end))
        (a_t, b_t), (a_s, b_s) = later, earlier
        # Bayes: x_t = r z_s + sqrt(v) noise, and z_s = a_s x_0 + b_s noise.
        ratio = a_t / a_s
        variance = b_t**2 - (ratio * b_s) ** 2
        precision = 1 / b_s**2 + ratio**2 / variance
        mean = (a_s * x_0 / b_s**2 + ratio * x_t / variance) / precision
        torch.testing.assert_close(draw_earlier(x_t, x_0, later, earlier, zeros), mean)
        torch.testing.assert_close(draw_earlier(x_t, x_0, later, earlier, noise), mean + noise / precision.sqrt())
    # Without a step, nothing changes; rounding may make the variance negative.
    same = levels(flow, torch.tensor([333.3]))
    torch.testing.assert_close(draw_earlier(x_t, x_0, same, same, noise), x_t, rtol=0, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_sampler_takes_the_steps_of_the_student(name: str, steps: int) -> None:
    objective = OBJECTIVES[student_objective(name)]
    times = make_task(name, known(objective), steps=steps).times
    walk = Steps(make_scheduler(objective, student_sampler(objective), steps), objective, steps)
    assert walk.timesteps.tolist() == times.flip(0).tolist()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, 1, 4, 4), generator=generator)
    ends = [*times.flip(0), None]
    for t, earlier in zip(walk.timesteps, ends[1:], strict=True):
        out = torch.randn((2, 2, 4, 4), generator=generator)
        x_0 = objective.predict_x_0(x, t.expand(2), out[:, :1])
        noise = torch.cat([torch.randn((1, 1, 4, 4), generator=torch.Generator().manual_seed(i)) for i in range(2)])
        target = (torch.tensor(1.0), torch.tensor(0.0)) if earlier is None else levels(objective, earlier[None])
        wanted = draw_earlier(x, x_0, levels(objective, t[None].float()), target, noise)
        x = walk.step(out, t, x, [torch.Generator().manual_seed(i) for i in range(2)])
        torch.testing.assert_close(x, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x, x_0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_times_are_drawn_alike_for_every_step(name: str) -> None:
    task = make_task(name, known(OBJECTIVES[student_objective(name)]))
    s = task.draw_timesteps(40_000, CPU, torch.Generator().manual_seed(0))
    assert (float(s.min()), float(s.max())) == (1, 999)
    counts = torch.bucketize(s, task.times).bincount()
    assert len(counts) == 4
    assert (counts / 10_000 - 1).abs().max() < 0.1
    first = s[s <= task.times[0]]
    assert float(first.mean()) == pytest.approx(float(task.times[0]) / 2, rel=0.05)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "diffusion"])
def test_the_gradients_are_those_of_the_paper(name: str) -> None:
    """The student's is (x_auxiliary - x_teacher) / b_s, and neither loss has a gradient for another network."""
    objective, generator = OBJECTIVES[name], torch.Generator().manual_seed(0)
    answers = {
        who: torch.randn((6, 2, 4, 4), generator=generator).requires_grad_()
        for who in ("student", "auxiliary", "teacher")
    }
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def answer(who: str) -> Predict:
        def predict(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
            seen[who] = x_t.detach(), t
            return answers[who]

        return predict

    task = make_task(name, answer("auxiliary"), answer("teacher"))
    x_0, noise = torch.randn((6, 1, 4, 4), generator=generator), torch.randn((6, 2, 4, 4), generator=generator)
    s = torch.tensor([60.0, 120, 260, 400, 500, 990])
    terms = task.losses(answer("student"), x_0, s, torch.zeros(6, dtype=torch.long), noise)
    terms["loss"].sum().backward()
    assert answers["teacher"].grad is None
    x_t, t = seen["student"]
    assert torch.equal(t, torch.stack([next(time for time in task.times if time >= own) for own in s]))
    signal, noise_share = levels(objective, t)
    torch.testing.assert_close(x_t, signal * x_0 + noise_share * noise[:, :1])
    assert torch.equal(seen["auxiliary"][0], seen["teacher"][0])
    assert torch.equal(seen["auxiliary"][1], s)

    inputs = {who: seen[who] for who in answers}
    predictions = {who: answers[who][:, :1].detach().requires_grad_() for who in answers}
    x = {who: objective.predict_x_0(*inputs[who], prediction) for who, prediction in predictions.items()}
    z = draw_earlier(x_t, x["student"].detach(), levels(objective, t), levels(objective, s), noise[:, 1:])
    torch.testing.assert_close(seen["auxiliary"][0], z)
    b_s = levels(objective, s)[1]
    x["student"].backward((x["auxiliary"] - x["teacher"]).detach() / b_s / 16)
    errors = [((x["auxiliary"] - x[who].detach()) / b_s).square().flatten(1).mean(1) for who in ("student", "teacher")]
    (errors[0] + errors[1]).sum().backward()
    for who in ("student", "auxiliary"):
        assert predictions[who].grad is not None
        torch.testing.assert_close(answers[who].grad[:, :1], predictions[who].grad, rtol=1e-4, atol=1e-6)  # type: ignore[index]
    torch.testing.assert_close(terms["loss"].detach(), (errors[0] + errors[1]).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["gap"].detach(), errors[1].detach(), rtol=1e-4, atol=1e-5)


def test_the_auxiliary_network_learns_the_mean_of_student_and_teacher() -> None:
    """A student x = c + g x_t makes Gaussian images, whose mean E[x | z_s] is known."""
    flow, c, g, s = OBJECTIVES["flow"], 0.2, 0.8, 500.0
    parameters = torch.tensor([0.0, 0.0], requires_grad=True)

    def student(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return answering(flow, x_t, t, c + g * x_t)

    def auxiliary(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return answering(flow, z, t, parameters[0] + parameters[1] * z)

    task = make_task("flow", auxiliary, steps=1)
    generator = torch.Generator().manual_seed(0)
    x_0 = MEAN + SPREAD * torch.randn((400, 1, 16, 16), generator=generator)
    noise, times = torch.randn((400, 2, 16, 16), generator=generator), torch.full((400,), s)

    def slope() -> Tensor:
        loss = task.losses(student, x_0, times, torch.zeros(400), noise)["loss"].mean()
        return torch.autograd.grad(loss, parameters)[0]

    # The loss is quadratic: a step of Newton's method reaches its minimum.
    with torch.no_grad():
        start, columns = slope_at(slope, parameters, 0.0, 0.0), []
        for place in ((1.0, 0.0), (0.0, 1.0)):
            columns.append(slope_at(slope, parameters, *place) - start)
    found = torch.linalg.solve(torch.stack(columns, dim=1), -start)
    (a_t, b_t), (a_s, b_s) = ([float(level) for level in flow.levels(torch.tensor(t))] for t in (999.0, s))
    ratio = a_t / a_s
    variance = b_t**2 - (ratio * b_s) ** 2
    to_x = a_s * variance / b_t**2
    to_x_t, spread = ratio * (b_s / b_t) ** 2 + to_x * g, math.sqrt(variance) * b_s / b_t
    gain = g * to_x_t / (to_x_t**2 + spread**2)  # E[x | z] = c + gain (z - to_x c), as x_t is nearly N(0, 1)
    teachers = a_s * SPREAD**2 / ((a_s * SPREAD) ** 2 + b_s**2)
    wanted = (c - gain * to_x * c + MEAN - teachers * a_s * MEAN) / 2, (gain + teachers) / 2
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=0.01)


def slope_at(slope: Callable[[], Tensor], parameters: Tensor, *values: float) -> Tensor:
    parameters.copy_(torch.tensor(values))
    with torch.enable_grad():
        return slope()


class Affine(nn.Module):
    """A network whose predictions are affine in its input, with coefficients that depend on the time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 32), nn.SiLU(), nn.Linear(32, 2))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        angles = t[:, None] / 1000 * torch.tensor([1.5, 3, 6])
        features = torch.cat([angles.sin(), angles.cos(), torch.ones_like(angles[:, :1])], dim=1)
        factor, offset = self.layers(features)[:, :, None, None, None].unbind(1)
        return torch.cat([factor * x_t + offset, torch.zeros_like(x_t)], dim=1)


def sample(objective: Objective, network: Predict, steps: int) -> Tensor:
    walk = Steps(make_scheduler(objective, student_sampler(objective), steps), objective, steps)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((64, 1, 16, 16), generator=generator)
    for t in walk.timesteps:
        x = walk.step(network(x, t.expand(64), torch.zeros(64)), t, x, [generator] * 64)
    return x


@pytest.mark.parametrize(("name", "steps"), [
    ("flow", 1), ("flow", 4), ("flow-x", 2), ("diffusion", 4), ("diffusion-v", 4),
])  # fmt: skip
def test_a_student_has_mean_and_spread_of_the_data(name: str, steps: int) -> None:
    """The teacher is perfect, but in so few steps its samples have too little spread."""
    objective = OBJECTIVES[student_objective(name)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student, auxiliary = Affine(), Affine()
    task, generator = make_task(name, auxiliary, steps=steps), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([*student.parameters(), *auxiliary.parameters()], betas=(0.0, 0.99))
    switches, number = 0, 1500
    for step in range(number):
        switches += task.begin_step(step * 1000 // number)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / number)
        x_0 = MEAN + SPREAD * torch.randn((64, 1, 4, 4), generator=generator)
        t = task.draw_timesteps(64, CPU, generator)
        noise = torch.randn((64, 2, 4, 4), generator=generator)
        optimizer.zero_grad()
        task.losses(student, x_0, t, torch.zeros(64), noise)["loss"].mean().backward()
        for network in (student, auxiliary):
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    assert switches == (name == "diffusion"), "it first learns to predict v"
    assert not task.regresses
    own = sample(objective, known(objective), steps)
    assert own.std() < 0.75 * SPREAD
    with torch.no_grad():
        x = sample(objective, student, steps)
    assert abs(float(x.mean()) - MEAN) < 0.05
    assert abs(float(x.std()) - SPREAD) < 0.2 * abs(float(own.std()) - SPREAD)


@pytest.mark.parametrize("bounded", [False, True])
def test_images_that_predicted_noise_implies_are_clipped_in_much_noise(bounded: bool) -> None:
    def off(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """A teacher whose errors imply images far outside of -1 to 1."""
        return answering(OBJECTIVES["diffusion"], x_t, t, torch.full_like(x_t, 5.0))

    def learned(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        within = (t > 500).view(-1, 1, 1, 1) * bounded
        return answering(OBJECTIVES["diffusion-v"], x_t, t, torch.full_like(x_t, 5.0) - 4.0 * within)

    task = make_task("diffusion", learned, off, bounded=bounded)
    s, y = torch.tensor([100.0, 700.0]), torch.zeros(2)
    for images in (0, 200):
        assert task.begin_step(images) == (images == 200)
        terms = task.losses(learned, torch.zeros(2, 1, 4, 4), s, y, torch.zeros(2, 2, 4, 4))
        assert terms["loss"].max() < 1e-4


def test_an_objective_without_such_a_sampler_is_refused() -> None:
    class Other(type(OBJECTIVES["flow"])):  # type: ignore[misc]
        name, samplers = "other", ("heun",)

    with pytest.raises(ConfigError, match="objective 'other' cannot be distilled"):
        student_sampler(Other())


def make_trainer(out: Path, teacher: str = "flow", **options: Any) -> Trainer:
    """Build a trainer that distills a tiny network."""
    network = replace(PRESETS["nano"], **TINY_CONFIG, label_dropout=0.0)
    own = {"batch_size": 4, "num_images": 32, "learning_rate": 1e-3, "decay": "linear", **options}
    config = TrainConfig(
        out, device="cpu", objective=student_objective(teacher), network=network,
        distillation=DistillationOptions(4, 2.0, teacher), **own,
    )  # fmt: skip
    return Trainer(*resolve(config))


def take_steps(trainer: Trainer, number: int) -> dict[str, Tensor]:
    for batch, _ in zip(trainer.batches(), range(number), strict=False):
        trainer.take_step(*batch)
    networks = trainer._networks().items()
    return {f"{part}.{name}": value.clone() for part, own in networks for name, value in own.state_dict().items()}


def test_student_auxiliary_network_and_average_learn(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    before = take_steps(trainer, 0)
    for name in ("network", "ema", "auxiliary"):
        assert torch.equal(before[f"{name}.head.output.weight"], before["teacher.head.output.weight"])
    after = take_steps(trainer, 2)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"network", "ema", "auxiliary"}
    biases = [after[f"{part}.head.output.bias"] for part in ("network", "ema", "auxiliary")]
    assert not any(torch.equal(biases[i], biases[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert len(trainer.optimizer.state) == 2 * len(list(trainer.network.parameters()))
    info = trainer.info().distilled
    assert (info.steps, info.sampler, info.guidance) == (4, "ancestral", 2.0)  # type: ignore[union-attr]


def test_each_network_has_its_own_limit_of_the_gradient(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_grad_norm=1e-3)
    take_steps(trainer, 2)
    for network in trainer.trained.values():
        gradients = [value.grad.flatten() for value in network.parameters() if value.grad is not None]
        assert float(torch.cat(gradients).norm()) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("broken", ["network", "auxiliary"])
def test_a_step_is_skipped_for_both_networks(tmp_path: Path, broken: str) -> None:
    trainer = make_trainer(tmp_path)
    take_steps(trainer, 1)
    assert trainer.is_finite()
    weights: Any = trainer.trained[broken]
    with torch.no_grad():
        weights.head.output.bias[0] = math.inf
    before = [value.clone() for value in trainer.trained.parameters()]
    terms = trainer.take_step(*next(trainer.batches()))
    assert terms["skipped"] == 1
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.trained.parameters(), strict=True))
    assert not trainer.is_finite()


@pytest.mark.parametrize(("accumulate", "teacher"), [(1, "diffusion"), (2, "flow"), (2, "diffusion")])
def test_steps_that_are_replayed_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int, teacher: str
) -> None:
    called, replayed = (make_trainer(tmp_path, teacher, accumulate=accumulate) for _ in range(2))
    replayed.captures = True
    monkeypatch.setattr("lamamba.training.gradients.Captured", Replayed)
    monkeypatch.setattr(Replayed, "parameters", list(replayed.trained.parameters()))
    wanted, ours = (take_steps(trainer, 4) for trainer in (called, replayed))  # two steps of regression, if any
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("teacher", ["flow", "diffusion"])
def test_the_auxiliary_network_comes_close_to_the_teacher(tmp_path: Path, teacher: str) -> None:
    num_images = {"flow": 160, "diffusion": 800}[teacher]  # so that 40 steps are a whole run, or the regression of one
    trainer = make_trainer(tmp_path, teacher, num_images=num_images, learning_rate=5e-3)
    with torch.no_grad():
        assert trainer.teacher is not None
        trainer.teacher.head.output.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    gaps = [float(trainer.take_step(*batch)["gap"]) for batch, _ in zip(trainer.batches(), range(40), strict=False)]
    assert all(math.isfinite(gap) for gap in gaps)
    assert sum(gaps[-5:]) < 0.7 * sum(gaps[:5])
