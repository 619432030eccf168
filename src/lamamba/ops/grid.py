"""The four paths along which a scan walks an image, and the way back.

A path is a permutation of the pixels of a grid. Its geometry depends on the grid alone, so it is computed once per size
and device and then shared by every block and every call.
"""

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Scan = Literal["continuous", "raster"]
NUM_PATHS = 4


def path_order(height: int, width: int, scan: Scan) -> np.ndarray:
    """Compute which pixel each path reads at each step (LaMamba-Diff, arXiv 2408.02615, section 3.2).

    "continuous" paths are serpentine, so that neighbours in the sequence are neighbours in the image: path 0 runs along
    row 0 to the right, row 1 to the left, and so on down; path 2 up column 0, down column 1, and so on to the right;
    paths 1 and 3 are 0 and 2 reversed. "raster" paths are row-major, column-major, and their reverses.

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
    """Row indices of one grid and the positions that undo them; rows are what `gather_rows` and `sum_rows` move."""

    pixels: Tensor  # (4 l,) pixel read by path k at step t, at k l + t
    pixel_positions: Tensor  # (4, l) where in `pixels` path k reads each pixel
    projections: Tensor  # (4 l,) the same reading from rows ordered (pixel, path)
    projection_positions: Tensor  # (1, 4 l) its inverse


def as_constant(size: int) -> int:
    """Return a size as it is, but let torch.compile make a graph for each: to it, an iterated range is no variable."""
    return len(range(size))


# The geometry is a constant to torch.compile: without this, every compiled graph would rebuild it on each call.
@torch.compiler.assume_constant_result
def scan_paths(height: int, width: int, scan: Scan, device: torch.device) -> ScanPaths:
    """Look up the paths of a grid on a device, computing them the first time they are asked for."""
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
    # Built outside inference mode, since the first caller may be a sampler and the next one a training step.
    with torch.inference_mode(False):
        return ScanPaths(*(torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays))


def gather_rows(x: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Read rows in a given order; the transpose of `sum_rows`.

    Args:
        x: (b, r, c).
        rows: (m r,) row read at each place; every row is read m times.
        positions: (m, r) places where each row is read: `rows[positions[j, i]] == i`.

    Returns:
        (b, m r, c). Its gradient is a gather too, where that of plain indexing would be a scatter.
    """
    result: Tensor = _GatherRows.apply(x, rows, positions)
    return result


def sum_rows(y: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Put every row back to where `gather_rows` read it and add up; the transpose of `gather_rows`.

    Args:
        y: (b, m r, c).
        rows: (m r,), see `gather_rows`.
        positions: (m, r), see `gather_rows`.

    Returns:
        (b, r, c).
    """
    result: Tensor = _SumRows.apply(y, rows, positions)
    return result


def _sum_of_gathers(y: Tensor, positions: Tensor) -> Tensor:
    total = y.index_select(1, positions[0])
    for place in positions[1:]:
        total = total + y.index_select(1, place)
    return total


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(rows, positions)
        return x.index_select(1, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, positions = ctx.saved_tensors
        return sum_rows(grad, rows, positions), None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(rows, positions)
        return _sum_of_gathers(y, positions)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, positions = ctx.saved_tensors
        return gather_rows(grad, rows, positions), None, None
