"""A Hugging Face dataset as a source: a folder of `save_to_disk`, parquet files, or a name on the hub.

Rows hold images or latents. They are read at random from Arrow files, which datasets maps into memory. A folder of
`save_to_disk` holds such files and is read in place; for parquet files and the hub, datasets makes them once, in its
cache.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError

from lamamba.config import DatasetOptions
from lamamba.data.decoding import crop_centre, decode_image
from lamamba.data.sources import ImageSource
from lamamba.errors import DataError, reading
from lamamba.terminal.output import make_console

_SAVED = ("state.json", "dataset_dict.json")  # of save_to_disk: one split, or several
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LOOKED_AT = 20  # entries of a subfolder: a million images are not listed to find that there is no parquet file


def is_dataset(data: str) -> bool:
    """Say whether this is a Hugging Face dataset: a folder of one, a parquet file, or what can be a name on the hub."""
    path = Path(data).expanduser()
    if path.is_file():
        return path.suffix == ".parquet"
    if not path.is_dir():  # a mistyped path in a folder that exists never asks the hub
        return _HUB_NAME.fullmatch(data) is not None and not path.parent.is_dir() and not data.startswith((".", "~"))
    if any((path / name).is_file() for name in _SAVED):
        return True
    with os.scandir(path) as entries:
        return any(
            entry.name.endswith(".parquet") or (entry.is_dir() and _has_parquet(entry.path)) for entry in entries
        )


def _has_parquet(folder: str) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.name.endswith(".parquet") for entry in islice(entries, _LOOKED_AT))


class DatasetSource(ImageSource):
    """The images, or the latents, of one split of a Hugging Face dataset. Labels have the numbers of the dataset.

    Args:
        data: a folder that datasets.load_from_disk or load_dataset opens, a parquet file, or a name on the hub.
        options: split, subset and columns.
        image_size: pixels; images are center-cropped to it, see `crop_centre`. Latents stay as they are.
        channels: 1 or 3.
        skip_bad_images: decode every image now, in threads, and leave the unreadable ones out (see `bad_files`).

    Raises:
        DataError: datasets is missing or cannot open the dataset, columns need a choice, a row has no class, or there
            is no readable image.
    """

    def __init__(
        self, data: str, options: DatasetOptions, *, image_size: int, channels: int = 3, skip_bad_images: bool = False
    ) -> None:
        path = Path(data).expanduser()
        self.name = path.resolve().name if path.exists() else data
        self.image_size, self.channels = image_size, channels
        self.where = f"{data} ({options.split})"
        with reading(f"reading {data} needs datasets", "run pip install 'lamamba[datasets]'"):
            library = import_module("datasets")
        with _quiet(library):
            rows = _open(library, data, options.subset, options.split).with_format(None)
            self.column = _find_image_column(library, rows, self.where, options.image_column)
            self.class_names, self.labels = _find_classes(library, rows, self.where, options.label_column)
            self.images = rows.select_columns([self.column])
            if _is_array(rows.features[self.column]):
                self.images = self.images.with_format("numpy")
                self.latent_shape, self.is_mirrored = self._read_latents([0])[0].shape, False
            else:
                what = f"the column {self.column!r} of {self.where} cannot be opened as images"
                with reading(what, "give image_column (--image-column) another"):
                    self.images = self.images.cast_column(self.column, library.Image(decode=False))
        self.rows: Sequence[int] = range(len(self.images))  # those that are read
        if skip_bad_images and not self.latent_shape:
            good = self.find_readable()
            self.bad_files = tuple(f"row {row}" for row in self.rows if not good[row])
            self.rows = [row for row in self.rows if good[row]]
            if not self.rows:
                raise DataError(f"{self.where} has no readable image: give image_column (--image-column) the images")

    def __len__(self) -> int:
        return len(self.rows)

    def identify(self) -> str:
        """Digest all labels, and the sizes of the images in bytes, or some of the latents, which is quick."""
        together = hashlib.sha256(json.dumps([self.class_names, self.labels, list(self.rows)]).encode())
        if self.latent_shape:
            some = np.linspace(0, len(self) - 1, 64).round().astype(int).tolist()
            together.update(self._read_latents(some).tobytes())
            return together.hexdigest()
        compute = import_module("pyarrow.compute")
        for table in self.images.with_format("arrow").iter(1000):
            sizes: list[int | None] = []  # of all chunks, since the same images may be stored in other chunks
            for chunk in table[self.column].chunks:
                lengths = compute.binary_length(compute.struct_field(chunk, "bytes")).to_pylist()
                paths = compute.struct_field(chunk, "path").to_pylist()
                sizes += [
                    os.path.getsize(path) if length is None and path and os.path.isfile(path) else length
                    for length, path in zip(lengths, paths, strict=True)
                ]
            together.update(json.dumps(sizes).encode())
        return together.hexdigest()

    def load(self, index: int) -> tuple[np.ndarray, int]:
        row = self.rows[index]
        advice = "replace it, or skip it with skip_bad_images (--skip-bad-images)"
        with reading(f"row {row} of {self.where} cannot be read as an image", advice):
            entry = self.images[row][self.column] or {}
            content = entry.get("bytes") or Path(entry.get("path") or "").read_bytes()
            try:
                decoded = decode_image(io.BytesIO(content), self.channels)
            except UnidentifiedImageError:  # its message names a place in memory
                raise ValueError("it is of no known format") from None
            image = crop_centre(decoded, self.image_size)
        pixels = np.array(image).reshape(self.image_size, self.image_size, self.channels)
        return pixels, self.labels[row] if self.class_names else 0

    def gather(self, indices: np.ndarray, mirrored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read images, uint8 (b, c, h, w), or latents with a deviation of 0, float32 (b, 2 c, h, w), and labels."""
        if not self.latent_shape:
            return super().gather(indices, mirrored)
        latents = self._read_latents(indices.tolist())
        labels = [self.labels[index] if self.class_names else 0 for index in indices.tolist()]
        return np.concatenate([latents, np.zeros_like(latents)], axis=1), np.array(labels, dtype=np.int64)

    def _read_latents(self, rows: list[int]) -> np.ndarray:
        """Read latents, float32 (b, c, h, w)."""
        column = f"the column {self.column!r} of {self.where}"
        with reading(f"{column} cannot be read as latents", "give image_column (--image-column) another"):
            latents = np.asarray(self.images[rows][self.column], dtype=np.float32)
        if latents.shape[1:] != (self.latent_shape or latents.shape[1:]) or latents.ndim != 4:
            raise DataError(f"{column} has latents of several shapes: give arrays (c, h, w) of one")
        if not np.isfinite(latents).all():
            raise DataError(f"{column} has latents that are not finite, among the rows {rows[:5]}: replace them")
        return latents


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Without a terminal, keep the library's progress bars off."""
    if make_console().is_terminal or library.are_progress_bars_disabled():
        yield
        return
    library.disable_progress_bars()
    try:
        yield
    finally:
        library.enable_progress_bars()


