"""Data whose distribution is known, and what a perfectly trained network answers for them."""

import itertools
import math
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from lamamba.diffusion import Diffusion, FlowMatching, VPrediction, XPredictionFlow, schedule_arrays


class Mixture(NamedTuple):
    """Data whose pixels are drawn, each by itself, from a mixture of Gaussians."""

    weights: Tensor
    means: Tensor
    spreads: Tensor

    @property
    def mean(self) -> float:
        return float((self.weights * self.means).sum())

    @property
    def spread(self) -> float:
        return math.sqrt(float((self.weights * (self.spreads**2 + self.means**2)).sum()) - self.mean**2)

    def below(self, x: Tensor, signal: float, noise: float) -> Tensor:
        """Compute the probability that a pixel, noised so far, lies below x."""
        deviation = ((signal * self.spreads) ** 2 + noise**2).sqrt()
        return (self.weights * torch.special.ndtr((x[..., None] - signal * self.means) / deviation)).sum(-1)

    def destination(self, x: Tensor, signal: float, noise: float) -> Tensor:
        """Solve the probability flow from this level of noise to none exactly: pixels keep their place in the order."""
        place, low, high = self.below(x, signal, noise), torch.full_like(x, -8), torch.full_like(x, 8)
        for _ in range(60):
            middle = (low + high) / 2
            above = self.below(middle, 1, 0) < place
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return low


def mixture(weights: list[float], means: list[float], spreads: list[float]) -> Mixture:
    return Mixture(*(torch.tensor(values, dtype=torch.float64) for values in (weights, means, spreads)))


GAUSSIAN = mixture([1.0], [0.3], [0.5])
TWO_HILLS = mixture([0.35, 0.65], [-0.8, 0.5], [0.4, 0.5])


def levels(objective: Diffusion | FlowMatching, t: float) -> tuple[float, float]:
    """Share of signal and of noise in x_t, in float64."""
    if isinstance(objective, FlowMatching):
        return 1 - t / 1000, t / 1000
    log_sigma = (1 / schedule_arrays(objective.zero_terminal_snr)["alpha_bar"].clamp(min=2**-24) - 1).log() / 2
    below = min(int(t), 998)
    sigma = math.exp(torch.lerp(log_sigma[below], log_sigma[below + 1], min(t, 999) - below))  # log-linear between
    return 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)


class KnownDenoiser:
    """What a perfectly trained network answers: its prediction and, where the timesteps are known, the variance."""

    def __init__(
        self, objective: Diffusion | FlowMatching, data: Mixture = GAUSSIAN, timesteps: list[int] | None = None
    ) -> None:
        self.config = SimpleNamespace(sample_size=48, in_channels=1, num_classes=0)
        self.null_label, self.device = 0, torch.device("cpu")
        self.objective, self.data = objective, data
        self.earlier = dict(itertools.pairwise(timesteps)) if timesteps else {}

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        signal, noise = levels(self.objective, float(t[0]))
        weights, means, spreads = self.data
        variance = (signal * spreads) ** 2 + noise**2
        excess = x.double()[..., None] - signal * means
        share = torch.softmax(weights.log() - variance.log() / 2 - excess**2 / (2 * variance), dim=-1)
        component_x_0 = means + signal * spreads**2 / variance * excess
        expected_x_0 = (share * component_x_0).sum(-1)
        expected_noise = (share * noise / variance * excess).sum(-1)
        if isinstance(self.objective, FlowMatching):
            velocity, position = expected_noise - expected_x_0, torch.zeros_like(expected_x_0)
            prediction = expected_x_0 if isinstance(self.objective, XPredictionFlow) else velocity
        else:
            square = (share * (component_x_0**2 + (spreads * noise) ** 2 / variance)).sum(-1)
            v = signal * expected_noise - noise * expected_x_0
            prediction = v if isinstance(self.objective, VPrediction) else expected_noise
            position = self.log_variance_position(int(t[0]), square - expected_x_0**2)
        return torch.cat([prediction, position], dim=1).float()

    def log_variance_position(self, t: int, variance_of_x_0: Tensor) -> Tensor:
        """Where, from -1 to 1, the log of the true variance of x_earlier given x_t lies between the two bounds."""
        alpha_bars = schedule_arrays(getattr(self.objective, "zero_terminal_snr", False))["alpha_bar"]
        if t not in self.earlier:
            return torch.zeros_like(variance_of_x_0)
        alpha_bar, earlier = float(alpha_bars[t]), float(alpha_bars[self.earlier[t]])
        beta = 1 - alpha_bar / earlier
        lower = beta * (1 - earlier) / (1 - alpha_bar)
        true = lower + (math.sqrt(earlier) * beta / (1 - alpha_bar)) ** 2 * variance_of_x_0
        return 2 * torch.log(true / lower) / math.log(beta / lower) - 1
