"""Which parameters an optimizer changes in which way, and the learning rate over a run."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lamamba.config import TrainConfig
from lamamba.training.distillation import BETAS

ADAMW_KEYS, MUON_KEYS = ("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)
"""The names of the tensors that an optimizer keeps for a parameter."""


def hidden_matrices(network: nn.Module) -> dict[str, nn.Parameter]:
    """Find the matrices that Muon trains, by name: the weights of all linear layers in lists of modules.

    These are the layers of the blocks and between the stages. The first and the last layer, embeddings, convolutions
    and stacks of matrices are for AdamW (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).
    """
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    layers = {layer for inside in lists for layer in inside.modules() if isinstance(layer, nn.Linear)}
    return {f"{path}.weight": layer.weight for path, layer in network.named_modules() if layer in layers}


def weights_decayed(network: nn.Module) -> dict[str, bool]:
    """Decide for each parameter, by name, whether weight decay applies: only for matrices and convolution kernels.

    Biases, norms, embeddings, `A_log` and `D` have none, because zero is not their neutral value.
    """

    def decays(module: nn.Module, name: str, parameter: Tensor) -> bool:
        return name.endswith("weight") and parameter.ndim >= 2 and not isinstance(module, nn.Embedding)

    return {
        f"{path}.{name}".lstrip("."): decays(module, name, parameter)
        for path, module in network.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    }


def make_optimizers(
    config: TrainConfig, trained: nn.Module, own: Mapping[str, Tensor], hidden: set[Tensor], fused: bool
) -> list[torch.optim.Optimizer]:
    """Make AdamW for parameters and, if there are hidden matrices, Muon for these.

    Args:
        config: of the run.
        trained: all networks that are trained.
        own: the parameters to step, by name in `trained`.
        hidden: the parameters in `trained` that Muon steps.
        fused: use AdamW's single kernel.
    """
    decays = weights_decayed(trained)
    named = [(name, value) for name, value in own.items() if value not in hidden]
    adamw = torch.optim.AdamW(
        [
            {"params": [value for name, value in named if decays[name]], "weight_decay": config.weight_decay},
            {"params": [value for name, value in named if not decays[name]], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=BETAS if config.distillation else (0.9, 0.999),
        fused=fused,
    )
    matrices = [value for value in own.values() if value in hidden]
    if not matrices:
        return [adamw]
    # Its steps get the length of AdamW's, so that both use one learning rate (arXiv 2502.16982, section 2.2).
    muon = torch.optim.Muon(matrices, config.learning_rate, config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


def learning_rate(config: TrainConfig, images: int) -> float:
    """Compute the learning rate of the step that brings the number of images seen to `images`."""
    rising = min(1.0, images / config.warmup_images) if config.warmup_images else 1.0
    past = max(0, images - config.warmup_images) / max(1, config.num_images - config.warmup_images)
    falling = {"none": 1.0, "linear": 1 - past, "cosine": (1 + math.cos(math.pi * past)) / 2}[config.decay]
    return config.learning_rate * rising * max(0.0, falling)
