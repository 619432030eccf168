"""The best public scan that installs from PyPI and needs no compiler: fla-core's `fused_recurrent_hgrn`, in Triton.

It computes the recurrence h[t] = gate[t] h[t-1] + token[t] of independent channels, step by step with a float32 state.
Two things are timed:

* The recurrence alone, on four sequences for the four paths. Gates and tokens are given in its own layout, which is an
  advantage for it.
* Everything that `scan_grid` does, with this recurrence inside. Gathers, low-rank expansion, softplus, gates, tokens,
  output and the sum over paths are in PyTorch.

Not compared:

* mamba-ssm and accelerated_scan.warp compile CUDA code.
* accelerated_scan.scalar 0.3.1 causes an illegal memory access at the size of XL's first stage, after which nothing
  else can run.
* mambapy is plain PyTorch.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

NAME = "fla"


def is_installed() -> bool:
    """Return whether the package is installed; if not, print how to install it."""
    found = find_spec("fla") is not None
    if not found:
        print("fla is not installed and is left out (pip install --no-deps fla-core)")
    return found


def recurrence(log_gate: Tensor, token: Tensor) -> Tensor:
    """Run the recurrence over logarithms of gates and over tokens, each (b, l, d)."""
    from fla.ops.hgrn import fused_recurrent_hgrn

    h: Tensor = fused_recurrent_hgrn(token, log_gate)[0]
    return h


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Compute `lamamba.ops.selective_scan.selective_scan` for one state with this recurrence."""
    log_gate, token = ((x.flatten(0, 1).to(torch.bfloat16)) for x in (delta * A[..., 0][:, None], delta * B * u))
    y = C * recurrence(log_gate, token).reshape(u.shape) + D[:, None] * u
    return y.to(u.dtype)
