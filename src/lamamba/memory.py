"""Work in parts that fit in GPU memory; keep freed memory on a CPU."""

import ctypes
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Options of the GNU C library's `mallopt`, man page mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let memory that is freed stay with this process, to be used again: with the GNU C library, else do nothing.

    That library gives large blocks back at once and gets them anew as pages of zeros, one fault each. In a training
    step, whose tensors have the same sizes every time, that takes about as long as a tenth of the work.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)


def in_parts(work: Callable[[slice], Tensor], number: int, at_once: int) -> Iterator[Tensor]:
    """Do work on parts of a batch; whenever GPU memory runs out, go on with parts half as large.

    Args:
        work: takes a slice of the batch and returns a result for each of its items.
        number: items of the batch.
        at_once: items of a part, at most.

    Raises:
        torch.OutOfMemoryError: not even a single item fits.
    """
    done, at_once = 0, min(at_once, number)
    while done < number:
        try:
            part = work(slice(done, min(done + at_once, number)))
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
            at_once = -(-at_once // 2)
            torch.cuda.empty_cache()
            continue
        done += len(part)
        yield part
