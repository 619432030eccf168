"""The command `lamamba encode`: compute the distributions of images' latents once, on any number of ranks.

Ranks take shards in turn, and each shard is written atomically, so the same command continues after an interruption.
`lamamba.data.latent_files` describes the format.
"""

import json
import shlex
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import MofNCompleteColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lamamba import __version__
from lamamba.checkpoints.checkpoint import locked
from lamamba.config import EncodeConfig
from lamamba.data import Source, open_source
from lamamba.data.latent_files import FORMAT, INDEX, SETTINGS, read_settings
from lamamba.data.latents import Latents, identify
from lamamba.distributed.processes import Processes, joined
from lamamba.distributed.signals import SignalsNoted
from lamamba.errors import ConfigError, DataError, reading
from lamamba.files import atomic_write, checksum, utf8_path, write_json
from lamamba.files.records import changes, parse_record
from lamamba.sampling import choose_device
from lamamba.terminal.output import progress_bars, say


def encode(config: EncodeConfig) -> None:
    """Encode all images of a source. Under torchrun, the ranks share them.

    Raises:
        LamambaError: the data, the autoencoder or the folder is invalid, or the folder has latents of other images or
            settings.
    """
    with joined(config.device) as (processes, device_name):
        space = Latents.open(config.vae, choose_device(device_name))
        source = _open(config, space)
        settings = describe(config, source, space) if processes.is_first else {}
        # The others wait until rank 0 has created or checked the folder.
        with locked(config.out) if processes.is_first else nullcontext():
            if processes.is_first:
                _begin(config.out, settings)
                if source.left_out:
                    say(f"left out of {config.data}: {source.left_out}")
            with processes.sharing() as signals:
                _encode_shards(config, source, space, processes, signals)
            if processes.is_first:
                _write_index(config.out, settings)


def _open(config: EncodeConfig, space: Latents) -> Source:
    source = open_source(
        config.data,
        image_size=config.image_size,
        channels=space.image_channels,
        folder=config.data_folder,
        skip_bad_images=config.skip_bad_images,
        dataset=config.dataset,
    )
    if source.latent_shape:
        raise ConfigError(f"{config.data} contains latents: give images")
    space.grid_size(source.image_size)
    return source


def describe(config: EncodeConfig, source: Source, space: Latents) -> dict[str, Any]:
    """Describe everything that determines the contents of the shards."""
    grid = space.grid_size(source.image_size)
    return {
        "source": source.name,
        "digest": source.identify(),
        "images": len(source),
        "class_names": list(source.class_names),
        "image_size": source.image_size,
        "channels": source.channels,
        "shape": [space.channels(source.channels), grid, grid],
        "mirrored": config.mirrored,
        "images_per_shard": config.images_per_shard,
        "autoencoder": {"folder": str(config.vae.resolve()), "sha256": identify(config.vae)},
    }


def _begin(folder: Path, settings: dict[str, Any]) -> None:
    """Record the settings in a new folder, or compare them with those of an existing one."""
    path = folder / SETTINGS
    if path.is_file():
        begun = read_settings(path)
        # Images and autoencoder may have moved; only their contents count. Earlier versions recorded no digest.
        ignored = {"autoencoder", "digest", *(["source"] if "digest" in begun else [])}
        changed = changes(begun, settings, ignored)
        if begun.get("digest", settings["digest"]) != settings["digest"]:
            changed.append("the images have other names or sizes")
        if begun["autoencoder"]["sha256"] != settings["autoencoder"]["sha256"]:
            changed.append("the autoencoder has other weights")
        if changed:
            raise DataError(f"{folder} was started with other options, choose another --out: {'; '.join(changed)}")
        return
    left = [other.name for pattern in ("shard-*", INDEX) for other in folder.glob(pattern)]
    if left:
        raise DataError(f"{folder} contains {min(left)} but no {SETTINGS} that describes it: choose another --out")
    write_json(path, {"format": FORMAT, "settings": settings})


