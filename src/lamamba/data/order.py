"""Which image is read when: a pure function of (seed, position), so that training resumes to the image."""

import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lamamba.config.checks import check, check_seed
from lamamba.data.sources import ArraySource, Source
from lamamba.distributed.signals import leave_signals_to_parent
from lamamba.errors import DataError, first_line


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """Return the order of one epoch: a permutation of 0..length-1, int64 (length,), read-only.

    It sorts raw Philox numbers, which are the same in all versions of NumPy, unlike `Generator.permutation`.
    """
    keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(length)
    order: np.ndarray = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order


def reading_order(positions: np.ndarray, *, length: int, seed: int) -> np.ndarray:
    """Return the index of the image at each position since the start of training: int64 (b,) -> int64 (b,)."""
    epochs = positions // length
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        indices[here] = permutation(seed, epoch, length)[positions[here] % length]
    return indices


def flip_choices(positions: np.ndarray, *, seed: int) -> np.ndarray:
    """Return whether to mirror the image at each position, half of them: int64 (b,) -> bool (b,)."""
    key = _mix_bits(np.array([seed], dtype=np.uint64))
    bits = _mix_bits(key ^ _mix_bits(positions.astype(np.uint64)))
    return bits >= np.uint64(1 << 63)


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    horizontal_flip: bool = False,
    num_workers: int = 0,
    share: slice = slice(None),
) -> Generator[tuple[Tensor, Tensor]]:
    """Read batches forever, each epoch in a new order that depends only on (seed, epoch).

    Args:
        source: the images.
        batch_size: images a batch; a batch may reach into the next epoch.
        seed: 0 to 2**64 - 1.
        start: number of images already seen; the images that follow are those of a run that never stopped.
        horizontal_flip: mirror half of the images, chosen by (seed, position).
        num_workers: processes that decode files; they change only the speed, and are not used for images in memory.
        share: the part of each batch that is read; other ranks read the rest.

    Returns:
        Iterator over images, uint8 (b, c, h, w), or latents of the source, and labels, int64 (b,), of the share.
        Closing it ends the workers. PyTorch's global generator is not used.

    Raises:
        ConfigError: a number is out of its range.
        DataError: the source is empty. While iterating: an image cannot be read, or a worker died.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("start", start, 0), ("num_workers", num_workers, 0)):
        check(value >= least, name, value, f"{least} or more")
    check_seed(seed)
    if len(source) == 0:
        raise DataError(f"the source {source.name} has no images: give one with at least one image")
    every_positions = (np.arange(first, first + batch_size)[share] for first in count(start, batch_size))
    return _read_batches(source, every_positions, seed, horizontal_flip, num_workers)


def _read_batches(
    source: Source, every_positions: Iterator[np.ndarray], seed: int, horizontal_flip: bool, num_workers: int
) -> Generator[tuple[Tensor, Tensor]]:
    reader = _BatchReader(source, seed, horizontal_flip)
    if isinstance(source, ArraySource):
        num_workers = 0  # gathering a batch is faster than sending it between processes
    # Without a generator of its own, the loader would draw from PyTorch's global one, and the noise of a run would
    # depend on how often it was resumed.
    options: dict[str, Any] = {"generator": torch.Generator(), "worker_init_fn": leave_signals_to_parent}
    loader = DataLoader[Any](reader, None, sampler=every_positions, num_workers=num_workers, **options)
    with _worker_deaths_left_to_the_reader():
        loaded = iter(loader)
    try:
        while True:
            batch = next(loaded)
            if isinstance(batch, DataError):
                raise batch
            images, labels = batch
            yield images, labels
    except (OSError, MemoryError) as error:  # such as too many open files
        raise _unreadable(source, error) from error
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):  # an error in a worker, not its death
            raise
        raise DataError(
            f"a worker that reads {source.name} died ({first_line(error).rstrip('. ')}), perhaps for lack of "
            "memory: use fewer num_workers (--num-workers)"
        ) from error
    finally:
        for worker in getattr(loaded, "_workers", ()):  # the loader would wait for one that hangs
            worker.kill()
        del loaded  # in the traceback's reference cycle, it would end its workers at an arbitrary later time


@contextmanager
def _worker_deaths_left_to_the_reader() -> Iterator[None]:
    """Keep a loader made in this context from raising an error in the main thread when a worker dies.

    The loader raises from a handler of SIGCHLD, possibly in the middle of a step, whose weights cannot be saved then.
    It also checks for dead workers while it waits for a batch, which is early enough.
    """
    handles = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if handles else None
    try:
        yield
    finally:
        if handles:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _unreadable(source: Source, error: OSError | MemoryError) -> DataError:
    cause = "out of memory" if isinstance(error, MemoryError) else f"{type(error).__name__}: {error}"
    return DataError(f"images of {source.name} could not be read ({cause})")


class _BatchReader(Dataset[Any]):
    """Makes a batch of positions; returns a DataError, because a worker would wrap a raised one in a traceback."""

    def __init__(self, source: Source, seed: int, horizontal_flip: bool) -> None:
        self.source, self.seed, self.horizontal_flip = source, seed, horizontal_flip

    def __getitem__(self, positions: np.ndarray) -> tuple[Tensor, Tensor] | DataError:
        indices = reading_order(positions, length=len(self.source), seed=self.seed)
        flipped = np.zeros(len(positions), dtype=bool)
        if self.horizontal_flip:
            flipped = flip_choices(positions, seed=self.seed)
        try:
            images, labels = self.source.gather(indices, flipped)
        except DataError as error:
            return DataError(str(error))  # without its cause, which may not be picklable
        except (OSError, MemoryError) as error:
            return _unreadable(self.source, error)
        return torch.from_numpy(images), torch.from_numpy(labels)


def _mix_bits(values: np.ndarray) -> np.ndarray:
    """Hash uint64 values one to one, evenly over all 64 bits (SplitMix64, Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values
