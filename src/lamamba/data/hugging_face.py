"""A Hugging Face dataset of images, of the hub or a local folder, to class folders that `FolderSource` reads.

row 7, a JPEG of the class "cat" -> train/cat/00000007.jpg, or train/00000007.jpg without classes

What has its final name is whole: each file, and the split once all of it is there; until then it lies in the hidden
folder `.incomplete-train`. What it was made of is kept in train/dataset.json, so that nothing else is mixed in.
"""

import hashlib
import io
import json
import os
import re
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from lamamba.config import PrepareDatasetConfig
from lamamba.data.decoding import FORMATS, decode_image
from lamamba.data.folders import list_images_below
from lamamba.data.preparing import SplitCounts, is_there, list_names, make_folder, progress_bars, rename, using
from lamamba.errors import ConfigError, DataError
from lamamba.files import TEMPORARY, flush, write_text, written_whole
from lamamba.output import make_console, say
from lamamba.records import read_record

RECORD = "dataset.json"

# Pillow's names; MPO is a JPEG that other pictures follow. Files of other formats become PNG.
_SUFFIX = {
    "JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif", "TIFF": ".tif",
}  # fmt: skip
_ROWS_AT_ONCE = 64
_DIGITS = 8
_UNSAFE = re.compile(r"[/\\\x00-\x1f\x7f]")
_LONGEST_NAME = 255  # bytes


@dataclass(frozen=True)
class DatasetCounts(SplitCounts):
    """What `prepare_dataset` did.

    Attributes:
        left_out: the rows (from 0) whose images cannot be read, and why.
        renumbered: whether training, which numbers classes in the order of their folders' names, gives any class
            another number than the dataset.
    """

    left_out: dict[int, str]
    renumbered: bool


@dataclass(frozen=True)
class _Classes:
    """The column they are from; of each class its number there, name and folder; of each row the number."""

    column: str
    names: dict[int, str]
    folders: dict[int, str]
    labels: list[int]


def prepare(config: PrepareDatasetConfig) -> None:
    """Run `lamamba prepare dataset`: write the images, and print the counts; raises as `prepare_dataset` does."""
    counts = prepare_dataset(**vars(config))
    folder = config.out / config.split
    classes = {0: "no classes", 1: "1 class"}.get(counts.num_classes, f"{counts.num_classes:,} classes")
    left_out = f", {len(counts.left_out):,} left out ({RECORD} says why)" if counts.left_out else ""
    say(f"{folder}: {classes}, {counts.describe_images()}{left_out}")
    if counts.renumbered:
        say(f"training numbers classes in the order of their folders, unlike the dataset: {folder / RECORD} has both")


def prepare_dataset(
    dataset: str,
    out: Path,
    *,
    split: str = "train",
    subset: str | None = None,
    image_column: str | None = None,
    label_column: str | None = "auto",
    number_classes: bool = False,
    skip_bad_images: bool = False,
) -> DatasetCounts:
    """Write the images of a Hugging Face dataset to `out`/`split`, one folder a class, or flat without classes.

    A call that was stopped, killed or ran out of space is repeated as it was, and goes on where it stopped. Files are
    copied byte by byte and each is decoded once, to know that training can; files of rarer formats become PNG. A
    progress bar is shown in a terminal.

    Args:
        dataset: a dataset of the hub, or a folder that datasets.load_dataset or load_from_disk opens.
        out: folder for the split; made where missing.
        split: name of the split.
        subset: name of the subset (configuration), for a dataset of several.
        image_column: column with the images; by default the only one of the type Image.
        label_column: column with the classes, of the type ClassLabel, strings or integers; "auto" is the only
            ClassLabel, if there is any, and None is no classes.
        number_classes: begin the names of class folders with the dataset's numbers, 007_cat, which keeps their order,
            and replace in them what a folder's name cannot have.
        skip_bad_images: leave out images that cannot be read, instead of failing once all others are written.

    Raises:
        ConfigError: split is no name, or `out` lies where datasets looks for the dataset.
        DataError: datasets is missing or cannot open the dataset; columns or names of classes need a choice; images
            cannot be read; or `out` holds something else or cannot be written.
    """
    if not re.fullmatch(r"\w[\w.-]*", split):
        raise ConfigError(f"split {split!r} cannot be a folder's name: give split (--split) a name such as train")
    place = Path(dataset).expanduser().resolve()  # where the library looks before it asks the hub
    if out.resolve().is_relative_to(place):
        raise ConfigError(f"out {out} would be taken for files of {dataset}: give out (--out) another folder")
    library = _import_datasets(dataset)
    with _quiet(library, unless=make_console().is_terminal):
        rows = _open(library, dataset, subset, split).with_format(None)
        where = f"{dataset} ({split})"
        image_column = _find_image_column(library, rows, where, image_column)
        classes = _find_classes(library, rows, where, label_column, number_classes)
        with _opening(
            f"the column {image_column!r} of {where}", "images", "give image_column (--image-column) another"
        ):
            images = rows.select_columns([image_column]).cast_column(image_column, library.Image(decode=False))
    identity = {
        "dataset": str(place) if place.exists() else dataset,
        "subset": subset,
        "split": split,
        "image_column": image_column,
        "label_column": None if classes is None else classes.column,
        "number_classes": number_classes,
        "num_images": len(images),
        "contents": _identify(images, image_column, classes),
    }
    with progress_bars() as bar:
        return _prepare(where, images, classes, identity, out, skip_bad_images, bar(split, len(images)))


