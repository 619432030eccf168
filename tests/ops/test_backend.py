"""Which version of an operation is chosen, and the errors if it cannot run."""

import importlib.util
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lamamba.ops import backend


def on_cuda(dtype: torch.dtype = torch.bfloat16) -> Any:
    return cast(Any, SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda")))


@pytest.fixture(autouse=True)
def _forget() -> None:
    backend._find_triton.cache_clear()
    backend._import_numba.cache_clear()


def test_auto_takes_the_kernels_on_cuda_where_they_fit() -> None:
    pytest.importorskip("triton")
    assert backend.choose_kernels("operation", on_cuda(), "auto")
    assert not backend.choose_kernels("operation", on_cuda(torch.float64), "auto")
    assert not backend.choose_kernels("operation", on_cuda(), "auto", limit="too large")
    assert not backend.choose_kernels("operation", on_cuda(), "pytorch")
    assert not backend.choose_kernels("operation", torch.ones(1), "auto")


def test_what_is_left_to_choose_can_be_chosen_for_all() -> None:
    with backend.use_backend("pytorch"):
        assert not backend.choose_kernels("operation", on_cuda(), "auto")
        assert backend.choose_kernels("operation", on_cuda(), "triton")
        with backend.use_backend("triton"), pytest.raises(ValueError, match=r"do not take torch\.int64"):
            backend.choose_kernels("operation", on_cuda(torch.int64), "auto")
    assert backend.choose_kernels("operation", on_cuda(), "auto")


def test_auto_without_triton_warns_once_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(RuntimeWarning, match="triton is not installed: lamamba falls back to slower PyTorch operations"):
        assert not backend.choose_kernels("operation", on_cuda(), "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not backend.choose_kernels("operation", on_cuda(), "auto")
    with pytest.raises(ValueError, match='triton is not installed: pip install triton, or use backend "pytorch"'):
        backend.choose_kernels("operation", on_cuda(), "triton")


def test_auto_does_without_on_gpus_that_are_not_nvidia_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert not backend.choose_kernels("operation", on_cuda(), "auto")


def test_a_batch_beyond_cuda_s_grid_is_an_error() -> None:
    host = pytest.importorskip("lamamba.ops.selective_scan.triton")
    x = torch.empty(65536, 1, 1, 1, device="meta")
    with pytest.raises(ValueError, match="a batch of 65536 is too large for the kernels: use 65535 or less"):
        host._geometry(x, torch.empty(65536, 1, 1, 12, device="meta"), 1, torch.empty(4, 1, 1), True, False)


def test_loops_are_for_a_cpu_up_to_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_import_numba", lambda: True)
    assert backend.choose_loops(torch.ones(1), "auto")
    assert backend.choose_loops(torch.ones(1, dtype=torch.bfloat16), "auto")
    assert not backend.choose_loops(torch.ones(1), "pytorch")
    assert not backend.choose_loops(torch.ones(1, dtype=torch.float64), "auto")
    assert not backend.choose_loops(torch.ones(1, device="meta"), "auto")


def test_a_numba_that_does_not_import_warns_once_and_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "numba.py").write_text('raise ImportError("Numba needs NumPy 1.26 or less")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    with pytest.warns(RuntimeWarning, match="numba cannot be imported .Numba needs NumPy 1.26 or less"):
        assert not backend.choose_loops(torch.ones(1), "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not backend.choose_loops(torch.ones(1), "auto")
    backend._import_numba.cache_clear()
