"""Memory that a training step frees is there for the next one, without a fault for each page."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from lamamba.memory import keep_freed_memory

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
