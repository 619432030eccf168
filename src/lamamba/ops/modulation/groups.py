"""Linear layers of the same shape as one matrix product, for training.

Every block applies two linear layers to the condition. Their matrix products are small. One by one, these products and
their gradients would be a tenth of the launches of a training step.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamamba.ops.linear import stack_rounded, weight_gradient, weight_gradients


def modulate_in_groups(condition: Tensor, modules: Iterable[Any]) -> Mapping[nn.Module, tuple[Tensor, ...]]:
    """Compute `modulate` for all modules that share the shapes of their layers with another module.

    Args:
        condition: (b, i), in the dtype of the products.
        modules: see `lamamba.ops.modulation.modulate_together`.

    Returns:
        Shifts, scales and gates of these modules, (b, c) each, with gradients.
    """
    groups: dict[object, list[Any]] = defaultdict(list)
    for module in modules:
        layers = (module.condition_projection, module.modulation)
        kinds = ((type(layer), *((x.shape, x.dtype) for x in layer.parameters())) for layer in layers)
        groups[tuple(kinds)].append(module)
    found: dict[nn.Module, tuple[Tensor, ...]] = {}
    for group in groups.values():
        if len(group) == 1:
            continue
        hidden, first = condition, group[0].modulation
        if not isinstance(group[0].condition_projection, nn.Identity):
            (hidden,) = _apply_layers(condition, [module.condition_projection for module in group], None)
        number = first.out_features // first.in_features
        parts = iter(_apply_layers(F.silu(hidden), [module.modulation for module in group], number))
        found |= {module: tuple(next(parts) for _ in range(number)) for module in group}
    return found


def _apply_layers(x: Tensor, layers: list[nn.Linear], num_parts: int | None) -> tuple[Tensor, ...]:
    weights, biases = ([getattr(layer, name) for layer in layers] for name in ("weight", "bias"))
    parts: tuple[Tensor, ...] = _Layers.apply(x, num_parts, *weights, *biases)
    return parts


class _Layers(torch.autograd.Function):
    """Apply n linear layers of the same shape as one matrix product.

    Takes x, the number of parts or None, the n weights (o, i), and the n biases (o,). x is (b, i) if all layers share
    it, and (b, n, i) otherwise. Returns one tensor (b, n, o), or with a number of parts, the parts of every layer's
    result, (b, o / parts) each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_parts: int | None, *parameters: Tensor) -> tuple[Tensor, ...]:
        number = len(parameters) // 2
        weight, bias = (stack_rounded(some, x.dtype) for some in (parameters[:number], parameters[number:]))
        ctx.save_for_backward(x, weight)
        ctx.dtypes = parameters[0].dtype, parameters[-1].dtype
        if x.ndim == 2:
            out = F.linear(x, weight.flatten(0, 1), bias.flatten()).unflatten(1, (number, -1))
        else:
            out = torch.baddbmm(bias[:, None], x.transpose(0, 1), weight.mT).transpose(0, 1)
        if num_parts is None:
            return (out,)
        return tuple(part for own in out.unbind(1) for part in own.chunk(num_parts, dim=1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (weight_dtype, bias_dtype) = ctx.saved_tensors, ctx.dtypes
        number, num_outputs, num_inputs = weight.shape
        grad = (grads[0] if len(grads) == 1 else torch.stack(grads, dim=1)).reshape(len(x), number, num_outputs)
        with torch.autocast(x.device.type, enabled=False):
            if x.ndim == 2:
                grad_x = grad.flatten(1) @ weight.flatten(0, 1)
                grad_weight = weight_gradient(grad.flatten(1), x, weight_dtype).view(number, num_outputs, num_inputs)
            else:
                of_layers = grad.transpose(0, 1)
                grad_x = (of_layers @ weight).transpose(0, 1)
                grad_weight = weight_gradients(of_layers, x.transpose(0, 1), weight_dtype)
            grad_bias = grad.sum(dim=0, dtype=bias_dtype)
        return grad_x, None, *grad_weight.unbind(), *grad_bias.unbind()
