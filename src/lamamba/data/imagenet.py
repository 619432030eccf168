"""The official ImageNet files (Russakovsky et al. 2015, arXiv 1409.0575) to class folders that `FolderSource` reads.

ILSVRC2012_img_train.tar: n01440764.tar: n01440764_18.JPEG -> train/n01440764/n01440764_18.JPEG
ILSVRC2012_img_val.tar: ILSVRC2012_val_00000001.JPEG       -> validation/n01751748/ILSVRC2012_val_00000001.JPEG
"""

import io
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from gzip import BadGzipFile
from importlib import import_module
from pathlib import Path
from typing import IO

import numpy as np
from rich.progress import MofNCompleteColumn

from lamamba.config import PrepareImagenetConfig
from lamamba.data.preparing import NewFile, SplitCounts, check_names, fill_folder
from lamamba.errors import ConfigError, DataError, reading
from lamamba.terminal.output import progress_bars, say

_DEVKIT_META = "ILSVRC2012_devkit_t12/data/meta.mat"
_DEVKIT_TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"


@dataclass(frozen=True)
class Official:
    """A file of image-net.org."""

    name: str
    md5: str

    @property
    def again(self) -> str:
        """What to do about a damaged copy."""
        return f"download {self.name} again from image-net.org (its MD5 is {self.md5})"

    def check_number(self, where: object, number: int, expected: int, what: str) -> None:
        """Raise DataError if a copy of this file has a wrong number of something."""
        if number != expected:
            raise DataError(f"{where} has {number:,} {what}, not {expected:,}: {self.again}")

    @contextmanager
    def open(self, where: object, mode: str = "r:", file: IO[bytes] | None = None) -> Iterator[tarfile.TarFile]:
        """Open a copy of this file, or a tar inside it, which is `file`; raises DataError if it is damaged."""
        try:
            with tarfile.open(str(where), mode, file) as tar:  # type: ignore[call-overload]
                yield tar
        except (tarfile.TarError, EOFError, zlib.error, BadGzipFile) as error:
            raise DataError(f"{where} is damaged or cut off ({error}): {self.again}") from error
        except OSError as error:
            raise DataError(
                f"{where} cannot be read ({error.strerror or error}): make it readable, or {self.again}"
            ) from error

    def list_entries(
        self, where: object, tar: tarfile.TarFile, fits: Callable[[str], object], wanted: str
    ) -> Iterator[tarfile.TarInfo]:
        """Yield the entries of a tar: regular files whose names fit, each once. Anything else is a DataError."""
        names = set[str]()
        for member in tar:
            fault = (
                f", which is not {wanted}"
                if not fits(member.name)
                else ", which is not a regular file"
                if not member.isreg()
                else " twice"
                if member.name in names
                else ""
            )
            if fault:
                raise DataError(f"{where} has the entry {member.name!r}{fault}: {self.again}")
            names.add(member.name)
            yield member
        if tar.fileobj is not None:  # at a damaged header, tarfile ends silently
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"bad header at byte {tar.offset}")


