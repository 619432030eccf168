"""The commands `lamamba sample` and `lamamba generate`: write images of a checkpoint to files.

`generate` works in shards, which ranks take in turn. A shard that exists is complete. An image depends only on its
position in the set.
"""

import copy
import importlib.util
import io
import json
import math
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.progress import MofNCompleteColumn
from torch import Tensor

from lamamba import __version__
from lamamba.checkpoints.checkpoint import describe_steps, load_denoiser, locked
from lamamba.config import GenerateConfig, SampleConfig, SamplingConfig
from lamamba.config.checks import MAX_GRID_PIXELS, check_seed
from lamamba.config.sampling import DEFAULT_STEPS
from lamamba.data.latents import IMAGE_CHANNELS, Latents, identify_autoencoder, open_space
from lamamba.diffusion import OBJECTIVES
from lamamba.distributed.processes import Processes, joined
from lamamba.distributed.signals import SignalsNoted
from lamamba.errors import CheckpointError, ConfigError, reading
from lamamba.files import atomic_write, checksum, write_json
from lamamba.files.npz import opened_array
from lamamba.files.records import changes, read_record
from lamamba.sampling import Callback, Start, choose_device, make_grid, sample, uses_bf16
from lamamba.sampling.captured import CapturedNetwork
from lamamba.sampling.labels import Labels, choose_guidance, why_unguided
from lamamba.sampling.schedulers import make_scheduler
from lamamba.terminal.output import progress_bars, say

SAMPLES, GENERATION = "samples.npz", "generation.json"
COMPILE_FROM = 10_000 * 256**2  # decoded pixels; benchmarks/sampling.py measures what compiling takes


class ImageSampler:
    """Samples images from a checkpoint on a device.

    Raises:
        LamambaError: the checkpoint or an option is wrong.
    """

    def __init__(self, config: SamplingConfig, device: torch.device) -> None:
        loaded = load_denoiser(config.checkpoint)
        self.info, self.path = loaded.info, loaded.path
        self.uses_bf16 = uses_bf16(config.precision, device)
        self.network = CapturedNetwork(loaded.network.to(device), self.uses_bf16)
        self.objective = OBJECTIVES[self.info.objective]
        vae = config.vae or (Path(self.info.vae) if self.info.vae else None)
        if vae is None and self.network.config.in_channels not in IMAGE_CHANNELS:
            raise ConfigError(
                f"{config.checkpoint} samples latents, of {self.network.config.in_channels} channels: give (--vae) the "
                "folder of the AutoencoderKL that decodes them"
            )
        self.vae = vae
        self.space = open_space(vae, device, torch.bfloat16 if self.uses_bf16 else torch.float32)
        if isinstance(self.space, Latents):
            self.space.check_network(int(self.network.config.in_channels))
        self.num_classes = int(self.network.config.num_classes)
        self._configure(config)

    def with_config(self, config: SamplingConfig) -> Self:
        """Return a sampler of the same weights with other options; raises LamambaError."""
        other = copy.copy(self)
        other._configure(config)
        return other

    def _configure(self, config: SamplingConfig) -> None:
        self.config = config
        self.weaker: CapturedNetwork | None = None
        self.weaker_path: Path | None = None
        if config.guidance_checkpoint is not None:
            weaker = load_denoiser(config.guidance_checkpoint)
            if weaker.info.objective != self.info.objective:
                raise ConfigError(
                    f"guidance_checkpoint {config.guidance_checkpoint} has the objective {weaker.info.objective!r}, "
                    f"this one {self.info.objective!r}: guide by one trained alike"
                )
            self.weaker = CapturedNetwork(weaker.network.to(self.network.device), self.uses_bf16)
            self.weaker_path = weaker.path
        own = self.info.distilled
        self.guidance = choose_guidance(self.network.config, config.guidance, self.weaker is not None, own)
        sides = config.size
        self.size = None if sides is None else (self.space.grid_size(sides[0]), self.space.grid_size(sides[1]))
        self.sampler = config.sampler or (own.sampler if own else self.objective.default_sampler)
        self.steps = config.steps or (own.steps if own else DEFAULT_STEPS)
        # Before the work, so that a sampler that does not fit costs no time.
        scheduler = make_scheduler(self.objective, self.sampler, self.steps, clip_sample=self.space.bounded)
        self.evaluations, self.clips = len(scheduler.timesteps), bool(scheduler.config.get("thresholding"))

    @property
    def labels(self) -> Labels:
        return Labels(self.num_classes, dict(enumerate(self.info.class_names)))

    def say_notes(self) -> None:
        """Print why guidance is off by default although there are labels, and how a distilled network is sampled."""
        is_default = self.config.guidance is None and self.weaker is None
        if own := self.info.distilled:
            say(own.why_unsuited(self.sampler, self.steps) or f"this network was {own}")
        elif is_default and self.num_classes and (why := why_unguided(self.network.config)):
            say(f"guidance is off: {why}")

    def prepare(self, number: int) -> None:
        """Compile the autoencoder's decoder if that pays: on a GPU, for many images."""
        pixels = number * math.prod(self.grid_size) * self.space.factor**2
        can_compile = self.network.device.type == "cuda" and importlib.util.find_spec("triton") is not None
        if isinstance(self.space, Latents) and can_compile and pixels >= COMPILE_FROM:
            self.space.compile()

    @property
    def image_channels(self) -> int:
        return self.space.image_channels if isinstance(self.space, Latents) else int(self.network.config.in_channels)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Height and width of what the network samples."""
        return self.size or (int(self.network.config.sample_size),) * 2

    def sample(
        self,
        labels: Sequence[int] | Tensor,
        seeds: Sequence[int | torch.Generator],
        callback: Callback | None = None,
        noise: Tensor | None = None,
        start: Start | None = None,
    ) -> np.ndarray:
        """Sample images, (b, c, h, w) uint8, as many at once as configured; arguments as in `lamamba.sample`."""
        images = []
        for first in range(0, len(labels), self.config.batch_size):
            part = slice(first, first + self.config.batch_size)
            x = sample(
                self.network,
                self.objective,
                labels[part],
                seeds[part],
                sampler=self.sampler,
                num_steps=self.steps,
                guidance_scale=self.guidance,
                guidance_options=self.config.guidance_options,
                weaker=self.weaker,
                size=self.size,
                clip_sample=self.space.bounded,
                noise=None if noise is None else noise[part],
                start=start and start[part],
                callback=callback,
            )
            images.append(self.space.decode(x).cpu().numpy())
        return np.concatenate(images)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the images depend on besides label and seed."""
        return {
            "checkpoint": str(self.config.checkpoint),
            "images_seen": self.info.images,
            "vae": None if self.vae is None else str(self.vae),
            "precision": "bf16" if self.uses_bf16 else "float32",
            "sampler": self.sampler,
            "steps": self.steps,
            "guidance": self.guidance,
            **({"guidance_included": self.info.distilled.guidance} if self.info.distilled else {}),
            "guidance_checkpoint": self.config.guidance_checkpoint,
            "clip_sample": self.clips,
            **{f"guidance_{name}": value for name, value in vars(self.config.guidance_options).items()},
            "lamamba": __version__,
            "torch": torch.__version__,
        }