def _import_datasets(dataset: str) -> Any:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise DataError(f"reading {dataset} needs datasets ({error}): run pip install 'lamamba[datasets]'") from error


@contextmanager
def _quiet(library: Any, unless: bool) -> Iterator[None]:
    """Without a terminal, keep the library's progress bars off."""
    if unless or library.are_progress_bars_disabled():
        yield
        return
    library.disable_progress_bars()
    try:
        yield
    finally:
        library.enable_progress_bars()


def _open(library: Any, dataset: str, subset: str | None, split: str) -> Any:
    """Open one split, without decoding anything."""
    folder = Path(dataset).expanduser()
    if not folder.exists() and (dataset.startswith(("/", ".", "~")) or dataset.count("/") > 1):
        raise DataError(f"{dataset} is missing: give an existing folder, or the name of a dataset of the hub")
    if folder.is_file():
        raise DataError(f"{dataset} is a file: give the folder that it is in")
    mend = "give a dataset of the hub or a folder that datasets opens, and with --subset and --split a part that it has"
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        if folder.exists():
            _refuse_image_folder(folder, split)
        with _opening(dataset, "a dataset", mend):
            return library.load_dataset(str(folder) if folder.exists() else dataset, subset, split=split)
    with _opening(dataset, "a dataset", mend):  # as save_to_disk wrote it: one split, or several by name
        saved = library.load_from_disk(str(folder))
    if subset is not None:
        raise DataError(f"{dataset} was written by save_to_disk, without subsets: leave subset (--subset) out")
    splits = saved if isinstance(saved, dict) else {str(saved.split or split): saved}
    if split not in splits:
        raise DataError(f"{dataset} has no split {split!r}: give split (--split) {_any_of(list(splits))}")
    return splits[split]


