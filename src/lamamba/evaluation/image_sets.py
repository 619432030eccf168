"""Sets of images to score: a folder, a .npz of images, published statistics, Fashion-MNIST."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lamamba.data import ArraySource, crop_centre, load_builtin, load_fashion_mnist, read_image
from lamamba.data.folders import list_images_below, no_images
from lamamba.data.sources import map_in_threads
from lamamba.errors import DataError
from lamamba.evaluation.metrics import Gaussian
from lamamba.files import checksum
from lamamba.files.npz import list_arrays, opened_array
from lamamba.sampling.generate import SAMPLES, read_generation

_NAMED: Mapping[str, Callable[[Path | None], ArraySource]] = {
    "builtin": lambda _: load_builtin(),
    "fashion-mnist": lambda folder: load_fashion_mnist("train", folder=folder),
    "fashion-mnist-test": lambda folder: load_fashion_mnist("test", folder=folder),
}
_MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**26)  # of an image in a .npz: Pillow's limit for files
_MOST_FEATURES = 16_384  # in statistics: a covariance of 2 GiB
_MOST_VALUES = 10  # named of a setting that differs between images; of the others, only the number


@dataclass
class ImageSet:
    """Images that are read once, in order."""

    name: str
    """Where the images are from."""
    num_images: int
    read: Callable[[], Iterator[tuple[str, np.ndarray]]]
    """Yields (name of the image, uint8 (h, w, c))."""
    paths: tuple[str, ...] = ()
    """Paths of the images that are in files of their own."""
    file: Path | None = None
    """The file with all images."""
    left_out: str = ""
    """The other files of a folder, which are not images, in words."""
    size: tuple[int, int] | None = None
    """Height and width, once the first image was read."""
    pixels_sha256: str | None = None
    """Digest of all pixels, once the last image was read; the same for a folder and a .npz of the same images."""

    def first_size(self) -> tuple[int, ...]:
        """Return height and width of the first image; DataError if it cannot be read."""
        return next(self.read())[1].shape[:2]

    def batches(self, batch_size: int, channels: int) -> Iterator[tuple[list[str], Tensor]]:
        """Yield names and uint8 (b, channels, h, w).

        Raises:
            DataError: an image cannot be read, has another size than the first, or is in color where channels is 1.
        """
        digest = hashlib.sha256()
        first = "the first"
        images = self.read()
        while batch := list(islice(images, batch_size)):
            pixels = []
            for name, image in batch:
                if self.size is None:
                    self.size, first = image.shape[:2], name
                if image.shape[:2] != self.size:
                    raise DataError(
                        f"{name} is {show_size(image.shape)} and {first} {show_size(self.size)}: give images of one "
                        "size, or image_size (--image-size) to crop the files of folders to"
                    )
                if channels == 1 and (image != image[..., :1]).any():
                    raise DataError(
                        f"{name} is in color and these features are for gray images: give others (--features)"
                    )
                in_color = np.broadcast_to(image, (*self.size, 3))
                digest.update(in_color.tobytes())
                pixels.append(in_color[..., :channels])
            stacked = np.ascontiguousarray(np.stack(pixels).transpose(0, 3, 1, 2))
            yield [name for name, _ in batch], torch.from_numpy(stacked)
        self.pixels_sha256 = digest.hexdigest()


@dataclass(frozen=True)
class Reference:
    """A reference for scores: images, published statistics of their features, or both. Statistics go before images."""

    name: str
    images: ImageSet | None
    features: Gaussian | None = None
    spatial: Gaussian | None = None
    sha256: str | None = None
    """Checksum of the file with the statistics."""


def open_images(name: str, image_size: int | None = None, data_folder: Path | None = None) -> ImageSet:
    """Open a folder of images (at any depth), a .npz of images, or builtin, fashion-mnist or fashion-mnist-test.

    Images of a folder are cropped to `image_size`; `data_folder` has the files of Fashion-MNIST.

    Raises:
        DataError: the set is missing, or has no image.
    """
    reference = open_reference(name, image_size, data_folder)
    if reference.images is None:
        raise DataError(f"{name} has statistics but no images (arr_0): give the generated images themselves")
    return reference.images


def open_reference(name: str, image_size: int | None = None, data_folder: Path | None = None) -> Reference:
    """Open what `open_images` does, or a .npz of statistics (mu, sigma, mu_s, sigma_s), of images (arr_0), or of both.

    Raises:
        DataError: the reference is missing, nothing in it can be used, or a statistic is invalid.
    """
    path = Path(name).expanduser()
    if (path / SAMPLES).is_file():  # written by `lamamba generate --format npz`
        path = path / SAMPLES
    if name in _NAMED:
        images = _NAMED[name](data_folder).images.transpose(0, 2, 3, 1)
        return Reference(name, ImageSet(name, len(images), lambda: _enumerate(name, iter(images))))
    if path.is_dir():
        return Reference(name, _open_folder(path, image_size))
    if path.suffix == ".npz" and path.is_file():
        return _open_npz(path)
    kinds = f"a folder of images, a .npz file, {', '.join(_NAMED)}"
    raise DataError(f"{name} is {'none of what can be scored' if path.exists() else 'missing'}: give {kinds}")


def show_size(shape: tuple[int, ...]) -> str:
    """Format height and width, such as 32x32."""
    return f"{shape[0]}x{shape[1]}"


def _enumerate(name: str, images: Iterator[np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    return ((f"image {index} of {name}", image) for index, image in enumerate(images))


def _open_folder(folder: Path, image_size: int | None) -> ImageSet:
    found = list_images_below(folder)
    paths = found.images
    if not paths and any(folder.glob("*.tar")):
        raise DataError(f"{folder} holds tars: unpack them, or generate the images with --format png or npz")
    if not paths:
        raise DataError(no_images(folder, found))

    def load(path: str) -> np.ndarray:
        image = read_image(path, 3)
        return np.asarray(image if image_size is None else crop_centre(image, image_size))

    def read() -> Iterator[tuple[str, np.ndarray]]:
        return zip(paths, map_in_threads(load, paths, at_once=256), strict=True)

    return ImageSet(str(folder), len(paths), read, tuple(paths), left_out=found.left_out)


def _open_npz(path: Path) -> Reference:
    names = list_arrays(path)
    images = _images_of(path) if "arr_0" in names else None
    features = _read_gaussian(path, "mu", "sigma") if "mu" in names else None
    spatial = _read_gaussian(path, "mu_s", "sigma_s") if "mu_s" in names else None
    if images is None and features is None:
        raise DataError(
            f"{path} has the arrays {', '.join(names) or 'none'}: images are in arr_0, statistics in mu and sigma"
        )
    return Reference(str(path), images, features, spatial, checksum(path) if features else None)


def _images_of(path: Path) -> ImageSet:
    with opened_array(path, "arr_0") as array:
        shape, dtype = array.shape, array.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or math.prod(shape) == 0:
            raise DataError(f"arr_0 of {path} is {dtype} {shape}: images are uint8 (n, height, width, 3), or 1 if gray")
        if array.is_fortran:
            raise DataError(f"arr_0 of {path} is in Fortran order: save numpy.ascontiguousarray of it")
        if shape[1] * shape[2] > _MOST_PIXELS:
            raise DataError(f"images of {path} have {show_size(shape[1:])} pixels: {_MOST_PIXELS:,} are the most")
    return ImageSet(str(path), shape[0], lambda: _enumerate(str(path), _stream(path)), file=path)


def _stream(path: Path) -> Iterator[np.ndarray]:
    """Yield one image after the other, so that 10 GB of images are never in memory at once."""
    with opened_array(path, "arr_0") as array:
        count, *shape = array.shape
        for _ in range(count):
            yield np.frombuffer(array.read_bytes(math.prod(shape)), np.uint8).reshape(shape)


def _read_gaussian(path: Path, mean_name: str, covariance_name: str) -> Gaussian:
    arrays = []
    for name in (mean_name, covariance_name):
        with opened_array(path, name) as array:
            if array.dtype.kind not in "fiu" or max(array.shape, default=0) > _MOST_FEATURES:
                raise DataError(
                    f"{name} of {path} is {array.dtype} {array.shape}: statistics are numbers of up to "
                    f"{_MOST_FEATURES:,} features"
                )
            if array.num_bytes > _MOST_FEATURES**2 * array.dtype.itemsize:
                raise DataError(f"{name} of {path} has the shape {array.shape}: give (d,) and (d, d)")
            arrays.append(array.read().astype(np.float64))
    mean, covariance = arrays
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        fault = f"have shapes {mean.shape} and {covariance.shape}, not (d,) and (d, d)"
    elif not len(mean):
        fault = "are empty"
    elif not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        fault = "have numbers that are not finite"
    elif (covariance.diagonal() < 0).any():
        fault = "are no mean and covariance: a variance is negative"
    elif not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-4 * np.abs(covariance).max()):
        fault = "are no mean and covariance: the matrix is not symmetric"
    else:
        return Gaussian(torch.from_numpy(mean), torch.from_numpy((covariance + covariance.T) / 2))
    raise DataError(f"{mean_name} and {covariance_name} of {path} {fault}: fetch or make it again")


def read_settings(images: ImageSet) -> tuple[dict[str, Any] | None, list[str]]:
    """Read how images were made, from the metadata that lamamba writes into PNG files or beside a .npz.

    Returns:
        Settings, or None if no image has any. A setting that all images share has its value; of another, the values
        with their counts. Labels have their counts; seeds are first, last and how many different ones.
        And warnings of images that say nothing, or were made differently.
    """
    if images.file and (generation := read_generation(images.file)):
        return generation, []
    found = [settings for path in images.paths if (settings := _settings_of(path)) is not None]
    if not found:
        return None, [f"{images.name} does not say how its images were made, as those of lamamba generate do"]
    warned = []
    if len(found) < images.num_images:
        warned.append(f"{images.num_images - len(found):,} of {images.num_images:,} generated images do not say how")
    gathered: dict[str, Any] = {}
    for name in dict.fromkeys(name for settings in found for name in settings):
        values = Counter(json.dumps(settings.get(name)) for settings in found)
        if name == "seed":
            seeds = {settings["seed"] for settings in found if isinstance(settings.get("seed"), int)}
            described = {"first": min(seeds), "last": max(seeds), "different": len(seeds)} if seeds else None
            gathered["seeds"] = described
        elif name == "label":
            gathered["images_of_label"] = dict(sorted(values.items(), key=lambda item: (len(item[0]), item[0])))
        elif len(values) == 1:
            gathered[name] = found[0][name]
        else:
            common = dict(values.most_common(_MOST_VALUES))
            gathered[name] = {"different": len(values), "images_of_value": common}
            more = ", ..." * (len(values) > 3)
            warned.append(f"generated images differ in {name}: {', '.join(list(common)[:3])}{more}")
    return gathered, warned


def _settings_of(path: str) -> dict[str, Any] | None:
    try:
        with Image.open(path) as image:
            settings = json.loads(image.info["lamamba"])
    except Exception:  # not written by lamamba, which is no fault; reading the pixels says whether the file has one
        return None
    return settings if isinstance(settings, dict) else None
