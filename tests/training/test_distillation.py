"""Distillation: a step of the student lands where two of its teacher do, round after round, also after a stop."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from known_data import GAUSSIAN, KnownDenoiser
from lamamba.config import PRESETS, DistillationOptions, TrainConfig
from lamamba.diffusion import OBJECTIVES, Objective, Predict
from lamamba.errors import ConfigError
from lamamba.sampling.guidance import guide
from lamamba.sampling.schedulers import make_scheduler
from lamamba.training.distillation import Distillation, Round, plan_rounds, student_objective, student_sampler
from lamamba.training.optimizers import learning_rate
from lamamba.training.run import resolve
from lamamba.training.trainer import Trainer
from steps import Replayed

NULL_LABEL = 3
FIRST, SECOND, LONGEST = Round(1, 0, 16, 8), Round(2, 16, 32, 8), Round(1, 0, 16, 256)
MEAN, SPREAD = 0.4, 0.3  # of Gaussian data


def make_config(objective: str, **options: Any) -> TrainConfig:
    distillation = DistillationOptions(4, teacher_steps=8, teacher_objective=objective)
    return TrainConfig(
        Path("out"), objective=student_objective(objective), distillation=distillation, num_images=16, **options
    )


def toy(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """A teacher that depends on everything."""
    t, y = (value.to(x_t.dtype)[:, None, None, None] for value in (t, y))
    return torch.cat([0.8 * x_t + 0.3 * torch.sin(3 * x_t + t / 300 + y), torch.cos(x_t)], dim=1)


def answering(objective: Objective, x_t: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
    """The output of a network that implies a clean image."""
    prediction = objective.move_x_0(x_t, t, torch.zeros_like(x_t), x_0)
    return torch.cat([prediction, torch.zeros_like(prediction)], dim=1)


def draw_inputs(task: Distillation) -> tuple[Tensor, Tensor, Tensor]:
    """Draw noised images, one for each of the student's timesteps."""
    t = task.own_times
    x_t = torch.randn((len(t), 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x_t, t, torch.arange(len(t)) % NULL_LABEL


@pytest.mark.parametrize("round", [FIRST, SECOND, LONGEST], ids=["first", "second", "longest"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_of_the_student_lands_where_two_of_the_teacher_do(name: str, guidance: float, round: Round) -> None:
    config = make_config(name)
    objective = OBJECTIVES[config.objective]
    teacher_objective = OBJECTIVES[name] if round.number == 1 else objective
    task = Distillation(config, round, guide(toy, guidance, NULL_LABEL), torch.device("cpu"), clips=False)
    x_t, t, y = draw_inputs(task)

    def move(x: Tensor, x_0: Tensor, place: int) -> Tensor:
        """Take a step of DDIM or Euler to another place in the teacher's timesteps, 0 being no noise."""
        signal, noise = (level.double().view(-1, 1, 1, 1) for level in objective.levels(times))
        ends = [level.double() for level in objective.levels(task.times[place - 1 : place])] if place else (1, 0)
        return ends[0] * x_0 + ends[1] * (x - signal * x_0) / noise

    def ask(x: Tensor, row: int) -> Tensor:
        labelled, unlabelled = toy(x, times, y[row, None]), toy(x, times, torch.tensor([NULL_LABEL]))
        out = (unlabelled + guidance * (labelled - unlabelled))[:, :1]
        return teacher_objective.predict_x_0(x, times, out)

    for row in range(len(t)):
        x, place = x_t[row, None], 2 * row + 2
        times = task.times[place - 1 : place]
        assert times == t[row]
        wanted, in_one_step = x, move(x, ask(x, row), place - 2)
        for earlier in (place - 1, place - 2):
            times = task.times[earlier : earlier + 1]
            wanted = move(wanted, ask(wanted, row), earlier)
        if round.number == 1:  # extrapolated to steps of no length
            wanted = 2 * wanted - in_one_step
        times = t[row, None]
        landed = move(x, task.target(x, times, y[row, None]), place - 2)
        torch.testing.assert_close(landed, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_steps_are_those_of_the_sampler(name: str, clips: bool) -> None:
    config = make_config(name)
    objective = OBJECTIVES[config.objective]
    sampler = student_sampler(objective)
    task = Distillation(config, SECOND, toy, torch.device("cpu"), clips=clips)
    own = make_scheduler(objective, sampler, 4, clip_sample=clips)
    theirs = make_scheduler(objective, sampler, 8, clip_sample=clips)
    assert task.own_times.flip(0).tolist() == own.timesteps.tolist()
    x_t, _, y = (value.flip(0) for value in draw_inputs(task))

    def taken(out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """What the scheduler takes: of flows, the velocity."""
        return (x - out[:, :1]) / (t / 1000) if name == "flow-x" else out[:, :1]

    for index, t in enumerate(own.timesteps):
        x, label = x_t[index, None].float(), y[index, None]
        own.set_begin_index(index)
        own._step_index = None
        out = answering(objective, x, t[None], task.target(x, t[None], label))
        landed = own.step(taken(out, x, t), t, x, return_dict=False)[0]
        theirs.set_begin_index(2 * index)
        theirs._step_index = None
        for time in theirs.timesteps[2 * index : 2 * index + 2]:
            x = theirs.step(taken(toy(x, time[None], label), x, time), time, x, return_dict=False)[0]
        torch.testing.assert_close(landed, x, rtol=1e-4, atol=1e-4)


class Exact:
    """Its steps end exactly where the probability flow of Gaussian data leads.

    Args:
        objective: what it predicts.
        times: ascending timesteps of its steps.
        mean, spread: of the data.
    """

    def __init__(self, objective: Objective, times: Tensor, mean: float = MEAN, spread: float = SPREAD) -> None:
        self.objective, self.times, self.mean, self.spread = objective, times, mean, spread

    def __call__(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        places = (self.times - t[:, None]).abs().argmin(dim=1)
        signal, noise = (level.double().view(-1, 1, 1, 1) for level in self.objective.levels(t))
        earlier = self.objective.levels(self.times[places - 1])
        is_last = (places == 0).view(-1, 1, 1, 1)
        signal_2, noise_2 = (
            torch.where(is_last, at_end, level.double().view(-1, 1, 1, 1))
            for at_end, level in zip((1.0, 0.0), earlier, strict=True)
        )
        spread, spread_2 = (torch.hypot(a * self.spread, b) for a, b in ((signal, noise), (signal_2, noise_2)))
        end = signal_2 * self.mean + spread_2 / spread * (x_t - signal * self.mean)
        x_0 = (end - noise_2 / noise * x_t) / (signal_2 - noise_2 / noise * signal)
        return answering(self.objective, x_t, t, x_0)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "diffusion"])  # no student predicts noise
def test_the_average_velocity_has_no_loss(name: str) -> None:
    objective, device = OBJECTIVES[name], torch.device("cpu")
    task = Distillation(make_config(name), SECOND, toy, device, clips=False)
    task.teacher = Exact(objective, task.times)
    generator = torch.Generator().manual_seed(1)
    x_0 = MEAN + SPREAD * torch.randn((64, 1, 4, 4), generator=generator, dtype=torch.float64)
    noise = torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
    t, y = task.draw_timesteps(64, device, generator), torch.zeros(64, dtype=torch.long)
    assert set(t.tolist()) == set(task.own_times.tolist())

    def loss(student: Predict) -> Tensor:
        return task.losses(student, x_0, t, y, noise)["loss"]

    assert loss(Exact(objective, task.own_times)).max() < 1e-10
    assert loss(task.teacher).mean() > 1e-4, "steps of half the length have another average velocity"

    def shifted(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return Exact(objective, task.own_times)(x_t, t, y) + 0.1

    # An error of v or of the velocity counts alike at all levels of noise.
    expected = 0.01 / objective.levels(t)[1].double() ** 2 if name == "flow-x" else torch.full((64,), 0.01).double()
    torch.testing.assert_close(loss(shifted), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_first_round_is_of_second_order(name: str) -> None:
    """The place that it teaches comes closer with the square of the length of a step; without, it is the length."""
    config = make_config(name)
    objective, errors = OBJECTIVES[config.objective], []
    for count in (16, 32):
        task = Distillation(config, Round(1, 0, 16, count), toy, torch.device("cpu"), clips=False)
        known = KnownDenoiser(OBJECTIVES[name], GAUSSIAN)
        task.teacher = lambda x, t, y, known=known: torch.cat([known(x[i, None], t[i, None], y) for i in range(len(x))])
        exact = Exact(objective, task.own_times, GAUSSIAN.mean, GAUSSIAN.spread)
        x_t, t, y = draw_inputs(task)
        middle = (t > 200) & (t < 700)
        wanted = objective.predict_x_0(x_t, t, exact(x_t, t, y)[:, :1])
        errors.append(float((task.target(x_t, t, y) - wanted)[middle].abs().mean()))
    assert errors[1] < 0.4 * errors[0]


def test_timesteps_of_all_rounds_are_nested_and_distinct() -> None:
    for name in ("diffusion-v", "diffusion-v-zero-snr", "flow"):
        objective = OBJECTIVES[name]
        sampler = student_sampler(objective)
        finer = make_scheduler(objective, sampler, 128).timesteps.tolist()
        assert finer == sorted(set(finer), reverse=True)
        while len(finer) > 1:
            coarser = make_scheduler(objective, sampler, len(finer) // 2).timesteps.tolist()
            assert coarser == finer[::2]
            finer = coarser


def test_rounds_halve_the_steps_and_share_the_images() -> None:
    config = TrainConfig(
        Path("out"), num_images=100, batch_size=8, decay="linear", learning_rate=1.0, warmup_images=8,
        distillation=DistillationOptions(1, teacher_steps=16),
    )  # fmt: skip
    rounds = plan_rounds(config)
    assert [(own.number, own.teacher_steps, own.steps) for own in rounds] == [
        (1, 16, 8),
        (2, 8, 4),
        (3, 4, 2),
        (4, 2, 1),
    ]
    assert [(own.begin, own.end) for own in rounds] == [(0, 24), (24, 48), (48, 72), (72, 104)]
    assert [learning_rate(config, images) for images in (8, 16, 24, 32, 40, 48)] == [1.0, 0.5, 0.0, 1.0, 0.5, 0.0]
    with pytest.raises(ConfigError, match=r"too short for 4 rounds, from 16 steps to 1: give 64 or more"):
        plan_rounds(replace(config, num_images=48))


@pytest.mark.parametrize(("steps", "teacher_steps"), [(4, 4), (4, 12), (8, 4), (1, 512)])
def test_steps_that_halving_does_not_reach_are_refused(steps: Any, teacher_steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"teacher_steps is {teacher_steps}: it must be steps {steps} times a power"):
        DistillationOptions(steps, teacher_steps=teacher_steps)


def test_an_objective_without_such_a_sampler_is_refused() -> None:
    class Other(type(OBJECTIVES["flow"])):  # type: ignore[misc]
        name, samplers = "other", ("heun",)

    with pytest.raises(ConfigError, match="objective 'other' cannot be distilled"):
        student_sampler(Other())


def make_trainer(out: Path, **options: Any) -> Trainer:
    """Build a trainer that distills a tiny network in two rounds, of two optimizer steps each."""
    network = replace(
        PRESETS["nano"], embed_dim=8, num_heads=2, depths=(1, 1, 1, 1), bottleneck_depth=1, label_dropout=0.0
    )
    distillation = DistillationOptions(4, 2.0, teacher_steps=16, teacher_objective="flow")
    config = TrainConfig(
        out, batch_size=4, num_images=16, device="cpu", objective="flow", learning_rate=1e-3, decay="linear",
        network=network, distillation=distillation, **options,
    )  # fmt: skip
    return Trainer(*resolve(config))


def take_steps(trainer: Trainer, number: int) -> dict[str, Tensor]:
    for batch, _ in zip(trainer.batches(), range(number), strict=False):
        trainer.take_step(*batch)
    networks = trainer._networks().items()
    return {f"{part}.{name}": value.clone() for part, own in networks for name, value in own.state_dict().items()}


def test_a_round_begins_with_the_average_of_the_round_before(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    first = take_steps(trainer, 2)
    assert trainer.round is not None
    assert (trainer.round.number, trainer.info().distilled.steps) == (1, 8)  # type: ignore[union-attr]
    assert not torch.equal(first["ema.head.output.bias"], first["teacher.head.output.bias"]), "the teacher stays"
    moments = trainer.optimizer.state
    second = take_steps(trainer, 1)
    assert (trainer.round.number, trainer.info().distilled.steps) == (2, 4)  # type: ignore[union-attr]
    assert all(torch.equal(second["teacher" + name[3:]], first[name]) for name in first if name.startswith("ema."))
    assert {float(state["step"]) for state in moments.values()} == {1.0}, "the optimizer starts over"
    # In a round's first step, the decay is 2/11.
    torch.testing.assert_close(
        second["ema.head.output.bias"],
        torch.lerp(first["ema.head.output.bias"], second["network.head.output.bias"], 1 - 2 / 11),
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rounds_that_are_replayed_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    called, replayed = (make_trainer(tmp_path, accumulate=accumulate) for _ in range(2))
    replayed.captures = True
    monkeypatch.setattr("lamamba.training.gradients.Captured", Replayed)
    monkeypatch.setattr(Replayed, "parameters", list(replayed.network.parameters()))
    wanted, ours = (take_steps(trainer, 4) for trainer in (called, replayed))
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_loss_falls(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.config = replace(trainer.config, num_images=160, learning_rate=5e-3)
    with torch.no_grad():
        assert trainer.teacher is not None
        trainer.teacher.head.output.weight.normal_(generator=torch.Generator().manual_seed(0))
    losses = [float(trainer.take_step(*batch)["loss"]) for batch, _ in zip(trainer.batches(), range(20), strict=False)]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[15:]) < 0.7 * sum(losses[:5])
