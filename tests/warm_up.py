"""What the process that `forked.py` forks from does first: imports, and one step of training on a CPU."""

import gc
import os
import signal
import tempfile
import threading
from contextlib import redirect_stdout
from pathlib import Path

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # another way of looking for a GPU forbids forks to use it

import torch
import torch.distributed.fsdp
import torch.distributed.launcher.api

import lamamba.commands.encode
import lamamba.evaluation.evaluate
import lamamba.sampling.generate
import lamamba.training.run  # noqa: F401 - what commands import when they are called
import loss_curves  # noqa: F401
from lamamba.cli import main
from small_network import TINY_NETWORK

TINY = [
    *TINY_NETWORK,
    *("--num-images", "4", "--batch-size", "4", "--device", "cpu", "--sample-steps", "1"),
]

torch.set_num_threads(1)
if not torch.cuda.is_available():  # where there is a GPU, a backward pass starts threads, which no fork survives
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        main(["train", "--out", f"{folder}/run", *TINY])
assert threading.active_count() == 1, f"threads are left: {threading.enumerate()}"
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in tests that run in the background
gc.freeze()  # of what all forks share
