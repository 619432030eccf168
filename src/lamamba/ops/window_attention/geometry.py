"""How a grid is cut into windows, which pixels of a window see each other, and which bias they use."""

import math
from functools import lru_cache
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lamamba.ops.backend import assume_constant_result


class Windows(NamedTuple):
    """How a grid is cut. A grid that is not larger than the window is one window, and one window is never shifted."""

    side_y: int
    side_x: int
    shift_y: int
    shift_x: int
    number: int

    @classmethod
    def of(cls, height: int, width: int, window_size: int, shifted: bool) -> Self:
        """Cut a grid of (height, width) into windows of side `window_size`; `shifted` shifts them by half a window."""
        side_y, side_x = min(height, window_size), min(width, window_size)
        shift_y = side_y // 2 if shifted and height > side_y else 0
        shift_x = side_x // 2 if shifted and width > side_x else 0
        return cls(side_y, side_x, shift_y, shift_x, -(-height // side_y) * -(-width // side_x))


class WindowGeometry:
    """Tables that window attention needs for a grid, computed once per size.

    Attributes:
        offsets: (pixels, pixels) row of the bias table for each query and key of a window.
        mask: (windows, pixels, pixels) to add to the logits, or None if nothing is masked. It is -100 between regions
            that only the cyclic shift brings together, and minus infinity on padded keys.
        pixels: (windows, pixels) pixel of the grid at each place of a window, or -1 for padding.
    """

    def __init__(self, height: int, width: int, window_size: int, shifted: bool, device: str) -> None:
        side_y, side_x, shift_y, shift_x, _ = Windows.of(height, width, window_size, shifted)
        dy, dx = torch.arange(side_y), torch.arange(side_x)
        dy = (dy[:, None] - dy)[:, None, :, None] + window_size - 1
        dx = (dx[:, None] - dx)[None, :, None, :] + window_size - 1
        offsets = dy * (2 * window_size - 1) + dx
        self.offsets = offsets.reshape(side_y * side_x, side_y * side_x).to(device)
        grid = F.pad(
            torch.arange(height * width).view(height, width), (0, -width % side_x, 0, -height % side_y), value=-1
        )
        self.pixels = (
            self._partition(grid.roll((-shift_y, -shift_x), dims=(0, 1)), side_y, side_x).contiguous().to(device)
        )
        self.mask: Tensor | None = None
        if shift_y or shift_x or height % side_y or width % side_x:
            region_y, padding_y = self._regions(height, side_y, shift_y)
            region_x, padding_x = self._regions(width, side_x, shift_x)
            region = self._partition(3 * region_y[:, None] + region_x, side_y, side_x)
            padding = self._partition(padding_y[:, None] | padding_x, side_y, side_x)
            mask = torch.where(region[:, :, None] == region[:, None, :], 0.0, -100.0)
            self.mask = mask.masked_fill(padding[:, None, :], -math.inf).to(device)

    @staticmethod
    def _regions(length: int, side: int, shift: int) -> tuple[Tensor, Tensor]:
        """Number the regions along one axis after the shift, and mark the places that are padding."""
        place = torch.arange(length + -length % side)
        region = (place >= len(place) - side).long() + (place >= len(place) - shift).long() if shift else place * 0
        return region, (place >= length).roll(-shift)

    @staticmethod
    def _partition(grid: Tensor, side_y: int, side_x: int) -> Tensor:
        return rearrange(grid, "(ny sy) (nx sx) -> (ny nx) (sy sx)", sy=side_y, sx=side_x)


@assume_constant_result
def window_geometry(height: int, width: int, window_size: int, shifted: bool, device: torch.device) -> WindowGeometry:
    """Return the tables of a grid; they are computed at the first call for a size."""
    return _window_geometry(height, width, window_size, shifted, str(device))


@lru_cache(maxsize=256)
def _window_geometry(*arguments: Any) -> WindowGeometry:
    with torch.inference_mode(False):
        return WindowGeometry(*arguments)
