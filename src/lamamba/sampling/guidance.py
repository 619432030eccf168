"""Classifier-free guidance and autoguidance."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lamamba.config import PLAIN_GUIDANCE, GuidanceOptions
from lamamba.diffusion import NUM_TIMESTEPS, Predict
from lamamba.errors import ConfigError


def guide(
    denoiser: Predict,
    scale: float,
    null_label: int,
    options: GuidanceOptions = PLAIN_GUIDANCE,
    *,
    sigma: Callable[[Tensor], Tensor] | None = None,
    weaker: Predict | None = None,
) -> Predict:
    """Return a guided denoiser, whose predictions move away from those of a worse denoiser.

        guided = worse + s(t) (labelled - worse),        s(t) = 1 + (scale - 1) (1 - cos(pi (1 - t/1000)^power)) / 2

    The worse denoiser is the same one without a label (classifier-free guidance, Ho & Salimans 2022, arXiv
    2207.12598) or a weaker denoiser with the same label (autoguidance, Karras et al. 2024, arXiv 2406.02507). The
    schedule s is MDT's (Gao et al. 2023, arXiv 2303.14389), constant where `options.cosine_power` is 0; outside
    `options.interval`, in noise over signal, s is 1 (Kynkaanniemi et al. 2024, arXiv 2404.07724). The guided prediction
    is then multiplied by 1 + rescale (std(labelled) / std(guided) - 1), each over an image's values (Lin et al. 2023,
    arXiv 2305.08891, eq. 15 and 16). The variance, where there is one, stays the labelled one.

    Args:
        denoiser: see `lamamba.diffusion`.
        scale: 1 is no guidance.
        null_label: the label that means "no label".
        options: interval, cosine power and rescaling.
        sigma: computes the noise level of timesteps, as the objective does; needed with an interval.
        weaker: a weaker denoiser to guide away from; None is the same denoiser without a label.

    Raises:
        ConfigError: the scale is not finite, or there is an interval and no sigma.
    """
    if not math.isfinite(scale):
        raise ConfigError(f"guidance_scale is {scale}: give a number, 1 for no guidance")
    interval = options.interval
    if interval is not None and sigma is None:
        raise ConfigError(
            "an interval of noise levels needs sigma, the noise level of a timestep: give objective.sigma"
        )
    if scale == 1:
        return denoiser

    def scales(t: Tensor) -> Tensor:
        time_left = 1 - t.float() / NUM_TIMESTEPS
        strength = (1 - torch.cos(math.pi * time_left**options.cosine_power)) / 2
        if interval is not None and sigma is not None:
            level = sigma(t)
            strength = torch.where((level >= interval[0]) & (level <= interval[1]), strength, 0.0)
        return (1 + (scale - 1) * strength)[:, None, None, None]

    def unlabeled(y: Tensor) -> Tensor:
        if not y.is_floating_point():
            return torch.full_like(y, null_label)
        weights = torch.zeros_like(y)
        weights[:, null_label] = 1
        return weights

    def guided(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        scale_of = scales(t).to(x_t.dtype)
        if interval is not None and bool((scale_of == 1).all()):  # outside of it one evaluation is enough
            return denoiser(x_t, t, y)
        if weaker is None:
            doubled = torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, unlabeled(y)])
            labelled, other = denoiser(*doubled).chunk(2)
        else:
            labelled, other = denoiser(x_t, t, y), weaker(x_t, t, y)
        prediction, variance = labelled.chunk(2, dim=1)
        worse = other.chunk(2, dim=1)[0]
        moved = worse + scale_of * (prediction - worse)
        if options.rescale:
            ratio = prediction.std(dim=(1, 2, 3), keepdim=True) / moved.std(dim=(1, 2, 3), keepdim=True)
            moved = moved * (1 + options.rescale * (ratio - 1))
        return torch.cat([moved, variance], dim=1)

    return guided
