"""Freed memory is used again without page faults; work is cut into parts that fit."""

import subprocess
import sys

import pytest
import torch

from lamamba.data.latents import in_parts

PROGRAM = """
import resource
import torch
from lamamba.training.run import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        large = [torch.ones(1 << 23) for _ in range(2)]
        del large
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
keep_freed_memory()
for _ in range(3):  # what is kept grows until all fits
    faults()
print(first, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the GNU C library's way")
def test_freed_memory_is_used_again() -> None:
    printed = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    given_back, kept = map(int, printed.split())
    assert given_back > 10_000
    assert kept < given_back / 20


def test_parts_are_halved_until_they_fit() -> None:
    asked: list[int] = []

    def double(part: slice) -> torch.Tensor:
        asked.append(part.stop - part.start)
        if asked[-1] > 2:
            raise torch.OutOfMemoryError("no more")
        return 2 * torch.arange(7)[part]

    assert torch.cat(list(in_parts(double, 7, 100))).tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert asked == [7, 4, 2, 2, 2, 1]
    with pytest.raises(torch.OutOfMemoryError):
        list(in_parts(lambda part: double(slice(0, 3)), 1, 1))
