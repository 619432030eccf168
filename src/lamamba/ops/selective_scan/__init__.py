"""The selective scan: a linear recurrence whose step size, input and output matrices depend on the input.

`reference.py` is its meaning, `blocked.py` the version that runs; README.md holds the equations of both.
"""

import torch
from torch import Tensor

from lamamba.ops.selective_scan.blocked import selective_scan_blocked

__all__ = ["selective_scan"]


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Run k independent selective scans along l (Gu & Dao 2023, arXiv 2312.00752, Algorithm 2).

        h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t],   h[-1] = 0
        y[t] = <C[t], h[t]> + D u[t]

    Args:
        u: (b, k, l, d) input.
        delta: (b, k, l, d) step sizes, positive.
        A: (k, d, n) decay rates, negative.
        B: (b, k, l, n) input weights of the n states.
        C: (b, k, l, n) output weights of the n states.
        D: (k, d) weight of the input in the output.

    Returns:
        (b, k, l, d), in the dtype of u; the state h is float32 (float64 if u is).

    Raises:
        ValueError: shapes disagree, or a dimension is 0.
    """
    _check_shapes(u, delta, A, B, C, D)
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    y: Tensor = selective_scan_blocked(*(x.to(dtype) for x in (u, delta, A, B, C, D)))[0]
    return y.to(u.dtype)


def _check_shapes(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> None:
    if u.ndim != 4 or 0 in u.shape:
        raise ValueError(f"selective_scan: u is {tuple(u.shape)}: give (b, k, l, d), none of them 0")
    if A.ndim != 3 or A.shape[2] == 0:
        raise ValueError(f"selective_scan: A is {tuple(A.shape)}: give (k, d, n), none of them 0")
    b, k, l, d = u.shape
    n = A.shape[2]
    wanted = {"delta": (b, k, l, d), "A": (k, d, n), "B": (b, k, l, n), "C": (b, k, l, n), "D": (k, d)}
    for (name, shape), x in zip(wanted.items(), (delta, A, B, C, D), strict=True):
        if tuple(x.shape) != shape:
            raise ValueError(f"selective_scan: {name} is {tuple(x.shape)}: with u {tuple(u.shape)} it must be {shape}")