TRAIN = Official("ILSVRC2012_img_train.tar", "1d675b47d978889d74fa0da5fadfb00e")
VALIDATION = Official("ILSVRC2012_img_val.tar", "29b22e2961454d5413ddabcf34fc5622")
DEVKIT = Official("ILSVRC2012_devkit_t12.tar.gz", "fa75699e90414af021442c21a62c3abf")


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

    If a call was stopped or ran out of space, the same call continues it. Images are copied byte by byte, one at a
    time; their sizes and numbers are checked, not their MD5. A terminal shows a progress bar.

    Args:
        out: folder for the splits; created if missing.
        train: ILSVRC2012_img_train.tar.
        validation: ILSVRC2012_img_val.tar; needs devkit.
        devkit: ILSVRC2012_devkit_t12.tar.gz, which has the classes of the validation images, and is read with scipy.
            With it, the classes of train are checked too.
        expected: the size of the complete set.

    Returns:
        The counts of "validation" and "train", for the files that were given.

    Raises:
        ConfigError: neither train nor validation is given, or validation without devkit.
        DataError: a file is missing, damaged, cut off, or not the official one; `out` holds something else or cannot
            be written; or scipy is missing.
    """
    if train is None and validation is None:
        raise ConfigError(
            f"no ImageNet file is given: give train ({TRAIN.name}), validation ({VALIDATION.name}) or both"
        )
    if validation is not None and devkit is None:
        raise ConfigError(f"validation is given without devkit, which has its classes: give devkit ({DEVKIT.name}) too")
    for path, official in ((train, TRAIN), (validation, VALIDATION), (devkit, DEVKIT)):
        if path is not None and not os.path.isfile(path):  # check all files before hours of work
            raise DataError(f"{path} is missing or not a file: give the path of {official.name} from image-net.org")
    classes = {} if devkit is None else _read_devkit(devkit, expected)
    counts: dict[str, SplitCounts] = {}
    with progress_bars(MofNCompleteColumn(), "images ·") as bar:
        if validation is not None:
            advance = bar("validation", len(classes))
            counts["validation"] = _extract_validation(validation, out / "validation", classes, advance)
        if train is not None:
            advance = bar("train", expected.num_train)
            counts["train"] = _extract_train(train, out / "train", set(classes.values()), expected, advance)
    return counts


def _read_devkit(path: Path, expected: Expected) -> dict[str, str]:
    """Return the WNID of each validation image, by the name of its file."""
    with reading(f"reading {path} needs scipy", "run 'pip install scipy'"):
        loadmat = import_module("scipy.io").loadmat
    with DEVKIT.open(path, "r:gz") as tar:
        members = {member.name: member for member in tar if member.isreg()}
        for name in (_DEVKIT_META, _DEVKIT_TRUTH):
            if name not in members:
                raise DataError(f"{path} has no file {name}: {DEVKIT.again}")
        meta, truth = (_read_entry(tar, members[name]) for name in (_DEVKIT_META, _DEVKIT_TRUTH))
    with reading(f"{path}: {_DEVKIT_META} cannot be read", DEVKIT.again):
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        classes = [synset for synset in synsets if int(synset["num_children"]) == 0]  # the others are groups of classes
        wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in classes}
    unsafe = [wnid for wnid in wnids.values() if not re.fullmatch("n[0-9]{8}", wnid)]
    if unsafe:
        raise DataError(f"{path} names a class {unsafe[0]!r}, unlike n01440764: {DEVKIT.again}")
    DEVKIT.check_number(path, len(set(wnids.values())), expected.num_classes, "classes")
    try:
        of_images = [wnids[int(number)] for number in truth.split()]
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{path}: {_DEVKIT_TRUTH} has a line with the number of no class ({error}): {DEVKIT.again}"
        ) from error
    numbers = Counter(of_images)
    for wnid in sorted(wnids.values()):
        what = f"validation images of {wnid}"
        DEVKIT.check_number(path, numbers[wnid], expected.num_validation_per_class, what)
    return {f"ILSVRC2012_val_{number:08d}.JPEG": wnid for number, wnid in enumerate(of_images, start=1)}


def _extract_validation(
    path: Path, final: Path, classes: dict[str, str], advance: Callable[[int], None]
) -> SplitCounts:
    """Extract the validation tar to a folder; `classes` has the WNID of each image."""

    def list_files(tar: tarfile.TarFile) -> Iterator[NewFile]:
        number = 0
        for member in VALIDATION.list_entries(path, tar, classes.get, f"{min(classes)} to {max(classes)}"):
            number += 1
            yield NewFile(f"{classes[member.name]}/{member.name}", member.size, partial(_read_entry, tar, member))
        VALIDATION.check_number(path, number, len(classes), "images")

    with VALIDATION.open(path) as tar:
        written, number = fill_folder(final, list_files(tar), advance)
    return SplitCounts(len(set(classes.values())), written, number - written)


def _extract_train(
    path: Path, folder: Path, wnids: set[str], expected: Expected, advance: Callable[[int], None]
) -> SplitCounts:
    """Extract the training tar, which has one tar per class, to a folder; `wnids` are the expected classes if known."""
    extracted = total = 0
    with TRAIN.open(path) as tar:
        # This reads only headers, and so finds a truncated tar at once.
        tars = list(
            TRAIN.list_entries(path, tar, re.compile(r"n[0-9]{8}\.tar").fullmatch, "a name such as n01440764.tar")
        )
        members = {member.name.removesuffix(".tar"): member for member in tars}
        TRAIN.check_number(path, len(members), expected.num_classes, "classes")
        if wnids and (odd := sorted(members.keys() ^ wnids)):
            raise DataError(f"the class {odd[0]} is in only one of {path} and the devkit: take both from ILSVRC2012")
        check_names(folder, members.keys())
        for wnid, member in members.items():
            where, is_image = f"{path}: {member.name}", re.compile(rf"{wnid}_[0-9]+\.JPEG").fullmatch
            with TRAIN.open(where, file=tar.extractfile(member)) as inner:
                images = TRAIN.list_entries(where, inner, is_image, f"a name such as {wnid}_18.JPEG")
                files = (NewFile(image.name, image.size, partial(_read_entry, inner, image)) for image in images)
                written, number = fill_folder(folder / wnid, files, advance)
            extracted, total = extracted + written, total + number
    TRAIN.check_number(path, total, expected.num_train, "images")
    return SplitCounts(len(members), extracted, total - extracted)


def _read_entry(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    content = b"" if file is None else file.read()
    if len(content) != member.size:
        raise tarfile.ReadError(f"{len(content)} of {member.size} bytes of {member.name}")
    return content
