"""Latents of images that were encoded before: the distribution of each, in shards with random access.

A folder holds `shard-00000.safetensors`, ... and the index `latents.json`, which is written when all shards are
complete. A shard of n images holds

    moments  (n, v, 2 c, h, w) float16   mean and standard deviation of the latents; v is 2 with the mirrored image
    labels   (n,) int64
    crc32    (n, v) int64                checksum of each moments[i, j], checked at every read
"""

import hashlib
import json
import zlib
from bisect import bisect_right
from contextlib import AbstractContextManager
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from pydantic import Field
from safetensors import safe_open
from typing_extensions import TypedDict

from lamamba.data.sources import Source
from lamamba.errors import DataError, reading
from lamamba.files import utf8_path
from lamamba.files.records import read_versioned

INDEX, SETTINGS = "latents.json", "settings.json"
FORMAT = 1

_Count = Annotated[int, Field(ge=1, lt=1 << 40)]
_Side = Annotated[int, Field(ge=1, le=65_536)]
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Autoencoder(TypedDict):
    folder: str
    sha256: _Digest


class _Settings(TypedDict):
    """The settings on which the contents of the shards depend."""

    source: str
    digest: NotRequired[_Digest]
    images: _Count
    class_names: Annotated[list[str], Field(max_length=1_000_000)]
    image_size: _Side
    channels: Literal[1, 3]
    shape: Annotated[list[_Side], Field(min_length=3, max_length=3)]
    mirrored: bool
    images_per_shard: _Count
    autoencoder: _Autoencoder


class _Begun(TypedDict):
    """settings.json."""

    settings: _Settings


class _Shard(TypedDict):
    file: Annotated[str, Field(pattern=r"^[\w-]+\.safetensors$")]
    images: _Count
    sha256: _Digest


class _Statistics(TypedDict):
    mean: list[float]
    standard_deviation: list[Annotated[float, Field(ge=0)]]


class _Index(_Begun):
    """latents.json."""

    channel_statistics: _Statistics
    shards: Annotated[list[_Shard], Field(min_length=1)]


class LatentSource(Source):
    """Latents that `lamamba encode` wrote: moments, (2 c, h, w) float16.

    Attributes:
        autoencoder: "folder", its path at the time, and "sha256", the checksum of its weights.

    Raises:
        DataError: the folder is incomplete, or of a later version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.resolve().name
        if (folder / SETTINGS).is_file() and not (folder / INDEX).is_file():
            raise DataError(f"{folder} is incomplete: run the same lamamba encode again to continue it")
        index = self.index = _read_index(folder / INDEX)
        settings = index["settings"]
        self.class_names = tuple(settings["class_names"])
        self.image_size, self.channels = settings["image_size"], settings["channels"]
        self.is_mirrored = settings["mirrored"]
        self.latent_shape = tuple(settings["shape"])
        self.autoencoder = settings["autoencoder"]
        self.shards = [folder / shard["file"] for shard in index["shards"]]
        self.ends = list(accumulate(shard["images"] for shard in index["shards"]))
        missing = [path for path in self.shards if not path.is_file()]
        if missing:
            raise DataError(f"{missing[0]} is missing: delete {folder / INDEX} and run the same lamamba encode again")
        for path, shard in zip(self.shards, index["shards"], strict=True):
            _check_shard(path, shard["images"], settings)
        self.opened: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.ends[-1]

    def identify(self) -> str:
        """Digest the settings in the index and the checksums of the shards."""
        made = {name: value for name, value in self.index["settings"].items() if name not in ("source", "digest")}
        made["autoencoder"] = self.autoencoder["sha256"]  # without its path
        shards = [[shard["file"], shard["images"], shard["sha256"]] for shard in self.index["shards"]]
        return hashlib.sha256(json.dumps([made, shards], sort_keys=True).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": {}}  # each worker opens the shards itself

    def gather(self, indices: np.ndarray, mirrored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read moments, (b, 2 c, h, w) float16, and labels.

        Raises:
            DataError: a shard is damaged; the message names it.
        """
        read = [self._read(int(index), int(other)) for index, other in zip(indices, mirrored, strict=True)]
        return np.stack([moments for moments, _ in read]), np.array([label for _, label in read], dtype=np.int64)

    def _read(self, index: int, view: int) -> tuple[np.ndarray, int]:
        shard = bisect_right(self.ends, index)
        place = index - (self.ends[shard - 1] if shard else 0)
        with _reading_shard(self.shards[shard]):
            if shard not in self.opened:
                self.opened[shard] = open_shard(self.shards[shard])
            moments, labels, sums = self.opened[shard]
            values: np.ndarray = moments[place : place + 1, view : view + 1][0, 0]
            if zlib.crc32(values.tobytes()) != int(sums[place, view]):
                raise ValueError(f"the checksum of image {place} does not match")
            return values, int(labels[place])


