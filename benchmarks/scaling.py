"""Measure how training scales: images/s of one process, and of several that train together, each with as many images.

    python benchmarks/scaling.py                                        one GPU
    torchrun --nproc-per-node 2 benchmarks/scaling.py                   two, through NCCL
    torchrun --nproc-per-node 2 benchmarks/scaling.py --quick           tiny, on a CPU too: the numbers mean nothing

It is the trainer itself that is timed, with all that a step does: drawing noise, the average, the gradients' way
between processes. Images lie in memory, so that none are waited for. The first process writes results/scaling/.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from lamamba.config import NetworkConfig, TrainConfig, preset
from lamamba.data import ArraySource
from lamamba.latents import Pixels
from lamamba.pipeline import choose_device
from lamamba.processes import joined
from lamamba.train import Trainer
from measure import RESULTS, Results, milliseconds

TINY = NetworkConfig(
    in_channels=4, sample_size=8, num_classes=10, embed_dim=8, num_heads=2, depths=(1, 1, 1, 1), bottleneck_depth=1
)


def main() -> None:
    """Time steps of the trainer in this process, among others if torchrun started some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--preset", default="xl-256")
    parser.add_argument("--batch-size", type=int, default=128, help="images of a process")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling", help="folder for the record")
    parser.add_argument("--commit", default="", help="its name, for a copy without history")
    options = parser.parse_args()
    network = TINY if options.quick else preset(options.preset)
    each = 2 if options.quick else options.batch_size
    with joined("auto") as (processes, device_name), tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            out=Path(folder), network=network, batch_size=each * processes.number, num_images=10**9, max_grad_norm=1.0
        )
        size = network.sample_size
        images = np.random.default_rng(0).integers(0, 256, (64, network.in_channels, size, size), dtype=np.uint8)
        labels = np.arange(len(images)) % network.num_classes
        source = ArraySource("random", images, labels, tuple(map(str, range(network.num_classes))))
        trainer = Trainer(config, source, Pixels(), choose_device(device_name), processes)
        batches = trainer.batches()
        times = milliseconds(lambda: trainer.take_step(*next(batches)), 3 if options.quick else 20, warm_up=5)
        trainer.close()
        dtype = "bf16" if trainer.uses_bf16 else "float32"
        results = Results(options.out if processes.is_first else None, options.commit)
        case, provider = f"scaling_{'quick' if options.quick else options.preset}", f"processes-{processes.number}"
        if processes.is_first:
            results.add(case, provider, "ms", times, config.batch_size, dtype)
            speeds = [1e3 * config.batch_size / ms for ms in times]
            results.add(case, provider, "images_per_s", speeds, config.batch_size, dtype)
            if torch.cuda.is_available():
                peak = torch.cuda.max_memory_allocated() / 2**30
                results.add(case, provider, "peak_gib", [peak], config.batch_size, dtype)
            results.path = results.path and results.path.with_stem(f"{results.path.stem}_{case}_{provider}")
            results.write()


if __name__ == "__main__":
    main()