def _encode_shards(
    config: EncodeConfig, source: Source, space: Latents, processes: Processes, signals: SignalsNoted
) -> None:
    size = config.images_per_shard
    shards = {first // size: range(first, min(first + size, len(source))) for first in range(0, len(source), size)}
    mine = {shard: images for shard, images in shards.items() if shard % processes.world_size == processes.rank}
    with progress_bars(MofNCompleteColumn(), "images", shows=processes.is_first) as bar:
        advance = bar("encode", sum(len(images) for images in mine.values()))
        for shard, images in mine.items():
            path = _shard_path(config.out, shard)
            if path.is_file():
                advance(len(images))
                continue
            parts = []
            for pixels, labels in _read(source, images, config):
                where = f"shard {shard + 1} of {len(shards)}: the same command continues there"
                signals.end_if_noted(where, silent=not processes.is_first)
                part = _encode_batch(space, torch.from_numpy(pixels).to(space.autoencoder.device), config.mirrored)
                parts.append({**part, "labels": torch.from_numpy(labels)})
                advance(len(labels))
            _write_shard(path, parts)


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def _read(source: Source, indices: range, config: EncodeConfig) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Read batches in threads, a few of them ahead."""
    waiting: deque[Future[tuple[np.ndarray, np.ndarray]]] = deque()
    with ThreadPoolExecutor(max(1, config.num_workers)) as threads:
        for first in range(0, len(indices), config.batch_size):
            batch = np.array(indices[first : first + config.batch_size])
            waiting.append(threads.submit(source.gather, batch, np.zeros(len(batch), dtype=bool)))
            if len(waiting) > config.num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _encode_batch(space: Latents, images: Tensor, mirrored: bool) -> dict[str, Tensor]:
    """Compute the moments of images, and their sums for the statistics in the index."""
    views = [images, images.flip(-1)] if mirrored else [images]
    moments = torch.stack([torch.cat(space.moments(view), dim=1) for view in views], dim=1)
    rounded = moments.half().cpu()
    if not bool(rounded.isfinite().all()):
        raise DataError("latents of these images exceed the range of float16: use another autoencoder")
    mean, deviation = moments.double().chunk(2, dim=2)
    sums = torch.stack([mean.sum((0, 1, 3, 4)), (mean**2 + deviation**2).sum((0, 1, 3, 4))])
    return {"moments": rounded, "sums": sums.cpu()}


def _write_shard(path: Path, parts: list[dict[str, Tensor]]) -> None:
    tensors = {name: torch.cat([part[name] for part in parts]) for name in ("moments", "labels")}
    tensors["crc32"] = torch.tensor(
        [[zlib.crc32(view.numpy().tobytes()) for view in image] for image in tensors["moments"]]
    )
    sums = torch.stack([part["sums"] for part in parts]).sum(dim=0)
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, {"sums": json.dumps(sums.tolist())})


def _write_index(folder: Path, settings: dict[str, Any]) -> None:
    """Write the list of shards with their checksums, and the statistics of all latents."""
    shards, sums = [], np.zeros((2, settings["shape"][0]))
    for shard in range(-(-settings["images"] // settings["images_per_shard"])):
        path = _shard_path(folder, shard)
        with (
            reading(f"{path} is damaged", "delete it and run the same command again"),
            safe_open(utf8_path(path), framework="np") as file,
        ):
            num_images = file.get_slice("labels").get_shape()[0]
            own = parse_record(file.metadata()["sums"], str(path), list[list[float]], DataError)
            if [len(row) for row in own] != [sums.shape[1]] * 2:
                raise IndexError("its sums have another number of channels")
            sums += own
        expected = min(settings["images_per_shard"], settings["images"] - shard * settings["images_per_shard"])
        if num_images != expected:
            raise DataError(f"{path} has {num_images} images, not {expected}: delete it and run the same command again")
        shards.append({"file": path.name, "images": num_images, "sha256": checksum(path)})
    _, height, width = settings["shape"]
    mean, square = sums / (settings["images"] * (1 + settings["mirrored"]) * height * width)
    statistics = {"mean": mean.tolist(), "standard_deviation": np.sqrt(np.maximum(square - mean**2, 0)).tolist()}
    begun = {"format": FORMAT, "lamamba": __version__, "settings": settings}
    write_json(folder / INDEX, {**begun, "channel_statistics": statistics, "shards": shards})
    number = f"{len(shards)} shard{'s' * (len(shards) > 1)}"
    say(f"encoded {settings['images']:,} images in {number}; train with --data {shlex.quote(str(folder))}")
