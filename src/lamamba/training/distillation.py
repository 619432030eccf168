"""Progressive distillation: a student learns to take in one step what its teacher takes in two.

Each round halves the number of sampler steps, and its student is the teacher of the next round (Salimans & Ho 2022,
arXiv 2202.00512). The teacher of the first round is guided, so that the students need no guidance (Meng et al. 2023,
arXiv 2210.03142, with one scale). `lamamba.commands.distill` starts such a run; the trainer does the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lamamba.checkpoints.checkpoint import LoadedCheckpoint
from lamamba.config import TrainConfig
from lamamba.config.training import DistillationOptions
from lamamba.diffusion import OBJECTIVES, Objective, Predict
from lamamba.errors import ConfigError
from lamamba.sampling.schedulers import make_scheduler


@dataclass(frozen=True)
class Round:
    """A part of the training with one teacher."""

    number: int
    """From 1."""
    begin: int
    """Images seen before the round."""
    end: int
    """Images seen after the round."""
    teacher_steps: int
    """Sampler steps of the teacher; the student takes half as many."""

    @property
    def steps(self) -> int:
        """Sampler steps of the student."""
        return self.teacher_steps // 2


def options_of(config: TrainConfig) -> DistillationOptions:
    """Return the options of a run that distills."""
    assert config.distillation is not None
    return config.distillation


def plan_rounds(config: TrainConfig) -> list[Round]:
    """Divide a run into rounds of about as many optimizer steps each.

    Raises:
        ConfigError: the run is too short.
    """
    options = options_of(config)
    teachers = [options.teacher_steps]
    while teachers[-1] > 2 * options.steps:
        teachers.append(teachers[-1] // 2)
    num_updates, number = -(-config.num_images // config.batch_size), len(teachers)
    shortest = config.batch_size * (num_updates // number)
    if shortest <= config.warmup_images:
        raise ConfigError(
            f"num_images {config.num_images:,} is too short for {number} rounds, from {teachers[0]} steps to "
            f"{options.steps}: give {number * (config.warmup_images + config.batch_size):,} or more"
        )
    ends = [config.batch_size * (num_updates * index // number) for index in range(number + 1)]
    parts = zip(pairwise(ends), teachers, strict=True)
    return [Round(index + 1, *images, count) for index, (images, count) in enumerate(parts)]


def round_at(config: TrainConfig, images: int) -> Round:
    """Return the round of the optimizer step that brings the number of images seen to `images`."""
    rounds = plan_rounds(config)
    return next((own for own in rounds if images <= own.end), rounds[-1])


def student_objective(name: str) -> str:
    """Return the objective of a student. Noise that a network predicts says little of the image where all is noise, so
    few steps cannot be taken with it: such a student predicts v."""
    return "diffusion-v" if name == "diffusion" else name


def student_sampler(objective: Objective) -> str:
    """Return the sampler of a student, whose steps are deterministic, of first order, and each two of them make one of
    half as many; raises ConfigError if the objective has no such sampler."""
    for sampler in ("euler", "ddim-cosine"):
        if sampler in objective.samplers:
            return sampler
    raise ConfigError(f"networks of the objective {objective.name!r} cannot be distilled: it has no sampler euler")


def check_teacher(name: str, teacher: LoadedCheckpoint, config: TrainConfig, class_names: Sequence[str]) -> None:
    """Raise ConfigError unless the images of a run, with these classes, are of the kind that its teacher learned."""
    fault = ""
    own, theirs = vars(config.network), vars(teacher.network.config)
    for option in ("num_classes", "in_channels", "sample_size"):
        if own[option] != theirs[option]:
            fault = f"{option} {own[option]} and {name} has {theirs[option]}"
    names = zip(class_names, teacher.info.class_names, strict=False)
    other = [pair for pair in names if len(set(pair)) > 1]
    if other and not fault:
        fault = f"the class {other[0][0]!r} where {name} has {other[0][1]!r}"
    if fault:
        raise ConfigError(f"data {config.data} has {fault}: distill on the data that it was trained on")


class Distillation:
    """What a student learns in a round: to land in one step where its teacher lands in two.

    Both take the steps of the sampler, DDIM or Euler, which differ in the levels a (signal) and s (noise) alone:

        z' = a' x_0 + s' (z - a x_0) / s

    So one step from (a, s) to (a'', s'') over two predictions x_0 and x_0' of the teacher needs the prediction

        (1 - w) x_0 + w x_0',    w = (a'' - a' s''/s') / (a'' - a s''/s)

    The first teacher can take steps of any length, unlike students. So in the first round the place is extrapolated, to
    twice the one of two steps less the one of one step (Richardson), which removes the first-order error of the
    steps: w is doubled.

    The loss is the squared error of that prediction over s^2: of v, or of the velocity of a flow. That is the weight
    "SNR + 1" of the paper.

    Args:
        config: of the run.
        round: the round.
        teacher: the teacher, with guidance if it is the first one; see `lamamba.diffusion.Predict`.
        device: where to compute.
        clips: clip the teacher's clean images to -1 to 1, as its sampler does for pixels.
    """

    def __init__(self, config: TrainConfig, round: Round, teacher: Predict, device: torch.device, clips: bool) -> None:
        self.objective = OBJECTIVES[config.objective]
        self.teacher = teacher
        self.teacher_objective = self.objective
        self.extrapolates = round.number == 1
        if self.extrapolates:
            self.teacher_objective = OBJECTIVES[options_of(config).teacher_objective]
        sampler = student_sampler(self.objective)
        scheduler = make_scheduler(self.objective, sampler, round.teacher_steps, clip_sample=clips)
        self.clips = bool(scheduler.config.get("thresholding"))
        self.times = scheduler.timesteps.to(device).flip(0)
        self.own_times = self.times[1::2]
        # Before the first timestep, there is no noise.
        signal, noise_share = self.objective.levels(self.times)
        self.signal = torch.cat([torch.ones_like(signal[:1]), signal])
        self.noise_share = torch.cat([torch.zeros_like(noise_share[:1]), noise_share])

    def draw_timesteps(self, batch: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Draw (b,) of the student's timesteps, all with the same probability."""
        return self.own_times[torch.randint(len(self.own_times), (batch,), device=device, generator=generator)]

    def losses(self, denoiser: Predict, x_0: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Compute the losses of noised images, see the class; arguments as `Diffusion.losses`."""
        signal, noise_share = (level.to(x_0.dtype).view(-1, 1, 1, 1) for level in self.objective.levels(t))
        x_t = signal * x_0 + noise_share * noise
        target = self.target(x_t, t, y)
        prediction = denoiser(x_t, t, y).to(x_0.dtype).chunk(2, dim=1)[0]
        error = (self.objective.predict_x_0(x_t, t, prediction) - target) / noise_share
        mse = error.square().flatten(1).mean(dim=1)
        return {"loss": mse, "mse": mse}

    def min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        return self.objective.min_snr_weight(t, gamma)

    @torch.no_grad()
    def target(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Compute the clean images that the student should predict (b, c, h, w), for (b,) timesteps of the student."""
        # The student's timesteps differ. Of its teacher's, the last two are the same in 256 steps of ddim-cosine.
        place = 2 * (self.own_times - t[:, None]).abs().argmin(dim=1) + 2
        start, middle, end = (self._levels(place - step, x_t.dtype) for step in range(3))
        first = self._clean(x_t, t, y)
        x_middle = middle[0] * first + middle[1] * (x_t - start[0] * first) / start[1]
        second = self._clean(x_middle, self.times[place - 2], y)
        share = (end[0] - middle[0] * end[1] / middle[1]) / (end[0] - start[0] * end[1] / start[1])
        target = torch.lerp(first, second, 2 * share if self.extrapolates else share)
        return target.clamp(-1, 1) if self.clips else target

    def _levels(self, place: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        signal, noise_share = (level[place].to(dtype).view(-1, 1, 1, 1) for level in (self.signal, self.noise_share))
        return signal, noise_share

    def _clean(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        prediction = self.teacher(x_t, t, y).to(x_t.dtype).chunk(2, dim=1)[0]
        x_0 = self.teacher_objective.predict_x_0(x_t, t, prediction)
        return x_0.clamp(-1, 1) if self.clips else x_0
