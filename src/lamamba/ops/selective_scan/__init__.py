"""The selective scan: a linear recurrence whose step size, input and output matrices depend on the input.

* `selective_scan` is the recurrence along a sequence.
* `scan_grid` runs the four scans of a block over a grid of pixels.
* `project_and_scan` also computes the projection before them. The network calls this one.

`reference.py` defines the operation, and `blocked.py` is the version for any device. `cpu.py` (compiled loops) and
`triton.py` (Triton kernels) are fast versions of `scan_grid`. `portable.py` is the version of exported networks.
README.md has the equations.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lamamba.ops.backend import Backend, choose_kernels, choose_loops, is_portable
from lamamba.ops.grid import NUM_PATHS, Scan, as_constant, gather_rows, scan_paths, sum_rows
from lamamba.ops.linear import compute_dtype, linear, rounded
from lamamba.ops.selective_scan.blocked import selective_scan_blocked
from lamamba.ops.selective_scan.cpu import scan_grid_cpu
from lamamba.ops.selective_scan.portable import selective_scan_portable
from lamamba.ops.shapes import check_dimensions, check_shapes

__all__ = ["project_and_scan", "scan_grid", "selective_scan"]

# From this many elements of x on, it pays to pad each path's projection to a multiple of 8, for faster loads.
FILLED_UP_FROM = 1 << 23


def scan_grid(
    x: Tensor,
    low: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    scan: Scan = "continuous",
    backend: Backend = "auto",
) -> Tensor:
    """Scan a grid along its four paths; the result at a pixel is the sum over paths (arXiv 2408.02615, section 3.2).

    Path p is a `selective_scan` of x with `delta = softplus(dt_weight[p] delta_low + dt_bias[p])`.

    Args:
        x: (b, h, w, e) input, float32, bfloat16 or float16 (the PyTorch version also takes float64).
        low: (b, h, w, 4 (r + 2 n)); for each path the low-rank step size (r), then B (n) and C (n).
        dt_weight: (4, e, r) maps the low-rank step size to the step sizes of all channels.
        dt_bias: (4, e) bias of the step sizes.
        A_log: (4, e, n) logarithms of the decay rates: A = -exp(A_log).
        D: (4, e) weight of the input in the output.
        scan: "continuous" (serpentine) or "raster" paths, see `lamamba.ops.grid.path_order`.
        backend: see `lamamba.ops.backend`.

    Returns:
        (p, b, h, w, e), in the dtype of x: planes that add up to the scan. The kernels return one plane per path, the
        other versions one plane with the sum. The next operation adds them up as it reads them. The state is float32
        (float64 if x is).

    Raises:
        ValueError: shapes disagree, a dimension is 0, or the kernels cannot run on these tensors.
    """
    _check_grid_shapes(x, low, dt_weight, dt_bias, A_log, D)
    if choose_kernels("scan_grid", x, backend):
        from lamamba.ops.selective_scan.triton import padded, scan_grid_triton

        weight = dt_weight.to(x.dtype) if torch.is_grad_enabled() else rounded(dt_weight, x.dtype)
        tensors = (x, low.to(x.dtype), padded(weight), dt_bias.float(), A_log.float(), D.float())
        save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        planes: Tensor = scan_grid_triton(*tensors, dt_weight.shape[2], scan == "continuous", save)[0]
        return planes
    if choose_loops(x, backend):
        A = -torch.exp(A_log.float())
        floats = (tensor.float() for tensor in (x, low, dt_weight, dt_bias, A, D))
        y: Tensor = scan_grid_cpu(*floats, scan == "continuous")[0]
        return y.to(x.dtype)[None]
    run = selective_scan_portable if is_portable(backend) else selective_scan
    return _scan_grid_pytorch(run, x, low, dt_weight, dt_bias, A_log, D, scan)


def project_and_scan(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    scan: Scan = "continuous",
    backend: Backend = "auto",
) -> Tensor:
    """Project x to step sizes, B and C, then scan as `scan_grid` does.

    The projection does not depend on the order of the pixels, so every pixel is projected once for all paths.

    Args:
        x: (b, h, w, e), as for `scan_grid`; autocast rounds it to the autocast dtype.
        x_proj_weight: (4, r + 2 n, e), one projection per path.
        dt_weight: (4, e, r), as for `scan_grid`.
        dt_bias: (4, e), as for `scan_grid`.
        A_log: (4, e, n), as for `scan_grid`.
        D: (4, e), as for `scan_grid`.
        scan: "continuous" or "raster" paths.
        backend: see `lamamba.ops.backend`.

    Returns:
        The result of `scan_grid`.

    Raises:
        ValueError: shapes disagree, a dimension is 0, or the kernels cannot run on these tensors.
    """
    x, weight = x.to(compute_dtype(x)), x_proj_weight.flatten(0, 1)
    if not choose_kernels("scan_grid", x, backend):
        return scan_grid(x, linear(x, weight), dt_weight, dt_bias, A_log, D, scan, backend)
    from lamamba.ops.selective_scan.triton import ProjectedScan, fill_up, padded, scan_grid_triton

    _check_grid_shapes(x, x[..., :1].expand(*x.shape[:-1], len(weight)), dt_weight, dt_bias, A_log, D)
    fill = -x_proj_weight.shape[1] % 8 if x.numel() >= FILLED_UP_FROM else 0
    others = (dt_bias.float(), A_log.float(), D.float(), dt_weight.shape[2], scan == "continuous")
    parameters = (x_proj_weight, dt_weight, dt_bias, A_log, D)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *parameters)):
        y: Tensor = ProjectedScan.apply(x, x_proj_weight, dt_weight, *others, fill)
    else:
        low, of_steps = F.linear(x, fill_up(x_proj_weight, x.dtype, fill)), padded(rounded(dt_weight, x.dtype))
        y = scan_grid_triton(x, low, of_steps, *others, False)[0]
    return y


def _scan_grid_pytorch(
    run: Callable[..., Tensor],
    x: Tensor,
    low: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    scan: Scan,
) -> Tensor:
    height, width = as_constant(x.shape[1]), as_constant(x.shape[2])
    rank, num_states = dt_weight.shape[2], A_log.shape[2]
    paths = scan_paths(height, width, scan, x.device)
    x = x.flatten(1, 2)
    low = low.unflatten(3, (NUM_PATHS, -1)).flatten(1, 3)
    low = gather_rows(low, paths.projections, paths.projection_positions).unflatten(1, (NUM_PATHS, -1))
    delta_low, B, C = low.split([rank, num_states, num_states], dim=-1)
    delta = delta_low @ dt_weight.mT
    state_dtype = torch.promote_types(delta.dtype, torch.float32)
    delta = F.softplus(delta.to(state_dtype) + dt_bias.to(state_dtype)[:, None])
    u = gather_rows(x, paths.pixels, paths.pixel_positions).unflatten(1, (NUM_PATHS, -1))
    A = -torch.exp(A_log.to(state_dtype))
    y = run(u, delta, A, B, C, D)
    y = sum_rows(y.flatten(1, 2), paths.pixels, paths.pixel_positions)
    return y.unflatten(1, (height, width))[None]


def _check_grid_shapes(x: Tensor, low: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor) -> None:
    for name, tensor, dimensions in (("x", x, "b h w e"), ("A_log", A_log, "4 e n"), ("dt_weight", dt_weight, "4 e r")):
        check_dimensions("scan_grid", name, tensor, dimensions)
    b, h, w, e = x.shape
    r, n = dt_weight.shape[2], A_log.shape[2]
    wanted = {
        "low": (low, (b, h, w, NUM_PATHS * (r + 2 * n))),
        "dt_weight": (dt_weight, (NUM_PATHS, e, r)),
        "dt_bias": (dt_bias, (NUM_PATHS, e)),
        "A_log": (A_log, (NUM_PATHS, e, n)),
        "D": (D, (NUM_PATHS, e)),
    }
    check_shapes("scan_grid", f"x {tuple(x.shape)}", wanted)


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
    check_dimensions("selective_scan", "u", u, "b k l d")
    check_dimensions("selective_scan", "A", A, "k d n")
    b, k, l, d = u.shape
    of_states = (b, k, l, A.shape[2])
    wanted = {"delta": (delta, u.shape), "A": (A, (k, d, A.shape[2])), "B": (B, of_states), "C": (C, of_states)}
    check_shapes("selective_scan", f"u {tuple(u.shape)}", {**wanted, "D": (D, (k, d))})
