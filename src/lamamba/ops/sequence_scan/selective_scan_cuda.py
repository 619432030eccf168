"""The functions of the module `selective_scan_cuda`, which `mamba_ssm` and its forks compile, without a compiler.

Register this module under that name before the first import of `mamba_ssm` or of a fork:

    sys.modules["selective_scan_cuda"] = lamamba.ops.sequence_scan.selective_scan_cuda

Nothing is kept between the two passes: `bwd` runs the forward pass again. `selective_scan_fn` itself is faster.
"""

from typing import Any

import torch
from torch import Tensor

from lamamba.ops.sequence_scan import selective_scan_fn


def fwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool,
) -> list[Tensor]:
    """Scan; arguments as in `lamamba.ops.selective_scan_fn`.

    Returns:
        y, then (b, d, 1, 2 n) whose odd places hold the last state, and with z the gated y. The first y is gated, too,
        because `bwd` does not read it.
    """
    y, last = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state=True)
    states = torch.stack([torch.ones_like(last), last], dim=3).flatten(2)[:, :, None]
    return [y, states] if z is None else [y, states, y]


def bwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None,
    dout: Tensor, x: Tensor | None, out: Tensor | None, dz: Tensor | None, delta_softplus: bool, recompute_out_z: bool,
) -> list[Tensor | None]:
    """Compute gradients; x and out are results of `fwd`, which are not read.

    Returns:
        The gradients of u, delta, A, B, C, D and the bias; with z its gradient, also written to dz if given; and with
        `recompute_out_z` the gated y.
    """
    tensors = (u, delta, A, B, C, D, delta_bias, z)
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    arguments: list[Any] = [*leaves[:6], leaves[7], leaves[6], delta_softplus]
    with torch.enable_grad():
        y: Any = selective_scan_fn(*arguments)
    found = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dout))
    gradients = [None if leaf is None else next(found) for leaf in leaves]
    if z is None:
        return gradients[:7]
    if dz is not None:
        dz.copy_(gradients[7])  # type: ignore[arg-type]
        gradients[7] = dz
    return [*gradients, y.detach()] if recompute_out_z else gradients
