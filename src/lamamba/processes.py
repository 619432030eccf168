"""The processes that train together: started by torchrun, one for each device; a single process without it.

Every process does the same at the same time but for its share of a batch, and the first one alone writes to disk.
Shares may differ by an image. Losses are summed and divided by the size of the whole batch, so every image counts the
same.
"""

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # they are there, and documented
from torch.distributed.distributed_c10d import _abort_process_group

from lamamba.errors import ConfigError


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int = 0
    number: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, length: int) -> slice:
        """Cut a batch of so many images into shares, one a process, and return this process's.

        Raises:
            ConfigError: there are fewer images than processes.
        """
        if length < self.number:
            raise ConfigError(
                f"batch_size {length} is too small for {self.number} processes: use {self.number} or more"
            )
        shares = cut_evenly(length, self.number)
        start = sum(shares[: self.rank])
        return slice(start, start + shares[self.rank])

    def add_up(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum numbers of the same names over the processes."""
        if self.number == 1:
            return values
        together = torch.stack([value.float() for value in values.values()])
        dist.all_reduce(together)
        return dict(zip(values, together, strict=True))

    def largest(self, number: int) -> int:
        """Return the largest of the processes' numbers."""
        if self.number == 1:
            return number
        together = torch.tensor(number)
        dist.all_reduce(together, dist.ReduceOp.MAX)
        return int(together)

    def wait(self) -> None:
        """Go on once all processes are here."""
        if self.number > 1:
            dist.barrier()


def cut_evenly(length: int, number: int) -> list[int]:
    """Cut a length into so many parts that differ by one at most, from a smallest to a largest one."""
    ends = [length * index // number for index in range(number + 1)]
    return [end - start for start, end in pairwise(ends)]


class GradientSums:
    """Adds up parameters' gradients over the processes as a backward pass leaves them, beside the rest of it.

    What it launches can be recorded in a CUDA graph, other than what DistributedDataParallel does.

    Args:
        parameters: of this process; the others have the same, and leave gradients in the same order.
    """

    AT_A_TIME = 256 << 20  # bytes

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.adding_up = False
        self.left: list[Tensor] = []
        self.bytes_left = 0
        self.under_way: list[Any] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._note)

    def _note(self, parameter: Tensor) -> None:
        if self.adding_up and parameter.grad is not None:
            self._take(parameter.grad)

    def _take(self, gradient: Tensor) -> None:
        self.left.append(gradient)
        self.bytes_left += gradient.nbytes
        if self.bytes_left >= self.AT_A_TIME:
            self._launch()

    def _launch(self) -> None:
        if self.left and self.left[0].is_cuda:
            with dist._coalescing_manager(async_ops=True) as together:  # type: ignore[attr-defined]  # as FSDP does
                for gradient in self.left:
                    dist.all_reduce(gradient)
            self.under_way.append(together)
        else:
            self.under_way += [dist.all_reduce(gradient, async_op=True) for gradient in self.left]
        self.left, self.bytes_left = [], 0

    def add_up(self, gradients: Iterable[Tensor]) -> None:
        """Add up gradients that are there already."""
        with self.added_up():
            for gradient in gradients:
                self._take(gradient)

    @contextmanager
    def added_up(self) -> Iterator[None]:
        """Add up the gradients of a backward pass in this context; after it they are there."""
        self.adding_up = True
        try:
            yield
            self._launch()
            for work in self.under_way:
                work.wait()
        finally:
            self.adding_up, self.left, self.bytes_left, self.under_way = False, [], 0, []


@contextmanager
def joined(device: str) -> Iterator[tuple[Processes, str]]:
    """Join the processes that torchrun started; gives this process's place, and its device for that of all."""
    number = int(os.environ.get("WORLD_SIZE", "1"))
    if number == 1:
        yield Processes(), device
        return
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    elif device != "cpu":
        raise ConfigError(f"device {device!r} is not for {number} processes: use auto, cuda or cpu")
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, **_place_to_meet())
    try:
        yield Processes(dist.get_rank(), number), device
    except BaseException:
        # The others may be waiting for this process: to end as usual would be to wait for them.
        _abort_process_group()
        raise
    dist.destroy_process_group()


def _place_to_meet() -> dict[str, Any]:
    """Say where processes find each other, if not where PyTorch would look.

    That is a store which torchrun keeps over restarts, with the addresses of processes that are gone
    (github.com/pytorch/pytorch/issues/135712): so each restart has a part of it to itself.
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return {
        "store": PrefixStore(f"restart {restart}", store),
        "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"]),
    }  # fmt: skip


class SignalsNoted:
    """A context in which a signal to end is noted, for a loop to look at; a later one ends the process as usual.

    Not one that follows at once: whoever signals all processes of a job reaches some of them twice, directly and by way
    of torchrun, which passes on what it gets.
    """

    # Of Ctrl-C, of whoever ends a job, and of a scheduler that warns before it does.
    NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")
    AT_ONCE_S = 2.0

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> Self:
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in self.NAMES if hasattr(signal, name)]
            self.before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _note(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self.noted = number, now
        elif now - self.noted > self.AT_ONCE_S:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
