"""Measure encoding, training from latents, and saving checkpoints, with the commands that users run.

    python benchmarks/feeding.py                   XL at 256 px, on a GPU
    python benchmarks/feeding.py --processes 2     on two GPUs, started by torchrun
    python benchmarks/feeding.py --quick           a quick check with tiny sizes, also on a CPU; ignore its numbers
    python benchmarks/feeding.py --parts checkpoints

* Encoding: the images are random JPEG files. The autoencoder has the shape of Stable Diffusion's, with random weights.
  A larger and a smaller folder are encoded. The speed is computed from the difference, so startup does not count.
* Training: the log of a training from latents gives the speed, and the share of time spent waiting for data.
  benchmarks/scaling.py measures the speed with images in memory.
* Checkpoints: training continues while a checkpoint is written. The records have the time until `save` returns, the
  time until the file is written, and the time of steps meanwhile.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from lamamba.config import TrainConfig, preset
from lamamba.data import ArraySource
from lamamba.data.latents import Pixels
from lamamba.sampling import choose_device
from lamamba.training.trainer import Trainer
from measure import RESULTS, Results

PARTS = ["encoding", "training", "checkpoints"]
TINY = ("--embed-dim", "8", "--num-heads", "2", "--depths", "1", "1", "1", "1")


class Feeding:
    """Run the commands on random images in a folder."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.folder, self.quick, self.processes = folder, options.quick, options.processes
        self.pixels = 64 if self.quick else 256
        self.each = 2 if self.quick else options.batch_size
        self.provider = f"processes-{self.processes}"
        torch.manual_seed(0)
        channels = [8, 8, 8, 8] if self.quick else [128, 256, 512, 512]
        AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=channels, layers_per_block=1 if self.quick else 2, latent_channels=4,
            norm_num_groups=4 if self.quick else 32,
        ).save_pretrained(folder / "vae")  # fmt: skip

    def run(self, *arguments: str) -> float:
        """Run a command of lamamba, and return the seconds it took."""
        together = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
        command = [sys.executable, *(together if self.processes > 1 else []), "-m", "lamamba", *arguments]
        begun = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)}: {done.stderr[-2000:]}")
        return time.perf_counter() - begun

    def encoding(self, results: Results, few: int, many: int) -> None:
        """Encode a smaller and a larger folder."""
        seconds = []
        for number in (few, many):
            images, out = self.folder / f"images-{number}", self.folder / f"latents-{number}"
            write_images(images, number, self.pixels)
            seconds.append(
                self.run(
                    "encode", "--data", str(images), "--vae", str(self.folder / "vae"), "--image-size",
                    str(self.pixels), "--out", str(out), "--images-per-shard", str(few // 4), "--num-workers", "8",
                )
            )  # fmt: skip
        speed = (many - few) / (seconds[1] - seconds[0])
        results.add("encode_both_ways_round", self.provider, "images_per_s", [speed], 32, "float32")

    def training(self, results: Results, latents: Path, steps: int) -> None:
        """Train from latents, and read the log without its first steps."""
        batch, run = self.each * self.processes, self.folder / "run"
        network = ("s-256", *TINY) if self.quick else ("xl-256",)
        self.run(
            "train", "--data", str(latents), "--horizontal-flip", "--out", str(run), "--batch-size", str(batch),
            "--num-images", str(batch * steps), "--log-every", str(batch * steps // 6), "--sample-every", str(10**9),
            "--checkpoint-every", str(10**9), "--preset", *network,
        )  # fmt: skip
        records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()][1:]
        shutil.rmtree(run)  # 10 GB for XL
        dtype = "bf16" if torch.cuda.is_available() else "float32"
        for metric in ("images_per_s", "data_wait"):
            results.add("train_from_latents", self.provider, metric, [r[metric] for r in records], batch, dtype)

    def checkpointing(self, results: Results) -> None:
        """Save checkpoints while training continues, in one process."""
        device = choose_device("auto")
        network = preset("xl-256")
        if self.quick:
            network = replace(network, sample_size=8, embed_dim=8, num_heads=2, depths=(1, 1, 1, 1))
        size = network.sample_size
        images = np.zeros((64, network.in_channels, size, size), dtype=np.uint8)
        source = ArraySource("zeros", images, np.arange(64), tuple(map(str, range(network.num_classes))))
        config = TrainConfig(
            out=self.folder / "saved", network=network, batch_size=self.each, num_images=10**9, keep_checkpoints=1
        )
        with device:
            trainer = Trainer(config, source, Pixels(), device)
        reader = trainer.batches()

        def step() -> float:
            begun = time.perf_counter()
            float(trainer.take_step(*next(reader))["loss"])  # waits for the device
            return 1e3 * (time.perf_counter() - begun)

        with closing(trainer):
            for _ in range(3):
                step()
            before = [step() for _ in range(10)]
            print(f"a step takes {statistics.median(before):.0f} ms", flush=True)
            kept, writing, meanwhile = [], [], []
            for _ in range(2):
                begun = time.perf_counter()
                trainer.save()
                kept.append(1e3 * (time.perf_counter() - begun))
                print(f"save returned after {kept[-1]:.0f} ms", flush=True)
                while trainer.writer.finish(wait=False) is None:
                    meanwhile.append(step())
                writing.append(time.perf_counter() - begun)
                print(f"and had written after {writing[-1]:.0f} s", flush=True)
        dtype = "bf16" if trainer.uses_bf16 else "float32"
        results.add("checkpoint", "trainer", "kept_ms", kept, self.each, dtype)
        results.add("checkpoint", "trainer", "written_s", writing, self.each, dtype)
        results.add("checkpoint", "trainer", "step_before_ms", before, self.each, dtype)
        results.add("checkpoint", "trainer", "step_meanwhile_ms", meanwhile, self.each, dtype)
        size_gib = sum(path.stat().st_size for path in config.out.rglob("*") if path.is_file()) / 2**30
        results.add("checkpoint", "trainer", "size_gib", [size_gib], self.each, dtype)
        print(f"a save costs {statistics.median(kept) / statistics.median(before):.1f} steps", flush=True)


def write_images(folder: Path, number: int, side: int) -> None:
    """Write smooth random JPEG files of two classes."""
    generator = np.random.default_rng(0)
    for index in range(number):
        path = folder / str(index % 2) / f"{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(generator.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)


def main() -> None:
    """Run the chosen measurements, and write their records to results/feeding/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128, help="images per process and step")
    parser.add_argument("--steps", type=int, default=90, help="number of steps when training from latents")
    parser.add_argument("--out", type=Path, default=RESULTS / "feeding", help="folder for the records")
    parser.add_argument("--commit", default="", help="commit to note in the records, for a copy without history")
    options = parser.parse_args()
    if "training" in options.parts and "encoding" not in options.parts:
        parser.error("part `training` needs the latents of part `encoding`: give both")
    few, many, steps = (8, 16, 6) if options.quick else (256, 1280, options.steps)
    results = Results(options.out, options.commit)
    if results.path:
        results.path = results.path.with_stem(f"{results.path.stem}_feeding_processes-{options.processes}")
    with tempfile.TemporaryDirectory() as folder:
        feeding = Feeding(options, Path(folder))
        if "encoding" in options.parts:
            results.attempt("encoding", feeding.encoding, few, many)
        if "training" in options.parts:
            results.attempt("training", feeding.training, Path(folder) / f"latents-{many}", steps)
        if "checkpoints" in options.parts and options.processes == 1:
            results.attempt("checkpoints", feeding.checkpointing)
    raise SystemExit(1 if results.failures else 0)


if __name__ == "__main__":
    main()
