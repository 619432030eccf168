"""Compare each operation, as it runs on this machine, with its reference, on a tiny input."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lamamba.ops.backend import choose_kernels, choose_loops, choose_loops_outside_graphs
from lamamba.ops.depthwise_convolution import depthwise_convolution
from lamamba.ops.depthwise_convolution.reference import depthwise_convolution_reference
from lamamba.ops.fused_layers import Norm, gated_norm_linear, norm_attention, norm_linear_in_halves, norm_mlp
from lamamba.ops.gated_norm import gated_norm
from lamamba.ops.gated_norm.reference import gated_norm_reference
from lamamba.ops.grid import NUM_PATHS
from lamamba.ops.launch import precompile
from lamamba.ops.linear_gelu import linear_gelu
from lamamba.ops.linear_gelu.reference import linear_gelu_reference
from lamamba.ops.residual_norm import Residual, residual_norm
from lamamba.ops.residual_norm.reference import add_gated_reference, layer_norm_reference
from lamamba.ops.selective_scan import scan_grid
from lamamba.ops.sequence_scan import selective_scan_fn
from lamamba.ops.window_attention import window_attention
from lamamba.ops.window_attention.reference import window_attention_reference

_BATCH, _SIDE, _CHANNELS, _RANK, _HEADS, _WINDOW, _EPS, _LENGTH = 2, 6, 16, 4, 2, 4, 1e-5, 20
# Wrong results differ by a tenth or more; rounding changes only the last digits.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


class Operation(NamedTuple):
    """An operation, its reference, and the shapes of their inputs."""

    run: Callable[..., Tensor]
    meaning: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    takes_loops: Callable[[Tensor], bool] = lambda x: False
    """Return whether loops compiled by numba run for such an input."""


class Agreement(NamedTuple):
    """Which version of an operation ran, and how far its results are from the reference."""

    version: str
    """Kernels, compiled loops or PyTorch."""
    error: float
    """The largest relative error of the result and the gradients: norm of the difference over norm of the reference."""
    holds: bool
    """Whether the error is within rounding."""


def check_operation(name: str, device: torch.device, dtype: torch.dtype) -> Agreement:
    """Run an operation forward and backward on a device, and compare it with its reference in float64 on the CPU.

    Args:
        name: a name in `OPERATIONS`.
        device: where the operation runs, in the version that "auto" selects.
        dtype: dtype of the inputs, one of `TOLERANCES`.

    Returns:
        Which version ran, and how well it agrees with the reference.
    """
    operation = OPERATIONS[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in operation.shapes]
    ours = [tensor.to(device) for tensor in inputs]
    if choose_kernels(name, ours[0], "auto"):
        version = "kernels"
        precompile(_differentiate, operation.run, ours)
    else:
        version = "compiled loops" if operation.takes_loops(ours[0]) else "PyTorch"
    wanted = _differentiate(operation.meaning, [tensor.double() for tensor in inputs])
    found = _differentiate(operation.run, ours)
    error = max(_relative_error(value, exact) for value, exact in zip(found, wanted, strict=True))
    return Agreement(version, error, error <= TOLERANCES[dtype])


def _differentiate(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def _relative_error(value: Tensor, exact: Tensor) -> float:
    difference = float((value.cpu().double() - exact).norm() / exact.norm())
    return difference if difference == difference else float("inf")


def _residual_norm(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.cat(residual_norm(x, Residual(branch, gate, bias), modulation=(shift, scale), eps=_EPS))


def _residual_norm_meaning(
    x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor, shift: Tensor, scale: Tensor
) -> Tensor:
    x = add_gated_reference(x, branch, gate, bias)
    return torch.cat((x, layer_norm_reference(x, None, None, (shift, scale), _EPS, x.dtype)))


def _fused(
    function: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...], takes_loops: Callable[[Tensor], bool]
) -> Operation:
    """Check layers after a norm: the result without gradients, and the gradients of the separate operations."""

    def run(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            fused = function(*inputs)
        out = function(*inputs)
        return out + (fused - out).detach()

    return Operation(run, partial(function, backend="pytorch"), shapes, takes_loops)


def _takes_norm_loops(x: Tensor) -> bool:
    return choose_loops_outside_graphs((x,), "auto")


def _norm(x: Tensor, branch: Tensor, of_images: Tensor, of_channels: Tensor) -> Norm:
    gate, shift, scale = of_images.unbind(1)
    weight, bias, branch_bias = of_channels.unbind(0)
    return Norm(x, Residual(branch, gate, branch_bias), weight, bias, (shift, scale), _EPS)


def _norm_mlp(*inputs: Tensor, **options: Any) -> Tensor:
    *norm, weight_1, bias_1, weight_2 = inputs
    return torch.cat(norm_mlp(_norm(*norm), _KEEPS_SIZE * weight_1, bias_1, weight_2, **options))


def _norm_linear(*inputs: Tensor, **options: Any) -> Tensor:
    *norm, weight = inputs
    return torch.cat(norm_linear_in_halves(_norm(*norm), weight, **options))


def _norm_attention(*inputs: Tensor, **options: Any) -> Tensor:
    *norm, qkv, qkv_bias, bias, weight = inputs
    return torch.cat(
        norm_attention(_norm(*norm), _KEEPS_SIZE * qkv, qkv_bias, bias, weight, _HEADS, _WINDOW, True, **options)
    )


def _gated_norm_linear(
    planes: Tensor, z: Tensor, weight: Tensor, bias: Tensor, layer: Tensor, **options: Any
) -> Tensor:
    return gated_norm_linear(planes, z, weight, bias, _EPS, layer, **options)


_GRID = (_BATCH, _SIDE, _SIDE, _CHANNELS)
_PER_IMAGE = (_BATCH, _CHANNELS)
_NORM = (_GRID, _GRID, (_BATCH, 3, _CHANNELS), (3, _CHANNELS))
_SQUARE = (_CHANNELS, _CHANNELS)
_KEEPS_SIZE = _CHANNELS**-0.5  # factor of a normal weight; with larger logits, rounding would grow


def _scan(num_states: int) -> Operation:
    low = (_BATCH, _SIDE, _SIDE, NUM_PATHS * (_RANK + 2 * num_states))
    per_channel = (NUM_PATHS, _CHANNELS)
    return Operation(
        lambda *inputs: scan_grid(*inputs).sum(dim=0),
        lambda x, low, weight, bias, A_log, D: scan_grid(x, low, weight, bias, A_log, D, backend="pytorch").sum(dim=0),
        (_GRID, low, (*per_channel, _RANK), per_channel, (*per_channel, num_states), per_channel),
        lambda x: choose_loops(x, "auto"),
    )


def _sequences(num_states: int) -> Operation:
    sequences, weights = (1, _CHANNELS, _LENGTH), (1, num_states, _LENGTH)

    def scan(
        u: Tensor, delta: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, **options: Any
    ) -> Any:
        return selective_scan_fn(u, delta, -torch.exp(A_log), B, C, D, z, delta_softplus=True, **options)

    shapes = (sequences, sequences, (_CHANNELS, num_states), weights, weights, (_CHANNELS,), sequences)
    return Operation(scan, partial(scan, backend="pytorch"), shapes, lambda x: choose_loops(x, "auto"))


OPERATIONS: Mapping[str, Operation] = {
    "scan_grid": _scan(num_states=1),
    "scan_grid, 4 states": _scan(num_states=4),
    "selective_scan_fn": _sequences(num_states=1),
    "selective_scan_fn, 4 states": _sequences(num_states=4),
    "window_attention": Operation(
        lambda qkv, bias: window_attention(qkv, bias, _HEADS, _WINDOW, shifted=True),
        lambda qkv, bias: window_attention_reference(qkv, bias, _HEADS, _WINDOW, True),
        ((*_GRID[:3], 3 * _CHANNELS), ((2 * _WINDOW - 1) ** 2, _HEADS)),
        lambda x: x.dtype == torch.float32 and choose_loops(x, "auto"),
    ),
    "depthwise_convolution": Operation(
        depthwise_convolution, depthwise_convolution_reference, (_GRID, (_CHANNELS, 1, 3, 3), (_CHANNELS,))
    ),
    "gated_norm": Operation(
        lambda planes, z, weight, bias: gated_norm(planes, z, weight, bias, _EPS),
        lambda planes, z, weight, bias: gated_norm_reference(planes, z, weight, bias, _EPS),
        ((1, *_GRID), _GRID, (_CHANNELS,), (_CHANNELS,)),
        _takes_norm_loops,
    ),
    "residual_norm": Operation(
        _residual_norm,
        _residual_norm_meaning,
        (_GRID, _GRID, _PER_IMAGE, (_CHANNELS,), _PER_IMAGE, _PER_IMAGE),
        _takes_norm_loops,
    ),
    "linear_gelu": Operation(linear_gelu, linear_gelu_reference, (_GRID, (32, _CHANNELS), (32,))),
    "norm_linear": _fused(_norm_linear, (*_NORM, (2 * _CHANNELS, _CHANNELS)), _takes_norm_loops),
    "norm_mlp": _fused(_norm_mlp, (*_NORM, (32, _CHANNELS), (32,), (_CHANNELS, 32)), _takes_norm_loops),
    "norm_attention": _fused(
        _norm_attention,
        (*_NORM, (3 * _CHANNELS, _CHANNELS), (3 * _CHANNELS,), ((2 * _WINDOW - 1) ** 2, _HEADS), _SQUARE),
        _takes_norm_loops,
    ),
    "gated_norm_linear": _fused(
        _gated_norm_linear, ((NUM_PATHS, *_GRID), _GRID, (_CHANNELS,), (_CHANNELS,), (8, _CHANNELS)), lambda x: False
    ),
}  # fmt: skip
