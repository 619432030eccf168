"""The selective scan with the signature and layouts of `mamba_ssm`, for other networks than ours; no build step.

* `selective_scan_fn` scans sequences, (b, d, l).
* `selective_scan_2d` scans grids, (b, d, h, w), along four paths, and adds up the results.

`reference.py` defines the operation. `triton.py` (Triton kernels) and `cpu.py` (compiled loops) are fast versions.
README.md has the equations.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lamamba.ops.backend import Backend, assume_constant_result, choose_kernels, choose_loops
from lamamba.ops.grid import NUM_PATHS, Scan, as_constant, gather_rows, scan_paths, sum_rows
from lamamba.ops.linear import autocast_dtype
from lamamba.ops.selective_scan.blocked import selective_scan_blocked
from lamamba.ops.sequence_scan.cpu import scan_sequences_cpu
from lamamba.ops.shapes import check_dimensions, check_shapes

__all__ = ["selective_scan_2d", "selective_scan_fn"]

NARROWEST = 32  # channels of a sequence on a CPU; wider sequences are split over threads


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan sequences selectively (Gu & Dao 2023, arXiv 2312.00752, Algorithm 2), as `mamba_ssm.selective_scan_fn` does.

        delta[t] = softplus(delta[t] + delta_bias)               softplus only with delta_softplus
        h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t]       h[-1] = initial_state, or 0
        y[t] = (<C[t], h[t]> + D u[t]) silu(z[t])                the last factor only with z

    All arguments may be strided and may have different floating-point dtypes. Every tensor gets a gradient, through the
    output and through the last state. The state is float32 (float64 if u is).

    Args:
        u: (b, d, l) input.
        delta: (b, d, l) step sizes.
        A: (d, n) decay rates, real and usually negative.
        B: (b, n, l) input weights of the n states; (b, g, n, l) for g groups of d / g channels; or constant, (d, n).
        C: output weights of the n states, in one of the same three shapes.
        D: (d,) weight of the input in the output.
        z: (b, d, l) gate.
        delta_bias: (d,) added to delta.
        delta_softplus: apply softplus to delta.
        return_last_state: also return the state after the last step.
        initial_state: (b, d, n) state before the first step, such as the last state of the sequence before.
        backend: see `lamamba.ops.backend`.

    Returns:
        y, (b, d, l), in the dtype of u. With `return_last_state` a tuple of y and the last state, (b, d, n).

    Raises:
        TypeError: A, B or C is complex.
        ValueError: shapes disagree, a dimension is 0, or the kernels cannot run on these tensors.
    """
    B, C, num_groups = _check_shapes(u, delta, A, B, C, D, z, delta_bias, initial_state)
    sequences = Arguments(u, delta, A, B, C, D, z, delta_bias, initial_state)
    return _scan(sequences, num_groups, delta_softplus, backend, return_last_state)


def selective_scan_2d(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    scan: Scan = "continuous",
    backend: Backend = "auto",
) -> Tensor:
    """Scan a grid along four paths with `selective_scan_fn`; the result at a pixel is the sum over the paths.

    Every tensor is in the order of the pixels. The paths "raster" are VMamba's cross scan (Liu et al. 2024,
    arXiv 2401.10166): rows, columns, and both backward. A path is a group of channels, so A, D and `delta_bias` have
    the layout of VMamba's parameters. If step sizes come from a low-rank projection, as in VMamba and in LaMamba-Diff,
    `lamamba.ops.selective_scan.project_and_scan` is faster, because it keeps them out of memory.

    Args:
        u: (b, d, h, w) input.
        delta: (b, 4 d, h, w) step sizes, path 0 first.
        A: (4 d, n) decay rates.
        B: (b, 4, n, h, w) input weights of the n states.
        C: (b, 4, n, h, w) output weights of the n states.
        D: (4 d,) weight of the input in the output.
        delta_bias: (4 d,) added to delta.
        delta_softplus: apply softplus to delta.
        scan: "continuous" (serpentine) or "raster" paths, see `lamamba.ops.grid.path_order`.
        backend: see `lamamba.ops.backend`.

    Returns:
        (b, d, h, w), in the dtype of u.

    Raises:
        TypeError: A, B or C is complex.
        ValueError: shapes disagree, a dimension is 0, or the kernels cannot run on these tensors.
    """
    if u.ndim != 4 or B.ndim != 5 or C.ndim != 5:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (u, B, C))
        raise ValueError(f"selective_scan_2d: u, B, C are {shapes}: give (b, d, h, w), and twice (b, 4, n, h, w)")
    b, d, h, w = u.shape
    wanted = {"delta": (delta, (b, NUM_PATHS * d, h, w)), "B": (B, (b, NUM_PATHS, B.shape[2], h, w))}
    check_shapes("selective_scan_2d", f"u {tuple(u.shape)}", wanted)
    order = scan_paths(as_constant(h), as_constant(w), scan, u.device)

    def along_paths(x: Tensor) -> Tensor:
        """Reorder (b, 4, c, h, w), given in the order of the pixels, to (b, 4, c, l) in the order of the paths."""
        rows = x.permute(0, 3, 4, 1, 2).reshape(b, h * w * NUM_PATHS, -1)
        rows = gather_rows(rows, order.projections, order.projection_positions)
        return rows.unflatten(1, (NUM_PATHS, h * w)).mT

    rows = gather_rows(u.permute(0, 2, 3, 1).reshape(b, h * w, d), order.pixels, order.pixel_positions)
    grouped = Arguments(
        rows.unflatten(1, (NUM_PATHS, h * w)).mT, along_paths(delta.unflatten(1, (NUM_PATHS, d))),
        A.unflatten(0, (NUM_PATHS, d)), along_paths(B), along_paths(C),
        None if D is None else D.unflatten(0, (NUM_PATHS, d)), None,
        None if delta_bias is None else delta_bias.unflatten(0, (NUM_PATHS, d)), None,
    )
    y: Any = _scan(grouped, None, delta_softplus, backend, False)
    return sum_rows(y.mT.flatten(1, 2), order.pixels, order.pixel_positions).mT.reshape(b, d, h, w)


