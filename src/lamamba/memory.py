"""Work in parts that fit in GPU memory; keep freed memory on a CPU."""

import ctypes
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Options of the GNU C library's `mallopt`, man page mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Keep freed memory in this process for reuse. Does nothing without the GNU C library.

    By default, that library returns large blocks to the system at once and gets new pages of zeros later, with one page
    fault each. In a training step, whose tensors always have the same sizes, this costs about a tenth of the time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)


def in_parts(work: Callable[[slice], Tensor], number: int, at_once: int) -> Iterator[Tensor]:
    """Process a batch in parts. Whenever GPU memory runs out, continue with parts half as large.

    Args:
        work: takes a slice of the batch and returns one result per item.
        number: number of items in the batch.
        at_once: maximum number of items in a part.

    Raises:
        torch.OutOfMemoryError: a single item does not fit.
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
