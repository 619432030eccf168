"""Compile loops for a CPU with numba, and functions that several loops share.

Rules for compiled functions:

* Arrays are contiguous float32.
* An argument that is written must not overlap any other argument. LLVM relies on this to turn loops over channels into
  vector code.
* They allocate nothing. Otherwise numba counts references to every row, which costs more than the arithmetic.

numba caches compiled code on disk until the file of the loop changes. After a change here, touch the files that import
this one.
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
    fastmath={"reassoc", "contract", "nsz"},  # sums may be split over lanes; NaN and infinity still work
    pipeline_class=_WithoutOverlap,
    _nrt=False,
)
f32 = np.float32


@njit(inline="always")
def exp(x):
    """Compute e^x for x <= 0, to one unit in the last place: 2^n e^r, with |r| below ln(2) / 2."""
    x = f32(-87) if x < f32(-87) else x  # not `max`, which would replace NaN
    n = np.floor(x * f32(1.44269504) + f32(0.5))
    r = x - n * f32(0.693359375) + n * f32(2.12194440e-4)  # ln 2 in two parts, so that the first product is exact
    p = f32(1 / 5040)
    for coefficient in (f32(1 / 720), f32(1 / 120), f32(1 / 24), f32(1 / 6), f32(1 / 2), f32(1), f32(1)):
        p = p * r + coefficient
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(inline="always")
def moments(x, eps):
    """Compute the mean and 1 / sqrt(variance + eps) of (c,)."""
    total, squares, channels = f32(0), f32(0), f32(len(x))
    for c in range(len(x)):
        total += x[c]
    mean = total / channels
    for c in range(len(x)):
        squares += (x[c] - mean) * (x[c] - mean)
    return mean, f32(1) / np.sqrt(squares / channels + eps)
