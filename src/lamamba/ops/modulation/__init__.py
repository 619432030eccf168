"""The modulation of all blocks from the condition, in three launches instead of three for each block."""

from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamamba.ops.backend import choose_kernels
from lamamba.ops.linear import compute_dtype, find_rounded

MAX_BATCH = 64  # with more images, matrix products of single layers are as fast

Modulations = Mapping[nn.Module, Tensor]


class _Plan(NamedTuple):
    """Tables for the kernel, and what its results are."""

    projections: tuple[Tensor, bool]
    num_hidden: int
    """Outputs of all projections."""
    modulations: tuple[Tensor, bool]
    sizes: dict[nn.Module, int]
    """Outputs of the modulation of each module."""


# By network, for the addresses of its weights. CUDA graphs of a network read its tables, so they live as long.
_plans: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], _Plan]] = WeakKeyDictionary()


def modulate(module: Any, condition: Tensor) -> Tensor:
    """Compute a module's shifts, scales and gates, (b, o), from the condition, (b, i)."""
    modulation: Tensor = module.modulation(F.silu(module.condition_projection(condition)))
    return modulation


def modulate_together(condition: Tensor, network: nn.Module) -> Modulations:
    """Compute `modulate` for every module of a network that has a `condition_projection` and a `modulation`.

    Args:
        condition: (b, i).
        network: the network. A projection is a linear layer or the identity, and a modulation is a linear layer.

    Returns:
        The results by module. There are none where each module has to compute its own: with gradients, with many
        images, in torch.compile, without kernels, for other layers or those with hooks, or with weights that are not
        rounded yet.
    """
    dtype = compute_dtype(condition)
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or len(condition) > MAX_BATCH:
        return {}
    if dtype == torch.float32 or not choose_kernels("modulate_together", condition, "auto"):
        return {}
    modules: list[Any] = [module for module in network.modules() if hasattr(module, "condition_projection")]
    layers = [layer for module in modules for layer in (module.condition_projection, module.modulation)]
    layers = [layer for layer in layers if not isinstance(layer, nn.Identity)]
    if not all(_is_plain(layer, condition) for layer in layers):
        return {}
    weights = {layer: (find_rounded(layer.weight, dtype), find_rounded(layer.bias, dtype)) for layer in layers}
    if any(weight is None or not weight.is_contiguous() for pair in weights.values() for weight in pair):
        return {}

    from lamamba.ops.modulation.triton import linears

    plans = _plans.setdefault(network, {})
    key = tuple(weight.data_ptr() for pair in weights.values() for weight in pair if weight is not None)
    if key not in plans:
        plans[key] = _make_plan(modules, weights, condition.device)
    plan, batch = plans[key], len(condition)
    condition = condition.to(dtype).contiguous()
    hidden = linears(condition, condition, *plan.projections, plan.num_hidden, True) if plan.num_hidden else condition
    out = linears(F.silu(condition), hidden, *plan.modulations, sum(plan.sizes.values()), False)
    parts = out.split([batch * size for size in plan.sizes.values()])
    return {module: part.view(batch, -1) for module, part in zip(plan.sizes, parts, strict=True)}


def _make_plan(modules: list[Any], weights: Mapping[Any, tuple[Any, Any]], device: torch.device) -> _Plan:
    from lamamba.ops.modulation.triton import make_table

    projections = [module.condition_projection for module in modules if module.condition_projection in weights]
    before = list(accumulate((layer.out_features for layer in projections), initial=0))
    starts = dict(zip(projections, before, strict=False))
    first = make_table([(*weights[layer], None) for layer in projections], device)
    rows = [(*weights[module.modulation], starts.get(module.condition_projection)) for module in modules]
    sizes = {module: module.modulation.out_features for module in modules}
    return _Plan(first, before[-1], make_table(rows, device), sizes)


def _is_plain(layer: nn.Module, condition: Tensor) -> bool:
    """Return whether a layer lies on this device, and does nothing but its product when it is called."""
    if not isinstance(layer, nn.Linear) or layer.bias is None or layer.weight.device != condition.device:
        return False
    has_hooks = layer._forward_hooks or layer._forward_pre_hooks
    return type(layer.weight) is nn.Parameter and type(layer).__name__ == "Linear" and not has_hooks
