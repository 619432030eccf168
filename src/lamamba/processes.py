"""The processes that train together: started by torchrun, one for each device; a single process without it.

Every process does the same at the same time but for its share of a batch, and the first one alone writes to disk.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

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
        """Cut a batch of so many images into equal shares and return this process's.

        Raises:
            ConfigError: it cannot be cut so.
        """
        if length % self.number:
            raise ConfigError(
                f"batch_size {length} cannot be shared by {self.number} processes: use a multiple of {self.number}"
            )
        share = length // self.number
        return slice(self.rank * share, (self.rank + 1) * share)

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Average numbers of the same names over the processes."""
        if self.number == 1:
            return values
        together = torch.stack([value.float() for value in values.values()])
        dist.all_reduce(together)
        return dict(zip(values, together / self.number, strict=True))

    def wait(self) -> None:
        """Go on once all processes are here."""
        if self.number > 1:
            dist.barrier()


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
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Processes(dist.get_rank(), number), device
    finally:
        dist.destroy_process_group()
