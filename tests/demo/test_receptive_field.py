"""What a pixel sees: with attention alone no more than windows allow, with the scan the whole image."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from lamamba.checkpoints.checkpoint import load_checkpoint
from lamamba.config import DemoLimits
from lamamba.demo.figures import attention_groups
from lamamba.demo.receptive_field import NUM_DRAWS, TIMESTEP, draw_receptive_field, receptive_fields
from lamamba.errors import ConfigError
from lamamba.model import LaMambaDiff

PIXEL = (37, 10)


@pytest.fixture(scope="module")
def network() -> LaMambaDiff:
    return load_checkpoint("nano").network


def allowed_by_windows(network: LaMambaDiff, side: int, pixel: tuple[int, int]) -> np.ndarray:
    """Follow the pixels that one pixel of the output can depend on, from the head back to the input."""

    def attend(seen: np.ndarray, blocks: object) -> np.ndarray:
        for block in list(blocks)[::-1]:  # type: ignore[call-overload]
            groups = attention_groups(*seen.shape, 8, block.attention.shifted)
            seen = np.isin(groups, groups[seen])
        return seen

    def halve(seen: np.ndarray) -> np.ndarray:
        return seen.reshape(seen.shape[0] // 2, 2, -1, 2).any(axis=(1, 3))

    def double(seen: np.ndarray) -> np.ndarray:
        return seen.repeat(2, axis=0).repeat(2, axis=1)

    seen = np.zeros((side, side), dtype=bool)
    seen[pixel] = True
    skips = []
    for index, blocks in enumerate(list(network.decoder)[::-1]):  # the largest grid first
        seen = attend(seen, blocks)
        skips.append(seen)
        seen = halve(seen) if index < 2 else seen
    seen = seen | attend(seen, network.bottleneck)
    for index, blocks in reversed(list(enumerate(network.encoder))):
        seen = attend(seen | skips[index], blocks)
        seen = double(seen) if 1 <= index <= 2 else seen
    return seen


def test_attention_alone_sees_what_windows_allow(network: LaMambaDiff) -> None:
    allowed = allowed_by_windows(network, 64, PIXEL)
    assert 0 < allowed.sum() < allowed.size
    *_, field = receptive_fields(network, 64, 64, PIXEL, "attention", DemoLimits())
    # A mask of -100 on the logits leaves weights below e^-80, not zeros.
    assert field[~allowed].max() < 1e-34 * field.max()
    assert (field[allowed] > 0).mean() > 0.99


@pytest.mark.parametrize("branches", ["scan", "both"])
def test_the_scan_sees_the_whole_image(network: LaMambaDiff, branches: str) -> None:
    *_, field = receptive_fields(network, 64, 64, PIXEL, branches, DemoLimits())  # type: ignore[arg-type]
    assert (field > 0).mean() > 0.99
    assert np.unravel_index(field.argmax(), field.shape) == PIXEL


def test_it_grows_draw_by_draw(network: LaMambaDiff) -> None:
    fields = list(receptive_fields(network, 16, 16, (4, 5), "both", DemoLimits()))
    assert len(fields) == NUM_DRAWS
    for before, after in pairwise(fields):
        assert not np.array_equal(before, after)
        assert before.mean() == pytest.approx(after.mean(), rel=0.5), "a mean and no sum"


def test_both_is_the_gradient_of_the_network_and_leaves_it_alone(network: LaMambaDiff) -> None:
    x_t = torch.randn((NUM_DRAWS, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    t = torch.full((NUM_DRAWS,), TIMESTEP)
    before = network(x_t, t, torch.full_like(t, 10))
    *_, field = receptive_fields(network, 16, 16, (4, 5), "both", DemoLimits())
    list(receptive_fields(network, 16, 16, (4, 5), "scan", DemoLimits()))
    assert torch.equal(network(x_t, t, torch.full_like(t, 10)), before)
    # A small step at one pixel moves the prediction by what its gradient says.
    step = torch.zeros_like(x_t, dtype=torch.float64)
    step[:, :, 4, 7] = 1e-4
    double = load_checkpoint("nano").network.double()
    ends = [double(x_t.double() + sign * step, t, torch.full_like(t, 10))[:, 0, 4, 5] for sign in (1, -1)]
    slope = ((ends[0] - ends[1]) / 2e-4).abs().mean().item()
    assert field[4, 7] == pytest.approx(slope, rel=1e-3)


def test_what_is_outside_or_unknown_is_refused(network: LaMambaDiff) -> None:
    with pytest.raises(ConfigError, match="row is 16: give 0 to 15"):
        list(receptive_fields(network, 16, 16, (16, 0), "both", DemoLimits()))
    with pytest.raises(ConfigError, match="branches 'scans' are unknown: did you mean scan"):
        list(receptive_fields(network, 16, 16, (0, 0), "scans", DemoLimits()))  # type: ignore[arg-type]


@pytest.mark.parametrize(("height", "width", "said"), [(18, 16, "pixels together"), (15, 16, "must be even, as 16")])
def test_a_grid_is_held_to_the_limit(network: LaMambaDiff, height: int, width: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        list(receptive_fields(network, height, width, (0, 0), "both", DemoLimits(max_pixels=NUM_DRAWS * 16 * 16)))


def test_a_field_is_drawn_in_whole_pixels_with_its_pixel_framed() -> None:
    field = np.zeros((4, 4), dtype=np.float32)
    field[1, 2], field[3, 3] = 1.0, 0.1
    picture = np.asarray(draw_receptive_field(field, (1, 2)))
    assert picture.shape == (320, 320, 3)
    assert (picture[0, 0] == 230).all()  # nothing comes from there
    assert picture[80, 160].tolist() == [220, 38, 38]
    inner = picture[240:, 240:].reshape(-1, 3)
    assert (inner == inner[0]).all()
    assert not (inner[0] == 230).all()
