"""Measure how fast a set of images is generated: LaMamba-XL with `lamamba generate`, against DiT-XL/2 in diffusers.

    python benchmarks/sampling.py            XL at 256 px, on a GPU
    python benchmarks/sampling.py --quick    a quick check with tiny sizes, also on a CPU; ignore its numbers

Everything from labels to PNG files on disk is timed: 25 steps of DPM-Solver++ with guidance, and the same autoencoder
for all, whose time is also measured alone. Weights are random, which does not change the time.

Each competitor generates a small set, another small set, and a large set. The speed is computed from the difference
between the large and the small set, so startup does not count. Startup is recorded separately: for the first run, which
compiles, and for a later one. The decoder is compiled, as it is for 50,000 images.

lamamba          `lamamba generate`
dit-pipeline     diffusers' DiTPipeline, in the same dtype; images are written by the same threads
dit-compiled     the same with compiled transformer blocks, and the autoencoder in channels-last layout
dit-generate     `lamamba generate` with the same DiT
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler

import lamamba.sampling.generate
from lamamba.checkpoints.checkpoint import CheckpointInfo, write_weights
from lamamba.config import GenerateConfig
from lamamba.data.latents import Latents
from lamamba.diffusion import Diffusion
from lamamba.model import LaMambaDiff
from lamamba.sampling.generate import generate, write_pngs
from measure import RESULTS, Results, milliseconds
from networks import COMPILE, CUDA, DEVICE

STEPS, GUIDANCE = 25, 4.0
SHARD = 4  # batches
DTYPE = torch.bfloat16 if CUDA else torch.float32
NAME = "bf16" if CUDA else "float32"


class Sets:
    """Generate sets of images with each competitor, and record the time."""

    def __init__(self, folder: Path, quick: bool, batch: int, number: int) -> None:
        self.folder, self.quick, self.batch, self.number = folder, quick, batch, number
        self.case = "generate_quick" if quick else "generate_xl-256"
        self.steps = 2 if quick else STEPS
        torch.manual_seed(0)
        channels = [8, 8, 8, 8] if quick else [128, 256, 512, 512]  # the second list is Stable Diffusion's
        AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=channels, layers_per_block=1 if quick else 2, latent_channels=4, sample_size=256,
            norm_num_groups=4 if quick else 32,
        ).save_pretrained(folder / "vae")  # fmt: skip
        small = {"embed_dim": 8, "num_heads": 2, "depths": (1, 1, 1, 1), "bottleneck_depth": 0} if quick else {}
        size = 8 if quick else 32
        with DEVICE:
            network = LaMambaDiff.from_preset("xl-256", sample_size=size, **small)
        write_weights(folder / "lamamba", network.to("cpu"), CheckpointInfo(vae=str(folder / "vae")))
        heads, head_dim = (2, 8) if quick else (16, 72)
        with DEVICE:
            transformer = DiTTransformer2DModel(
                num_attention_heads=heads, attention_head_dim=head_dim, in_channels=4, out_channels=8,
                num_layers=2 if quick else 28, sample_size=size, patch_size=2,
            )  # fmt: skip
        scheduler = DPMSolverMultistepScheduler.from_config(Diffusion().scheduler("dpm++", self.steps).config)
        vae = AutoencoderKL.from_pretrained(folder / "vae")
        DiTPipeline(
            transformer.to("cpu"), vae, scheduler, {label: str(label) for label in range(1000)}
        ).save_pretrained(folder / "dit")

    def generate(self, results: Results, provider: str) -> None:
        """Time `lamamba generate` of a checkpoint or a pipeline."""
        checkpoint = self.folder / ("dit" if provider == "dit-generate" else "lamamba")

        def make(number: int) -> None:
            with tempfile.TemporaryDirectory(dir=self.folder) as out:
                generate(
                    GenerateConfig(
                        checkpoint=str(checkpoint), out=Path(out), num_images=number, batch_size=self.batch,
                        steps=self.steps, guidance=GUIDANCE, sampler="dpm++", images_per_shard=SHARD * self.batch,
                    )
                )  # fmt: skip

        self._time(results, provider, make)

    def pipeline(self, results: Results, provider: str) -> None:
        """Time diffusers' pipeline."""
        pipe = DiTPipeline.from_pretrained(self.folder / "dit", torch_dtype=DTYPE).to(DEVICE)
        pipe.set_progress_bar_config(disable=True)
        if provider == "dit-compiled":
            pipe.transformer.pos_embed.register_forward_hook(lambda module, inputs, tokens: tokens.contiguous())
            for block in pipe.transformer.transformer_blocks:
                block.compile(**COMPILE)
            pipe.vae.to(memory_format=torch.channels_last)

        def make(number: int) -> None:
            with tempfile.TemporaryDirectory(dir=self.folder) as out:
                for start in range(0, number, self.batch):
                    places = range(start, min(start + self.batch, number))
                    images = pipe(
                        [place % 1000 for place in places], guidance_scale=GUIDANCE, num_inference_steps=self.steps,
                        generator=[torch.Generator(DEVICE).manual_seed(place) for place in places], output_type="np",
                    ).images  # fmt: skip
                    pixels = (255 * images).round().astype(np.uint8).transpose(0, 3, 1, 2)
                    write_pngs(Path(out), places, pixels, [{"label": place % 1000} for place in places])

        self._time(results, provider, make)

    def _time(self, results: Results, provider: str, make: Callable[[int], None]) -> None:
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        few = SHARD * self.batch
        first, again, many = (seconds(make, number) for number in (few, few, few + self.number))
        each = (many - again) / self.number
        for metric, value in (
            ("images_per_s", 1 / each), ("first_start_s", first - few * each), ("start_s", again - few * each)
        ):  # fmt: skip
            results.add(self.case, provider, metric, [value], self.batch, NAME)
        if CUDA:
            peak = torch.cuda.max_memory_allocated() / 2**30
            results.add(self.case, provider, "peak_gib", [peak], self.batch, NAME)

    def autoencoder(self, results: Results) -> None:
        """Time the autoencoder that all competitors share, plain and compiled."""
        latents = Latents.open(self.folder / "vae", DEVICE, DTYPE)
        side = 8 if self.quick else 32
        x = torch.randn(self.batch, 4, side, side, device=DEVICE)
        for provider in ("autoencoder", "autoencoder-compiled") if CUDA else ("autoencoder",):
            times = [time / self.batch for time in milliseconds(lambda: latents.decode(x), repeats=5)]
            results.add(self.case, provider, "ms_per_image", times, self.batch, NAME)
            latents.compile()


def seconds(make: Callable[[int], None], number: int) -> float:
    """Return the seconds that generating a number of images takes."""
    begun = time.perf_counter()
    make(number)
    return time.perf_counter() - begun


def main() -> None:
    """Measure all chosen competitors, and write their records to results/sampling/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--providers", nargs="+", default=["lamamba", "dit-pipeline", "dit-compiled", "dit-generate"])
    parser.add_argument("--out", type=Path, default=RESULTS / "sampling")
    parser.add_argument("--commit", default="", help="commit to note in the records, for a copy without history")
    options = parser.parse_args()
    batch, number = (2, 4) if options.quick else (options.batch_size, options.num_images)
    lamamba.sampling.generate.COMPILE_FROM = 0  # always compile, as for a large set
    results = Results(options.out, options.commit)
    with tempfile.TemporaryDirectory() as folder:
        sets = Sets(Path(folder), options.quick, batch, number)
        for provider in options.providers:
            measure = sets.pipeline if provider in ("dit-pipeline", "dit-compiled") else sets.generate
            results.attempt(provider, measure, provider)
        results.attempt("autoencoder", sets.autoencoder)
    raise SystemExit(1 if results.failures else 0)


if __name__ == "__main__":
    main()