def sample_grid(config: SampleConfig) -> None:
    """Sample and write a grid, and single images if configured.

    Raises:
        LamambaError: the checkpoint, a label, the sampler or a path is wrong.
    """
    model = ImageSampler(config, choose_device(config.device))
    classes = model.labels.parse(config.labels)
    pixels_of_grid = len(classes) * config.num_per_label * math.prod(model.grid_size) * model.space.factor**2
    if pixels_of_grid > MAX_GRID_PIXELS:
        raise ConfigError(
            f"num_per_label {config.num_per_label} of {len(classes)} classes makes {pixels_of_grid:,} pixels, and a "
            f"grid has at most {MAX_GRID_PIXELS:,}: ask for fewer, or make a set of files with lamamba generate"
        )
    labels = [label for label in classes for _ in range(config.num_per_label)]
    check_seed(config.seed, len(labels))
    seeds = range(config.seed, config.seed + len(labels))
    _make_folders(config)
    model.say_notes()
    pixels = sample_with_bar(model, labels, seeds)

    settings = model.settings
    grid = make_grid(pixels, columns=config.num_per_label)
    own = {"labels": classes, "num_per_label": config.num_per_label, "seed": config.seed}
    _write_png(config.out, grid, {**settings, **own})
    if config.images_out is not None:
        for index, (image, label, seed) in enumerate(zip(pixels, labels, seeds, strict=True)):
            path = config.images_out / f"{index:06d}.png"
            _write_png(path, image, {**settings, "label": label, "seed": seed})
    named = ", ".join(model.labels.name(label) for label in classes)
    drawn = f"{len(labels)} image{'s' * (len(labels) != 1)} ({named})"
    say(f"{drawn} · {model.sampler}, {describe_steps(model.steps)}", f"grid   {config.out}")
    if config.images_out is not None:
        last = f" to {len(labels) - 1:06d}.png" if len(labels) > 1 else ""
        others = len(list(config.images_out.glob("*.png"))) - len(labels)
        beside = f", beside {others} other{'s' * (others > 1)}" if others else ""
        say(f"images {config.images_out / '000000.png'}{last}{beside}")


