"""The modulation of all blocks from the condition, in fewer launches than one block at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamamba.ops.backend import choose_kernels
from lamamba.ops.linear import Linear, compute_dtype, find_rounded
from lamamba.ops.modulation.groups import modulate_in_groups

MAX_BATCH = 64  # of the kernel; with more images, separate matrix products are as fast
# Plans that a network keeps, besides those of CUDA graphs. Without a limit, weights that move often would fill memory.
KEPT = 4

Modulations = Mapping[nn.Module, Sequence[Tensor]]
"""The shifts, scales and gates of each module, (b, c) each."""


@dataclass
class _Plan:
    """Tables for the kernel, and the sizes of its results."""

    projections: tuple[Tensor, bool]
    num_hidden: int
    """Outputs of all projections."""
    modulations: tuple[Tensor, bool]
    sizes: list[int]
    """Outputs of the modulation of each module."""
    is_in_graph: bool = False
    """Whether a CUDA graph reads the tables."""


# The plans of each network, by the addresses and shapes of its weights. CUDA graphs of a network read its tables, so
# these tables live as long as the network.
_plans: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], _Plan]] = WeakKeyDictionary()


def modulate(module: Any, condition: Tensor) -> tuple[Tensor, ...]:
    """Compute a module's shifts, scales and gates, (b, c) each, from the condition, (b, i)."""
    hidden = F.silu(module.condition_projection(condition))
    return _cut(module.modulation(hidden), hidden.shape[1])


def _cut(modulation: Tensor, width: int) -> tuple[Tensor, ...]:
    return modulation.unflatten(1, (-1, width)).unbind(1)


def modulate_together(condition: Tensor, network: nn.Module) -> Modulations:
    """Compute `modulate` for every module of a network that has a `condition_projection` and a `modulation`.

    Args:
        condition: (b, i).
        network: the network. A projection is a linear layer or the identity, and a modulation is a linear layer.

    Returns:
        The results by module. A module without a result has to compute its own:

        * Always: all modules with no images, in torch.compile, in float32, without kernels, or if any layer has another
          type or hooks.
        * Without gradients: all modules with more than MAX_BATCH images, or with weights that are not rounded yet.
        * With gradients: each module whose layers have shapes that no other module has.
    """
    dtype, with_gradients = compute_dtype(condition), torch.is_grad_enabled()
    if torch.compiler.is_compiling() or len(condition) == 0 or not (with_gradients or len(condition) <= MAX_BATCH):
        return {}
    if dtype == torch.float32 or not choose_kernels("modulate_together", condition, "auto"):
        return {}
    modules: list[Any] = [module for module in network.modules() if hasattr(module, "condition_projection")]
    layers = [layer for module in modules for layer in (module.condition_projection, module.modulation)]
    layers = [layer for layer in layers if not isinstance(layer, nn.Identity)]
    if not all(_is_plain(layer, condition) for layer in layers):
        return {}
    if with_gradients:
        return modulate_in_groups(condition.to(dtype), modules)
    weights = {layer: (find_rounded(layer.weight, dtype), find_rounded(layer.bias, dtype)) for layer in layers}
    if any(weight is None or not weight.is_contiguous() for pair in weights.values() for weight in pair):
        return {}

    from lamamba.ops.modulation.triton import linears

    plans = _plans.setdefault(network, {})
    addresses = (weight.data_ptr() for pair in weights.values() for weight in pair if weight is not None)
    key = *addresses, *(layer.weight.shape for layer in layers)
    is_recorded = condition.is_cuda and torch.cuda.is_current_stream_capturing()
    plan = plans.get(key)
    if plan is None:
        if is_recorded:  # copying a new table to the GPU would end the recording
            return {}
        plan = plans[key] = _make_plan(modules, weights, condition.device)
        _forget_old(plans)
    plan.is_in_graph |= is_recorded
    batch = len(condition)
    condition = condition.to(dtype).contiguous()
    hidden = linears(condition, condition, *plan.projections, plan.num_hidden, True) if plan.num_hidden else condition
    out = linears(F.silu(condition), hidden, *plan.modulations, sum(plan.sizes), False)
    parts = out.split([batch * size for size in plan.sizes])
    return {
        module: _cut(part.view(batch, -1), module.modulation.in_features)
        for module, part in zip(modules, parts, strict=True)
    }


def _forget_old(plans: dict[tuple[object, ...], _Plan]) -> None:
    others = [key for key, plan in list(plans.items()) if not plan.is_in_graph]
    for key in others[:-KEPT]:
        plans.pop(key, None)


def _make_plan(modules: list[Any], weights: Mapping[Any, tuple[Any, Any]], device: torch.device) -> _Plan:
    from lamamba.ops.modulation.triton import make_table

    projections = [module.condition_projection for module in modules if module.condition_projection in weights]
    before = list(accumulate((layer.out_features for layer in projections), initial=0))
    starts = dict(zip(projections, before, strict=False))
    first = make_table([(*weights[layer], None) for layer in projections], device)
    rows = [(*weights[module.modulation], starts.get(module.condition_projection)) for module in modules]
    sizes = [module.modulation.out_features for module in modules]
    return _Plan(first, before[-1], make_table(rows, device), sizes)


def _is_plain(layer: nn.Module, condition: Tensor) -> bool:
    """Return whether a layer lies on this device, and does nothing but its product when it is called."""
    # Other classes may be called Linear, too. Libraries that offload or adapt layers replace the method of an object.
    if type(layer) not in (nn.Linear, Linear) or "forward" in vars(layer):
        return False
    assert isinstance(layer, nn.Linear)
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    weight, bias = layer.weight, layer.bias
    if type(weight) is not nn.Parameter or type(bias) is not nn.Parameter or weight.device != condition.device:
        return False
    return weight.shape == (layer.out_features, layer.in_features)  # weights may also be in parts, on several devices
