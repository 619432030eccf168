"""The official ImageNet files (Russakovsky et al. 2015, arXiv 1409.0575) to class folders that `FolderSource` reads.

ILSVRC2012_img_train.tar: n01440764.tar: n01440764_18.JPEG -> train/n01440764/n01440764_18.JPEG
ILSVRC2012_img_val.tar: ILSVRC2012_val_00000001.JPEG       -> validation/n01751748/ILSVRC2012_val_00000001.JPEG

What has its final name is whole; what is not yet whole lies below a hidden folder `.incomplete-*`.
"""

import errno
import io
import os
import re
import tarfile
import textwrap
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from gzip import BadGzipFile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import MofNCompleteColumn

from lamamba.config import PrepareImagenetConfig
from lamamba.data.preparing import SplitCounts, is_there, list_names, make_folder, rename, using
from lamamba.errors import ConfigError, DataError
from lamamba.output import progress_bars, say

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VALIDATION_TAR = "ILSVRC2012_img_val.tar"
DEVKIT_TAR = "ILSVRC2012_devkit_t12.tar.gz"

_MD5 = {
    TRAIN_TAR: "1d675b47d978889d74fa0da5fadfb00e",
    VALIDATION_TAR: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT_TAR: "fa75699e90414af021442c21a62c3abf",
}
_DEVKIT_META = "ILSVRC2012_devkit_t12/data/meta.mat"
_DEVKIT_TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
_WNID = re.compile(r"n[0-9]{8}")


@dataclass(frozen=True)
class Expected:
    """The size of the complete set: classes, training images in all, validation images per class."""

    num_classes: int
    num_train: int
    num_validation_per_class: int


ILSVRC2012 = Expected(num_classes=1000, num_train=1_281_167, num_validation_per_class=50)


def prepare(config: PrepareImagenetConfig) -> None:
    """Run `lamamba prepare imagenet`: extract, and print the counts; raises as `prepare_imagenet` does."""
    for split, count in prepare_imagenet(**vars(config)).items():
        say(f"{config.out / split}: {count.num_classes:,} classes, {count.describe_images()}")


def prepare_imagenet(
    out: Path,
    *,
    train: Path | None = None,
    validation: Path | None = None,
    devkit: Path | None = None,
    expected: Expected = ILSVRC2012,
) -> dict[str, SplitCounts]:
    """Extract the official ImageNet files to `out`/train and `out`/validation, one folder per class, named by its WNID.

    A call that was stopped, killed or ran out of space is repeated as it was, and goes on where it stopped. Images
    are copied byte by byte, each is held in memory alone, and their sizes and numbers are checked, not their MD5.
    A progress bar is shown in a terminal.

    Args:
        out: folder for the splits; made where missing.
        train: ILSVRC2012_img_train.tar.
        validation: ILSVRC2012_img_val.tar; needs devkit.
        devkit: ILSVRC2012_devkit_t12.tar.gz, which knows the classes of the validation images, and is read with scipy.
            With it, the classes of train are checked too.
        expected: the size of a whole set.

    Returns:
        The counts of "validation" and "train", for the files that were given.

    Raises:
        ConfigError: neither train nor validation is given, or validation without devkit.
        DataError: a file is missing, damaged, cut off, or not the official one; `out` holds something else or cannot
            be written; or scipy is missing.
    """
    if train is None and validation is None:
        raise ConfigError(f"no ImageNet file is given: give train ({TRAIN_TAR}), validation ({VALIDATION_TAR}) or both")
    if validation is not None and devkit is None:
        raise ConfigError(f"validation is given without devkit, which has its classes: give devkit ({DEVKIT_TAR}) too")
    for path, official in ((train, TRAIN_TAR), (validation, VALIDATION_TAR), (devkit, DEVKIT_TAR)):
        if path is not None and not os.path.isfile(path):  # check all files before hours of work
            raise DataError(f"{path} is missing or not a file: give the path of {official} from image-net.org")
    classes = None if devkit is None else _read_devkit(devkit, expected)
    counts: dict[str, SplitCounts] = {}
    with progress_bars(MofNCompleteColumn(), "images ·") as bar:
        if validation is not None and classes is not None:
            counts["validation"] = _prepare_validation(validation, out, classes, bar("validation", len(classes)))
        if train is not None:
            wnids = None if classes is None else set(classes)
            counts["train"] = _prepare_train(train, out / "train", wnids, expected, bar("train", expected.num_train))
    return counts