def _open(library: Any, data: str, subset: str | None, split: str) -> Any:
    """Open one split, without decoding anything."""
    path = Path(data).expanduser()
    advice = "give a folder or a name on the hub that datasets opens, with --subset and --split if needed"
    was_saved = any((path / name).is_file() for name in _SAVED)
    with reading(f"{data} cannot be opened as a dataset", advice):
        if path.is_file():
            return library.load_dataset("parquet", data_files={split: str(path)}, split=split)
        if not was_saved:
            return library.load_dataset(str(path) if path.exists() else data, subset, split=split)
        saved = library.load_from_disk(str(path))
    if subset is not None:
        raise DataError(f"{data} was written by save_to_disk, without subsets: leave subset (--subset) out")
    splits = saved if isinstance(saved, dict) else {str(saved.split or split): saved}
    if split not in splits:
        raise DataError(f"{data} has no split {split!r}: give split (--split) {' or '.join(splits)}")
    return splits[split]


def _find_image_column(library: Any, rows: Any, where: str, given: str | None) -> str:
    option = "give image_column (--image-column)"
    if given is not None:
        _check_column(rows, where, given, option)
        if _type_of(rows.features[given]) == "string":  # which datasets would take for paths
            raise DataError(f"the column {given!r} of {where} holds text: {option} another")
        return given
    images = [name for name, feature in rows.features.items() if isinstance(feature, library.Image)]
    found = images or [name for name, feature in rows.features.items() if _is_array(feature)]
    if not found:
        raise DataError(
            f"{where} has no column of images: {option} the one that holds image files, of {', '.join(rows.features)}"
        )
    if len(found) > 1:
        what = "images" if images else "latents"
        raise DataError(f"{where} has several columns of {what}: {option} {' or '.join(found)}")
    return found[0]


def _check_column(rows: Any, where: str, column: str, option: str) -> None:
    if column not in rows.features:
        raise DataError(f"{where} has no column {column!r}: {option} {' or '.join(rows.features)}")


def _is_array(feature: Any) -> bool:
    """Return whether a column holds arrays of three dimensions of floats: Array3D, or lists of lists of lists."""
    dimensions = len(getattr(feature, "shape", ()))
    while hasattr(feature, "feature"):
        feature, dimensions = feature.feature, dimensions + 1
    return dimensions == 3 and str(getattr(feature, "dtype", "")).startswith("float")


def _type_of(feature: Any) -> str:
    """Return "integer", "string" or ""."""
    kind = getattr(feature, "dtype", "")
    return "integer" if re.fullmatch(r"u?int\d+", kind) else "string" if kind in ("string", "large_string") else ""


def _find_classes(library: Any, rows: Any, where: str, column: str | None) -> tuple[tuple[str, ...], list[int]]:
    """Return the names of the classes, and the label of each row; nothing where there are no classes."""
    if column == "auto":
        found = [name for name, feature in rows.features.items() if isinstance(feature, library.ClassLabel)]
        if len(found) > 1:
            raise DataError(
                f"{where} has several columns of labels: give label_column (--label-column) "
                f"{' or '.join(found)}, or None for no classes"
            )
        column = found[0] if found else None
    if column is None:
        return (), []
    _check_column(rows, where, column, "give label_column (--label-column)")
    feature, values = rows.features[column], rows[column][:]
    if isinstance(feature, library.ClassLabel):
        names = dict(enumerate(map(str, feature.names)))
    elif _type_of(feature):  # numbered in the order of the values
        names = {value: str(value) for value in sorted({value for value in values if value is not None})}
    else:
        raise DataError(
            f"the column {column!r} of {where} is neither ClassLabel nor strings nor integers: give another"
        )
    without = [row for row, value in enumerate(values) if value not in names]
    if without:
        raise DataError(
            f"{len(without):,} of {len(values):,} rows of {where} have no class in the column {column!r} (first row "
            f"{without[0]}): give label_column (--label-column) another, or None for no classes"
        )
    numbers = {value: number for number, value in enumerate(names)}
    return tuple(names.values()), [numbers[value] for value in values]
