"""The processes that train together: started by torchrun, one for each device; a single process without it.

Every process does the same at the same time but for its share of a batch, and the first one alone writes to disk.
Shares may differ by an image. Losses are summed and divided by the size of the whole batch, so every image counts the
same.
"""

import os
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # they are there, and documented
from torch.distributed.distributed_c10d import _abort_process_group

from lamamba.errors import ConfigError, LamambaError
from lamamba.signals import SignalsNoted


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
        """Go on once all processes are here; raises LamambaError if one of them has ended."""
        if self.number == 1:
            return
        try:
            dist.barrier()
        except RuntimeError as error:
            raise LamambaError("another process has ended, so this one does too: see what that one printed") from error

    def wait_at_end(self, signals: SignalsNoted) -> None:
        """Wait for all processes at the end of this one's share; raises SignalError if a signal ended them all."""
        try:
            self.wait()
        except LamambaError:  # the others ended at a signal, which may have reached this one too
            signals.end_if_noted("the end of its share: the same command goes on", silent=not self.is_first)
            raise


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
    """Join the processes that torchrun started; gives this process's place, and its device for that of all.

    Raises:
        ConfigError: the environment variables that torchrun sets are wrong, or the processes cannot meet.
    """
    number = _read_variable("WORLD_SIZE", least=1, default=1)
    rank = _read_variable("RANK", default=0 if number == 1 else None)
    if rank >= number:
        raise ConfigError(f"RANK is {rank}: it must be less than WORLD_SIZE {number}, {_START_BY_TORCHRUN}")
    if number == 1:
        yield Processes(), device
        return
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        local_rank, num_gpus = _read_variable("LOCAL_RANK"), torch.cuda.device_count()
        if local_rank >= num_gpus:
            raise ConfigError(
                f"LOCAL_RANK is {local_rank} and this machine has {num_gpus} GPUs: start a process for each GPU, or "
                "give --device cpu"
            )
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    elif device != "cpu":
        raise ConfigError(f"device {device!r} is not for {number} processes: use auto, cuda or cpu")
    _meet("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", rank, number)
    try:
        yield Processes(rank, number), device
    except BaseException:
        # The others may be waiting for this process: to end as usual would be to wait for them.
        _abort_process_group()
        raise
    dist.destroy_process_group()


_START_BY_TORCHRUN = "so start with torchrun, or unset RANK and WORLD_SIZE"


def _read_variable(name: str, least: int = 0, most: int = sys.maxsize, default: int | None = None) -> int:
    """Read a whole number from an environment variable; raises ConfigError."""
    value = os.environ.get(name)
    if value is None:
        if default is None:
            raise ConfigError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {name} is not set, {_START_BY_TORCHRUN}")
        return default
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        limits = f"{least} or more" if most == sys.maxsize else f"from {least} to {most}"
        raise ConfigError(f"{name} is {value!r}: it must be a whole number, {limits}, {_START_BY_TORCHRUN}")
    return number


def _meet(backend: str, rank: int, number: int) -> None:
    """Start the process group; raises ConfigError."""
    host, port = os.environ.get("MASTER_ADDR"), _read_variable("MASTER_PORT", least=1, most=65535)
    if not host:
        raise ConfigError(f"WORLD_SIZE is {number} but MASTER_ADDR is not set, {_START_BY_TORCHRUN}")
    try:
        socket.getaddrinfo(host, port)  # PyTorch would try for half an hour
        dist.init_process_group(backend, rank=rank, world_size=number, store=_open_store(host, port))
    except (OSError, RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            raise ConfigError(f"MASTER_PORT {port} is taken by another program: use another one") from error
        cause = str(error).splitlines()[0]
        raise ConfigError(
            f"{number} processes could not meet at {host}:{port} ({cause}): check MASTER_ADDR and MASTER_PORT, and "
            "that all processes were started"
        ) from error


def _open_store(host: str, port: int) -> Any:
    """Open the store where processes find each other, if not the one that PyTorch would open.

    That is a store which torchrun keeps over restarts, with the addresses of processes that are gone
    (github.com/pytorch/pytorch/issues/135712): so each restart has a part of it to itself.
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return PrefixStore(f"restart {restart}", TCPStore(host, port, is_master=False))
