"""The best public scan that installs from PyPI and needs no compiler: fla-core's `fused_recurrent_hgrn`, in Triton.

It is the recurrence h[t] = gate[t] h[t-1] + token[t] of independent channels, which walks in time with a float32 state.
So two things are timed: that alone, four paths as four sequences, gates and tokens ready-made in its own layout, which
is generous to it; and all that `scan_grid` does, with this recurrence inside: gathers, low-rank expansion, softplus,
gates, tokens, output, sum over paths, in PyTorch.

Left aside: mamba-ssm and accelerated_scan.warp, which compile CUDA; accelerated_scan.scalar 0.3.1, with which CUDA
reports an illegal memory access at the size of XL's first stage, so that nothing after it can run; mambapy, which is
plain PyTorch.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

NAME = "fla"


def is_installed() -> bool:
    """Say whether the package is there, and how to get it if not."""
    found = find_spec("fla") is not None
    if not found:
        print("left out, not installed: fla (pip install --no-deps fla-core)")
    return found


def recurrence(log_gate: Tensor, token: Tensor) -> Tensor:
    """Run the recurrence over (b, l, d) logarithms of gates and tokens."""
    from fla.ops.hgrn import fused_recurrent_hgrn

    h: Tensor = fused_recurrent_hgrn(token, log_gate)[0]
    return h


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Stand in for `lamamba.ops.selective_scan.selective_scan`, for one state, with the recurrence inside."""
    log_gate, token = ((x.flatten(0, 1).to(torch.bfloat16)) for x in (delta * A[..., 0][:, None], delta * B * u))
    y = C * recurrence(log_gate, token).reshape(u.shape) + D[:, None] * u
    return y.to(u.dtype)
