"""Measure how training scales: images/s of one process, and of several processes with the same images per process.

    python benchmarks/scaling.py                                        one GPU
    torchrun --nproc-per-node 2 benchmarks/scaling.py                   two GPUs, through NCCL
    torchrun --nproc-per-node 2 benchmarks/scaling.py --preset xl-256 xl-512 --batch-size 8 16 32 64
    torchrun --nproc-per-node 2 benchmarks/scaling.py --shard           with sharded optimizer state
    torchrun --nproc-per-node 2 benchmarks/scaling.py --quick           quick check, also on a CPU

`--quick` uses tiny sizes; ignore its numbers.

The trainer itself is timed, with everything that a step does: drawing noise, EMA, all-reduce of gradients. Images are
in memory, so no step waits for data. Other values that `lamamba plan` needs are measured as well. One process measures
how fast latents are read and noise is drawn. Several processes measure how fast collectives are when nothing else runs.

Every preset is measured at every batch size. If one fails, for example because memory runs out, the error is reported,
the others continue, and the exit status is 1. Rank 0 writes one file per run to results/scaling/, after every case.
"""

import argparse
import json
import sys
import tempfile
import zlib
from collections.abc import Callable
from contextlib import closing
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import save_file
from torch import Tensor

from lamamba.config import NetworkConfig, TrainConfig, preset
from lamamba.data import ArraySource, LatentSource, batches
from lamamba.data.latent_files import FORMAT, INDEX
from lamamba.data.latents import Pixels
from lamamba.diffusion import OBJECTIVES, draw_noise
from lamamba.distributed.processes import GradientSums, Processes, joined
from lamamba.sampling import choose_device
from lamamba.training.trainer import Trainer
from measure import RESULTS, Results, milliseconds

TINY = NetworkConfig(
    in_channels=4, sample_size=8, num_classes=10, embed_dim=8, num_heads=2, depths=(1, 1, 1, 1), bottleneck_depth=1
)
MIB = 2**20


