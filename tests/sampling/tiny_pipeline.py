"""A pipeline that samples in milliseconds, and the latents of its images."""

from typing import Any

import torch

from lamamba.diffusion import OBJECTIVES
from lamamba.model import LaMambaDiff
from lamamba.sampling.pipeline import LaMambaDiffPipeline
from lamamba.sampling.schedulers import make_scheduler

NAMES = ("T-shirt", "Coat", "Bag")


def build(objective: str = "diffusion", vae: Any = None, **options: Any) -> LaMambaDiffPipeline:
    torch.manual_seed(0)
    tiny = {
        "in_channels": 1, "sample_size": 8, "num_classes": 3, "embed_dim": 8, "num_heads": 2, "depths": (1, 1, 1, 1),
        "bottleneck_depth": 1,
    }  # fmt: skip
    network = LaMambaDiff(**{**tiny, **options}).eval()
    for parameter in network.parameters():  # new networks ignore their inputs, because gates are zero
        torch.nn.init.normal_(parameter, std=0.1)
    kind = OBJECTIVES[objective]
    names = dict(enumerate(NAMES)) if network.config.num_classes else None
    pipe = LaMambaDiffPipeline(network, make_scheduler(kind, kind.default_sampler, 4), vae, names, objective)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def latents_of(pipe: LaMambaDiffPipeline, labels: Any = None, num_steps: int = 4, **options: Any) -> torch.Tensor:
    options = {"generator": torch.Generator().manual_seed(7), **options}
    out: torch.Tensor = pipe(labels, num_steps, output_type="latent", **options).images
    assert out.isfinite().all()
    return out
