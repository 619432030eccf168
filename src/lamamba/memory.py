"""What becomes of memory that is freed on a CPU."""

import ctypes
import sys

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