def sample_with_bar(model: ImageSampler, labels: Sequence[int], seeds: Sequence[int]) -> np.ndarray:
    """Sample images and show a progress bar."""
    with progress_bars("{task.percentage:3.0f} %") as bar:
        advance = bar("sample", model.evaluations * len(labels))
        return model.sample(labels, seeds, lambda step: advance(len(step.x)))


def generate(config: GenerateConfig) -> None:
    """Make a set of images; under torchrun, the ranks share the work.

    Raises:
        LamambaError: the checkpoint or an option is wrong, or the folder holds images with other settings.
    """
    with joined(config.device) as (processes, device_name):
        model = ImageSampler(config, choose_device(device_name))
        labels_of = _labels_of_set(config, model)
        made = {
            **model.settings,
            "weights": _weights_digest(model.path),
            "guidance_weights": None if model.weaker_path is None else _weights_digest(model.weaker_path),
            "vae_digest": None if model.vae is None else identify_autoencoder(Path(model.vae)),
            **{name: getattr(config, name) for name in ("seed", "labels", "num_images", "size", "format")},
            "images_per_shard": config.images_per_shard,
        }
        # The other ranks wait until the folder exists and was checked.
        with locked(config.out) if processes.is_first else nullcontext():
            if processes.is_first:
                model.say_notes()
                _begin_set(config.out, json.loads(json.dumps(made)))
            with processes.sharing() as signals:
                _sample_shards(config, model, labels_of, processes, signals)
            if processes.is_first:
                if config.format == "npz":
                    _join(config)
                say(f"{config.num_images:,} images in {config.out}")


def _weights_digest(path: Path) -> str:
    return checksum(*sorted(path.rglob("diffusion_pytorch_model*")))


