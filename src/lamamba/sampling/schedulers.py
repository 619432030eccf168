"""Makes schedulers of diffusers by name, checks those that users choose, and steps a batch through one."""

import copy
import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor
from typing_extensions import TypedDict

from lamamba.config.checks import is_whole
from lamamba.diffusion import NUM_TIMESTEPS, FlowMatching, Objective
from lamamba.errors import CheckpointError, ConfigError, first_line, reading
from lamamba.files.records import SchedulerRecord, read_record
from lamamba.files.weights import PIPELINE_INDEX

COSINE_SPACING = "cosine"  # `timestep_spacing` of ddim-cosine and ancestral-cosine, which diffusers does not know
_PREDICTIONS = dict(epsilon="noise", v_prediction="v", sample="the clean image", flow_prediction="a flow's velocity")


def make_scheduler(
    objective: Objective,
    sampler: str,
    num_steps: int,
    device: torch.device | None = None,
    clip_sample: bool = False,
) -> Any:
    """Make the diffusers scheduler of one of an objective's samplers, with its timesteps set.

    | sampler | method |
    | --- | --- |
    | ancestral | the training process, backwards; for diffusion with the learned variance (arXiv 2102.09672) |
    | ancestral-cosine | the same, as if predictions were exact, with the steps of the cosine schedule: for few steps |
    | ddim | arXiv 2010.02502 |
    | ddim-cosine | the same with the steps of the cosine schedule (arXiv 2202.00512, section 2) |
    | dpm++ | DPM-Solver++ of second order, 2M (arXiv 2211.01095) |
    | sde-dpm++ | the same for the stochastic equation, SDE-2M |
    | unipc | arXiv 2302.04867 |
    | euler, heun | the classical methods, for flows |

    For diffusion all go from 999 to 0, except three. `ddim` has its published stride from 20 steps on, 0, 1000/n,
    2000/n, ..., which starts at 1000 - 1000/n. Fewer steps of that stride would start where noise does not hide the
    image yet. `ddim-cosine` and `ancestral-cosine` end with a step from a higher timestep to no noise.

    The steps of `ancestral` and `ddim` are even in time. Those of `ddim-cosine` and `ancestral-cosine` are even in the
    angle whose tangent is noise over signal, so that two of the steps are one of half as many. Those of the multistep
    solvers are even in the seventh root of noise over signal (arXiv 2206.00364, eq. 5), rounded to whole timesteps, so
    that from 79 steps on a timestep can occur twice; with zero terminal SNR, whose noise has no upper limit, they are
    even in time (arXiv 2305.08891, section 3.3). For flows all steps are even in time; Heun has two timesteps for each
    step but the last.

    Args:
        objective: what the network was trained with.
        sampler: one of `objective.samplers`.
        num_steps: 1 to 1000.
        device: of the timesteps; None is the CPU.
        clip_sample: hold the clean image that each prediction implies between -1 and 1: for pixels. Without it, a
            pixel whose noise is further out than the network knows can end as a speck. `euler` and `heun` do not clip.

    Raises:
        ConfigError: there is no such sampler, or the number of steps is out of range.
    """
    if sampler not in objective.samplers:
        raise ConfigError(
            f"sampler {sampler!r} does not go with the objective {objective.name!r} that the network was trained with: "
            f"use {' or '.join(objective.samplers)}"
        )
    if not (is_whole(num_steps) and 1 <= num_steps <= NUM_TIMESTEPS):  # beyond the training's, levels of noise repeat
        raise ConfigError(f"{num_steps} steps are out of range: use 1 to {NUM_TIMESTEPS}")
    ends_in_noise = objective.scheduler_options.get("rescale_betas_zero_snr")
    options = {**objective.scheduler_options, "thresholding": clip_sample}  # to 1 by default: clipping
    if sampler == "euler":
        scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TIMESTEPS)
    elif sampler == "heun":
        scheduler = diffusers.FlowMatchHeunDiscreteScheduler(num_train_timesteps=NUM_TIMESTEPS)
    elif sampler.endswith("cosine") or (sampler == "ancestral" and _is_flow(objective)):
        if sampler.endswith("cosine"):
            options["timestep_spacing"] = COSINE_SPACING
        # An ancestral step is one of first order of the stochastic equation, exactly.
        algorithm = "dpmsolver++" if sampler == "ddim-cosine" else "sde-dpmsolver++"
        scheduler = diffusers.DPMSolverMultistepScheduler(**options, algorithm_type=algorithm, solver_order=1)
    elif sampler == "ancestral" and num_steps > 1:
        scheduler = diffusers.DDPMScheduler(**options, variance_type="learned_range", clip_sample=False)
        scheduler.choose_timesteps = _even_timesteps
    elif sampler in ("ancestral", "ddim"):  # a single ancestral step adds no noise either
        # DDIM is the solver of first order (arXiv 2206.00927); diffusers' own DDIM assumes that timesteps are a whole
        # number apart, and the same everywhere.
        scheduler = diffusers.DPMSolverMultistepScheduler(**options, algorithm_type="dpmsolver++", solver_order=1)
        scheduler.choose_timesteps = _even_timesteps if ends_in_noise else _ddim_timesteps
    else:
        if ends_in_noise:
            options["timestep_spacing"] = "trailing"
        elif not _is_flow(objective):
            options["use_karras_sigmas"] = True
        if sampler == "unipc":
            scheduler = diffusers.UniPCMultistepScheduler(**options, solver_order=2)
        else:
            algorithm = {"dpm++": "dpmsolver++", "sde-dpm++": "sde-dpmsolver++"}[sampler]
            scheduler = diffusers.DPMSolverMultistepScheduler(**options, algorithm_type=algorithm, solver_order=2)
    set_timesteps(scheduler, num_steps, device)
    return scheduler


