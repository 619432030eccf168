"""The scan paths against a literal walk over the image, and the row movers against each other."""

import numpy as np
import pytest
import torch

from lamamba.ops.grid import ScanPaths, gather_rows, path_order, scan_paths, sum_rows

GRIDS = [(2, 2), (4, 4), (8, 8), (4, 6), (6, 4), (10, 2), (3, 5), (5, 3), (7, 7), (1, 6), (6, 1), (1, 1)]


def walk_continuous(height: int, width: int) -> list[list[int]]:
    """Walk as the specification describes it, one pixel after the other."""
    along_rows = []
    for row in range(height):
        to_the_right = row % 2 == 0
        for column in range(width) if to_the_right else range(width - 1, -1, -1):
            along_rows.append(row * width + column)
    along_columns = []
    for column in range(width):
        upwards = column % 2 == 0
        for row in range(height - 1, -1, -1) if upwards else range(height):
            along_columns.append(row * width + column)
    return [along_rows, along_rows[::-1], along_columns, along_columns[::-1]]


def walk_raster(height: int, width: int) -> list[list[int]]:
    row_major = [row * width + column for row in range(height) for column in range(width)]
    column_major = [row * width + column for column in range(width) for row in range(height)]
    return [row_major, column_major, row_major[::-1], column_major[::-1]]


def small_grid() -> ScanPaths:
    return scan_paths(4, 6, "continuous", torch.device("cpu"))


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_continuous_paths_are_the_literal_walk(height: int, width: int) -> None:
    assert path_order(height, width, "continuous").tolist() == walk_continuous(height, width)


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_raster_paths_are_the_literal_walk(height: int, width: int) -> None:
    assert path_order(height, width, "raster").tolist() == walk_raster(height, width)


@pytest.mark.parametrize("scan", ["continuous", "raster"])
@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_each_path_visits_every_pixel_once(height: int, width: int, scan: str) -> None:
    order = path_order(height, width, scan)
    assert order.shape == (4, height * width)
    assert order.dtype == np.int64
    for path in order:
        assert sorted(path.tolist()) == list(range(height * width))


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_neighbours_on_a_continuous_path_are_neighbours_in_the_image(height: int, width: int) -> None:
    for path in path_order(height, width, "continuous"):
        row, column = np.divmod(path, width)
        assert (np.abs(np.diff(row)) + np.abs(np.diff(column)) == 1).all()


@pytest.mark.parametrize(("scan", "pairs"), [("continuous", [(0, 1), (2, 3)]), ("raster", [(0, 2), (1, 3)])])
@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_paths_come_with_their_reverses(height: int, width: int, scan: str, pairs: list[tuple[int, int]]) -> None:
    order = path_order(height, width, scan)
    for forward, backward in pairs:
        np.testing.assert_array_equal(order[forward], order[backward][::-1])


@pytest.mark.parametrize("scan", ["continuous", "raster"])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 6), (3, 5)])
def test_positions_undo_the_rows(height: int, width: int, scan: str) -> None:
    paths = scan_paths(height, width, scan, torch.device("cpu"))
    pixels = torch.arange(height * width)
    for positions in paths.pixel_positions:
        assert torch.equal(paths.pixels[positions], pixels)
    assert paths.projection_positions.shape[0] == 1
    assert torch.equal(paths.projections[paths.projection_positions[0]], torch.arange(4 * height * width))


@pytest.mark.parametrize("scan", ["continuous", "raster"])
def test_projections_read_for_each_path_its_own_rows_in_the_order_of_its_pixels(scan: str) -> None:
    height, width = 4, 6
    paths = scan_paths(height, width, scan, torch.device("cpu"))
    rows_pixel, rows_path = np.divmod(paths.projections.numpy().reshape(4, -1), 4)
    np.testing.assert_array_equal(rows_pixel, path_order(height, width, scan))
    np.testing.assert_array_equal(rows_path, np.repeat(np.arange(4)[:, None], height * width, axis=1))


def test_gather_rows_reads_the_pixels_of_every_path() -> None:
    paths = small_grid()
    x = torch.randn(2, 24, 3)
    gathered = gather_rows(x, paths.pixels, paths.pixel_positions).unflatten(1, (4, 24))
    for path, order in enumerate(walk_continuous(4, 6)):
        assert torch.equal(gathered[:, path], x[:, order])


def test_sum_rows_adds_every_path_up_at_its_pixels() -> None:
    paths = small_grid()
    y = torch.randn(2, 4 * 24, 3, dtype=torch.float64)
    total = torch.zeros(2, 24, 3, dtype=torch.float64)
    for path, order in enumerate(walk_continuous(4, 6)):
        for step, pixel in enumerate(order):
            total[:, pixel] += y[:, path * 24 + step]
    torch.testing.assert_close(sum_rows(y, paths.pixels, paths.pixel_positions), total, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("kind", ["pixels", "projections"])
@pytest.mark.parametrize("scan", ["continuous", "raster"])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 6), (3, 5)])
def test_gather_rows_and_sum_rows_are_transposes(height: int, width: int, scan: str, kind: str) -> None:
    paths = scan_paths(height, width, scan, torch.device("cpu"))
    rows, positions = {
        "pixels": (paths.pixels, paths.pixel_positions),
        "projections": (paths.projections, paths.projection_positions),
    }[kind]
    x = torch.randn(2, positions.shape[1], 3, dtype=torch.float64)
    y = torch.randn(2, len(rows), 3, dtype=torch.float64)
    gathered = torch.sum(gather_rows(x, rows, positions) * y)
    summed = torch.sum(x * sum_rows(y, rows, positions))
    torch.testing.assert_close(gathered, summed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scan", ["continuous", "raster"])
def test_gradients_of_moving_rows_are_right_twice(scan: str) -> None:
    paths = scan_paths(2, 3, scan, torch.device("cpu"))
    x = torch.randn(2, 6, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 24, 2, dtype=torch.float64, requires_grad=True)

    # The square makes the second derivative depend on the input.
    def gather(x: torch.Tensor) -> torch.Tensor:
        return gather_rows(x, paths.pixels, paths.pixel_positions) ** 2

    def scatter(y: torch.Tensor) -> torch.Tensor:
        return sum_rows(y, paths.pixels, paths.pixel_positions) ** 2

    assert torch.autograd.gradcheck(gather, (x,))
    assert torch.autograd.gradcheck(scatter, (y,))
    assert torch.autograd.gradgradcheck(gather, (x,))
    assert torch.autograd.gradgradcheck(scatter, (y,))


def test_paths_are_computed_once_per_size_and_kind() -> None:
    device = torch.device("cpu")
    first = scan_paths(6, 10, "continuous", device)
    assert scan_paths(6, 10, "continuous", device) is first
    assert scan_paths(10, 6, "continuous", device) is not first
    assert scan_paths(6, 10, "raster", device) is not first


def test_paths_first_asked_for_by_a_sampler_serve_training_too() -> None:
    with torch.inference_mode():
        paths = scan_paths(2, 14, "raster", torch.device("cpu"))
    assert not any(tensor.is_inference() for tensor in paths)
    x = torch.randn(1, 28, 2, requires_grad=True)
    gather_rows(x, paths.pixels, paths.pixel_positions).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 4.0))
