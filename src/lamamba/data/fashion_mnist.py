"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): the 10,000 shipped images, or all from a folder or the hub."""

import gzip
import io
import struct
from importlib import import_module
from pathlib import Path
from typing import Literal

import huggingface_hub
import numpy as np
from PIL import Image

from lamamba.data.sources import ArraySource
from lamamba.errors import ConfigError, DataError, reading

BUILTIN = Path(__file__).parents[1] / "assets" / "fashion_mnist_10k.npz"
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
FASHION_MNIST_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)

HUB_REPOSITORY = "zalando-datasets/fashion_mnist"
HUB_REVISION = "531be5e2ccc9dba0c201ad3ae567a4f3d16ecdd2"

_MOST_IDX_BYTES = 1 << 26  # the largest file has 47 MB
_WAYS_WITHOUT_HUB = (
    "on Debian or Ubuntu run 'apt install dataset-fashion-mnist'; or download the four .gz files from "
    "github.com/zalandoresearch/fashion-mnist (data/fashion) and give their folder (folder=, or "
    "--data-folder); or use 'builtin'"
)


def load_builtin() -> ArraySource:
    """Return the first 10,000 Fashion-MNIST training images, shipped with the package: (10000, 1, 32, 32).

    Raises:
        DataError: the shipped file is missing or damaged.
    """
    with reading(f"the built-in set {BUILTIN} cannot be read", "install lamamba again"), np.load(BUILTIN) as arrays:
        return ArraySource("builtin", _pad_to_32(arrays["images"]), arrays["labels"], FASHION_MNIST_CLASSES)


def load_fashion_mnist(split: Literal["train", "test"] = "train", *, folder: Path | None = None) -> ArraySource:
    """Return Fashion-MNIST, padded with black to 32 x 32: (60000, 1, 32, 32), or (10000, 1, 32, 32) for the test split.

    The images and their order do not depend on where they are read from.

    Args:
        split: "train" or "test".
        folder: holds the idx files, gzipped or not. By default they are taken from where Debian's package
            dataset-fashion-mnist puts them, or else from the Hugging Face hub, which needs pyarrow and, the first
            time, the network.

    Raises:
        ConfigError: there is no such split.
        DataError: a file is missing, damaged, or does not fit the other; the message names it. Or the hub cannot be
            reached, or pyarrow is missing.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"split {split!r} is not a part of Fashion-MNIST: use 'train' or 'test'")
    if folder is None and not FASHION_MNIST_FOLDER.is_dir():
        images, labels = _read_hub(split)
    else:
        images, labels = _read_idx_files(FASHION_MNIST_FOLDER if folder is None else folder, split)
    return ArraySource("fashion-mnist", _pad_to_32(images), labels, FASHION_MNIST_CLASSES)


def _pad_to_32(images: np.ndarray) -> np.ndarray:
    """Pad (n, 28, 28) with black to (n, 1, 32, 32), a size that halves well."""
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None]


def _read_idx_files(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 (n, 28, 28) and uint8 (n,)."""
    prefix = "train" if split == "train" else "t10k"
    images_path = _find_idx_file(folder, f"{prefix}-images-idx3-ubyte")
    labels_path = _find_idx_file(folder, f"{prefix}-labels-idx1-ubyte")
    images, labels = _read_idx(images_path, num_dimensions=3), _read_idx(labels_path, num_dimensions=1)
    if len(images) == 0 or images.shape[1:] != (28, 28):
        raise DataError(f"{images_path} has shape {images.shape}, not (n, 28, 28): replace it by the original file")
    if len(labels) != len(images):
        raise DataError(
            f"{labels_path} has {len(labels)} labels for the {len(images)} images of {images_path.name}: "
            "take both files from the same copy of the set"
        )
    if labels.max() > 9:
        raise DataError(f"{labels_path} has the label {labels.max()}, outside 0..9: replace it by the original file")
    return images, labels


def _find_idx_file(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise DataError(f"Fashion-MNIST's {name}.gz is not in {folder}: {_WAYS_WITHOUT_HUB}")


def _read_idx(path: Path, num_dimensions: int) -> np.ndarray:
    """Read an idx file of uint8 (big-endian magic 0x0800 + dimensions, the sizes, the bytes), gzipped or not."""
    advice = "replace it by the original file"
    opened = gzip.open if path.suffix == ".gz" else open
    with reading(f"{path} cannot be read as an idx file", advice), opened(path, "rb") as file:
        content = file.read(_MOST_IDX_BYTES)
        magic, *shape = struct.unpack_from(f">{1 + num_dimensions}I", content)
        if magic != 0x0800 + num_dimensions:
            raise ValueError(f"it is not of {'images' if num_dimensions == 3 else 'labels'}, its magic is {magic}")
        return np.frombuffer(content, np.uint8, offset=4 * (1 + num_dimensions)).reshape(shape)


def _read_hub(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 (n, 28, 28) and int64 (n,) from the Parquet file of the hub: image {bytes of a PNG, path}, label."""
    missing = f"Fashion-MNIST is not in {FASHION_MNIST_FOLDER}, and"
    what = f"{missing} reading it from the Hugging Face hub needs pyarrow"
    with reading(what, f"run 'pip install pyarrow'; or {_WAYS_WITHOUT_HUB}"):
        parquet = import_module("pyarrow.parquet")  # fail before the download
    name = f"fashion_mnist/{split}-00000-of-00001.parquet"
    advice = f"try again with a network; or {_WAYS_WITHOUT_HUB}"
    with reading(f"{missing} the Hugging Face hub did not give {name}", advice):
        found = huggingface_hub.hf_hub_download(
            repo_id=HUB_REPOSITORY, repo_type="dataset", filename=name, revision=HUB_REVISION
        )
    path = Path(found).resolve()  # the file, not the link: deleting only the link would keep a damaged file
    with reading(f"{path} cannot be read", "delete it, and it is downloaded again"):
        table = parquet.read_table(path, columns=["image", "label"])
        rows, labels = table["image"].to_pylist(), table["label"].to_numpy()
        images = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in rows])
    if images.shape[1:] != (28, 28) or labels.min() < 0 or labels.max() > 9:
        raise DataError(
            f"{path} has images of shape {images.shape} and labels {labels.min()}..{labels.max()}, not (n, 28, 28) and "
            "0..9: delete it, and it is downloaded again"
        )
    return images, labels