def is_sampler(scheduler: Any, sampler: str, objective: Objective, clip_sample: bool) -> bool:
    """Say whether a scheduler is the one that `make_scheduler` makes for a sampler."""
    made = make_scheduler(objective, sampler, 1, clip_sample=clip_sample)
    return type(scheduler) is type(made) and all(
        scheduler.config.get(name) == value for name, value in made.config.items() if not name.startswith("_")
    )


def set_timesteps(scheduler: Any, num_steps: int, device: torch.device | None = None, first: int = 0) -> None:
    """Set the timesteps of a scheduler for sampling, and correct those of diffusers' flow schedulers.

    diffusers' Euler and Heun schedulers for flows go down to timestep 1 before the last step. A network cannot tell so
    little noise from the image, and Heun, which evaluates it there, leaves noise in the image. diffusers' general
    solvers round a flow's timesteps to whole numbers. Here none of this happens.

    Args:
        scheduler: a scheduler of diffusers. Some that `make_scheduler` makes choose their timesteps themselves.
        num_steps: 1 or more.
        device: device of the timesteps; None is the CPU.
        first: index of the timestep at which sampling begins.

    Raises:
        ConfigError: a flow's steps would end before the noise does.
    """
    spaced = any(scheduler.config.get(f"use_{kind}_sigmas") for kind in ("karras", "exponential", "beta"))
    if hasattr(scheduler, "choose_timesteps"):
        scheduler.set_timesteps(timesteps=scheduler.choose_timesteps(num_steps), device=device)
    elif scheduler.config.get("timestep_spacing") == COSINE_SPACING:
        scheduler.set_timesteps(timesteps=_cosine_timesteps(num_steps, scheduler.alphas_cumprod), device=device)
    elif isinstance(scheduler, diffusers.FlowMatchHeunDiscreteScheduler):
        least, scheduler.sigma_min = scheduler.sigma_min, 1 / num_steps
        scheduler.set_timesteps(num_steps, device=device)
        scheduler.sigma_min = least
    elif isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler) and not spaced:
        scheduler.set_timesteps(sigmas=[1 - step / num_steps for step in range(num_steps)], device=device)
    else:
        scheduler.set_timesteps(num_steps, device=device)
        if option(scheduler, "use_flow_sigmas"):
            if scheduler.sigmas[-1]:
                raise ConfigError(
                    f"the scheduler {type(scheduler).__name__} leaves noise in the images of a flow: use "
                    'UniPCMultistepScheduler or DPMSolverMultistepScheduler, with final_sigmas_type "zero"'
                )
            scheduler.timesteps = scheduler.sigmas[:num_steps].to(device=device) * NUM_TIMESTEPS
    if hasattr(scheduler, "set_begin_index"):  # otherwise it searches for the first timestep, which may occur twice
        scheduler.set_begin_index(first)


