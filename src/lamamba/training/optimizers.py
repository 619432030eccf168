"""Which parameters an optimizer changes in which way, and the learning rate over a run."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lamamba.config import TrainConfig
from lamamba.training.distillation import BETAS

ADAMW_KEYS, MUON_KEYS = ("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)
"""The names of the tensors that an optimizer keeps for a parameter."""
MOST_VALUES = 2**26
"""The most values that Muon stacks for one step, to bound its memory."""


def hidden_matrices(network: nn.Module) -> dict[str, Tensor]:
    """Find what Muon trains, by name: the weights of linear layers and 2D convolutions in lists of modules.

    These are the layers of the blocks and between the stages. The first and the last layer, embeddings, depthwise
    convolutions and stacks of matrices are left to AdamW (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).
    """
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    inside = {layer for modules in lists for layer in modules.modules()}
    return {
        f"{path}.weight": layer.weight
        for path, layer in network.named_modules()
        if layer in inside and (isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1))
    }


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
    return [adamw, Muon(matrices, config.learning_rate, config.weight_decay)]


class Muon(torch.optim.Optimizer):
    """Step matrices by Muon with Nesterov momentum: all singular values of a step are about equal (Jordan et al. 2024).

    It follows `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`: steps get the length of AdamW's, so that both
    use one learning rate (arXiv 2502.16982, section 2.2). But it steps matrices of the same shape together, where
    PyTorch's launches 26 kernels for each. It also steps convolutions, as matrices with one row per output channel. If
    `found_inf` is set and not 0, a step changes nothing, and the host does not wait for the device, as with fused
    AdamW.
    """

    found_inf: Tensor | None = None

    def __init__(self, parameters: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step all parameters that have a gradient."""
        for group in self.param_groups:
            alike: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape, parameter.dtype, parameter.device].append(parameter)
            for parameters in alike.values():
                number = max(1, MOST_VALUES // max(1, parameters[0].numel()))
                for first in range(0, len(parameters), number):
                    self._step_together(parameters[first : first + number], group)

    def _step_together(self, parameters: list[Tensor], options: Mapping[str, float]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        old, grads = torch.stack(momenta), torch.stack([p.grad for p in parameters if p.grad is not None])
        new = old.lerp(grads, 1 - options["momentum"])
        matrices = grads.lerp(new, options["momentum"]).flatten(2)
        length = 0.2 * max(matrices.shape[1:]) ** 0.5 * options["lr"]
        steps = (_orthogonalize(matrices).to(grads.dtype) * -length).view_as(grads)
        decay: Tensor | float = options["lr"] * options["weight_decay"]
        if self.found_inf is not None:
            skips = self.found_inf != 0
            new, steps, decay = torch.where(skips, old, new), torch.where(skips, 0, steps), torch.where(skips, 0, decay)
        torch._foreach_copy_(momenta, new.unbind())
        torch._foreach_mul_(parameters, 1 - decay)
        torch._foreach_add_(parameters, steps.unbind())


def _orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices (n, o, i) near 1 by five Newton-Schulz iterations, in bfloat16 on a GPU."""
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x.mT.contiguous() if is_tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT.contiguous() if is_tall else x


def learning_rate(config: TrainConfig, images: int) -> float:
    """Compute the learning rate of the step that brings the number of images seen to `images`."""
    rising = min(1.0, images / config.warmup_images) if config.warmup_images else 1.0
    past = max(0, images - config.warmup_images) / max(1, config.num_images - config.warmup_images)
    falling = {"none": 1.0, "linear": 1 - past, "cosine": (1 + math.cos(math.pi * past)) / 2}[config.decay]
    return config.learning_rate * rising * max(0.0, falling)
