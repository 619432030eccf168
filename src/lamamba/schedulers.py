"""Schedulers of diffusers that others choose: whether one fits a network, and the one of a saved pipeline."""

import inspect
from pathlib import Path
from typing import Any, cast

import diffusers
from diffusers import SchedulerMixin
from typing_extensions import TypedDict

from lamamba.diffusion import BETA_END, BETA_START, NUM_TIMESTEPS, has_flow_sigmas
from lamamba.errors import CheckpointError, ConfigError
from lamamba.records import SchedulerRecord, read_record
from lamamba.weights import PIPELINE_INDEX


def check_scheduler(scheduler: Any, objective: str, pixels: bool) -> None:
    """Raise ConfigError where a scheduler cannot work with what a network of an objective predicts."""
    name, config = type(scheduler).__name__, scheduler.config
    taken = inspect.signature(type(scheduler).__init__).parameters  # a configuration keeps what a class does not know
    if not pixels and any(key in taken and config.get(key) for key in ("clip_sample", "thresholding")):
        raise ConfigError(
            f"the scheduler {name} clips to -1 to 1, as some do by default, and latents go further: make it with "
            f"{name}.from_config(pipe.scheduler.config, clip_sample=False, thresholding=False)"
        )
    flows = name.startswith("FlowMatch") or has_flow_sigmas(scheduler)
    predicts = config.get("prediction_type")
    if objective == "flow":
        if not flows:
            raise ConfigError(
                f"the scheduler {name} is not for flow matching, which this network was trained with: "
                "use FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler or one with use_flow_sigmas"
            )
        if "prediction_type" in taken and predicts != "flow_prediction":
            raise ConfigError(
                f"the scheduler {name} takes {predicts}, and this network predicts the velocity of a flow: make it "
                'with prediction_type="flow_prediction"'
            )
        return
    if flows or predicts != "epsilon":
        raise ConfigError(
            f"the scheduler {name} {'is for flow matching' if flows else f'takes {predicts}'}, and this network "
            'predicts noise: use one with prediction_type "epsilon"'
        )
    wanted = {
        "beta_schedule": "linear", "beta_start": BETA_START, "beta_end": BETA_END,
        "num_train_timesteps": NUM_TIMESTEPS,
    }  # fmt: skip
    other = [f"{key} {config.get(key)}" for key, value in wanted.items() if config.get(key) != value]
    if other or config.get("rescale_betas_zero_snr"):
        raise ConfigError(
            f"the scheduler {name} has other noise levels than the network was trained with "
            f"({', '.join(other) or 'rescale_betas_zero_snr'}): "
            f"make it with {name}.from_config(pipe.scheduler.config)"
        )


class _Index(TypedDict):
    scheduler: tuple[str, str]


def open_scheduler(pipeline: Path) -> SchedulerMixin:
    """Load the scheduler of a saved pipeline; raises CheckpointError."""
    name = read_record(pipeline / PIPELINE_INDEX, _Index)["scheduler"][1]
    kind: Any = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise CheckpointError(f"{pipeline / PIPELINE_INDEX}: scheduler is {name!r}: diffusers has no such scheduler")
    read_record(pipeline / "scheduler" / "scheduler_config.json", SchedulerRecord)
    try:
        return cast(Any, kind).from_pretrained(pipeline / "scheduler", local_files_only=True)
    except Exception as error:  # diffusers raises many kinds for a damaged folder
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{pipeline / 'scheduler'} cannot be read as a scheduler of diffusers: {line}") from error