def _read_devkit(path: Path, expected: Expected) -> list[str]:
    """Return the WNID of each validation image, in the order of their numbers."""
    try:
        loadmat = import_module("scipy.io").loadmat
    except ImportError as error:
        raise DataError(f"reading {path} needs scipy ({error}): run 'pip install scipy'") from error
    with _reading(path, DEVKIT_TAR), tarfile.open(path, "r:gz") as tar:
        members = {member.name: member for member in tar if member.isreg()}
        for name in (_DEVKIT_META, _DEVKIT_TRUTH):
            if name not in members:
                raise DataError(f"{path} has no file {name}: {_download_again(DEVKIT_TAR)}")
        meta, truth = (_read_entry(tar, members[name]) for name in (_DEVKIT_META, _DEVKIT_TRUTH))
    try:
        wnids = _read_wnids(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
    except MemoryError:
        raise
    except Exception as error:  # scipy raises nearly everything on damaged files
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise DataError(f"{path}: {_DEVKIT_META} cannot be read ({reason}): {_download_again(DEVKIT_TAR)}") from error
    unsafe = [wnid for wnid in wnids.values() if not _WNID.fullmatch(wnid)]
    if unsafe:
        raise DataError(f"{path} names a class {unsafe[0]!r}, unlike n01440764: {_download_again(DEVKIT_TAR)}")
    _check_number(len(set(wnids.values())), expected.num_classes, "classes", path, DEVKIT_TAR)
    try:
        classes = [wnids[int(number)] for number in truth.split()]
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{path}: {_DEVKIT_TRUTH} has a line with the number of no class ({error}): {_download_again(DEVKIT_TAR)}"
        ) from error
    number_of_images = Counter(classes)
    for wnid in sorted(wnids.values()):
        what = f"validation images of {wnid}"
        _check_number(number_of_images[wnid], expected.num_validation_per_class, what, path, DEVKIT_TAR)
    return classes


def _read_wnids(synsets: Any) -> dict[int, str]:
    """Return the WNID of each class number, without groups of classes, which have children."""
    return {
        int(synset["ILSVRC2012_ID"]): str(synset["WNID"])
        for synset in np.atleast_1d(synsets)
        if int(synset["num_children"]) == 0
    }


def _prepare_validation(path: Path, out: Path, classes: list[str], advance: Callable[[int], None]) -> SplitCounts:
    """Extract the validation tar to out/validation; `classes` lists the WNID of each image."""
    final, temporary = out / "validation", out / ".incomplete-validation"
    number_of_images = Counter(classes)
    if is_there(final):
        _check_split(final, number_of_images)
        advance(len(classes))
        return SplitCounts(len(number_of_images), 0, len(classes))
    for wnid in number_of_images:
        make_folder(temporary / wnid)
    extracted, names = 0, set[str]()
    with _reading(path, VALIDATION_TAR), tarfile.open(path, "r:") as tar:
        for member in _read_entries(tar):
            match = re.fullmatch(r"ILSVRC2012_val_([0-9]{8})\.JPEG", member.name)
            number = int(match[1]) if match else 0
            if not 1 <= number <= len(classes):
                highest = f"ILSVRC2012_val_{len(classes):08d}.JPEG"
                raise _unexpected(path, member, f"ILSVRC2012_val_00000001.JPEG to {highest}", VALIDATION_TAR)
            _check_new_file(path, member, names, VALIDATION_TAR)
            extracted += _extract(tar, member, temporary / classes[number - 1])
            advance(1)
    _check_number(len(names), len(classes), "images", path, VALIDATION_TAR)
    _check_split(temporary, number_of_images)
    rename(temporary, final)
    return SplitCounts(len(number_of_images), extracted, len(classes) - extracted)


def _prepare_train(
    path: Path, folder: Path, wnids: set[str] | None, expected: Expected, advance: Callable[[int], None]
) -> SplitCounts:
    """Extract the training tar to the folder; `wnids` are the expected classes, if known."""
    extracted = total = 0
    with _reading(path, TRAIN_TAR), tarfile.open(path, "r:") as tar:
        members = _list_classes(path, tar, expected)
        odd = sorted(members.keys() ^ wnids) if wnids is not None else []
        if odd:
            raise DataError(f"the class {odd[0]} is in only one of {path} and the devkit: take both from ILSVRC2012")
        make_folder(folder)
        _check_no_others(folder, members.keys())
        for wnid, member in members.items():
            where, file = f"{path}: {member.name}", tar.extractfile(member)
            with _reading(where, TRAIN_TAR), tarfile.open(fileobj=file, mode="r:") as inner:
                written, number = _prepare_class(where, inner, folder / wnid, advance)
            extracted, total = extracted + written, total + number
    _check_number(total, expected.num_train, "images", path, TRAIN_TAR)
    return SplitCounts(len(members), extracted, total - extracted)


