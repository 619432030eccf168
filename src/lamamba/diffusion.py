"""The objectives that a denoiser is trained with.

A denoiser is any callable `(x_t, t, y) -> (b, 2c, h, w)`; nothing here knows the network. These are the
objectives, see `Objective` for what they have in common:

* `Diffusion`: 1000 linear steps, noise prediction with a learned variance (Nichol & Dhariwal 2021, arXiv 2102.09672),
  what LaMamba-Diff, DiT and ADM train with.
* `VPrediction`: the same, but the network predicts v; optionally, the last timestep is pure noise.
* `FlowMatching`: the straight path from data to noise, velocity prediction (SiT, arXiv 2401.08740), in diffusers'
  direction: x_t = (1 - t/1000) x_0 + t/1000 noise.
* `XPredictionFlow`: the same path; the network predicts the clean image (JiT, arXiv 2511.13720).
"""

import math
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from lamamba.config import Timesteps

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A denoiser: `(x_t, t, y) -> (b, 2c, h, w)`."""
NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 1e-4, 2e-2


class Denoiser(Protocol):
    """A network that can be sampled. To be trained and saved, it is also a module in `lamamba.model.NETWORKS` with
    diffusers' `save_pretrained` and `config`; `examples/network.py` adds one in one file.

    On CUDA, `sample` records an `nn.Module` as a CUDA graph; wrap one that cannot be recorded,
    `CapturedNetwork(network, captures=False)`.
    """

    @property
    def config(self) -> Any:
        """Has `in_channels`, `sample_size` and `num_classes`; and `label_dropout`, 0 if it never saw "no label"."""

    @property
    def null_label(self) -> int:
        """The label that means "no label"."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    def __call__(self, x_t: Tensor, t: Tensor, y: Tensor, /) -> Tensor:
        """Predict (b, 2c, h, w) from (b, c, h, w) noised images, (b,) timesteps from 0 to 1000, and (b,) labels.

        The objective says what the first c channels predict; the others are the learned variance of diffusion,
        which only the sampler `ancestral` uses.
        """


