"""Drawings of how the network reads an image, as SVG that needs no script and fetches nothing."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from lamamba.config import nearest
from lamamba.demo.settings import read_whole
from lamamba.errors import ConfigError
from lamamba.ops.grid import Scan, path_order
from lamamba.ops.window_attention.geometry import window_geometry

MAX_SIDE = 24  # cells of a drawn grid: beyond, they are too small to follow
# In the order of `path_order`, which is another for each scan.
PATH_NAMES: Mapping[Scan, tuple[str, ...]] = {
    "continuous": ("along rows", "along rows, reversed", "along columns", "along columns, reversed"),
    "raster": ("along rows", "along columns", "along rows, reversed", "along columns, reversed"),
}
_COLOURS = ("#2563eb", "#db2777", "#059669", "#d97706")
_CELL = 14
_GAP = 28


def draw_paths(height: int, width: int, scan: Scan) -> str:
    """Draw the four paths of the scan over a grid; on each a point goes from its first pixel to its last.

    Returns:
        An `<svg>` element; each path is a `<polyline>` through the centres of all cells, in its order, with a ring at
        its first pixel.

    Raises:
        ConfigError: a side is not 2 to 24, or there is no such scan.
    """
    if scan not in PATH_NAMES:
        raise ConfigError(f"scan {scan!r} is unknown: {nearest(str(scan), PATH_NAMES)}")
    height, width = (read_whole(name, side, 2, MAX_SIDE) for name, side in (("height", height), ("width", width)))
    panels = []
    for number, order in enumerate(path_order(height, width, scan)):
        rows, columns = np.divmod(order, width)
        points = (np.stack([columns, rows], axis=1) + 0.5) * _CELL
        line = " ".join(f"{x:g},{y:g}" for x, y in points)
        colour = _COLOURS[number]
        panels.append(
            f"{_grid_lines(height, width)}"
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-opacity="0.45" stroke-width="2"/>'
            f'<circle cx="{points[0, 0]:g}" cy="{points[0, 1]:g}" r="3" fill="none" stroke="{colour}"/>'
            # Each step takes as long as the others, however far the next pixel is.
            f'<circle r="4.5" fill="{colour}"><animateMotion values="{line.replace(" ", ";")}" dur="6s" '
            'calcMode="linear" repeatCount="indefinite"/></circle>'
        )
    return _in_row(panels, PATH_NAMES[scan], height, width)


def draw_windows(height: int, width: int, window_size: int) -> str:
    """Draw which pixels attend to one another, by colour: in windows, and in those of the next block, shifted by half.

    Returns:
        An `<svg>` element of two grids; pixels of a group have the same `data-group`.

    Raises:
        ConfigError: a side is not 2 to 24.
    """
    height, width = (read_whole(name, side, 2, MAX_SIDE) for name, side in (("height", height), ("width", width)))
    window_size = read_whole("window_size", window_size, 2, MAX_SIDE)
    panels = []
    for shifted in (False, True):
        groups = attention_groups(height, width, window_size, shifted)
        bands_y, bands_x = _bands(groups[:, 0]), _bands(groups[0])
        cells = "".join(
            f'<rect x="{column * _CELL}" y="{row * _CELL}" width="{_CELL}" height="{_CELL}" data-group="{group}" '
            f'fill="{_COLOURS[2 * (bands_y[row] % 2) + bands_x[column] % 2]}" fill-opacity="0.55"/>'
            for (row, column), group in np.ndenumerate(groups)
        )
        panels.append(cells + _grid_lines(height, width))
    return _in_row(panels, ("windows", f"shifted by {window_size // 2}"), height, width)


def attention_groups(height: int, width: int, window_size: int, shifted: bool) -> np.ndarray:
    """Number the groups of pixels that attend to one another: (height, width) int64, counted row by row.

    From the geometry that attention itself uses, with its mask.
    """
    geometry = window_geometry(height, width, window_size, shifted, torch.device("cpu"))
    windows = geometry.pixels.numpy()
    places = windows.shape[1]
    seen = np.ones((len(windows), places, places), dtype=bool) if geometry.mask is None else geometry.mask.numpy() == 0
    # A pixel's group is known by the first pixel of its window that it attends to.
    first = np.empty(height * width, dtype=np.int64)
    for pixels, visible in zip(windows, seen, strict=True):
        first[pixels[pixels >= 0]] = pixels[visible.argmax(axis=1)][pixels >= 0]
    _, group = np.unique(first, return_inverse=True)
    return group.reshape(height, width)


def _bands(groups: np.ndarray) -> np.ndarray:
    """Number the runs of equal groups along one side of the grid."""
    return np.cumsum([0, *(groups[1:] != groups[:-1])])


def _grid_lines(height: int, width: int) -> str:
    lines = [f"M0 {row * _CELL}H{width * _CELL}" for row in range(height + 1)]
    lines += [f"M{column * _CELL} 0V{height * _CELL}" for column in range(width + 1)]
    return f'<path d="{"".join(lines)}" stroke="currentColor" stroke-opacity="0.18" fill="none"/>'


def _in_row(panels: Sequence[str], titles: Sequence[str], height: int, width: int) -> str:
    step = max(width * _CELL, 170) + _GAP
    shown = "".join(
        f'<g transform="translate({index * step + 1} 24)"><text x="0" y="-8" font-size="13" fill="currentColor">'
        f"{title}</text>{panel}</g>"
        for index, (title, panel) in enumerate(zip(titles, panels, strict=True))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" font-family="sans-serif" '
        f'viewBox="0 0 {len(panels) * step - _GAP + 2} {height * _CELL + 26}" '
        f'style="max-width:{len(panels) * step}px;width:100%">{shown}</svg>'
    )
