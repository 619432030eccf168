"""Sample a DiT (Peebles & Xie 2022, arXiv 2212.09748) that diffusers saved, like a network of this package.

The network is diffusers' own. This module finds it, loads it, and calls it as `(x_t, t, y) -> (b, 2c, h, w)`. DiT was
trained with the objective of `lamamba.diffusion.Diffusion`, so all its samplers and guidance work.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from lamamba.diffusion import Diffusion
from lamamba.errors import CheckpointError, ConfigError
from lamamba.files.records import DiTRecord, SchedulerRecord, order_names, read_record
from lamamba.files.weights import PIPELINE_INDEX, check_class, class_of, load_model

# The second is diffusers' name for it when the official weights were published.
DIT_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")


@dataclass(frozen=True)
class DiTConfig:
    """The options of a network that sampling needs."""

    in_channels: int
    sample_size: int
    num_classes: int


class DiT(nn.Module):
    """A denoiser around diffusers' DiTTransformer2DModel.

    Raises:
        CheckpointError: it does not predict the variance.
    """

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        channels, out_channels = transformer.config.in_channels, transformer.config.out_channels
        if out_channels != 2 * channels:
            raise CheckpointError(
                f"this DiT has {channels} input and {out_channels} output channels: only DiTs that also predict the "
                f"variance, with {2 * channels} output channels, can be sampled"
            )
        self.transformer = transformer
        self.config = DiTConfig(channels, transformer.config.sample_size, transformer.config.num_embeds_ada_norm)

    @property
    def null_label(self) -> int:
        """The label that means "no label": the last row of the table."""
        return self.config.num_classes

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict noise and variance, (b, 2c, h, w), for latents (b, c, h, w), timesteps (b,) and labels (b,).

        Raises:
            ConfigError: the latents are not square, or not a multiple of the patch size.
        """
        height, width = x_t.shape[2:]
        patch = self.transformer.config.patch_size
        if height != width or height % patch:
            raise ConfigError(
                f"a DiT samples square latents whose side is a multiple of {patch}, not {height} by {width}"
            )
        return self.transformer(x_t, timestep=t, class_labels=y, return_dict=False)[0]


def is_dit(path: Path) -> bool:
    """Return whether diffusers saved a DiT to this folder: a pipeline or the transformer alone.

    Raises CheckpointError if it is another pipeline, which cannot be sampled here.
    """
    kind = class_of(path)
    if (path / PIPELINE_INDEX).is_file() and kind not in ("LaMambaDiffPipeline", "DiTPipeline"):
        raise CheckpointError(f"{path} is a {kind}: only LaMambaDiffPipeline and DiTPipeline can be sampled")
    return kind in ("DiTPipeline", *DIT_CLASSES)


def load_dit(path: Path) -> tuple[DiT, tuple[str, ...], str | None]:
    """Load a DiT in float32 on the CPU, with its class names and the folder of its autoencoder, which a pipeline has.

    Raises CheckpointError if it is damaged, or was trained with another objective than `Diffusion`.
    """
    from diffusers import DiTTransformer2DModel

    transformer, vae = path, None
    class_names: tuple[str, ...] = ()
    if (path / PIPELINE_INDEX).is_file():
        _check_process(path / "scheduler" / "scheduler_config.json")
        class_names = _class_names(path / PIPELINE_INDEX)
        transformer, vae = path / "transformer", str(path / "vae") if (path / "vae").is_dir() else None
    check_class(transformer, DIT_CLASSES)
    # In training mode, its label embedding drops labels.
    return DiT(load_model(DiTTransformer2DModel, transformer, DiTRecord)).eval(), class_names, vae


class _Index(TypedDict, total=False):
    id2label: dict[str, str] | None


def _check_process(path: Path) -> None:
    """Refuse other noise schedules, because samplers of `Diffusion` cannot reverse them."""
    process: dict[str, Any] = {**read_record(path, SchedulerRecord)} if path.is_file() else {}
    for name, wanted in Diffusion.scheduler_options.items():
        if process.get(name, wanted) != wanted:
            raise CheckpointError(
                f"{path} has {name} {process[name]!r}: only DiTs trained with {wanted!r} can be sampled"
            )


def _class_names(path: Path) -> tuple[str, ...]:
    """Choose the name of each class from a comma-separated list: the first that no other class has."""
    listed = order_names(read_record(path, _Index).get("id2label") or {}, str(path))
    names = [[name.strip() for name in synonyms.split(",")] for synonyms in listed]
    uses = Counter(name for several in names for name in set(several))
    return tuple(
        next((name for name in several if uses[name] == 1), f"{several[0]} {label}")
        for label, several in enumerate(names)
    )
