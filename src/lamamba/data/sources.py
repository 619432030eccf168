"""The interface of a source, and two sources of images: arrays in memory, and files in a folder."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import compress
from pathlib import Path
from typing import TypeVar

import numpy as np

from lamamba.data.decoding import crop_centre, read_image
from lamamba.data.folders import list_classes
from lamamba.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_threads(work: Callable[[Item], Result], items: Sequence[Item], at_once: int = 4096) -> Iterator[Result]:
    """Map items in threads and in order, `at_once` at a time: a million would fill the memory."""
    with ThreadPoolExecutor() as threads:
        for first in range(0, len(items), at_once):
            yield from threads.map(work, items[first : first + at_once])


class Source(ABC):
    """A finite list of images or latents, with labels.

    Attributes:
        name: short name for logs and checkpoints.
        class_names: a name for each label; empty for a source without classes.
        image_size: height and width of an image in pixels.
        channels: channels of an image, 1 (grey) or 3 (red, green, blue).
        bad_files: files that were left out because they cannot be read.
        left_out: a description of the other files in the folder, which are not images.
        latent_shape: (c, h, w) of the latents of an image, for a source of latents instead of images.
        is_mirrored: whether `gather` can mirror.
    """

    name: str
    class_names: tuple[str, ...]
    image_size: int
    channels: int
    bad_files: tuple[str, ...] = ()
    left_out: str = ""
    latent_shape: tuple[int, ...] | None = None
    is_mirrored: bool = True

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def identify(self) -> str:
        """Compute a digest of the data, which does not depend on where they are stored."""

    @abstractmethod
    def gather(self, indices: np.ndarray, mirrored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read a batch.

        Args:
            indices: int64 (b,).
            mirrored: bool (b,), which of them to mirror left to right.

        Returns:
            The input of `lamamba.data.latents.Space.encode`, and int64 labels (b,), 0 without classes.

        Raises:
            DataError: an image cannot be read; the message names the file.
        """


class ImageSource(Source):
    """Square uint8 images with labels."""

    @abstractmethod
    def load(self, index: int) -> tuple[np.ndarray, int]:
        """Return one image, uint8 (h, w, c), and its label (0 without classes).

        Raises:
            DataError: the image cannot be read; the message names the file.
        """

    def find_readable(self) -> list[bool]:
        """Load all images, in threads, and return which of them can be read."""
        return list(map_in_threads(self._is_readable, range(len(self))))

    def _is_readable(self, index: int) -> bool:
        try:
            self.load(index)
        except DataError:
            return False
        return True

    def gather(self, indices: np.ndarray, mirrored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read images, uint8 (b, c, h, w), and their labels."""
        images, labels = zip(*(self.load(index) for index in indices.tolist()), strict=True)
        pixels = np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))
        pixels[mirrored] = pixels[mirrored, :, :, ::-1]
        return pixels, np.array(labels, dtype=np.int64)


class ArraySource(ImageSource):
    """Images in memory: uint8 (n, c, h, w) with int64 labels (n,)."""

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]) -> None:
        self.name, self.class_names = name, class_names
        self.images, self.labels = images, labels.astype(np.int64)
        self.channels, self.image_size = images.shape[1], images.shape[2]

    def __len__(self) -> int:
        return len(self.images)

    def identify(self) -> str:
        together = hashlib.sha256(json.dumps([self.images.shape, self.labels.tolist()]).encode())
        for image in self.images:  # one by one: the array may be a broadcast view that takes no memory
            together.update(image.tobytes())
        return together.hexdigest()

    def load(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index].transpose(1, 2, 0), int(self.labels[index])

    def gather(self, indices: np.ndarray, mirrored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels = self.images[indices]
        pixels[mirrored] = pixels[mirrored, :, :, ::-1]
        return pixels, self.labels[indices]


class FolderSource(ImageSource):
    """Image files below a folder, decoded by `load`; sorted by class, then by path.

    Args:
        folder: holds one subfolder per class, whose sorted names are the class names, or images without classes.
            Images may be deeper inside a class folder. All formats that Pillow decodes are read; `left_out` describes
            other files. Links to folders are followed, and each real folder is read once.
        image_size: pixels; images are center-cropped to it, see `crop_centre`.
        channels: 1 or 3.
        skip_bad_images: decode every file now, in threads, and leave out unreadable ones (see `bad_files`). Otherwise
            files are first opened by `load`, because a full pass over a large folder takes long.

    Raises:
        DataError: the folder is missing, empty, mixes images with class folders, has one class, a class twice, or a
            class without (readable) images.
    """

    def __init__(self, folder: Path, *, image_size: int, channels: int = 3, skip_bad_images: bool = False) -> None:
        self.folder, self.name = folder, folder.resolve().name
        self.image_size, self.channels = image_size, channels
        self.class_names, self.paths, self.labels, self.left_out = list_classes(folder)
        if skip_bad_images:
            self._leave_out_bad_files()

    def __len__(self) -> int:
        return len(self.paths)

    def identify(self) -> str:
        """Digest the files' paths within the folder, and their sizes."""
        start = len(os.path.join(self.folder, ""))
        names = (path[start:].replace(os.sep, "/") for path in self.paths)
        sizes = map_in_threads(_size, self.paths)  # network file systems are slow
        together = hashlib.sha256()
        for name, size in sorted(zip(names, sizes, strict=True)):
            together.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
        return together.hexdigest()

    def load(self, index: int) -> tuple[np.ndarray, int]:
        image = crop_centre(read_image(self.paths[index], self.channels, can_skip=True), self.image_size)
        return np.array(image).reshape(self.image_size, self.image_size, self.channels), self.labels[index]

    def _leave_out_bad_files(self) -> None:
        good = self.find_readable()
        self.bad_files = tuple(path for path, keep in zip(self.paths, good, strict=True) if not keep)
        self.labels = list(compress(self.labels, good))
        self.paths = list(compress(self.paths, good))
        lost = sorted(set(range(max(1, self.num_classes))) - set(self.labels))
        if lost:
            which = self.folder / self.class_names[lost[0]] if self.class_names else self.folder
            raise DataError(
                f"{which} has no readable image ({len(self.bad_files)} bad files skipped): replace its images"
            )


def _size(path: str) -> int:
    """Return the size of a file in bytes; -1 if it cannot be read, which `load` reports."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
