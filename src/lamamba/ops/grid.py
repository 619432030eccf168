"""The four paths along which a scan walks an image, and their inverses.

A path is a permutation of the pixels of a grid. It depends only on the size of the grid, so it is computed once per
size and device, and all blocks and calls share it.
"""

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lamamba.ops.backend import assume_constant_result

Scan = Literal["continuous", "raster"]
NUM_PATHS = 4


def path_order(height: int, width: int, scan: Scan) -> np.ndarray:
    """Compute the pixel that each path reads at each step (LaMamba-Diff, arXiv 2408.02615, section 3.2).

    "continuous" paths are serpentine, so that neighbors on the path are neighbors in the image. Path 0 goes right along
    row 0, left along row 1, and so on downward. Path 2 goes up column 0, down column 1, and so on to the right. Paths 1
    and 3 are paths 0 and 2 reversed. "raster" paths are row-major, column-major, and their reverses.

    Returns:
        (4, height * width) int64, row-major pixel indices.
    """
    pixels = np.arange(height * width, dtype=np.int64).reshape(height, width)
    if scan == "raster":
        rows, columns = pixels.reshape(-1), pixels.T.reshape(-1)
        return np.stack([rows, columns, rows[::-1], columns[::-1]])
    serpentine_rows = pixels.copy()
    serpentine_rows[1::2] = serpentine_rows[1::2, ::-1]
    serpentine_columns = pixels[::-1].T.copy()
    serpentine_columns[1::2] = serpentine_columns[1::2, ::-1]
    rows, columns = serpentine_rows.reshape(-1), serpentine_columns.reshape(-1)
    return np.stack([rows, rows[::-1], columns, columns[::-1]])


class ScanPaths(NamedTuple):
    """Row indices of one grid for `gather_rows` and `sum_rows`, and the positions that invert them."""

    pixels: Tensor  # (4 l,) pixel that path k reads at step t, at index k l + t
    pixel_positions: Tensor  # (4, l) index in `pixels` where path k reads each pixel
    projections: Tensor  # (4 l,) the same for rows in the order (pixel, path)
    projection_positions: Tensor  # (1, 4 l) its inverse


def as_constant(size: int) -> int:
    """Return the size unchanged, as a constant to torch.compile, which then makes a graph for each size."""
    return len(range(size))


# A constant to torch.compile: otherwise compiled graphs would compute the paths again at every call.
@assume_constant_result
def scan_paths(height: int, width: int, scan: Scan, device: torch.device) -> ScanPaths:
    """Return the paths of a grid on a device; they are computed at the first call for a size."""
    return _scan_paths(height, width, scan, str(device))


@lru_cache(maxsize=256)
def _scan_paths(height: int, width: int, scan: Scan, device: str) -> ScanPaths:
    length = height * width
    order = path_order(height, width, scan)
    inverse = np.empty_like(order)
    np.put_along_axis(inverse, order, np.broadcast_to(np.arange(length), order.shape), axis=1)
    path = np.arange(NUM_PATHS)[:, None]
    projections = (order * NUM_PATHS + path).reshape(-1)
    arrays = (order.reshape(-1), inverse + path * length, projections, np.argsort(projections)[None])
    # Outside inference mode: the first caller may be a sampler, and a training step may use the same tensors later.
    with torch.inference_mode(False):
        return ScanPaths(*(torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays))


def gather_rows(x: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Read rows in the given order; the transpose of `sum_rows`.

    Args:
        x: (b, r, c).
        rows: (m r,) which row to read at each index; every row is read m times.
        positions: (m, r) the indices at which each row is read: `rows[positions[j, i]] == i`.

    Returns:
        (b, m r, c). Its gradient is also a gather; plain indexing would use a slower scatter.
    """
    result: Tensor = _Rows.apply(x, rows, positions, False)
    return result


def sum_rows(y: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Add every row to the row that `gather_rows` read it from; the transpose of `gather_rows`.

    Args:
        y: (b, m r, c).
        rows: (m r,), see `gather_rows`.
        positions: (m, r), see `gather_rows`.

    Returns:
        (b, r, c).
    """
    result: Tensor = _Rows.apply(y, rows, positions, True)
    return result


class _Rows(torch.autograd.Function):
    """Gather or sum rows; each is the gradient of the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, positions: Tensor, sums: bool) -> Tensor:
        ctx.save_for_backward(rows, positions)
        ctx.sums = sums
        if not sums:
            return x.index_select(1, rows)
        total = x.index_select(1, positions[0])
        for place in positions[1:]:
            total = total + x.index_select(1, place)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return (gather_rows if ctx.sums else sum_rows)(grads[0], *ctx.saved_tensors), None, None, None