class Measurement:
    """The measurements of one run, by one process or all of them together, which go into one file."""

    def __init__(self, options: argparse.Namespace, processes: Processes, device: torch.device) -> None:
        self.processes, self.device, self.quick = processes, device, options.quick
        self.shard = options.shard
        self.provider = f"processes-{processes.world_size}" + "-shard" * options.shard
        self.results = Results(options.out if processes.is_first else None, options.commit)
        if self.results.path:
            cases = "_".join(["quick"] if options.quick else options.preset)
            self.results.path = self.results.path.with_stem(f"{self.results.path.stem}_scaling_{cases}_{self.provider}")

    def add(self, case: str, metric: str, values: list[float], batch: int, dtype: str) -> None:
        """Record repeated measurements on rank 0."""
        if self.processes.is_first:
            self.results.add(case, self.provider, metric, values, batch, dtype)

    def training(self, results: Results, name: str, network: NetworkConfig, each: int) -> None:
        """Time training steps with `each` images per process."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        size = network.sample_size
        images = np.random.default_rng(0).integers(0, 256, (64, network.in_channels, size, size), dtype=np.uint8)
        labels = np.arange(len(images)) % network.num_classes
        source = ArraySource("random", images, labels, tuple(map(str, range(network.num_classes))))
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig(
                out=Path(folder), network=network, batch_size=each * self.processes.world_size, num_images=10**9,
                max_grad_norm=1.0, shard=self.shard,
            )  # fmt: skip
            with self.device:  # draws the weights there, which would take a CPU many seconds
                trainer = Trainer(config, source, Pixels(), self.device, self.processes)
            with closing(trainer):
                reader = trainer.batches()
                times = milliseconds(lambda: trainer.take_step(*next(reader)), 3 if self.quick else 20, warm_up=5)
                if self.device.type == "cuda":
                    free, total = torch.cuda.mem_get_info()
        case, batch, dtype = f"scaling_{name}", config.batch_size, "bf16" if trainer.uses_bf16 else "float32"
        self.add(case, "ms", times, batch, dtype)
        self.add(case, "images_per_s", [1e3 * batch / ms for ms in times], batch, dtype)
        if self.device.type == "cuda":
            self.add(case, "peak_gib", [torch.cuda.max_memory_allocated() / 2**30], batch, dtype)
            # Includes memory that PyTorch caches, and memory of CUDA, NCCL and the CUDA graph.
            self.add(case, "in_use_gib", [(total - free) / 2**30], batch, dtype)

    def collectives(self, results: Results, num_bytes: int) -> None:
        """Time collectives over a given number of bytes, and compute the bandwidth per process."""
        number = self.processes.world_size
        share = num_bytes // 4 // number
        whole, part = torch.zeros(share * number, device=self.device), torch.zeros(share, device=self.device)
        ways: dict[str, tuple[int, Callable[[], object]]] = {
            "all_reduce": (2, lambda: dist.all_reduce(whole)),
            "all_gather": (1, lambda: dist.all_gather_into_tensor(whole, part)),
        }
        for name, (passes, way) in ways.items():
            times = milliseconds(way, 3 if self.quick else 20)
            sent = passes * (number - 1) / number * whole.nbytes
            case, length = f"{name}_{num_bytes / MIB:.0f}_mib", whole.numel()
            self.add(case, "ms", times, length, "float32")
            self.add(case, "sent_gb_per_s", [sent / ms / 1e6 for ms in times], length, "float32")

    def reading(self, results: Results, side: int) -> None:
        """Time how fast one process reads latents from files in the page cache."""
        number = 64 if self.quick else 512
        with tempfile.TemporaryDirectory() as folder:
            write_random_latents(Path(folder), number, side)
            reader = batches(LatentSource(Path(folder)), batch_size=32, seed=0, horizontal_flip=True)
            times = milliseconds(lambda: list(islice(reader, number // 32)), 3)
        self.add(f"read_latents_{side}", "images_per_s", [1e3 * number / ms for ms in times], number, "float16")

    def drawing(self, results: Results) -> None:
        """Time drawing the noise of a whole batch, which every rank does."""
        shape = (64 if self.quick else 4096, 4, 64, 64)
        generator = torch.Generator(self.device).manual_seed(0)

        def draw() -> tuple[Tensor, ...]:
            return draw_noise(OBJECTIVES["diffusion"], shape, self.device, label_dropout=0.1, generator=generator)

        speeds = [np.prod(shape) / ms / 1e6 for ms in milliseconds(draw, 3 if self.quick else 20)]
        self.add("draw_noise", "numbers_per_ns", [float(speed) for speed in speeds], shape[0], "float32")


def write_random_latents(folder: Path, number: int, side: int) -> None:
    """Write a shard of random moments in the format of `lamamba encode`."""
    moments = np.random.default_rng(0).standard_normal((number, 2, 8, side, side), dtype=np.float32).astype(np.float16)
    sums = np.array([[zlib.crc32(view.tobytes()) for view in image] for image in moments], dtype=np.int64)
    labels = np.zeros(number, dtype=np.int64)
    shard = folder / "shard-00000.safetensors"
    save_file({"moments": moments, "labels": labels, "crc32": sums}, shard)
    settings = {
        "source": "random", "images": number, "images_per_shard": number, "class_names": ["0"], "image_size": 8 * side,
        "channels": 3, "shape": [4, side, side], "mirrored": True,
        "autoencoder": {"folder": "none", "sha256": 64 * "0"},
    }  # fmt: skip
    index = {
        "format": FORMAT, "settings": settings,
        "channel_statistics": {"mean": 4 * [0.0], "standard_deviation": 4 * [1.0]},
        "shards": [{"file": shard.name, "images": number, "sha256": sha256(shard.read_bytes()).hexdigest()}],
    }  # fmt: skip
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def main() -> None:
    """Run all measurements, together with the other ranks if torchrun started some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--preset", nargs="+", default=["xl-256"])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[128], help="images per process")
    parser.add_argument("--shard", action="store_true", help="as `lamamba train --shard`")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling", help="folder for the records")
    parser.add_argument("--commit", default="", help="commit to note in the records, for a copy without history")
    options = parser.parse_args()
    networks = {"quick": TINY} if options.quick else {name: preset(name) for name in options.preset}
    with joined("auto") as (processes, device_name):
        measured = Measurement(options, processes, choose_device(device_name))
        results = measured.results
        if processes.world_size == 1:
            for side in (8,) if options.quick else (32, 64):
                results.attempt(f"reading latents {side}x{side}", measured.reading, side)
            results.attempt("drawing noise", measured.drawing)
        else:
            # The largest all-reduce of the trainer, and about the size of all gradients of XL.
            for num_bytes in (MIB,) if options.quick else (GradientSums.AT_A_TIME, 2488 * MIB):
                results.attempt(f"collectives of {num_bytes / MIB:.0f} MiB", measured.collectives, num_bytes)
        for name, network in networks.items():
            for each in (2, 4) if options.quick else options.batch_size:
                # If a single rank fails, the others wait for it: choose sizes that fit on all.
                results.attempt(f"{name}, {each} images", measured.training, name, network, each)
        if processes.is_first and results.path:
            print(f"written: {results.path}")
    if results.failures:
        sys.exit(f"failed: {'; '.join(results.failures)}")


if __name__ == "__main__":
    main()
