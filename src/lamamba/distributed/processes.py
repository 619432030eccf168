"""The ranks that train together: torchrun starts one process per device; without it there is a single process.

All ranks do the same at the same time, each on its share of a batch. Only rank 0 writes to disk. Shares may differ by
one image. Losses are summed and divided by the size of the whole batch, so all images have the same weight.
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

from lamamba.distributed.signals import SignalsNoted
from lamamba.errors import ConfigError, LamambaError, first_line


@dataclass(frozen=True)
class Processes:
    """This process's rank, and the number of ranks (world size)."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    def share(self, length: int) -> slice:
        """Split a batch of `length` images over the ranks, and return this rank's share.

        Raises:
            ConfigError: there are fewer images than ranks.
        """
        if length < self.world_size:
            raise ConfigError(
                f"batch_size {length} is too small for {self.world_size} processes: use {self.world_size} or more"
            )
        shares = cut_evenly(length, self.world_size)
        start = sum(shares[: self.rank])
        return slice(start, start + shares[self.rank])

    def all_reduce(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.world_size == 1:
            return values
        together = torch.stack([value.float() for value in values.values()])
        dist.all_reduce(together)
        return dict(zip(values, together, strict=True))

    def all_reduce_max(self, number: int) -> int:
        if self.world_size == 1:
            return number
        together = torch.tensor(number)
        dist.all_reduce(together, dist.ReduceOp.MAX)
        return int(together)

    def barrier(self) -> None:
        """Wait for all ranks; raises LamambaError if one of them has ended."""
        if self.world_size == 1:
            return
        try:
            dist.barrier()
        except RuntimeError as error:
            raise LamambaError("another rank has ended, so this one ends too: see the output of that rank") from error

    @contextmanager
    def sharing(self) -> Iterator[SignalsNoted]:
        """Note signals in this context, which all ranks enter and leave together; raises LamambaError if one ends."""
        self.barrier()
        with SignalsNoted() as signals:
            yield signals
            try:
                self.barrier()
            except LamambaError:  # a signal ended the others, and may have reached this one too
                signals.end_if_noted("the end of its share: the same command continues", silent=not self.is_first)
                raise


def cut_evenly(length: int, number: int) -> list[int]:
    """Split a length into `number` parts that differ by at most one; the last part is a largest one."""
    ends = [length * index // number for index in range(number + 1)]
    return [end - start for start, end in pairwise(ends)]


class GradientSums:
    """All-reduces gradients during the backward pass, as soon as they are computed.

    Unlike DistributedDataParallel, its operations can be recorded in a CUDA graph. All ranks must compute the same
    gradients in the same order.
    """

    AT_A_TIME = 256 << 20  # bytes

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.active = False
        self.left: list[Tensor] = []
        self.bytes_left = 0
        self.under_way: list[Any] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._note)

    def _note(self, parameter: Tensor) -> None:
        if self.active and parameter.grad is not None:
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

    def all_reduce(self, gradients: Iterable[Tensor]) -> None:
        """All-reduce gradients that are already computed."""
        with self.all_reducing():
            for gradient in gradients:
                self._take(gradient)

    @contextmanager
    def all_reducing(self) -> Iterator[None]:
        """All-reduce the gradients of a backward pass in this context; it ends when all are reduced."""
        self.active = True
        try:
            yield
            self._launch()
            for work in self.under_way:
                work.wait()
        finally:
            self.active, self.left, self.bytes_left, self.under_way = False, [], 0, []


@contextmanager
def joined(device: str) -> Iterator[tuple[Processes, str]]:
    """Join the ranks that torchrun started; yield this process's rank and its device.

    Raises:
        ConfigError: torchrun's environment variables are wrong, or the ranks cannot connect.
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
                f"LOCAL_RANK is {local_rank}, but this machine has {num_gpus} GPUs: start one process per GPU, or use "
                "--device cpu"
            )
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    elif device != "cpu":
        raise ConfigError(f"device {device!r} does not support {number} processes: use auto, cuda or cpu")
    _meet("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", rank, number)
    try:
        yield Processes(rank, number), device
    except BaseException:
        # The others may be waiting for this process, so a normal end would wait for them forever.
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
        socket.getaddrinfo(host, port)  # PyTorch would retry for half an hour
        dist.init_process_group(backend, rank=rank, world_size=number, store=_open_store(host, port))
    except (OSError, RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            raise ConfigError(f"another program uses MASTER_PORT {port}: choose another port") from error
        raise ConfigError(
            f"{number} processes could not connect at {host}:{port} ({first_line(error)}): check MASTER_ADDR and "
            "MASTER_PORT, and that all processes were started"
        ) from error


def _open_store(host: str, port: int) -> Any:
    """Open the store in which ranks find each other, or return None for PyTorch's own.

    torchrun keeps its store over restarts, with the addresses of processes that have ended
    (github.com/pytorch/pytorch/issues/135712). So each restart uses a separate part of it.
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return PrefixStore(f"restart {restart}", TCPStore(host, port, is_master=False))
