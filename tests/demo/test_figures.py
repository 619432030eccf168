"""What is drawn is what the network does."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from lamamba.demo.figures import PATH_NAMES, attention_groups, draw_paths, draw_windows
from lamamba.errors import ConfigError
from lamamba.ops.grid import path_order

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("scan", ["continuous", "raster"])
@pytest.mark.parametrize(("height", "width"), [(2, 2), (5, 8), (24, 3)])
def test_paths_drawn_visit_every_cell_once(height: int, width: int, scan: str) -> None:
    picture = ElementTree.fromstring(draw_paths(height, width, scan))  # type: ignore[arg-type]
    lines = [line.get("points", "") for line in picture.iter(f"{SVG}polyline")]
    motions = [motion.get("values", "") for motion in picture.iter(f"{SVG}animateMotion")]
    assert len(lines) == len(motions) == 4
    for order, line, motion in zip(path_order(height, width, scan), lines, motions, strict=True):  # type: ignore[arg-type]
        cells = [tuple(int(float(place) // 14) for place in point.split(",")) for point in line.split()]
        assert len(set(cells)) == len(cells) == height * width
        assert [row * width + column for column, row in cells] == order.tolist()
        assert motion.split(";") == line.split()


@pytest.mark.parametrize("scan", ["continuous", "raster"])
def test_paths_have_their_names(scan: str) -> None:
    seen = []
    for order in path_order(5, 7, scan):  # type: ignore[arg-type]
        direction = "rows" if abs(int(order[1]) - int(order[0])) == 1 else "columns"
        seen.append((direction, order.tolist()))
    names = PATH_NAMES[scan]  # type: ignore[index]
    for name, (direction, order) in zip(names, seen, strict=True):
        assert name.startswith(f"along {direction}")
        # A reversed path comes after the one that it reverses.
        earlier = [other for _, other in seen[: names.index(name)]]
        assert name.endswith("reversed") == (order[::-1] in earlier)
    drawn = ElementTree.fromstring(draw_paths(5, 7, scan)).iter(f"{SVG}text")  # type: ignore[arg-type]
    assert [text.text for text in drawn] == list(names)


def test_an_unknown_scan_is_refused() -> None:
    with pytest.raises(ConfigError, match="scan 'rasters' is unknown: did you mean raster"):
        draw_paths(4, 4, "rasters")  # type: ignore[arg-type]


def test_a_walk_takes_equally_long_to_every_pixel() -> None:
    motion = next(ElementTree.fromstring(draw_paths(4, 6, "raster")).iter(f"{SVG}animateMotion"))
    assert motion.get("calcMode") == "linear"
    assert {"path", "keyTimes", "keyPoints"}.isdisjoint(motion.keys())


def test_nothing_is_fetched() -> None:
    for picture in (draw_paths(4, 4, "continuous"), draw_windows(8, 8, 4)):
        assert re.findall(r"https?://[^\"]+", picture) == ["http://www.w3.org/2000/svg"]
        assert "<script" not in picture


@pytest.mark.parametrize(("height", "width"), [(1, 4), (4, 25)])
def test_grids_that_nobody_could_follow_are_refused(height: int, width: int) -> None:
    with pytest.raises(ConfigError, match="give 2 to 24"):
        draw_paths(height, width, "continuous")
    with pytest.raises(ConfigError, match="give 2 to 24"):
        draw_windows(height, width, 4)


def test_windows_are_cut_from_the_corner() -> None:
    rows, columns = np.divmod(np.arange(64).reshape(8, 8), 8)
    assert np.array_equal(attention_groups(8, 8, 4, shifted=False), 2 * (rows // 4) + columns // 4)


def test_shifted_windows_are_moved_by_half_and_do_not_join_opposite_edges() -> None:
    rows, columns = np.divmod(np.arange(64).reshape(8, 8), 8)
    assert np.array_equal(attention_groups(8, 8, 4, shifted=True), 3 * ((rows + 2) // 4) + (columns + 2) // 4)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("height", "width"), [(6, 10), (7, 9), (3, 12), (4, 4)])
def test_no_group_is_larger_than_a_window_and_each_is_a_rectangle(height: int, width: int, shifted: bool) -> None:
    groups = attention_groups(height, width, 4, shifted)
    assert np.array_equal(np.unique(groups), np.arange(groups.max() + 1))
    for group in range(groups.max() + 1):
        rows, columns = np.nonzero(groups == group)
        extent = (np.ptp(rows) + 1, np.ptp(columns) + 1)
        assert max(extent) <= 4
        assert extent[0] * extent[1] == len(rows)


def test_windows_drawn_are_the_groups() -> None:
    picture = ElementTree.fromstring(draw_windows(6, 10, 4))
    cells = [int(cell.get("data-group", "")) for cell in picture.iter(f"{SVG}rect")]
    wanted = np.concatenate([attention_groups(6, 10, 4, shifted).reshape(-1) for shifted in (False, True)])
    assert cells == wanted.tolist()