class Arguments(NamedTuple):
    """The tensors of a scan, with any strides.

    The shapes below are those after `in_groups`, which splits the d channels into g groups of w. Before it, u is
    (b, d, l), A is (d, n), and so on.
    """

    u: Tensor  # (b, g, w, l)
    delta: Tensor  # (b, g, w, l)
    A: Tensor  # (g, w, n)
    B: Tensor  # (b, g, n, l)
    C: Tensor  # (b, g, n, l)
    D: Tensor | None  # (g, w)
    z: Tensor | None  # (b, g, w, l)
    delta_bias: Tensor | None  # (g, w)
    initial_state: Tensor | None  # (b, g, w, n)

    def in_groups(self, num_groups: int) -> "Arguments":
        """View the channels as groups; B and C may also be (b, n, l), for one group."""

        def split(x: Tensor | None, dim: int) -> Any:
            if x is None:
                return None
            return x.unsqueeze(dim) if num_groups == 1 else torch.unflatten(x, dim, (num_groups, -1))

        B, C = (x if x.ndim == 4 else x[:, None] for x in (self.B, self.C))
        return Arguments(
            split(self.u, 1), split(self.delta, 1), split(self.A, 0), B, C,
            split(self.D, 0), split(self.z, 1), split(self.delta_bias, 0), split(self.initial_state, 1),
        )


