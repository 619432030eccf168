"""Which parameters an optimizer changes in which way, and the learning rate over a run."""

import math

import torch
from torch import Tensor, nn

from lamamba.config import TrainConfig


def optimizer_keys(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Name the tensors that an optimizer keeps for a parameter."""
    return ("momentum_buffer",) if isinstance(optimizer, torch.optim.Muon) else ("step", "exp_avg", "exp_avg_sq")


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


def learning_rate(config: TrainConfig, images: int) -> float:
    """Compute the learning rate of the step that brings the number of images seen to `images`."""
    rising = min(1.0, images / config.warmup_images) if config.warmup_images else 1.0
    past = max(0, images - config.warmup_images) / max(1, config.num_images - config.warmup_images)
    falling = {"none": 1.0, "linear": 1 - past, "cosine": (1 + math.cos(math.pi * past)) / 2}[config.decay]
    return config.learning_rate * rising * max(0.0, falling)
