"""Sums over the parts of a gradient."""

import pytest
import torch

pytest.importorskip("triton")
from lamamba.ops.sum_kernels import sum_parts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (600, 7), (513, 2, 10), (5, 3, 4, 130), (2, 9001)], ids=str)
def test_parts_are_summed(shape: tuple[int, ...]) -> None:
    """Integers, so that nothing is rounded, between values that must not be read."""
    generator = torch.Generator().manual_seed(sum(shape))
    parts = torch.randint(-9, 10, shape, generator=generator).to(DEVICE, torch.float32)
    surrounded = torch.full((parts.numel() + 2,), torch.nan, device=DEVICE)
    surrounded[1:-1] = parts.flatten()
    out = torch.full((*shape[1:], 2), torch.nan, device=DEVICE)
    assert torch.equal(sum_parts(surrounded[1:-1].view(shape)), parts.sum(dim=0))
    sum_parts(parts, out=out.flatten()[: parts[0].numel()].view(shape[1:]))
    assert torch.equal(out.flatten()[: parts[0].numel()].view(shape[1:]), parts.sum(dim=0))
    assert out.flatten()[parts[0].numel() :].isnan().all()