def _scan(
    given: Arguments, num_groups: int | None, delta_softplus: bool, backend: Backend, with_last: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan, and return y, and the last state if `with_last`.

    If `num_groups` is None, the tensors are already grouped.
    """
    if choose_kernels("selective_scan_fn", given.u, backend):
        from lamamba.ops.sequence_scan.triton import scan_sequences

        save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
        y, carry = scan_sequences(given, num_groups, delta_softplus, save)
        last = carry[:, :, -1].mT if with_last else carry
    else:
        grouped = given if num_groups is None else given.in_groups(num_groups)
        y, last = _scan_without_kernels(grouped, delta_softplus, backend, with_last)
        y = y if num_groups is None else y.flatten(1, 2)
    return (y, last.flatten(1, 2)) if with_last else y


def _scan_without_kernels(
    grouped: Arguments, delta_softplus: bool, backend: Backend, with_last: bool
) -> tuple[Tensor, Tensor]:
    """Scan, and return y, (b, g, w, l), and the last state, (b, g, w, n), which is meaningless unless `with_last`."""
    u = grouped.u
    dtype = torch.promote_types(u.dtype, torch.float32)
    wide = Arguments(*(None if x is None else x.to(dtype) for x in grouped))  # type: ignore[arg-type]
    delta = wide.delta if wide.delta_bias is None else wide.delta + wide.delta_bias[..., None]
    wide = wide._replace(delta=F.softplus(delta) if delta_softplus else delta)
    # Autocast would round products of states.
    with nullcontext() if autocast_dtype(u) is None else torch.autocast(u.device.type, enabled=False):
        y, last = _scan_by_loops(wide) if choose_loops(u, backend) else _scan_in_blocks(wide, with_last)
    y = y if wide.D is None else y + wide.D[..., None] * wide.u
    y = y if wide.z is None else y * F.silu(wide.z)
    return y.to(u.dtype), last


def _scan_by_loops(wide: Arguments) -> tuple[Tensor, Tensor]:
    """Run the recurrence in compiled loops. If there are fewer sequences than threads, their channels are split."""
    b, g, w, l = wide.u.shape
    parts = max(1, _num_threads() // (b * g))
    while w % parts or (parts > 1 and w // parts < NARROWEST):
        parts -= 1

    def split(x: Tensor) -> Tensor:
        """Bring (b, g, w, c) into the layout (b g parts, c, w / parts)."""
        return x.unflatten(2, (parts, -1)).mT.flatten(0, 2)

    def join(x: Tensor) -> Tensor:
        return x.unflatten(0, (b, g, parts)).mT.flatten(2, 3)

    A = wide.A.expand(b, *wide.A.shape)
    B, C = (x.mT[:, :, None].expand(b, g, parts, l, -1).flatten(0, 2) for x in (wide.B, wide.C))
    start = torch.zeros_like(A) if wide.initial_state is None else wide.initial_state
    y, last, _ = scan_sequences_cpu(split(wide.u), split(wide.delta), split(A), B, C, split(start))
    return join(y), join(last)


@assume_constant_result
def _num_threads() -> int:
    return torch.get_num_threads()


def _scan_in_blocks(wide: Arguments, with_last: bool) -> tuple[Tensor, Tensor]:
    """Run the recurrence in plain PyTorch."""
    u, delta, A, B, C = (x.mT for x in wide[:5])
    y, h = selective_scan_blocked(u, delta, wide.A, B, C, torch.zeros_like(wide.A[..., 0]))
    # The first state adds its product with decays, exp(A sum delta). The last state is a sum over steps.
    sums = delta.cumsum(dim=2)
    last = h[:, :, -1].mT
    if with_last and torch.is_grad_enabled():
        to_last = torch.exp((sums[:, :, -1:] - sums).unsqueeze(3) * A.unsqueeze(1))
        last = torch.einsum("bglnw,bglw,bgln,bglw->bgwn", to_last, delta, B, u)
    if wide.initial_state is not None:
        from_first = torch.exp(sums.unsqueeze(3) * A.unsqueeze(1)) * wide.initial_state.mT.unsqueeze(2)
        y = y + torch.einsum("bgln,bglnw->bglw", C, from_first)
        last = last + from_first[:, :, -1].mT
    return y.mT, last


def _check_shapes(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, int]:
    """Check all shapes, and return B, C and the number of groups g.

    B and C are (b, g, n, l); with one group they may also be (b, n, l).
    """
    for name, tensor in (("A", A), ("B", B), ("C", C)):
        if tensor.is_complex():
            raise TypeError(f"selective_scan_fn: {name} is complex: give the {tensor.shape[-1]} states as real numbers")
    check_dimensions("selective_scan_fn", "u", u, "b d l")
    check_dimensions("selective_scan_fn", "A", A, "d n")
    b, d, l = u.shape
    n = A.shape[1]
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "delta": (delta, (b, d, l)), "A": (A, (d, n)), "D": (D, (d,)), "z": (z, (b, d, l)),
        "delta_bias": (delta_bias, (d,)), "initial_state": (initial_state, (b, d, n)),
    }
    groups = {1}
    for name, weights in (("B", B), ("C", C)):
        groups.add({2: d, 4: weights.shape[1]}.get(weights.ndim, 1))
        fits = {2: (d, n), 4: (b, weights.shape[1], n, l)}.get(weights.ndim, (b, n, l))
        wanted[name] = (weights, fits)
    check_shapes("selective_scan_fn", f"u {tuple(u.shape)} and A {tuple(A.shape)}", wanted)
    num_groups = max(groups)
    if 0 in groups or any(num_groups % number for number in groups) or d % num_groups:
        raise ValueError(f"selective_scan_fn: {d} channels and groups of B and C {groups} do not divide each other")

    def in_groups(weights: Tensor) -> Tensor:
        if weights.ndim == 2:
            return weights[None, :, :, None].expand(b, d, n, l)
        if num_groups == 1:
            return weights
        weights = weights[:, None] if weights.ndim == 3 else weights
        if weights.shape[1] == num_groups:
            return weights
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32))  # gradients are summed in float32
        repeated = weights[:, :, None].expand(b, weights.shape[1], num_groups // weights.shape[1], n, l)
        return repeated.flatten(1, 2)

    return in_groups(B), in_groups(C), num_groups