class Task(Protocol):
    """What a training step minimizes: an `Objective`, or the losses of a distillation."""

    def draw_timesteps(self, batch: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Draw (b,) timesteps for training, from 0 to 1000."""

    def losses(self, denoiser: Predict, x_0: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Compute (b,) losses of clean images: `loss`, which is minimized, and its terms."""


class Objective(Task, Protocol):
    """What a network is trained for: how images are noised, and what the network predicts on its first c channels.

    Training and sampling need no more than this. `examples/objective.py` adds another objective in one file.
    """

    @property
    def name(self) -> str:
        """Name in `OBJECTIVES` and in checkpoints."""

    @property
    def scheduler_options(self) -> Mapping[str, Any]:
        """The noise schedule and the `prediction_type`, as the options of diffusers' schedulers."""

    @property
    def samplers(self) -> tuple[str, ...]:
        """Names of the samplers that work, see `lamamba.sampling.schedulers.make_scheduler`."""

    @property
    def default_sampler(self) -> str:
        """One of `samplers`."""

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the shares of the clean image and of noise in x_t, for (b,) timesteps."""

    def sigma(self, t: Tensor) -> Tensor:
        """Compute the noise level of (b,) timesteps, as noise over signal."""

    def min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """Compute the (b,) weights of the term `mse` that give the error of x_0 the weight min(SNR, gamma)."""

    def predict_x_0(self, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """Compute the clean image that a prediction implies."""

    def move_x_0(self, x_t: Tensor, t: Tensor, prediction: Tensor, x_0: Tensor) -> Tensor:
        """Change a prediction so that it implies the clean image x_0 instead of its own."""


def _deprecated_scheduler(self: Objective, *arguments: Any, **options: Any) -> Any:
    """Call `lamamba.make_scheduler`, which replaces this method."""
    warnings.warn(
        f"{type(self).__name__}.scheduler(...) is deprecated: call lamamba.make_scheduler(objective, ...)",
        DeprecationWarning,
        stacklevel=2,
    )
    return import_module("lamamba.sampling.schedulers").make_scheduler(self, *arguments, **options)


class Diffusion:
    """1000 linear steps; predicts the noise, and the log-variance of each value as a position between two bounds."""

    name = "diffusion"
    scheduler_options: Mapping[str, Any] = {
        "num_train_timesteps": NUM_TIMESTEPS,
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
    }
    samplers = ("ancestral", "ancestral-cosine", "ddim", "ddim-cosine", "dpm++", "sde-dpm++", "unipc")
    default_sampler = "dpm++"
    scheduler = _deprecated_scheduler
    zero_terminal_snr = False

    def _schedule(self, device: torch.device) -> Mapping[str, Tensor]:
        return linear_schedule(device, self.zero_terminal_snr)

    def draw_timesteps(self, batch: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Draw (b,) integer timesteps, uniform over 0 to 999."""
        return torch.randint(NUM_TIMESTEPS, (batch,), device=device, generator=generator)

    def noise_image(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw x_t from q(x_t | x_0): sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise."""
        schedule = self._schedule(x_0.device)
        return _at(schedule["sqrt_alpha_bar"], t) * x_0 + _at(schedule["sqrt_one_minus_alpha_bar"], t) * noise

    def sigma(self, t: Tensor) -> Tensor:
        """Compute the noise level of timesteps as noise over signal: sqrt((1 - alpha_bar) / alpha_bar).

        Between whole timesteps its logarithm is linear, as in the schedulers of diffusers that use such timesteps.
        """
        log_sigma = self._schedule(t.device)["log_sigma"]
        below = t.long().clamp(0, NUM_TIMESTEPS - 1)
        above = (below + 1).clamp(max=NUM_TIMESTEPS - 1)
        return torch.lerp(log_sigma[below], log_sigma[above], (t - below).float()).exp()

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the shares of the clean image and of noise in x_t: sqrt(alpha_bar) and sqrt(1 - alpha_bar)."""
        sigma = self.sigma(t)
        signal = (1 + sigma.square()).rsqrt()
        return signal, sigma * signal

    def predict_x_0(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Compute the clean image x_0 that a prediction of the noise implies, for (b,) timesteps.

        (x_t - sqrt(1 - alpha_bar) noise) / sqrt(alpha_bar): Ho et al. 2020, arXiv 2006.11239, eq. 15.
        """
        signal, noise_share = (level[:, None, None, None] for level in self.levels(t))
        return (x_t - noise_share * noise) / signal

    def move_x_0(self, x_t: Tensor, t: Tensor, noise: Tensor, x_0: Tensor) -> Tensor:
        """Change a prediction of the noise so that it implies the clean image x_0 instead of its own."""
        return noise + (self.predict_x_0(x_t, t, noise) - x_0) / self.sigma(t)[:, None, None, None]

    def min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """Compute the weights of the noise's error that give the error of x_0 the weight min(SNR, gamma): (b,).

        Hang et al. 2023, arXiv 2303.09556, section 3.4.
        """
        return (gamma * self.sigma(t).square()).clamp(max=1)

    def losses(self, denoiser: Predict, x_0: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Compute the hybrid loss (arXiv 2102.09672, eq. 16, with the weights of DiT).

        Args:
            denoiser: returns noise (or v) and variance, (b, 2c, h, w).
            x_0: (b, c, h, w) clean images, about -1 to 1.
            t: (b,) integer timesteps.
            y: (b,) labels.
            noise: (b, c, h, w) standard normal.

        Returns:
            (b,) each: `mse` of the noise (or v); `vb`, the variational bound in bits per dimension, through which only
            the variance learns; and `loss`, their sum.
        """
        x_t = self.noise_image(x_0, t, noise)
        prediction, variance = denoiser(x_t, t, y).to(x_0.dtype).chunk(2, dim=1)
        schedule = {name: _at(values, t) for name, values in self._schedule(x_0.device).items()}
        mse = mean_by_image(torch.square(self._target(schedule, x_0, noise) - prediction))
        predicted_x_0 = self._implied_x_0(schedule, x_t, prediction.detach())
        vb = self._variational_bound(schedule, x_0, x_t, t, predicted_x_0, variance)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _target(self, schedule: Mapping[str, Tensor], x_0: Tensor, noise: Tensor) -> Tensor:
        return noise

    def _implied_x_0(self, schedule: Mapping[str, Tensor], x_t: Tensor, noise: Tensor) -> Tensor:
        return schedule["sqrt_recip_alpha_bar"] * x_t - schedule["sqrt_recip_alpha_bar_minus_1"] * noise

    @staticmethod
    def _variational_bound(
        schedule: Mapping[str, Tensor], x_0: Tensor, x_t: Tensor, t: Tensor, predicted_x_0: Tensor, v: Tensor
    ) -> Tensor:
        true_mean = schedule["posterior_x_0"] * x_0 + schedule["posterior_x_t"] * x_t
        mean = schedule["posterior_x_0"] * predicted_x_0 + schedule["posterior_x_t"] * x_t
        true_log_variance = schedule["posterior_log_variance"]
        fraction = (v + 1) / 2
        log_variance = fraction * schedule["log_beta"] + (1 - fraction) * true_log_variance

        widths = -1 + log_variance - true_log_variance + torch.exp(true_log_variance - log_variance)
        divergence = 0.5 * (widths + torch.square(true_mean - mean) * torch.exp(-log_variance))
        likelihood = -_discretised_gaussian_log_likelihood(x_0, mean, 0.5 * log_variance)
        return torch.where(t == 0, mean_by_image(likelihood), mean_by_image(divergence)) / math.log(2)


class VPrediction(Diffusion):
    """Predict v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022, arXiv 2202.00512, section 4).

    Args:
        zero_terminal_snr: shift and scale sqrt(alpha_bar) so that it ends at 0: the last timestep is pure noise, as in
            sampling, and the network learns the overall brightness there (Lin et al. 2023, arXiv 2305.08891, alg. 1).
    """

    def __init__(self, zero_terminal_snr: bool = False) -> None:
        self.zero_terminal_snr = zero_terminal_snr
        self.name = "diffusion-v-zero-snr" if zero_terminal_snr else "diffusion-v"
        self.scheduler_options = {**Diffusion.scheduler_options, "prediction_type": "v_prediction"}
        if zero_terminal_snr:
            self.scheduler_options["rescale_betas_zero_snr"] = True

    def predict_x_0(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Compute the clean image that v implies: sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v."""
        signal, noise_share = (level[:, None, None, None] for level in self.levels(t))
        return signal * x_t - noise_share * v

    def move_x_0(self, x_t: Tensor, t: Tensor, v: Tensor, x_0: Tensor) -> Tensor:
        """Change v so that it implies the clean image x_0 instead of its own."""
        return v + (self.predict_x_0(x_t, t, v) - x_0) / self.levels(t)[1][:, None, None, None]

    def min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """Compute the weights of the error of v that give the error of x_0 the weight min(SNR, gamma): (b,)."""
        signal, noise_share = self.levels(t)
        return torch.minimum(signal.square(), gamma * noise_share.square())

    def _target(self, schedule: Mapping[str, Tensor], x_0: Tensor, noise: Tensor) -> Tensor:
        return schedule["sqrt_alpha_bar"] * noise - schedule["sqrt_one_minus_alpha_bar"] * x_0

    def _implied_x_0(self, schedule: Mapping[str, Tensor], x_t: Tensor, v: Tensor) -> Tensor:
        return schedule["sqrt_alpha_bar"] * x_t - schedule["sqrt_one_minus_alpha_bar"] * v


class FlowMatching:
    """The straight path between data and noise; predicts its velocity, noise - x_0, on the first c channels.

    Args:
        timesteps: distribution of the timesteps in training, see `draw_timesteps`.
        contrast: weight of the contrastive term in the loss, see `losses`; from 0 to less than 1.
        logits: mean and standard deviation of the logit of logit-normal timesteps.
    """

    name = "flow"
    scheduler_options: Mapping[str, Any] = dict(
        num_train_timesteps=NUM_TIMESTEPS, prediction_type="flow_prediction", use_flow_sigmas=True
    )
    samplers = ("unipc", "euler", "heun", "ancestral")
    default_sampler = "unipc"
    scheduler = _deprecated_scheduler

    def __init__(
        self, timesteps: Timesteps = "uniform", contrast: float = 0.0, logits: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        self.timesteps, self.contrast, self.logits = timesteps, contrast, logits

    def draw_timesteps(self, batch: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Draw (b,) float timesteps from 0 to 1000: uniform, or 1000 / (1 + exp(-u)) with u normal.

        The latter is logit-normal (Esser et al. 2024, arXiv 2403.03206, section 3.1, where m and s are `logits`).
        """
        if self.timesteps == "logit-normal":
            mean, spread = self.logits
            u = mean + spread * torch.randn(batch, device=device, generator=generator)
            return u.sigmoid() * NUM_TIMESTEPS
        return torch.rand(batch, device=device, generator=generator) * NUM_TIMESTEPS

    def noise_image(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Go along the path: (1 - t/1000) x_0 + t/1000 noise."""
        fraction = (t / NUM_TIMESTEPS)[:, None, None, None]
        return (1 - fraction) * x_0 + fraction * noise

    def sigma(self, t: Tensor) -> Tensor:
        """Compute the noise level of timesteps as noise over signal: t / (1000 - t)."""
        return t / (NUM_TIMESTEPS - t)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the shares of the clean image and of noise in x_t: 1 - t/1000 and t/1000."""
        return 1 - t / NUM_TIMESTEPS, t / NUM_TIMESTEPS

    def predict_x_0(self, x_t: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        """Compute the clean image that a prediction of the velocity implies: x_t - t/1000 velocity."""
        return x_t - (t / NUM_TIMESTEPS)[:, None, None, None] * velocity

    def move_x_0(self, x_t: Tensor, t: Tensor, velocity: Tensor, x_0: Tensor) -> Tensor:
        """Change a prediction of the velocity so that it implies the clean image x_0 instead of its own."""
        return velocity + (self.predict_x_0(x_t, t, velocity) - x_0) / (t / NUM_TIMESTEPS)[:, None, None, None]

    def min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """Compute the weights of the velocity's error that give the error of x_0 the weight min(SNR, gamma): (b,)."""
        fraction = t / NUM_TIMESTEPS
        return torch.minimum(1 - fraction, math.sqrt(gamma) * fraction).square()

    def losses(self, denoiser: Predict, x_0: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Compute the squared error of the velocity (arXiv 2401.08740, eq. 8); arguments as `Diffusion.losses`.

        With `contrast`, the squared distance from the velocity of another image of the batch and its noise is
        subtracted with this weight (contrastive flow matching, Stoica et al. 2025, arXiv 2506.05350). The batch is in
        random order, so the other image is the one before.

        Returns:
            (b,) each: `mse`; with `contrast`, `mse_other`, the distance from the other velocity; and `loss`.
        """
        x_t = self.noise_image(x_0, t, noise)
        velocity = denoiser(x_t, t, y).to(x_0.dtype).chunk(2, dim=1)[0]
        return self._compare(velocity, noise - x_0)

    def _compare(self, velocity: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        mse = mean_by_image(torch.square(wanted - velocity))
        if not self.contrast:
            return {"loss": mse, "mse": mse}
        mse_other = mean_by_image(torch.square(wanted.roll(1, dims=0) - velocity))
        return {"loss": mse - self.contrast * mse_other, "mse": mse, "mse_other": mse_other}


class XPredictionFlow(FlowMatching):
    """Flow matching whose network predicts the clean image x; the loss is the velocity's (JiT, arXiv 2511.13720).

    Images lie near a surface of few dimensions, and velocities do not, so x is easier to predict.
    """

    name = "flow-x"
    scheduler_options: Mapping[str, Any] = {**FlowMatching.scheduler_options, "prediction_type": "sample"}
    least = 0.05
    """The loss divides by t/1000, or by this if it is larger, as in JiT."""

    def predict_x_0(self, x_t: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Return the prediction, which is the clean image."""
        return x

    def move_x_0(self, x_t: Tensor, t: Tensor, x: Tensor, x_0: Tensor) -> Tensor:
        """Return x_0, which is the prediction that implies it."""
        return x_0

    def min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """Compute the weights of `mse` that give the error of x_0 the weight min(SNR, gamma): (b,)."""
        fraction = t / NUM_TIMESTEPS
        clipped = fraction.clamp(min=self.least)
        return torch.minimum((1 - fraction) * (clipped / fraction), math.sqrt(gamma) * clipped).square()

    def losses(self, denoiser: Predict, x_0: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Compute the squared error of the velocity that x implies, (x_t - x) / (t/1000); see `FlowMatching.losses`."""
        x_t = self.noise_image(x_0, t, noise)
        x = denoiser(x_t, t, y).to(x_0.dtype).chunk(2, dim=1)[0]
        clipped = (t / NUM_TIMESTEPS).clamp(min=self.least)[:, None, None, None]
        return self._compare((x_t - x) / clipped, (x_t - x_0) / clipped)


_BUILT_IN: list[Objective] = [Diffusion(), VPrediction(), VPrediction(True), FlowMatching(), XPredictionFlow()]
OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in _BUILT_IN}
"""Every objective by its name. Code may add its own."""


def draw_noise(
    objective: Task,
    shape: tuple[int, ...],
    device: torch.device,
    *,
    label_dropout: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw what is random in a training step on images of a shape (b, c, h, w).

    Returns:
        Timesteps (b,); noise (b, c, h, w); and which labels are to become the null label, bool (b,).
    """
    t = objective.draw_timesteps(shape[0], device, generator)
    noise = torch.randn(shape, device=device, generator=generator)
    return t, noise, torch.rand(shape[0], device=device, generator=generator) < label_dropout


def training_losses(
    objective: Task,
    denoiser: Predict,
    x_0: Tensor,
    y: Tensor,
    *,
    null_label: int,
    label_dropout: float,
    generator: torch.Generator | None = None,
    drawn: tuple[Tensor, Tensor, Tensor] | None = None,
    min_snr_gamma: float = 0.0,
) -> dict[str, Tensor]:
    """Draw timesteps, noise and label dropout, and compute the losses of a batch: the losses that training minimizes.

    Args:
        objective: such as `Diffusion()` or `FlowMatching()`.
        denoiser: see the top of this file.
        x_0: (b, c, h, w) clean images.
        y: (b,) labels.
        null_label: the label that means "no label".
        label_dropout: probability that a label becomes the null label, which guidance needs (arXiv 2207.12598).
        generator: draws everything random, on the device of x_0.
        drawn: what `draw_noise` drew for these images, which is then not drawn here.
        min_snr_gamma: weight timesteps by min-SNR with this gamma (arXiv 2303.09556); 0 weights all equally.

    Returns:
        (b,) each, see `losses` of the objective; `loss` is the weighted one.
    """
    t, noise, dropped = drawn or draw_noise(
        objective, tuple(x_0.shape), x_0.device, label_dropout=label_dropout, generator=generator
    )
    losses = objective.losses(denoiser, x_0, t, torch.where(dropped, null_label, y), noise.to(x_0.dtype))
    if min_snr_gamma:
        losses["loss"] = (
            losses["loss"] + (cast(Objective, objective).min_snr_weight(t, min_snr_gamma) - 1) * losses["mse"]
        )
    return losses


@lru_cache(maxsize=16)
def linear_schedule(device: torch.device, zero_terminal_snr: bool = False) -> Mapping[str, Tensor]:
    """Look up the schedule of `Diffusion`: (1000,) float32 each, computed in float64 once per device."""
    with torch.inference_mode(False):
        return {name: array.float().to(device) for name, array in schedule_arrays(zero_terminal_snr).items()}


def schedule_arrays(zero_terminal_snr: bool = False) -> dict[str, Tensor]:
    """Compute the schedule in float64 (Ho et al. 2020, arXiv 2006.11239, eq. 4 and 7); see `VPrediction`."""
    beta = torch.linspace(BETA_START, BETA_END, NUM_TIMESTEPS, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, dim=0)
    if zero_terminal_snr:
        first, last = alpha_bar[[0, -1]].sqrt()
        alpha_bar = ((alpha_bar.sqrt() - last) * first / (first - last)).square()
        beta = 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    posterior_variance = beta * (1 - previous) / (1 - alpha_bar)
    # The first posterior variance is 0; its logarithm is taken from the second.
    clipped = torch.cat([posterior_variance[1:2], posterior_variance[1:]])
    return {
        "beta": beta,
        "alpha_bar": alpha_bar,
        "sqrt_alpha_bar": alpha_bar.sqrt(),
        "sqrt_one_minus_alpha_bar": (1 - alpha_bar).sqrt(),
        "sqrt_recip_alpha_bar": (1 / alpha_bar).sqrt(),
        "sqrt_recip_alpha_bar_minus_1": (1 / alpha_bar - 1).sqrt(),
        # Finite where the signal ends: schedulers of diffusers have this limit too.
        "log_sigma": (1 / alpha_bar.clamp(min=2**-24) - 1).log() / 2,
        "posterior_variance": posterior_variance,
        "posterior_log_variance": clipped.log(),
        "posterior_x_0": beta * previous.sqrt() / (1 - alpha_bar),
        "posterior_x_t": (1 - previous) * (1 - beta).sqrt() / (1 - alpha_bar),
        "log_beta": beta.log(),
    }


def _at(values: Tensor, t: Tensor) -> Tensor:
    """(b, 1, 1, 1): a schedule at timesteps (b,)."""
    return values[t][:, None, None, None]


def mean_by_image(x: Tensor) -> Tensor:
    """Compute the mean of each image: (b, ...) to (b,)."""
    return x.flatten(1).mean(dim=1)


def _discretised_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-likelihood of 8-bit values, scaled to -1 to 1, under a Gaussian; the outer bins reach to infinity."""

    def cumulative(z: Tensor) -> Tensor:
        # The usual tanh approximation of the normal distribution function, which the published losses contain.
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse_scale = torch.exp(-log_scale)
    above = cumulative(inverse_scale * (x - mean + 1 / 255))
    below = cumulative(inverse_scale * (x - mean - 1 / 255))
    smallest = 1e-12
    inside = torch.log((above - below).clamp(min=smallest))
    lowest, highest = torch.log(above.clamp(min=smallest)), torch.log((1 - below).clamp(min=smallest))
    return torch.where(x < -0.999, lowest, torch.where(x > 0.999, highest, inside))
