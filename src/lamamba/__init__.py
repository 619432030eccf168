"""LaMamba-Diff: linear-time image diffusion. Public names are imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_NAMES = {
    "lamamba.checkpoints.checkpoint": ("load_checkpoint", "load_denoiser"),
    "lamamba.checkpoints.released": ("load_released",),
    "lamamba.commands.distill": ("distill",),
    "lamamba.config": ("DistillConfig", "GuidanceOptions", "TrainConfig"),
    "lamamba.data": ("to_uint8",),
    "lamamba.diffusion": ("Diffusion", "FlowMatching", "VPrediction", "XPredictionFlow", "training_losses"),
    "lamamba.errors": ("CheckpointError", "ConfigError", "DataError", "LamambaError"),
    "lamamba.model": ("LaMambaDiff",),
    "lamamba.sampling": ("sample",),
    "lamamba.sampling.guidance": ("guide",),
    "lamamba.sampling.pipeline": ("LaMambaDiffPipeline",),
    "lamamba.sampling.schedulers": ("make_scheduler",),
    "lamamba.training.run": ("Run", "train"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from lamamba.checkpoints.checkpoint import load_checkpoint as load_checkpoint
    from lamamba.checkpoints.checkpoint import load_denoiser as load_denoiser
    from lamamba.checkpoints.released import load_released as load_released
    from lamamba.commands.distill import distill as distill
    from lamamba.config import DistillConfig as DistillConfig
    from lamamba.config import GuidanceOptions as GuidanceOptions
    from lamamba.config import TrainConfig as TrainConfig
    from lamamba.data import to_uint8 as to_uint8
    from lamamba.diffusion import Diffusion as Diffusion
    from lamamba.diffusion import FlowMatching as FlowMatching
    from lamamba.diffusion import VPrediction as VPrediction
    from lamamba.diffusion import XPredictionFlow as XPredictionFlow
    from lamamba.diffusion import training_losses as training_losses
    from lamamba.errors import CheckpointError as CheckpointError
    from lamamba.errors import ConfigError as ConfigError
    from lamamba.errors import DataError as DataError
    from lamamba.errors import LamambaError as LamambaError
    from lamamba.model import LaMambaDiff as LaMambaDiff
    from lamamba.sampling import sample as sample
    from lamamba.sampling.guidance import guide as guide
    from lamamba.sampling.pipeline import LaMambaDiffPipeline as LaMambaDiffPipeline
    from lamamba.sampling.schedulers import make_scheduler as make_scheduler
    from lamamba.training.run import Run as Run
    from lamamba.training.run import train as train


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lamamba' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