def _labels_of_set(config: GenerateConfig, model: ImageSampler) -> Callable[[range], list[int]]:
    """Return a function from positions in the set to labels, so that a set may have any size."""
    if config.labels == "random" and model.num_classes:

        def draw(places: range) -> list[int]:
            numbers = np.random.Philox(key=np.array([config.seed, 0], dtype=np.uint64))
            numbers.advance(places.start // 4)  # it draws four at a time
            raw = numbers.random_raw(places.start % 4 + len(places))[places.start % 4 :]
            return [int(label) for label in raw % np.uint64(model.num_classes)]

        return draw
    if config.labels in ("balanced", "random"):
        classes = list(range(max(1, model.num_classes)))
    else:
        classes = model.labels.parse(config.labels)
    return lambda places: [classes[place % len(classes)] for place in places]


def read_generation(samples: Path) -> dict[str, Any] | None:
    """Read how the images of a .npz file were made; None if `generate` did not write it."""
    try:
        made = read_record(samples.parent / GENERATION, dict[str, Any])
    except CheckpointError:
        return None
    return made if samples.name == SAMPLES and made.get("format") == "npz" else None


def _begin_set(out: Path, made: dict[str, Any]) -> None:
    path = out / GENERATION
    if not path.exists():
        if any(entry for entry in out.iterdir() if not entry.name.startswith(".")):
            raise ConfigError(f"out {out} holds other files: choose an empty or a new folder")
        write_json(path, made)
        return
    before = read_record(path, dict[str, Any])
    for digest in {"guidance_weights", "vae_digest"} - before.keys():  # an earlier version wrote none
        del made[digest]
    # Weights and autoencoder may have moved: their digests count.
    places = {"checkpoint": "weights", "guidance_checkpoint": "guidance_weights", "vae": "vae_digest"}
    for place, digest in places.items():
        if before.get(place) and before.get(digest, "") == made.get(digest):
            made[place] = before[place]
    number = before.get("num_images")
    if made["format"] == "png" and isinstance(number, int) and number < made["num_images"]:
        grown = {**before, "num_images": made["num_images"]}  # an image is the same in a larger set
        if grown == made:
            write_json(path, made)
            return
    if changed := changes(before, made):
        raise ConfigError(f"{out} holds images that were made otherwise, choose another folder: {'; '.join(changed)}")


def _sample_shards(
    config: GenerateConfig,
    model: ImageSampler,
    labels_of: Callable[[range], list[int]],
    processes: Processes,
    signals: SignalsNoted,
) -> None:
    if config.format == "npz" and (config.out / SAMPLES).exists():
        return
    size = config.images_per_shard
    starts = range(size * processes.rank, config.num_images, size * processes.world_size)
    missing = 0 if not starts else max(0, starts[-1] + size - config.num_images)  # in the last shard
    with progress_bars(MofNCompleteColumn(), "images", shows=processes.is_first, transient=False) as bar:
        others = f", process 1 of {processes.world_size}" if processes.world_size > 1 else ""
        done, total = 0.0, size * len(starts) - missing
        show = bar(f"generate{others}", total)
        model.prepare(config.num_images)  # the whole set counts, so that any number of ranks decodes alike

        def advance(number: float) -> None:
            nonlocal done
            where = f"image {done:,.0f} of {total:,}: the same command goes on after the last whole shard"
            signals.end_if_noted(where, silent=not processes.is_first)
            show(round(done + number) - round(done))
            done += number

        # Write a shard while the next one is sampled: encoding PNG takes the CPU as long as sampling takes the GPU.
        with ThreadPoolExecutor(1) as writer:
            written: Future[None] | None = None
            for start in starts:
                places = range(start, min(start + size, config.num_images))
                if _is_there(config, places):
                    advance(len(places))
                    continue
                own = labels_of(places)
                seeds = range(config.seed + places.start, config.seed + places.stop)
                images = model.sample(own, seeds, lambda step: advance(len(step.x) / model.evaluations))
                settings = [
                    {**model.settings, "label": label, "seed": seed} for label, seed in zip(own, seeds, strict=True)
                ]
                if written:
                    written.result()
                written = writer.submit(_WRITERS[config.format], config.out, places, images, settings)
            if written:
                written.result()


def _is_there(config: GenerateConfig, places: range) -> bool:
    if config.format == "png":
        return all((config.out / f"{place:08d}.png").exists() for place in places)
    suffix = {"webdataset": "tar", "npz": "npz"}[config.format]
    return (config.out / f"shard-{places.start:08d}.{suffix}").exists()


def write_pngs(out: Path, places: range, images: np.ndarray, settings: Sequence[dict[str, Any]]) -> None:
    """Write each image of (b, c, h, w) uint8 to a file named after its position."""
    paths = (out / f"{place:08d}.png" for place in places)
    with ThreadPoolExecutor() as threads:
        list(threads.map(_write_png, paths, images, settings))  # raises the first error


def _write_tar(out: Path, places: range, images: np.ndarray, settings: Sequence[dict[str, Any]]) -> None:
    with (
        atomic_write(out / f"shard-{places.start:08d}.tar") as temporary,
        tarfile.open(temporary, "w") as tar,
        ThreadPoolExecutor() as threads,
    ):
        for place, picture, own in zip(places, threads.map(encode_png, images, settings), settings, strict=True):
            for suffix, content in (("png", picture), ("cls", str(own["label"]).encode())):
                member = tarfile.TarInfo(f"{place:08d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _write_npz(out: Path, places: range, images: np.ndarray, settings: Sequence[dict[str, Any]]) -> None:
    labels = np.array([own["label"] for own in settings], dtype=np.int64)
    with atomic_write(out / f"shard-{places.start:08d}.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, arr_0=images.transpose(0, 2, 3, 1), arr_1=labels)


_WRITERS = {"png": write_pngs, "webdataset": _write_tar, "npz": _write_npz}


def _join(config: GenerateConfig) -> None:
    """Join all shards to one file, one shard at a time, and remove them."""
    shards = sorted(config.out.glob("shard-*.npz"))
    if not (config.out / SAMPLES).exists():
        with atomic_write(config.out / SAMPLES) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for name in ("arr_0", "arr_1"):
                with opened_array(shards[0], name) as first:
                    shape, dtype = first.shape[1:], first.dtype
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
                    np.lib.format.write_array_header_2_0(file, {**header, "shape": (config.num_images, *shape)})
                    for shard in shards:
                        with opened_array(shard, name) as array:
                            file.write(np.ascontiguousarray(array.read()).tobytes())
    for shard in shards:
        shard.unlink()


def _make_folders(config: SampleConfig) -> None:
    if config.out.suffix.lower() != ".png":
        raise ConfigError(f"out {config.out} is not a .png file: the grid is written as PNG")
    for folder in (config.out.parent, config.images_out):
        if folder is not None:
            with reading(f"folder {folder} cannot be made", "choose another", CheckpointError):
                folder.mkdir(parents=True, exist_ok=True)


def encode_png(image: np.ndarray | Image.Image, settings: dict[str, Any]) -> bytes:
    """Encode a picture, or (c, h, w) uint8, as PNG, with its settings as JSON in the text chunk `lamamba`."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    content, metadata = io.BytesIO(), PngInfo()
    metadata.add_text("lamamba", json.dumps(settings))
    image.save(content, format="PNG", pnginfo=metadata)
    return content.getvalue()


def _write_png(path: Path, image: np.ndarray | Image.Image, settings: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(encode_png(image, settings))
