"""The branches of a block: attention in windows that never see padding, and the MLP."""

import json
import math
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lamamba.config import NetworkConfig
from lamamba.model import Mlp, WindowAttention
from lamamba.ops.fused_layers import Norm
from lamamba.ops.window_attention.geometry import window_geometry
from small_network import relative_error

GOLDEN = Path(__file__).parent / "golden"


def attend_pixel_by_pixel(attention: WindowAttention, x: Tensor) -> Tensor:
    """Normalize, then attend in windows of a padded, shifted grid, one real query at a time, without padding."""
    x = F.layer_norm(x, x.shape[-1:])
    batch, height, width, channels = x.shape
    side_y, side_x = min(height, attention.window_size), min(width, attention.window_size)
    shift_y = side_y // 2 if attention.shifted and height > side_y else 0
    shift_x = side_x // 2 if attention.shifted and width > side_x else 0

    def place_and_region(pixel: int, length: int, side: int, shift: int) -> tuple[int, int]:
        """Where the cyclic shift puts a pixel, and from which side of the image it came there."""
        padded = math.ceil(length / side) * side
        return (pixel - shift) % padded, int(pixel < shift)

    def window_and_region(pixel: int) -> tuple[int, int, int, int]:
        row, region_y = place_and_region(pixel // width, height, side_y, shift_y)
        column, region_x = place_and_region(pixel % width, width, side_x, shift_x)
        return row // side_y, column // side_x, region_y, region_x

    def offset_row(query: int, key: int) -> int:
        (query_y, _), (key_y, _) = (place_and_region(p // width, height, side_y, shift_y) for p in (query, key))
        (query_x, _), (key_x, _) = (place_and_region(p % width, width, side_x, shift_x) for p in (query, key))
        window = attention.window_size
        return (query_y - key_y + window - 1) * (2 * window - 1) + query_x - key_x + window - 1

    heads = attention.num_heads
    qkv = attention.qkv(x).reshape(batch, height * width, 3, heads, channels // heads)
    q, k, v = qkv.unbind(2)
    table = attention.relative_position_bias
    found = [window_and_region(pixel) for pixel in range(height * width)]
    outputs = []
    for query in range(height * width):
        keys = [key for key in range(height * width) if found[key][:2] == found[query][:2]]
        bias = torch.stack([table[offset_row(query, key)] for key in keys], dim=1)
        bias = bias + torch.tensor([0.0 if found[key][2:] == found[query][2:] else -100.0 for key in keys])
        logits = torch.einsum("bhc,bkhc->bhk", q[:, query], k[:, keys]) * (channels // heads) ** -0.5 + bias
        outputs.append(torch.einsum("bhk,bkhc->bhc", logits.softmax(dim=-1), v[:, keys]).flatten(1))
    return attention.out_proj(torch.stack(outputs, dim=1)).reshape(x.shape)


def run_branch(branch: torch.nn.Module, x: Tensor) -> Tensor:
    """Run a branch of a block after a norm that only normalizes."""
    ones, zeros = x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1])
    of_images = zeros.expand(len(x), -1)
    stream, out, bias = branch(Norm(x, None, ones, zeros, (of_images, of_images), 1e-5))
    assert stream is x
    return cast(Tensor, out if bias is None else out + bias)


def attend(attention: WindowAttention, x: Tensor) -> Tensor:
    return run_branch(attention, x)


def build_attention(window_size: int, shifted: bool, scale: float = 1.0) -> WindowAttention:
    config = NetworkConfig(embed_dim=8, num_heads=2, window_size=window_size)
    attention = WindowAttention(config, 8, shifted)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return attention.double()


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize(
    ("height", "width", "window_size"),
    [(10, 10, 8), (8, 8, 4), (8, 12, 4), (6, 10, 4), (5, 7, 4), (9, 4, 4), (3, 11, 4), (9, 9, 8), (7, 6, 2)],
    ids=str,
)
def test_window_attention_never_sees_padding(height: int, width: int, window_size: int, shifted: bool) -> None:
    attention = build_attention(window_size, shifted)
    x = torch.randn(2, height, width, 8, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        assert relative_error(attend(attention, x), attend_pixel_by_pixel(attention, x)) < 1e-12


def test_pixels_that_only_the_shift_brought_together_see_each_other_at_minus_100() -> None:
    """Logits in the hundreds tell -100 from minus infinity."""
    attention = build_attention(4, shifted=True, scale=6.0)
    x = 3 * torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        wanted, out = attend_pixel_by_pixel(attention, x), attend(attention, x)
        geometry = window_geometry(8, 8, 4, True, torch.device("cpu"))
        assert sorted(geometry.mask.unique().tolist()) == [-100.0, 0.0]
        assert relative_error(out, wanted) < 1e-12
        geometry.mask[geometry.mask == -100] = -math.inf
        try:
            assert relative_error(attend(attention, x), wanted) > 1e-3
        finally:
            geometry.mask[geometry.mask == -math.inf] = -100


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 8), (3, 5), (1, 1)])
def test_a_grid_no_larger_than_the_window_is_one_window(height: int, width: int, shifted: bool) -> None:
    attention = build_attention(8, shifted)
    x = torch.randn(1, height, width, 8).double().requires_grad_()
    assert window_geometry(height, width, 8, False, x.device).mask is None
    (sensitivity,) = torch.autograd.grad(attend(attention, x)[0, 0, 0].sum(), x)
    assert (sensitivity != 0).all()
    assert relative_error(attend(attention, x), attend_pixel_by_pixel(attention, x)) < 1e-12


@pytest.mark.parametrize("shifted", [False, True])
def test_windows_agree_with_the_released_geometry(shifted: bool) -> None:
    recorded = json.loads((GOLDEN / "official_xl_256_state.json").read_text())
    geometry = window_geometry(32, 32, 8, shifted, torch.device("cpu"))
    shape, _, mean, std, least, most = recorded["layers.0.blocks.0.attn.relative_position_index"]
    offsets = geometry.offsets.double()
    assert list(offsets.shape) == shape
    assert [offsets.mean(), offsets.std(), offsets.min(), offsets.max()] == pytest.approx([mean, std, least, most])
    if shifted:
        shape, _, mean, std, least, most = recorded["layers.0.blocks.1.attn_mask"]
        mask = geometry.mask.double()
        assert list(mask.shape) == shape
        assert [mask.mean(), mask.std(), mask.min(), mask.max()] == pytest.approx([mean, std, least, most])
    else:
        assert geometry.mask is None


def test_dropout_acts_on_the_activations_of_the_mlp() -> None:
    mlp = Mlp(8, 8)
    mlp.linear_2.weight.data = torch.eye(8)
    torch.nn.init.zeros_(mlp.linear_2.bias)
    x = torch.randn(1, 100, 100, 8)
    whole = F.gelu(mlp.linear_1(F.layer_norm(x, (8,))))
    torch.testing.assert_close(run_branch(mlp, x), whole)
    mlp.dropout.p = 0.25
    left = run_branch(mlp, x)
    kept = left != 0
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.01)
    torch.testing.assert_close(left[kept], whole[kept] / 0.75)
    torch.testing.assert_close(run_branch(mlp.eval(), x), whole)
