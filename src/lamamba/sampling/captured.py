"""Records functions as CUDA graphs: a part of a training step, or a network for sampling."""

import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lamamba.diffusion import Denoiser
from lamamba.ops.launch import LOCK, precompile
from lamamba.ops.linear import RoundedWeights


class Captured:
    """A function of CUDA tensors that is recorded as a CUDA graph at its first call and replayed after that.

    Every call takes tensors of the same shapes and overwrites the results of the previous call, so read them before the
    next call. The same holds for gradients that the function writes to parameters. `shares_memory_with` is another
    graph that never runs at the same time; its results are overwritten too.
    """

    def __init__(
        self, function: Callable[..., dict[str, Tensor]], shares_memory_with: "Captured | None" = None
    ) -> None:
        self.function, self.shares_memory_with = function, shares_memory_with
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        if self.graph is None:
            state = torch.cuda.get_rng_state(inputs[0].device)
            self._record(*inputs)
            torch.cuda.set_rng_state(state, inputs[0].device)  # so that this call draws the same as a later one would
        assert self.graph is not None
        torch._foreach_copy_(self.inputs, list(inputs))
        self.graph.replay()
        return self.results

    def _record(self, *inputs: Tensor) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        # Run once without recording: this compiles kernels, and libraries allocate their buffers.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        other = self.shares_memory_with.graph if self.shares_memory_with else None
        pool = other.pool() if other else None
        # Other threads, such as NCCL's watchdog, may call CUDA during the recording.
        with _garbage_left_alone(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self.results = self.function(*self.inputs)
        self.graph = graph

    def forget(self) -> None:
        """Free the recorded graphs."""
        if self.graph is not None:
            self.graph.reset()
            self.graph, self.results = None, {}


@contextmanager
def _garbage_left_alone() -> Iterator[None]:
    """Pause Python's garbage collector, since freeing a graph ends the recording of another one."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class CapturedNetwork:
    """A network for sampling whose forward pass is replayed as a CUDA graph; on other devices, the plain network.

    Launched one by one, the kernels of a small batch wait for Python. A pass is recorded for each shape of its inputs,
    of which the last few are kept, and anew where the weights have moved; values that change in place are seen.
    Gradients are not. Threads may share it.

    Args:
        network: called as `(x_t, t, y) -> (b, 2c, h, w)`.
        bf16: compute in bfloat16, as `torch.autocast` does; otherwise as the weights are, and the context says.
        captures: whether to record passes. If not, kernels are still compiled at once before the first pass.
    """

    KEPT = 2  # guided and not, say; each keeps the memory of a pass

    def __init__(self, network: Any, bf16: bool = False, captures: bool = True) -> None:
        self.network, self.bf16, self.captures = network, bf16, captures
        self.config, self.null_label = network.config, network.null_label
        self._rounded: tuple[Any, RoundedWeights] | None = None
        self._passes: OrderedDict[tuple[Any, ...], Captured | None] = OrderedDict()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return device_of(self.network)

    @torch.inference_mode()
    def __call__(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        kind = x_t.device.type
        dtype = torch.bfloat16 if self.bf16 else torch.get_autocast_dtype(kind)
        enabled = self.bf16 or torch.is_autocast_enabled(kind)
        network = self.network  # the recorded function must not refer to this object, or the cycle is never freed
        rounding: Callable[[], Any] = nullcontext

        def forward(*inputs: Tensor) -> dict[str, Tensor]:
            is_recorded = kind == "cuda" and torch.cuda.is_current_stream_capturing()
            ahead = modulations_ahead(network) if is_recorded else nullcontext()
            # No autocast cache: its copies of the weights would be freed before the next replay.
            with ahead, torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False), rounding():
                return {"out": network(*inputs)}

        if kind != "cuda":
            self.forget()  # graphs of a device that it was moved away from
            return forward(x_t, t, y)["out"]
        inputs = (x_t, t, y)
        weights: tuple[int, ...] = ()
        if self.captures:
            weights = tuple(tensor.data_ptr() for tensor in chain(self.network.parameters(), self.network.buffers()))
        key = (*((tensor.shape, tensor.dtype) for tensor in inputs), enabled and dtype, weights)
        with LOCK:
            if key not in self._passes:
                if enabled and self.captures:
                    rounding = self._round_together(weights, dtype)
                precompile(forward, *inputs)
                if len(self._passes) >= self.KEPT:
                    self._drop_oldest()
                self._passes[key] = Captured(forward) if self.captures else None
            self._passes.move_to_end(key)
            recorded = self._passes[key]
            try:
                # A copy, since schedulers may keep results, and the next replay overwrites them.
                return recorded(*inputs)["out"].clone() if recorded else forward(*inputs)["out"]
            except torch.OutOfMemoryError:
                self.forget()
                raise

    def _round_together(self, weights: tuple[int, ...], dtype: torch.dtype) -> Callable[[], Any]:
        """Keep copies of the weights for as long as they do not move; every pass rounds the weights again."""
        if self._rounded is None or self._rounded[0] != (weights, dtype):
            self._rounded = (weights, dtype), RoundedWeights(self.network, dtype)
        return self._rounded[1].in_use

    def _drop_oldest(self) -> None:
        _, recorded = self._passes.popitem(last=False)
        if recorded is not None:
            recorded.forget()

    def forget(self) -> None:
        """Free the recorded graphs, and the copies of weights that they use."""
        while self._passes:
            self._drop_oldest()
        self._rounded = None


@contextmanager
def modulations_ahead(network: nn.Module) -> Iterator[None]:
    """While a pass is recorded, compute all blocks' modulations on a second stream, for which small batches have room.

    Blocks are modules with a method `modulate`, of a condition that is the same for all.
    """
    blocks: list[Any] = [module for module in network.modules() if callable(getattr(module, "modulate", None))]
    plain = {block: block.modulate for block in blocks}
    ahead: dict[Any, tuple[Any, torch.cuda.Event]] = {}

    def modulate_ahead(block: Any, condition: Tensor) -> Any:
        if not torch.cuda.is_current_stream_capturing():  # another thread, which computes as usual
            return plain[block](condition)
        if not ahead:
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                ahead.update((other, (modulate(condition), beside.record_event())) for other, modulate in plain.items())
        modulation, is_there = ahead[block]
        is_there.wait()
        return modulation

    for block in plain:
        block.modulate = partial(modulate_ahead, block)
    try:
        yield
    finally:
        for block in plain:
            del block.modulate


def capture(network: Denoiser) -> Denoiser:
    """Record a network's passes on CUDA, unless it is compiled, moves between devices, or is no module at all."""
    fits = isinstance(network, nn.Module) and not hasattr(network, "_hf_hook") and not hasattr(network, "_orig_mod")
    return CapturedNetwork(network) if fits else network


def device_of(network: Any) -> torch.device:
    """Return the device that a network computes on, even if accelerate keeps its weights on another."""
    device = getattr(getattr(network, "_hf_hook", None), "execution_device", None)
    return torch.device(network.device if device is None else device)
