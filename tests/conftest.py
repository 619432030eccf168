"""What must be set before the tests import anything."""

import os

# One thread for each test process: there are as many processes as cores, and threads that contend cost tenfold.
os.environ["OMP_NUM_THREADS"] = "1"  # for torch, imported after this, and for commands that tests start

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels run on the CPU, one operation at a time
