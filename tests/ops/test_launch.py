"""Kernels are launched, or precompiled without being launched."""

from types import SimpleNamespace
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


class Jitted:
    """Replaces a function of Triton, which compiles for the kinds of its arguments when it is launched."""

    arg_names = ("p_x", "sizes", "number", "BLOCK", "SAVE")

    def __init__(self) -> None:
        self.compiled = 0
        self.launched: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: object, **constants: object) -> "Compiled":
            self.compiled += 1
            return Compiled(self.launched)

        return run


class Compiled:
    packed_metadata, function = ("metadata",), 77

    def __init__(self, launched: list[Any]) -> None:
        self.launched = launched

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.launched.append((grid, arguments))

    def run(self, *arguments: object) -> None:
        self.launched.append(arguments)


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces Triton's driver by one with a stream for each device."""
    triton = pytest.importorskip("triton")
    active = SimpleNamespace(get_current_stream=lambda device: ("stream", device))
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))
    return triton


def test_a_kernel_is_launched_as_it_was_compiled_for_the_same_kinds(triton: Any) -> None:
    kernel, x, y = Jitted(), torch.ones(8), torch.zeros(16)
    for tensor in (x, y):
        launch(kernel, (3,), tensor, (4, 2), 7, SAVE=True, BLOCK=16, num_warps=4)
    assert kernel.compiled == 1
    # Addresses replace tensors. Constants are in the order of the signature, without options.
    wanted = (3, 1, 1, ("stream", -1), 77, ("metadata",), None, None, None, y.data_ptr(), (4, 2), 7, 16, True)
    assert kernel.launched == [wanted]


def test_profilers_see_every_launch(triton: Any) -> None:
    kernel, x = Jitted(), torch.ones(8)
    runtime, usual = triton.knobs.runtime, {"SAVE": True, "BLOCK": 16}
    launch(kernel, (3,), x, (4, 2), 7, **usual)
    for name in ("launch_enter_hook", "launch_exit_hook"):
        chain = getattr(runtime, name)
        chain.add(print)
        try:
            launch(kernel, (3,), x, (4, 2), 7, **usual)
        finally:
            chain.remove(print)
    for grid, arguments in kernel.launched:
        assert grid == (3, 1, 1)
        assert arguments[0] is x
        assert arguments[1:] == ((4, 2), 7, 16, True)
    assert (kernel.compiled, len(kernel.launched)) == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "constants"),
    [
        ((torch.ones(8, dtype=torch.bfloat16), (4, 2), 7), {}),
        ((torch.ones(8)[1:], (4, 2), 7), {}),  # not aligned to 16 bytes
        ((torch.ones(8), (4, 1), 7), {}),
        ((torch.ones(8), (2, 4), 7), {}),
        ((None, (4, 2), 7, torch.ones(8)), {}),
        ((torch.ones(8), (4, 2), 16), {}),
        ((torch.ones(8), (4, 2), 7.0), {}),
        ((torch.ones(8), (4, 2), 7), {"BLOCK": 32}),
        ((torch.ones(8), (4, 2), 7), {"num_warps": 8}),
    ],
)
def test_another_kind_is_compiled_anew(triton: Any, arguments: tuple[Any, ...], constants: dict[str, int]) -> None:
    kernel, usual = Jitted(), {"BLOCK": 16, "SAVE": False, "num_warps": 4}
    launch(kernel, (3,), torch.ones(8), (4, 2), 7, **usual)
    launch(kernel, (3,), *arguments, **(usual | constants))
    assert (kernel.compiled, kernel.launched) == (2, [])


def test_true_is_not_one(triton: Any) -> None:
    kernel = Jitted()
    for number in (1, True):
        launch(kernel, (3,), torch.ones(8), (), number, BLOCK=16, SAVE=False)
    assert kernel.compiled == 2


def test_tensors_on_several_devices_are_refused() -> None:
    kernel = Kernel()
    with pytest.raises(ValueError, match="are on cpu and meta: move them to one device"):
        launch(kernel, (1,), torch.ones(2), None, torch.ones(2, device="meta"))
    assert kernel.launched == []


def test_a_kernel_that_is_interpreted_is_launched_the_same_way_each_time() -> None:
    kernel, x = Kernel(), torch.ones(2)
    for _ in range(2):
        launch(kernel, (1,), x, BLOCK=8)
    assert kernel.launched == [((1,), (x,), {"BLOCK": 8})] * 2
