"""Latents of images, encoded once: the distribution of each, in shards that are read at random.

A folder holds `shard-00000.safetensors`, ... and an index, `latents.json`, which is written when all shards are there.
A shard holds of n images

    moments  (n, v, 2 c, h, w) float16   mean and standard deviation of the latents; v is 2 with the mirrored image
    labels   (n,) int64
    crc32    (n, v) int64                of the bytes of each moments[i, j], looked at whenever they are read
"""

import hashlib
import json
import zlib
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from lamamba.data.sources import Source
from lamamba.errors import DataError

INDEX, SETTINGS = "latents.json", "settings.json"
FORMAT = 1


class LatentSource(Source):
    """What `lamamba encode` wrote. Its images are moments, (2 c, h, w) float16.

    Attributes:
        autoencoder: "folder", where it was, and "sha256", of its weights.

    Raises:
        DataError: the folder is not complete, or not of this version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.resolve().name
        if (folder / SETTINGS).is_file() and not (folder / INDEX).is_file():
            raise DataError(f"{folder} is not encoded to its end: run the same lamamba encode again, it goes on")
        index = self.index = read_index(folder / INDEX)
        try:
            settings = index["settings"]
            self.class_names = tuple(settings["class_names"])
            self.image_size, self.channels = int(settings["image_size"]), int(settings["channels"])
            self.is_mirrored = bool(settings["mirrored"])
            self.autoencoder: dict[str, str] = settings["autoencoder"]
            self.shards = [folder / shard["file"] for shard in index["shards"]]
            self.ends = list(accumulate(int(shard["images"]) for shard in index["shards"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{folder / INDEX} is no index of latents ({type(error).__name__}: {error})") from error
        missing = [path for path in self.shards if not path.is_file()]
        if missing:
            raise DataError(f"{missing[0]} is missing: delete {folder / INDEX} and run the same lamamba encode again")
        self.opened: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.ends[-1]

    def identify(self) -> str:
        """Digest what the index says of the latents: how they were made, and the checksums of the shards."""
        made = {name: value for name, value in self.index["settings"].items() if name not in ("source", "digest")}
        made["autoencoder"] = self.autoencoder["sha256"]  # wherever it lies
        shards = [[shard["file"], shard["images"], shard["sha256"]] for shard in self.index["shards"]]
        return hashlib.sha256(json.dumps([made, shards], sort_keys=True).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": {}}  # a process that reads opens shards of its own

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
        path = self.shards[shard]
        try:
            if shard not in self.opened:
                self.opened[shard] = open_shard(path)
            moments, labels, sums = self.opened[shard]
            values: np.ndarray = moments[place : place + 1, view : view + 1][0, 0]
            if zlib.crc32(values.tobytes()) == int(sums[place, view]):
                return values, int(labels[place])
            fault = f"image {place} of it is not what was written"
        except (OSError, SafetensorError, IndexError) as error:
            fault = str(error)
        raise DataError(
            f"{path} is damaged ({fault}): delete it and {self.folder / INDEX} and run the same lamamba encode again"
        )


def open_shard(path: Path) -> tuple[Any, np.ndarray, np.ndarray]:
    """Open a shard: its moments, to be sliced where they lie on the disk, its labels and checksums."""
    file = safe_open(path, framework="np")
    return file.get_slice("moments"), file.get_tensor("labels"), file.get_tensor("crc32")


def read_index(path: Path) -> dict[str, Any]:
    """Read an index, or the settings of one to be; raises DataError."""
    try:
        content = json.loads(path.read_bytes())
        if content["format"] > FORMAT:
            raise DataError(f"{path} has format {content['format']}, this version reads {FORMAT}: update lamamba")
        return dict(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error})") from error


def are_latents(data: str | Path) -> bool:
    """Say whether a folder is what `lamamba encode` writes to."""
    folder = Path(data).expanduser()
    return (folder / INDEX).is_file() or (folder / SETTINGS).is_file()
