"""Distillation by moment matching: a student samples in a few steps what its teacher samples in many.

The student samples with few steps of the ancestral sampler. It is trained so that the mean of its clean images, given
a noised image, equals the teacher's prediction for that noised image (Salimans, Mensink, Heek & Hoogeboom 2024, arXiv
2406.04103, Algorithm 2). An auxiliary network learns this mean. The teacher is guided, so that the student needs no
guidance. `lamamba.commands.distill` starts the run, and the trainer does the rest.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lamamba.checkpoints.checkpoint import LoadedCheckpoint
from lamamba.config import TrainConfig
from lamamba.diffusion import OBJECTIVES, Objective, Predict, mean_by_image
from lamamba.errors import ConfigError
from lamamba.sampling.schedulers import make_scheduler

BETAS = (0.0, 0.99)
"""Betas of AdamW. There is no momentum, because the student's gradient changes with the auxiliary network."""
REGRESSION = 0.2
"""Share of the images during which the networks first learn to predict v, if their teacher predicts noise."""
Levels = tuple[Tensor, Tensor]
"""Shares of the clean image and of the noise in a noised image, each (b, 1, 1, 1)."""


def student_objective(name: str) -> str:
    """Return the objective of a student, given its teacher's: one that predicts noise becomes one that predicts v.

    When an image is nearly all noise, a prediction of the noise says little about the image. So it does not suit few
    steps.
    """
    return "diffusion-v" if name == "diffusion" else name


def student_sampler(objective: Objective) -> str:
    """Return the ancestral sampler of students; raises ConfigError if the objective has none."""
    for sampler in ("ancestral-cosine", "ancestral"):
        if sampler in objective.samplers:
            return sampler
    raise ConfigError(f"networks of the objective {objective.name!r} cannot be distilled: it has no sampler ancestral")


def check_teacher(name: str, teacher: LoadedCheckpoint, config: TrainConfig, class_names: Sequence[str]) -> None:
    """Raise ConfigError unless a run's images have the size, channels and classes that its teacher was trained on."""
    problem = ""
    own, theirs = vars(config.network), vars(teacher.network.config)
    for option in ("num_classes", "in_channels", "sample_size"):
        if own[option] != theirs[option]:
            problem = f"{option} {own[option]} and {name} has {theirs[option]}"
    names = zip(class_names, teacher.info.class_names, strict=False)
    other = [pair for pair in names if len(set(pair)) > 1]
    if other and not problem:
        problem = f"the class {other[0][0]!r} where {name} has {other[0][1]!r}"
    if problem:
        raise ConfigError(f"data {config.data} has {problem}: distill on the data that {name} was trained on")


