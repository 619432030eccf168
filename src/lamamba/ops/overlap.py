"""Let kernels start while the kernel before them ends (programmatic dependent launch).

From compute capability 9.0 on, `lamamba.ops.launch` launches Triton kernels like this. The GPU then prepares a kernel
while the last programs of the kernel before it still run. Between two short kernels, this saves about a microsecond.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait



@triton.jit
def wait_for_inputs():
    """Allow the next kernel to start, and wait until all kernels before this one have written their results.

    Every kernel calls this before it reads or writes memory. The next kernel waits here for the end of this one.
    """
    if tl.target_info.cuda_capability_geq(9, 0):
        gdc_launch_dependents()
        gdc_wait()