def _list_classes(path: Path, tar: tarfile.TarFile, expected: Expected) -> dict[str, tarfile.TarInfo]:
    """Return the tar of each class by its WNID; read only headers, to find a truncated tar at once."""
    names = set[str]()
    members = {}
    for member in _read_entries(tar):
        wnid = member.name.removesuffix(".tar")
        if not member.name.endswith(".tar") or not _WNID.fullmatch(wnid):
            raise _unexpected(path, member, "a name such as n01440764.tar", TRAIN_TAR)
        _check_new_file(path, member, names, TRAIN_TAR)
        members[wnid] = member
    _check_number(len(members), expected.num_classes, "classes", path, TRAIN_TAR)
    return members


def _prepare_class(where: str, tar: tarfile.TarFile, final: Path, advance: Callable[[int], None]) -> tuple[int, int]:
    """Extract the tar of one class to the folder `final`; return the number of images extracted, and of all images."""
    temporary = final.with_name(f".incomplete-{final.name}")
    there = is_there(final)
    if not there:
        make_folder(temporary)
    extracted, names = 0, set[str]()
    for member in _read_entries(tar):
        if not re.fullmatch(rf"{final.name}_[0-9]+\.JPEG", member.name):
            raise _unexpected(where, member, f"a name such as {final.name}_18.JPEG", TRAIN_TAR)
        _check_new_file(where, member, names, TRAIN_TAR)
        if not there:
            extracted += _extract(tar, member, temporary)
        advance(1)
    folder = final if there else temporary
    _check_class(folder, len(names), delete=folder)
    if not there:
        rename(temporary, final)
    return extracted, len(names)


def _read_entries(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the entries; raise an error at a damaged header, where tarfile would end silently."""
    yield from tar
    if tar.fileobj is not None:
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"bad header at byte {tar.offset}")


def _read_entry(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    content = b"" if file is None else file.read()
    if len(content) != member.size:
        raise tarfile.ReadError(f"{len(content)} of {member.size} bytes of {member.name}")
    return content


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> bool:
    """Write an image into the folder unless it is there with its full size; return whether it was written."""
    path = folder / member.name
    if is_there(path) and path.stat().st_size == member.size:
        return False
    content = _read_entry(tar, member)
    with using(path, "written"):
        path.write_bytes(content)
        if path.stat().st_size != member.size:
            raise OSError(errno.EIO, f"{path.stat().st_size} bytes arrived of {member.size}")
    return True


def _check_split(folder: Path, number_of_images: Counter[str]) -> None:
    _check_no_others(folder, number_of_images.keys())
    for wnid, number in number_of_images.items():
        _check_class(folder / wnid, number, delete=folder)


def _check_no_others(folder: Path, wnids: Set[str]) -> None:
    others = sorted(set(list_names(folder)) - wnids)
    if others:
        raise DataError(f"{folder} also holds {others[0]!r}, which is not in the tar: move it elsewhere")


def _check_class(folder: Path, number: int, delete: Path) -> None:
    there = len(list_names(folder)) if is_there(folder) else 0
    if there != number:
        raise DataError(f"{folder} has {there} files, not {number}: delete {delete}, and it is extracted again")


def _check_number(number: int, expected: int, what: str, where: object, official: str) -> None:
    if number != expected:
        raise DataError(f"{where} has {number:,} {what}, not {expected:,}: {_download_again(official)}")


def _check_new_file(where: object, member: tarfile.TarInfo, names: set[str], official: str) -> None:
    """Record the name of an entry, which must be new and a regular file."""
    if not member.isreg():
        raise _unexpected(where, member, "a regular file", official)
    if member.name in names:
        raise DataError(f"{where} has the entry {member.name!r} twice: {_download_again(official)}")
    names.add(member.name)


def _unexpected(where: object, member: tarfile.TarInfo, wanted: str, official: str) -> DataError:
    return DataError(f"{where} has the entry {member.name!r}, which is not {wanted}: {_download_again(official)}")


def _download_again(official: str) -> str:
    return f"download {official} again from image-net.org (its MD5 is {_MD5[official]})"


@contextmanager
def _reading(where: object, official: str) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, BadGzipFile) as error:
        raise DataError(f"{where} is damaged or cut off ({error}): {_download_again(official)}") from error
    except OSError as error:
        raise DataError(
            f"{where} cannot be read ({error.strerror or error}): make it readable, or {_download_again(official)}"
        ) from error
