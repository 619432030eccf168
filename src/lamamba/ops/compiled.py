"""How loops are compiled on a CPU, and what several of them compute; needs numba.

LLVM turns a loop over channels into vector code where it knows that what the loop writes overlaps nothing it reads: the
arguments of a compiled function must not overlap, other than those that are only read. It allocates nothing, or numba
would count references to every row it looks at, which costs more than the arithmetic. Arrays are contiguous float32.

What is compiled is kept on disk until the file of the loop itself changes: after a change here, touch the loops' files.
"""

import numpy as np
from numba import njit
from numba.core.compiler import Compiler


class _WithoutOverlap(Compiler):
    def define_pipelines(self):
        self.state.flags.noalias = True
        return super().define_pipelines()


compiled = njit(
    nogil=True,
    cache=True,
    error_model="numpy",
    fastmath={"reassoc", "contract", "nsz"},  # sums may be split over lanes; NaN and infinity keep their meaning
    pipeline_class=_WithoutOverlap,
    _nrt=False,
)
f32 = np.float32


@njit(inline="always")
def exp(x):
    """e^x for x up to 0, to a unit in the last place: 2^n e^r, with |r| below ln(2) / 2."""
    x = f32(-87) if x < f32(-87) else x  # not `max`, which would take NaN for the smaller one
    n = np.floor(x * f32(1.44269504) + f32(0.5))
    r = x - n * f32(0.693359375) + n * f32(2.12194440e-4)  # ln 2 in two parts: the first product is exact
    p = f32(1 / 5040)
    for coefficient in (f32(1 / 720), f32(1 / 120), f32(1 / 24), f32(1 / 6), f32(1 / 2), f32(1), f32(1)):
        p = p * r + coefficient
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(inline="always")
def moments(x, eps):
    """Compute mean and 1 / sqrt(variance + eps) of (c,)."""
    total, squares, channels = f32(0), f32(0), f32(len(x))
    for c in range(len(x)):
        total += x[c]
    mean = total / channels
    for c in range(len(x)):
        squares += (x[c] - mean) * (x[c] - mean)
    return mean, f32(1) / np.sqrt(squares / channels + eps)
