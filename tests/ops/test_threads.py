"""Threads share the images of a batch in compiled loops on a CPU."""

import threading

import numpy as np
import pytest
import torch

from lamamba.ops import threads


@pytest.mark.parametrize("by_openmp", [True, False])
def test_parts_run_side_by_side_and_their_errors_are_raised(by_openmp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_openmp and threads._openmp is None:
        pytest.skip("PyTorch without OpenMP")
    monkeypatch.setattr(threads, "_openmp", threads._openmp if by_openmp else None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    images = (np.arange(5),)
    both, seen = threading.Barrier(2, timeout=20), []

    def note(part: np.ndarray) -> None:
        both.wait()  # times out if they run one after the other
        seen.extend(part)

    threads.share_images(note, images, (), ())
    assert sorted(seen) == [0, 1, 2, 3, 4]

    def fail(part: np.ndarray) -> None:
        raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        threads.share_images(fail, images, (), ())