def _even_timesteps(num_steps: int, first: float = NUM_TIMESTEPS - 1) -> list[int]:
    """Space whole timesteps evenly from the first down to 0; a single step is the first."""
    return torch.linspace(first, 0, num_steps, dtype=torch.float64).round().long().tolist()


def _cosine_timesteps(num_steps: int, alpha_bar: Tensor) -> list[int]:
    """Choose the whole timesteps nearest to even angles, whose tangent is noise over signal, from the last down."""
    angles = (1 / alpha_bar.double().cpu() - 1).sqrt().atan()
    wanted = angles[-1] * torch.arange(num_steps, 0, -1) / num_steps
    return (angles - wanted[:, None]).abs().argmin(dim=1).tolist()


def _ddim_timesteps(num_steps: int) -> list[int]:
    published = NUM_TIMESTEPS - NUM_TIMESTEPS / num_steps
    return _even_timesteps(num_steps, published if num_steps >= 20 else NUM_TIMESTEPS - 1)


def option(scheduler: Any, name: str) -> Any:
    """Read an option of a scheduler of diffusers; None if its class has no such option.

    A scheduler's configuration may also hold options of other classes, which have no effect.
    """
    classes: list[Any] = type(scheduler).mro()
    has_it = any(name in inspect.signature(kind.__init__).parameters for kind in classes)
    return scheduler.config.get(name) if has_it else None


def _is_flow(objective: Objective) -> bool:
    return bool(objective.scheduler_options.get("use_flow_sigmas"))


def _working(objective: Objective) -> str:
    """Return a scheduler that works for an objective, as code for error messages."""
    if _is_flow(objective):
        takes = objective.scheduler_options["prediction_type"]
        return f'UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="{takes}")'
    return "DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)"


