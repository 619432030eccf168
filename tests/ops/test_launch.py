"""Kernels are launched, or precompiled without being launched."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lamamba.ops.launch import launch, precompile


class Kernel:
    """Replaces a compiled kernel, and remembers how it was called."""

    def __init__(self) -> None:
        self.launched: list[Any] = []
        self.compiled: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: self.launched.append((grid, arguments, constants))

    def warmup(self, *kinds: object, grid: tuple[int, ...], **constants: object) -> None:
        self.compiled.append((kinds, constants))


def test_precompiling_compiles_each_kernel_once_and_launches_none() -> None:
    pytest.importorskip("triton")
    kernel, x, y = Kernel(), torch.ones(2), torch.ones(3, dtype=torch.bfloat16)

    def function(x: Tensor, y: Tensor) -> None:
        for block in (8, 8, 16):
            launch(kernel, (block, 2), x, None, y, 0.5, BLOCK=block)

    precompile(function, x, y)
    assert kernel.launched == []
    kinds = (torch.float32, None, torch.bfloat16, 0.5)
    assert kernel.compiled == [(kinds, {"BLOCK": 8}), (kinds, {"BLOCK": 16})]
    function(x, y)
    assert kernel.launched == [((block, 2), (x, None, y, 0.5), {"BLOCK": block}) for block in (8, 8, 16)]


def test_a_failed_precompilation_leaves_kernels_to_be_launched() -> None:
    kernel, x = Kernel(), torch.ones(2)

    def fail() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        precompile(fail)
    launch(kernel, (1,), x)
    assert kernel.launched == [((1,), (x,), {})]
    assert kernel.compiled == []


def test_backward_passes_are_precompiled_too() -> None:
    """On a GPU, autograd runs backward passes in another thread."""
    pytest.importorskip("triton")
    kernel = Kernel()

    class Squared(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.square()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            launch(kernel, (1,), grad)
            return grad

    x = torch.ones(2, requires_grad=True, device="cuda" if torch.cuda.is_available() else "cpu")
    precompile(lambda: Squared.apply(x).sum().backward())
    assert kernel.compiled == [((torch.float32,), {})]
    assert kernel.launched == []