class MomentMatching:
    """The losses of a student and of its auxiliary network.

    A training image is noised to z_t at a timestep t of the student, and the student predicts x from it. Then z_s is
    drawn from q(z_s | z_t, x) for a time s between t and the student's next timestep. With z_s = alpha_s x + sigma_s
    noise, and sg for "no gradient":

        auxiliary:  |x_auxiliary(z_s) - sg(x)|^2 / sigma_s^2 + |x_auxiliary(z_s) - x_teacher(z_s)|^2 / sigma_s^2
        student:    <x, sg(x_auxiliary(z_s) - x_teacher(z_s))> / sigma_s

    The auxiliary network's best prediction is the average of E[x | z_s] and x_teacher. So the student's gradient is
    zero if E[x | z_s] = x_teacher(z_s). If the networks predict v or a velocity, the auxiliary loss is the squared
    error of that prediction.

    Networks that predict v cannot start from weights that predict noise. If the teacher predicts noise, both networks
    first learn the clean images that the teacher predicts from noisy images, for a fraction `REGRESSION` of the run.

    Args:
        teacher: the teacher, with guidance; see `lamamba.diffusion.Predict`.
        auxiliary: the auxiliary network, which has the objective of the student.
        bounded: whether images lie within -1 to 1. If so, and if the teacher predicts noise, its clean images are
            clipped where the noise exceeds the signal.
    """

    def __init__(
        self, config: TrainConfig, teacher: Predict, auxiliary: Predict, device: torch.device, bounded: bool
    ) -> None:
        options = config.distillation
        assert options is not None
        self.objective = OBJECTIVES[config.objective]
        self.teacher, self.auxiliary = teacher, auxiliary
        self.teacher_objective = OBJECTIVES[options.teacher_objective]
        self.regresses = self.teacher_objective is not self.objective
        self.end_of_regression = self.regresses * REGRESSION * config.num_images
        self.clips = self.regresses and bounded
        scheduler = make_scheduler(self.objective, student_sampler(self.objective), options.steps)
        self.times = scheduler.timesteps.to(device, torch.float32).flip(0)
        """Timesteps of the student, ascending."""

    def begin_step(self, images: int) -> bool:
        """Choose the losses of the step that begins after `images` images; return whether they have changed."""
        before, self.regresses = self.regresses, images < self.end_of_regression
        return before != self.regresses

    def draw_timesteps(self, batch: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Draw (b,) integer times s: one of the student's steps with equal probability, then uniformly within it."""
        place = len(self.times) * torch.rand(batch, device=device, generator=generator)
        ends = torch.cat([torch.zeros_like(self.times[:1]), self.times])
        step = place.long()
        return torch.lerp(ends[step], ends[step + 1], place - step).round().clamp(min=1)

    def losses(self, denoiser: Predict, x_0: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        The student's loss adds to the gradient of `loss`, but not to its value, because its value says nothing.

        Args:
            denoiser: the student.
            x_0: (b, c, h, w) clean images.
            t: (b,) times s of `draw_timesteps`.
            y: (b,) labels.
            noise: (b, 2c, h, w) standard normal: for the student's input, and for z_s.

        Returns:
            (b,) each: `loss`, the loss of the auxiliary network, or the sum of both networks' errors while they learn
            to predict v; and `gap`, |x_auxiliary - x_teacher|^2 / b_s^2.
        """
        noise, noise_of_step = noise.chunk(2, dim=1)
        earlier = self._levels(t, x_0)
        divisor = earlier[1].clamp(min=getattr(self.objective, "least", 0.0))  # as in the objective's own loss
        if self.regresses:
            z = earlier[0] * x_0 + earlier[1] * noise
            wanted = self._ask_teacher(z, t, y)
            errors = [
                mean_by_image(((self._clean(ask, z, t, y) - wanted) / divisor).square())
                for ask in (denoiser, self.auxiliary)
            ]
            return {"loss": errors[0] + errors[1], "gap": errors[1]}
        t_student = self.times[torch.bucketize(t, self.times)]
        later = self._levels(t_student, x_0)
        x_t = later[0] * x_0 + later[1] * noise
        x = self._clean(denoiser, x_t, t_student, y)
        z = draw_earlier(x_t, x.detach(), later, earlier, noise_of_step)
        wanted = self._ask_teacher(z, t, y)
        expected = self._clean(self.auxiliary, z, t, y)
        gap = mean_by_image(((expected - wanted) / divisor).square())
        loss = mean_by_image(((expected - x.detach()) / divisor).square()) + gap
        of_student = mean_by_image(x * (expected - wanted).detach() / divisor)
        return {"loss": loss + of_student - of_student.detach(), "gap": gap}

    def _levels(self, t: Tensor, like: Tensor) -> Levels:
        signal, noise_share = (level.to(like.dtype).view(-1, 1, 1, 1) for level in self.objective.levels(t))
        return signal, noise_share

    def _clean(self, ask: Predict, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.objective.predict_x_0(x_t, t, ask(x_t, t, y).to(x_t.dtype).chunk(2, dim=1)[0])

    @torch.no_grad()
    def _ask_teacher(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        prediction = self.teacher(x_t, t, y).to(x_t.dtype).chunk(2, dim=1)[0]
        x_0 = self.teacher_objective.predict_x_0(x_t, t, prediction)
        if self.clips:  # noise over signal multiplies an error of the predicted noise
            signal, noise_share = self._levels(t, x_t)
            x_0 = torch.where(noise_share > signal, x_0.clamp(-1, 1), x_0)
        return x_0


def draw_earlier(x_t: Tensor, x_0: Tensor, later: Levels, earlier: Levels, noise: Tensor) -> Tensor:
    """Draw z_s from q(z_s | x_t, x_0): one step of the ancestral sampler backward through the noising process.

    With the levels (a_t, b_t) and (a_s, b_s), r = a_t / a_s and v = b_t^2 - r^2 b_s^2, it is a Gaussian with

        mean r (b_s/b_t)^2 x_t + a_s v/b_t^2 x_0    and    standard deviation sqrt(v) b_s/b_t

    (Kingma et al. 2021, arXiv 2107.00630, appendix A.2).

    Args:
        x_t, x_0, noise: (b, c, h, w); the noise is standard normal.
        later: levels of t. The signal may be zero.
        earlier: levels of s. The signal is positive, and at least the signal of t.
    """
    (a_t, b_t), (a_s, b_s) = later, earlier
    ratio = a_t / a_s
    variance = (b_t.square() - (ratio * b_s).square()).clamp(min=0)
    mean = ratio * (b_s / b_t).square() * x_t + a_s * variance / b_t.square() * x_0
    return mean + variance.sqrt() * b_s / b_t * noise
