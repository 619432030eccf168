"""Opens a source by its name or path."""

from pathlib import Path

import numpy as np

from lamamba.config import WHOLE_DATASET, DatasetOptions, closest
from lamamba.data.fashion_mnist import load_builtin, load_fashion_mnist
from lamamba.data.hugging_face import DatasetSource, is_dataset
from lamamba.data.latent_files import LatentSource, are_latents
from lamamba.data.sources import ArraySource, FolderSource, Source
from lamamba.errors import ConfigError, DataError

NAMED_SOURCES = ("builtin", "fashion-mnist")


def open_source(
    data: str,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    folder: Path | None = None,
    skip_bad_images: bool = False,
    dataset: DatasetOptions = WHOLE_DATASET,
) -> Source:
    """Open a source to train on.

    Args:
        data: "builtin" (10,000 Fashion-MNIST images shipped with the package), "fashion-mnist" (all 60,000), the path
            of a folder of images, or of one that `lamamba encode` wrote, or a Hugging Face dataset: a folder of
            `save_to_disk`, parquet files, or a name on the hub.
        image_size: pixels, needed for a folder; the named sources are 32.
        channels: 1 (grey) or 3 (color, the default for a folder). The named sources are grey; with 3, their three
            channels are equal.
        folder: folder with the idx files of "fashion-mnist"; the default is Debian's package or the hub.
        skip_bad_images: for a folder or a dataset, leave unreadable images out and list them in `bad_files`.
        dataset: which part of a Hugging Face dataset is read. Given for a folder of images, datasets opens the folder,
            with the labels that its metadata files have.

    Raises:
        ConfigError: image_size does not fit, channels is neither 1 nor 3, or `folder` is given without "fashion-mnist".
        DataError: there is no such source, or its files are missing or damaged.
    """
    if folder is not None and data != "fashion-mnist":
        raise ConfigError(
            f"folder {folder} (--data-folder) is only for data 'fashion-mnist', not for {data!r}: leave it out"
        )
    if channels not in (None, 1, 3):
        raise ConfigError(f"channels {channels} is neither 1 (gray) nor 3 (color): give channels (--channels) 1 or 3")
    if data in NAMED_SOURCES:
        if image_size not in (None, 32):
            raise ConfigError(
                f"image_size {image_size} does not fit data {data!r}, whose images are 32: "
                "give image_size (--image-size) 32 or none"
            )
        source = load_builtin() if data == "builtin" else load_fashion_mnist("train", folder=folder)
        if channels != 3:
            return source
        in_color = np.broadcast_to(source.images, (len(source), 3, *source.images.shape[2:]))  # takes no memory
        return ArraySource(source.name, in_color, source.labels, source.class_names)
    path = Path(data).expanduser()
    of_hugging_face = bool(data) and (is_dataset(data) or (path.is_dir() and dataset != WHOLE_DATASET))
    if not of_hugging_face and not (data and path.exists()):
        close = closest(data.replace("_", "-"), NAMED_SOURCES)
        advice = f"did you mean {close[0]!r}?" if close else "give 'builtin', 'fashion-mnist', a folder or user/name"
        raise DataError(f"data {data!r} is neither a known name nor an existing folder: {advice}")
    if are_latents(path):
        latents = LatentSource(path)
        if image_size not in (None, latents.image_size):
            raise ConfigError(f"image_size {image_size} is not that of {path}, {latents.image_size}: leave it out")
        return latents
    if image_size is None or image_size < 1:
        fault = "not set" if image_size is None else f"{image_size}, not positive,"
        raise ConfigError(
            f"image_size is {fault} for {data}: give image_size (--image-size), the pixels to crop to, for example 256"
        )
    if of_hugging_face:
        return DatasetSource(
            data, dataset, image_size=image_size, channels=channels or 3, skip_bad_images=skip_bad_images
        )
    return FolderSource(path, image_size=image_size, channels=channels or 3, skip_bad_images=skip_bad_images)