def _reading_shard(path: Path) -> AbstractContextManager[None]:
    return reading(f"{path} is damaged", f"delete it and {INDEX} and run the same lamamba encode again")


def open_shard(path: Path) -> tuple[Any, np.ndarray, np.ndarray]:
    """Open a shard: its moments, which are read from disk when sliced, its labels and checksums."""
    file = safe_open(utf8_path(path), framework="np")
    return file.get_slice("moments"), file.get_tensor("labels"), file.get_tensor("crc32")


def read_settings(path: Path) -> _Settings:
    """Read the settings of latents that are being encoded; raises DataError with the file and the key."""
    return read_versioned(path, _Begun, FORMAT, DataError)["settings"]


def _read_index(path: Path) -> _Index:
    """Read an index and check that its numbers agree; raises DataError with the file and the key."""
    index = read_versioned(path, _Index, FORMAT, DataError)
    settings, shards = index["settings"], index["shards"]
    per_shard, images = settings["images_per_shard"], settings["images"]
    counts, statistics = [shard["images"] for shard in shards], index["channel_statistics"]
    fault = ""
    if sum(counts) != images:
        fault = f"shards hold {sum(counts):,} images, and settings.images is {images:,}"
    elif any(count != per_shard for count in counts[:-1]) or counts[-1] > per_shard:
        fault = f"shards hold {counts[:5]} images, and settings.images_per_shard is {per_shard:,}"
    elif len({shard["file"] for shard in shards}) < len(shards):
        fault = "shards name a file twice"
    elif len(set(settings["class_names"])) < len(settings["class_names"]):
        fault = "settings.class_names has a name twice"
    elif {len(statistics["mean"]), len(statistics["standard_deviation"])} != {settings["shape"][0]}:
        fault = f"channel_statistics are not of the {settings['shape'][0]} channels in settings.shape"
    if fault:
        raise DataError(f"{path}: {fault}: delete it and run the same lamamba encode again")
    return index


def _check_shard(path: Path, num_images: int, settings: _Settings) -> None:
    """Check the tensors of a shard against the index, and its labels against the classes; raises DataError.

    The moments are checked when they are read, because reading all of them here would take too long.
    """
    channels, *sides = settings["shape"]
    views = 1 + settings["mirrored"]
    wanted = {
        "moments": ("F16", [num_images, views, 2 * channels, *sides]),
        "labels": ("I64", [num_images]),
        "crc32": ("I64", [num_images, views]),
    }
    with _reading_shard(path), safe_open(utf8_path(path), framework="np") as file:
        there = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        for name, (dtype, shape) in wanted.items():
            found = [there[name].get_dtype(), list(there[name].get_shape())] if name in there else "missing"
            if found != [dtype, shape]:
                raise DataError(
                    f"{path}: {name} is {found}, but the index says {[dtype, shape]}: delete it and {INDEX} and "
                    "run the same lamamba encode again"
                )
        labels = file.get_tensor("labels")
    most = max(1, len(settings["class_names"])) - 1
    wrong = np.flatnonzero((labels < 0) | (labels > most))
    if len(wrong):
        raise DataError(
            f"{path}: labels[{wrong[0]}] is {labels[wrong[0]]}, and the classes are 0 to {most}: delete it and {INDEX} "
            "and run the same lamamba encode again"
        )


def are_latents(data: str | Path) -> bool:
    """Check whether `lamamba encode` writes or wrote to this folder."""
    folder = Path(data).expanduser()
    return (folder / INDEX).is_file() or (folder / SETTINGS).is_file()