class Steps:
    """The steps of a scheduler for one batch, from noise or from a noisy image to a clean image.

    Schedulers have state, so this works on a copy: several threads can use one scheduler, and no call affects the next.

    Args:
        scheduler: a scheduler of diffusers, which is not changed.
        objective: what the network was trained with.
        num_steps: number of steps of the scheduler.
        strength: fraction of the steps to take, counted from the end; 1 takes all.
        device: device of the timesteps.

    Raises:
        ConfigError: the scheduler cannot take this number of steps, or must begin at its first step.
    """

    def __init__(
        self,
        scheduler: Any,
        objective: Objective,
        num_steps: int,
        strength: float = 1.0,
        device: torch.device | None = None,
    ) -> None:
        self.scheduler, self.objective = copy.deepcopy(scheduler), objective
        taken = min(num_steps, max(1, round(num_steps * strength)))
        first = (num_steps - taken) * getattr(scheduler, "order", 1)
        set_timesteps(self.scheduler, num_steps, device, first)
        if first and len(self.scheduler.timesteps) > num_steps * getattr(scheduler, "order", 1):
            raise ConfigError(
                f"the scheduler {type(scheduler).__name__} begins with steps of another kind, which cannot be left out "
                f"to begin with an image: use {_working(objective)}"
            )
        self.timesteps: Tensor = self.scheduler.timesteps[first:]
        self._takes_variance = option(self.scheduler, "variance_type") == "learned_range"
        self._thresholds = bool(option(self.scheduler, "thresholding"))
        self._clips = self._thresholds or bool(option(self.scheduler, "clip_sample"))
        # Whether `clipped` has to be applied before `step`. These schedulers clip correctly by themselves.
        own = (diffusers.DDPMScheduler, diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler)
        self.needs_clipping = self._clips and not (self._thresholds and isinstance(self.scheduler, own))
        # The schedulers for flows alone have no option for what they take, and take velocities.
        takes_velocity = _is_flow(objective) and option(self.scheduler, "prediction_type") is None
        self._to_velocity = takes_velocity and objective.scheduler_options["prediction_type"] != "flow_prediction"
        self._takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters

    def begin(self, noise: Tensor, start: Tensor | None = None) -> Tensor:
        """Return the input of the first step: noise, or a clean image with the noise of the first timestep."""
        if start is None:
            return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        return self.noised(start, noise, self.timesteps[0])

    def noised(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Add the noise of a timestep to clean images (b, c, h, w)."""
        times = t.expand(len(x_0))
        if hasattr(self.scheduler, "scale_noise"):  # of flow matching
            return self.scheduler.scale_noise(x_0, times, noise)
        return self.scheduler.add_noise(x_0, noise, times)

    def scaled(self, x: Tensor, t: Tensor) -> Tensor:
        """Convert x from the scheduler's own scale to x_t, the input of the network."""
        scale = getattr(self.scheduler, "scale_model_input", None)
        return x if scale is None else scale(x, t)

    def clipped(self, x_t: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """Change predictions so that they imply clean images within the scheduler's limits, if it has limits.

        The clipping of some schedulers is not enough (`needs_clipping`): they clip the clean image but keep the
        unclipped noise, which then no longer matches (DDIM by default).

        Args:
            x_t: (b, c, h, w) input of the network.
            t: timestep, a scalar.
            out: (b, 2c, h, w) output of the network.
        """
        if not self._clips:
            return out
        (prediction, variance), times = out.chunk(2, dim=1), t.expand(len(x_t))
        x_0 = self.objective.predict_x_0(x_t, times, prediction)
        if self._thresholds and self.scheduler.config.sample_max_value != 1:  # a limit for each image, by its values
            within = self.scheduler._threshold_sample(x_0)
        else:
            limit = 1.0 if self._thresholds else self.scheduler.config.get("clip_sample_range", 1.0)
            within = x_0.clamp(-limit, limit)
        return torch.cat([self.objective.move_x_0(x_t, times, prediction, within), variance], dim=1)

    def step(self, out: Tensor, t: Tensor, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Take the step that begins at timestep t. `out` is (b, 2c, h, w); there is one generator per image."""
        prediction = out if self._takes_variance else out.chunk(2, dim=1)[0]
        if self._to_velocity:
            times = t.expand(len(x))
            x_0 = self.objective.predict_x_0(x, times, prediction)
            prediction = FlowMatching().move_x_0(x, times, torch.zeros_like(x), x_0)
        options = {"generator": list(generators)} if self._takes_generator else {}
        return self.scheduler.step(prediction, t, x, return_dict=False, **options)[0]


def choose_scheduler(
    sampler: Any, objective: Objective, channels: int, num_steps: int, strength: float, clip_sample: bool
) -> Any:
    """Make the scheduler of a sampler by name (None: the objective's default), or check a scheduler of diffusers.

    Raises:
        ConfigError: there is no such sampler, or the scheduler would not sample what the network was trained for.
    """
    if sampler is None or isinstance(sampler, str):
        return make_scheduler(objective, sampler or objective.default_sampler, num_steps, clip_sample=clip_sample)
    check_scheduler(sampler, objective, channels, clip_sample, num_steps, strength)
    return sampler


def check_scheduler(
    scheduler: Any, objective: Objective, channels: int, pixels: bool, num_steps: int, strength: float = 1.0
) -> None:
    """Raise ConfigError if a scheduler would sample wrong images from a network.

    First its options are compared with the objective; then it is tried on data whose correct samples are known.

    Args:
        scheduler: a scheduler of diffusers.
        objective: what the network was trained with.
        channels: number of channels of the images or latents.
        pixels: whether the network works on pixels, which have limits, or on latents.
        num_steps: number of steps of the scheduler.
        strength: fraction of the steps to take; less than 1 starts from an image.
    """
    _check_options(scheduler, objective, pixels)
    _try(scheduler, objective, channels, num_steps, strength)


def _check_options(scheduler: Any, objective: Objective, pixels: bool) -> None:
    name = type(scheduler).__name__
    if not callable(getattr(scheduler, "step", None)):
        raise ConfigError(f"the scheduler {name} has no steps to sample with: use {_working(objective)}")
    if not pixels and any(option(scheduler, key) for key in ("clip_sample", "thresholding")):
        raise ConfigError(
            f"the scheduler {name} clips to -1 to 1, as some do by default, and latents go further: make it with "
            f"{name}.from_config(pipe.scheduler.config, clip_sample=False, thresholding=False)"
        )
    flows = name.startswith("FlowMatch") or bool(option(scheduler, "use_flow_sigmas"))
    alpha_bars = getattr(scheduler, "alphas_cumprod", None)
    takes, wanted_prediction = option(scheduler, "prediction_type"), objective.scheduler_options["prediction_type"]
    if _is_flow(objective) and not flows and alpha_bars is not None:
        raise ConfigError(
            f"the scheduler {name} is not for flow matching, which this network was trained with: "
            "use FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler or one with use_flow_sigmas"
        )
    is_only_for_flows = flows and not _is_flow(objective)
    if is_only_for_flows or takes not in (None, wanted_prediction):
        raise ConfigError(
            f"the scheduler {name} {'is for flow matching' if is_only_for_flows else f'takes {takes}'}, and this "
            f'network predicts {_PREDICTIONS[wanted_prediction]}: use one with prediction_type "{wanted_prediction}"'
        )
    if _is_flow(objective):
        return
    if alpha_bars is None:
        raise ConfigError(
            f"the scheduler {name} is not of the noise schedule that this network was trained with, it has noise "
            f"levels of its own: use {_working(objective)}"
        )
    ours = objective.levels(torch.arange(NUM_TIMESTEPS))[0].double().square()
    theirs = torch.as_tensor(alpha_bars).detach().double().cpu()
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-7):
        usual = {"trained_betas": None, "rescale_betas_zero_snr": False, "snr_shift_scale": 1.0}
        wanted = {**usual, **objective.scheduler_options}
        given = {key: option(scheduler, key) for key in wanted}
        other = [key for key, value in given.items() if value is not None and value != wanted[key]]
        said = ", ".join(key if key == "trained_betas" else f"{key} {given[key]}" for key in other)
        raise ConfigError(
            f"the scheduler {name} has other noise levels than the network was trained with "
            f"({said or 'alphas_cumprod'}): make it with {name}.from_config(pipe.scheduler.config), or "
            f"use {_working(objective)}"
        )


# Data for trials: each value is drawn from a Gaussian with this mean and spread.
_MEAN, _SPREAD = 0.4, 0.5
_ERRORS: dict[tuple[Any, ...], float] = {}  # of earlier trials


def _try(scheduler: Any, objective: Objective, channels: int, num_steps: int, strength: float) -> None:
    """Sample known data with the ideal network; raise ConfigError if the images are wrong.

    Two kinds of data reveal different mistakes. A single image is reached exactly with any number of steps, unless
    noise remains or a step fails. A Gaussian is approached with more steps, unless the scheduler misreads the
    predictions or starts from another noise level than the image has. With few steps, most schedulers only lose
    contrast, which gives errors below 1; larger errors mean amplified noise.
    """
    name, use = type(scheduler).__name__, f"use {_working(objective)}"
    from_image = f" from an image at strength {strength:g}" if strength < 1 else ""

    def trial(spread: float, num_steps: int, strength: float) -> float:
        asked = (objective.name, channels, spread, num_steps, strength)
        key = (type(scheduler), str(dict(scheduler.config)), *asked)
        if key not in _ERRORS:
            _ERRORS[key] = _trial(scheduler, objective, channels, spread, num_steps, strength)
        return _ERRORS[key]

    def check_error(error: float, most: float, how: str, advice: str = "") -> None:
        if not error < most:
            size = f"{error:.0%}" if error < 10 else "over 1,000%"
            said = f"its error is {size}" if math.isfinite(error) else "they are not finite"
            raise ConfigError(f"the scheduler {name} makes wrong images{how} (on known data {said}): {advice}{use}")

    try:
        check_error(trial(_SPREAD, 50, 1.0), 0.2, " of what this network predicts")
        if from_image:
            check_error(trial(_SPREAD, 25, strength), trial(_SPREAD, 25, 1.0) + 0.05, from_image)
        how, advice = f" in {num_steps} steps{from_image}", "take another number of steps, or "
        check_error(trial(_SPREAD, num_steps, strength), 1.0, how, advice)
        check_error(trial(0.0, num_steps, strength), 0.1, how, advice)
    except ConfigError:
        raise
    except Exception as error:  # schedulers raise many kinds of errors
        what = f"the scheduler {name} cannot take {num_steps} steps{from_image} ({first_line(error)})"
        raise ConfigError(f"{what}: {use}") from error


def _trial(
    scheduler: Any, objective: Objective, channels: int, spread: float, num_steps: int, strength: float
) -> float:
    """Sample Gaussian data with the ideal network, and measure the error of mean and spread."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.register_to_config(clip_sample=False, thresholding=False)  # a Gaussian has no limits
    steps = Steps(scheduler, objective, num_steps, strength)
    side = math.ceil(math.sqrt(16384 / channels))
    generator = torch.Generator().manual_seed(0)
    image, noise = torch.randn((2, 1, channels, side, side), generator=generator)
    start = _MEAN + spread * (image - image.mean()) / image.std()
    x = steps.begin(noise, start if strength < 1 else None)
    for t in steps.timesteps:
        x_t, times = steps.scaled(x, t), t.expand(1)
        signal, noise_share = (level.double().view(1, 1, 1, 1) for level in objective.levels(times))
        gain = signal * spread**2 / (signal**2 * spread**2 + noise_share**2)
        expected = (_MEAN + gain * (x_t - signal * _MEAN)).to(x_t.dtype)  # the mean of x_0, given x_t
        prediction = objective.move_x_0(x_t, times, torch.zeros_like(x_t), expected)
        x = steps.step(torch.cat([prediction, torch.zeros_like(prediction)], dim=1), t, x, [generator])
    off = x.double() - _MEAN
    return max(float(off.mean().abs()), abs(float(off.std()) - spread)) / _SPREAD


class _Index(TypedDict):
    scheduler: tuple[str, str]


def open_scheduler(pipeline: Path) -> SchedulerMixin:
    """Load the scheduler of a saved pipeline; raises CheckpointError."""
    name = read_record(pipeline / PIPELINE_INDEX, _Index)["scheduler"][1]
    kind: Any = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise CheckpointError(f"{pipeline / PIPELINE_INDEX}: scheduler is {name!r}: diffusers has no such scheduler")
    read_record(pipeline / "scheduler" / "scheduler_config.json", SchedulerRecord)
    what, advice = f"{pipeline / 'scheduler'} cannot be read as a scheduler of diffusers", "copy or download it again"
    with reading(what, advice, CheckpointError):
        return cast(Any, kind).from_pretrained(pipeline / "scheduler", local_files_only=True)