@contextmanager
def _opening(what: str, kind: str, mend: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # datasets passes on what its many readers raise, with the reason as the cause
        reason = textwrap.shorten(str(error.__cause__ or error), 300).rstrip(".")
        raise DataError(f"{what} cannot be opened as {kind} ({reason}): {mend}") from error


def _refuse_image_folder(folder: Path, split: str) -> None:
    """Say that a folder of images, without anything that datasets would take labels from, needs no preparing."""
    found = list_images_below(folder)
    others = {Path(path).suffix.lower() for path in found.others if Path(path).name != RECORD}
    if found.images and others <= {".txt", ".md", ""}:
        images = folder / split if (folder / split).is_dir() else folder
        raise DataError(
            f"{folder} is a folder of images, which needs no preparing: train on it as it is (lamamba train --data "
            f"{images})"
        )


def _find_image_column(library: Any, rows: Any, where: str, given: str | None) -> str:
    if given is not None:
        _check_column(rows, where, given, "image_column (--image-column)")
        if _type_of(rows.features[given]) == "string":  # which datasets would take for paths
            raise DataError(f"the column {given!r} of {where} holds text: give image_column (--image-column) another")
        return given
    found = [name for name, feature in rows.features.items() if isinstance(feature, library.Image)]
    if not found:
        raise DataError(
            f"{where} has no column of images: give image_column (--image-column) the one that holds image files, of "
            f"{', '.join(rows.features)}"
        )
    if len(found) > 1:
        raise DataError(f"{where} has several columns of images: give image_column (--image-column) {_any_of(found)}")
    return found[0]


def _check_column(rows: Any, where: str, column: str, option: str) -> None:
    if column not in rows.features:
        raise DataError(f"{where} has no column {column!r}: give {option} {_any_of(list(rows.features))}")


def _type_of(feature: Any) -> str:
    """Return "integer", "string" or ""."""
    kind = getattr(feature, "dtype", "")
    return "integer" if re.fullmatch(r"u?int\d+", kind) else "string" if kind in ("string", "large_string") else ""


def _any_of(names: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _find_classes(library: Any, rows: Any, where: str, column: str | None, number_classes: bool) -> _Classes | None:
    if column is None:
        return None
    if column == "auto":
        found = [name for name, feature in rows.features.items() if isinstance(feature, library.ClassLabel)]
        if not found:
            return None
        if len(found) > 1:
            raise DataError(
                f"{where} has several columns of labels: give label_column (--label-column) "
                f"{_any_of([*found, 'None for no classes'])}"
            )
        column = found[0]
    _check_column(rows, where, column, "label_column (--label-column)")
    feature = rows.features[column]
    values = rows[column][:]
    if isinstance(feature, library.ClassLabel):
        names = dict(enumerate(map(str, feature.names)))
    elif _type_of(feature) == "integer":
        known = {value for value in values if value is not None and value >= 0}
        digits = len(str(max(known, default=0)))
        names = {value: f"{value:0{digits}d}" for value in known}  # with zeros, whose order is that of the numbers
    elif _type_of(feature) == "string":
        numbers = {name: number for number, name in enumerate(sorted(set(values) - {None}))}
        names = {number: name for name, number in numbers.items()}
        values = [numbers.get(value) for value in values]
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
    present = {number: names[number] for number in sorted(set(values))}
    if number_classes:
        digits = len(str(max(names)))
        folders = {number: _put_number_first(f"{number:0{digits}d}", name) for number, name in present.items()}
        return _Classes(column, present, folders, values)
    _check_names(where, list(present.values()))
    return _Classes(column, present, present, values)


def _put_number_first(number: str, name: str) -> str:
    """Return a folder's name that begins with the number: 007_cat; of a name that is the number, the number alone."""
    if name.isdecimal() and int(name) == int(number):
        return number
    allowed = _UNSAFE.sub("-", name).encode()[:200]  # which leaves room for any number
    return f"{number}_{allowed.decode(errors='ignore')}"


def _check_names(where: str, names: list[str]) -> None:
    """Refuse names that cannot be a folder's, are hidden, or are told apart on some disks only."""
    mend = "give number_classes (--number-classes), for folders such as 007_cat"
    folded = dict[str, str]()
    for name in names:
        unsafe = name in ("", RECORD) or name[0] == "." or _UNSAFE.search(name) or len(name.encode()) > _LONGEST_NAME
        if unsafe:
            raise DataError(f"the class {textwrap.shorten(name, 80)!r} of {where} cannot be a folder's name: {mend}")
        other = folded.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise DataError(f"the classes {other!r} and {name!r} of {where} are one folder on some disks: {mend}")


def _identify(images: Any, column: str, classes: _Classes | None) -> str:
    """Compute a checksum of all labels and sizes in bytes: it tells versions of a dataset apart, at little cost."""
    together = hashlib.sha256(json.dumps(classes and [classes.names, classes.labels]).encode())
    compute = import_module("pyarrow.compute")
    for table in images.with_format("arrow").iter(1000):
        for chunk in table[column].chunks:
            entries = dict(zip((field.name for field in chunk.type), chunk.flatten(), strict=True))
            sizes = compute.binary_length(entries["bytes"]).to_pylist()
            paths = entries["path"].to_pylist()
            sizes = [
                os.path.getsize(path) if size is None and path and os.path.isfile(path) else size
                for size, path in zip(sizes, paths, strict=True)
            ]
            together.update(json.dumps(sizes).encode())
    return together.hexdigest()


def _prepare(
    where: str,
    images: Any,
    classes: _Classes | None,
    identity: dict[str, Any],
    out: Path,
    skip_bad_images: bool,
    advance: Callable[[int], None],
) -> DatasetCounts:
    """Write the split, or check the one that is there."""
    final, temporary = out / identity["split"], out / f"{TEMPORARY}{identity['split']}"
    folders = [""] * len(images) if classes is None else [classes.folders[label] for label in classes.labels]
    if is_there(final):
        left_out = {int(row): reason for row, reason in _read_record(final, identity)["left_out"].items()}
        _check_counts(final, _find_rows(final, classes), folders, left_out)
        advance(len(folders))
        return _count(classes, folders, left_out, num_extracted=0)
    if is_there(temporary) and list_names(temporary):
        _read_record(temporary, identity)
    make_folder(temporary)
    _write_record(temporary, identity, classes, folders, {})
    present = _find_rows(temporary, classes)
    advance(len(present))
    missing = [row for row in range(len(folders)) if row not in present]
    left_out = _write_images(images, missing, [temporary / folders[row] for row in missing], advance)
    if left_out and (not skip_bad_images or len(left_out) == len(folders)):
        raise _unreadable(where, left_out, folders)
    _check_counts(temporary, _find_rows(temporary, classes), folders, left_out)
    _write_record(temporary, identity, classes, folders, left_out)
    rename(temporary, final)
    with using(final, "made"):
        flush(out)
    return _count(classes, folders, left_out, num_extracted=len(missing) - len(left_out))


def _write_images(images: Any, rows: list[int], folders: list[Path], advance: Callable[[int], None]) -> dict[int, str]:
    """Write the images of some rows, each into its folder; returns the rows that cannot be read, and why."""
    unreadable = {}
    with ThreadPoolExecutor() as threads:
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[first : first + _ROWS_AT_ONCE]
            entries = images[some][images.column_names[0]]
            faults = threads.map(_write_image, entries, some, folders[first : first + _ROWS_AT_ONCE])
            unreadable.update({row: fault for row, fault in zip(some, faults, strict=True) if fault})
            advance(len(some))
    return unreadable


def _write_image(entry: dict[str, Any] | None, row: int, folder: Path) -> str:
    """Write one image into a folder unless it cannot be decoded; returns why it cannot."""
    try:
        content, format_name = _check_image(entry)
    except MemoryError:
        raise
    except UnidentifiedImageError:  # its message names a place in memory
        return "it is of no known format"
    except DataError as error:
        return str(error)
    except Exception as error:  # Pillow's decoders raise nearly everything on damaged files
        return textwrap.shorten(f"{type(error).__name__}: {error}", 200)
    path = folder / f"{row:0{_DIGITS}d}{_SUFFIX[format_name]}"
    make_folder(folder)
    with using(path, "written"), written_whole(path) as temporary:
        temporary.write_bytes(content)
    return ""


def _check_image(entry: dict[str, Any] | None) -> tuple[bytes, str]:
    """Decode an image as training will; returns what to write and its format."""
    if entry is None or (not entry["bytes"] and not entry["path"]):
        raise DataError("it is missing")
    content = entry["bytes"] or Path(entry["path"]).read_bytes()
    with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
        format_name = opened.format or ""
    pixels = decode_image(io.BytesIO(content), 3)
    if format_name in _SUFFIX:
        return content, format_name
    file = io.BytesIO()
    pixels.save(file, "PNG")
    return file.getvalue(), "PNG"


def _find_rows(folder: Path, classes: _Classes | None) -> dict[int, str]:
    """Return the class folder of each row whose image is in the folder."""
    names = set(list_names(folder)) - {RECORD}
    others = sorted(names - set(classes.folders.values())) if classes is not None else []
    files = {"": names} if classes is None else {name: set(list_names(folder / name)) for name in names - set(others)}
    others += [name for within in files.values() for name in within if not re.match(rf"[0-9]{{{_DIGITS}}}\.", name)]
    if others:
        raise DataError(f"{folder} also holds {others[0]!r}, which is not of the dataset: move it elsewhere")
    return {int(name[:_DIGITS]): class_folder for class_folder, within in files.items() for name in within}


def _check_counts(folder: Path, there: dict[int, str], folders: list[str], left_out: dict[int, str]) -> None:
    """Compare the number of images of each class with the dataset's."""
    expected = Counter(name for row, name in enumerate(folders) if row not in left_out)
    found = Counter(there.values())
    for name, number in expected.items():
        if found[name] != number:
            raise DataError(
                f"{folder / name} has {found[name]} images, not {number}: delete {folder}, and it is extracted again"
            )


def _count(
    classes: _Classes | None, folders: list[str], left_out: dict[int, str], *, num_extracted: int
) -> DatasetCounts:
    num_present = len(folders) - len(left_out) - num_extracted
    if classes is None:
        return DatasetCounts(0, num_extracted, num_present, left_out, renumbered=False)
    numbers = _order_as_in_training(classes, folders, left_out)
    return DatasetCounts(
        len(numbers), num_extracted, num_present, left_out, renumbered=numbers != list(range(len(numbers)))
    )


def _order_as_in_training(classes: _Classes, folders: list[str], left_out: dict[int, str]) -> list[int]:
    """Return the dataset's numbers of the classes that have an image, in the order of their folders' names."""
    with_images = {name for row, name in enumerate(folders) if row not in left_out}
    numbers = (number for number, name in classes.folders.items() if name in with_images)
    return sorted(numbers, key=lambda number: classes.folders[number])


def _unreadable(where: str, left_out: dict[int, str], folders: list[str]) -> DataError:
    named = [f"{row} ({folders[row]})" if folders[row] else str(row) for row in list(left_out)[:20]]
    more = f" and {len(left_out) - len(named):,} more" if len(left_out) > len(named) else ""
    first, reason = next(iter(left_out.items()))
    mend = "replace them, or leave them out with skip_bad_images (--skip-bad-images)"
    if len(left_out) == len(folders):
        mend = "name the column of images with image_column (--image-column)"
    return DataError(
        f"{len(left_out):,} of {len(folders):,} images of {where} cannot be read, rows {', '.join(named)}{more} "
        f"(counted from 0; row {first}: {reason}): {mend}"
    )


def _write_record(
    folder: Path, identity: dict[str, Any], classes: _Classes | None, folders: list[str], left_out: dict[int, str]
) -> None:
    """Write what the folder is made of; its classes are in the order in which training numbers them."""
    listed = []
    if classes is not None:
        counts = Counter(name for row, name in enumerate(folders) if row not in left_out)
        for number in _order_as_in_training(classes, folders, left_out):
            name = classes.folders[number]
            entry = {"folder": name, "name": classes.names[number], "label": number, "num_images": counts[name]}
            listed.append(entry)
    path = folder / RECORD
    record = identity | {"classes": listed, "left_out": left_out}
    with using(path, "written"), written_whole(path) as temporary:
        write_text(temporary, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _read_record(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Read what the folder was made from, and check that it is the dataset of this command, wherever that lies."""
    mend = f"give another out (--out), or delete {folder}"
    try:
        record = read_record(folder / RECORD, dict[str, Any], DataError)
        differs = {name: record[name] != value for name, value in identity.items()}
        changed = [name for name, is_other in differs.items() if is_other and name != "dataset"]
        dict(record["left_out"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is there already, but is not what was made of a dataset: {mend}") from error
    if not changed:
        return record
    if changed[0] in ("contents", "num_images"):
        raise DataError(f"{folder} was made of other images or labels than {identity['dataset']} has now: {mend}")
    was, now = record[changed[0]], identity[changed[0]]
    raise DataError(f"{folder} was made with {changed[0]} {was!r}, not {now!r}: {mend}")
