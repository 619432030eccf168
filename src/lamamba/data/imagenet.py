"""The official ImageNet files (Russakovsky et al. 2015, arXiv 1409.0575) to class folders that `FolderSource` reads.

ILSVRC2012_img_train.tar: n01440764.tar: n01440764_18.JPEG -> train/n01440764/n01440764_18.JPEG
ILSVRC2012_img_val.tar: ILSVRC2012_val_00000001.JPEG       -> validation/n01751748/ILSVRC2012_val_00000001.JPEG
"""

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import IO, cast

from rich.progress import MofNCompleteColumn

from lamamba.config import PrepareImagenetConfig
from lamamba.data.preparing import NewFile, SplitCounts, check_names, fill_folder
from lamamba.errors import ConfigError, DataError, reading
from lamamba.terminal.output import progress_bars, say

TRAIN, VALIDATION, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"


@dataclass(frozen=True)
class Official:
    """The MD5 of each file, as image-net.org publishes it, and the number of training images."""

    md5: dict[str, str]
    num_train: int


ILSVRC2012 = Official(
    md5={
        TRAIN: "1d675b47d978889d74fa0da5fadfb00e",
        VALIDATION: "29b22e2961454d5413ddabcf34fc5622",
        DEVKIT: "fa75699e90414af021442c21a62c3abf",
    },
    num_train=1_281_167,
)


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
    official: Official = ILSVRC2012,
) -> dict[str, SplitCounts]:
    """Extract the official ImageNet files to `out`/train and `out`/validation, one folder per class, named by its WNID.

    First the MD5 of each file is checked, which takes some minutes for the training images. If a call was stopped or
    ran out of space, the same call continues it. Images are copied byte by byte, one at a time. A terminal shows a
    progress bar.

    Args:
        out: folder for the splits; created if missing.
        train: ILSVRC2012_img_train.tar.
        validation: ILSVRC2012_img_val.tar; needs devkit.
        devkit: ILSVRC2012_devkit_t12.tar.gz, which has the classes of the validation images, and is read with scipy.
        official: the checksums of the files.

    Returns:
        The counts of "validation" and "train", for the files that were given.

    Raises:
        ConfigError: neither train nor validation is given, or validation without devkit.
        DataError: a file is missing, damaged, or not the official one; `out` holds something else or cannot be written;
            or scipy is missing.
    """
    if train is None and validation is None:
        raise ConfigError(f"no ImageNet file is given: give train ({TRAIN}), validation ({VALIDATION}) or both")
    if validation is not None and devkit is None:
        raise ConfigError(f"validation is given without devkit, which has its classes: give devkit ({DEVKIT}) too")
    files = {name: path for name, path in {DEVKIT: devkit, VALIDATION: validation, TRAIN: train}.items() if path}
    for name, path in files.items():  # check all files before hours of work
        if not path.is_file():
            raise DataError(f"{path} is missing or not a file: give the path of {name} from image-net.org")
    counts: dict[str, SplitCounts] = {}
    with progress_bars("{task.percentage:3.0f} %") as bar:
        for name, path in files.items():
            _check_md5(path, name, official.md5[name], bar(f"check {name}", path.stat().st_size))
    with progress_bars(MofNCompleteColumn(), "images ·") as bar:
        if validation is not None and devkit is not None:
            classes = _read_devkit(devkit)
            advance = bar("validation", len(classes))
            counts["validation"] = _extract_validation(validation, out / "validation", classes, advance)
        if train is not None:
            counts["train"] = _extract_train(train, out / "train", bar("train", official.num_train))
    return counts


def _check_md5(path: Path, name: str, wanted: str, advance: Callable[[int], None]) -> None:
    """Raise DataError unless a file is the official one; then its content needs no checks."""
    digest = hashlib.md5(usedforsecurity=False)
    with reading(f"{path} cannot be read", "make it readable"), path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
            advance(len(piece))
    if digest.hexdigest() != wanted:
        raise DataError(
            f"{path} is damaged, cut off, or another file: download {name} again from image-net.org (its MD5 is "
            f"{wanted}, and not {digest.hexdigest()})"
        )


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    with reading(f"{path} cannot be read", "make it readable"), tarfile.open(path) as tar:
        yield tar


def _read(tar: tarfile.TarFile, member: str | tarfile.TarInfo) -> bytes:
    return cast(IO[bytes], tar.extractfile(member)).read()


def _read_devkit(path: Path) -> dict[str, str]:
    """Return the WNID of each validation image, by the name of its file."""
    with reading(f"reading {path} needs scipy", "run 'pip install scipy'"):
        loadmat = import_module("scipy.io").loadmat
    with _opened(path) as tar:
        meta = _read(tar, "ILSVRC2012_devkit_t12/data/meta.mat")
        truth = _read(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt")
    wnids = {
        int(synset["ILSVRC2012_ID"]): str(synset["WNID"])
        for synset in loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        if int(synset["num_children"]) == 0  # the others are groups of classes
    }
    labels = map(int, truth.split())
    return {f"ILSVRC2012_val_{number:08d}.JPEG": wnids[label] for number, label in enumerate(labels, start=1)}


def _extract_validation(
    path: Path, final: Path, classes: dict[str, str], advance: Callable[[int], None]
) -> SplitCounts:
    """Extract the validation tar to a folder; `classes` has the WNID of each image."""
    with _opened(path) as tar:
        files = (
            NewFile(f"{classes[member.name]}/{member.name}", member.size, partial(_read, tar, member)) for member in tar
        )
        written, number = fill_folder(final, files, advance)
    return SplitCounts(len(set(classes.values())), written, number - written)


def _extract_train(path: Path, folder: Path, advance: Callable[[int], None]) -> SplitCounts:
    """Extract the training tar, which has one tar per class, to a folder."""
    extracted = total = 0
    with _opened(path) as tar:
        members = {member.name.removesuffix(".tar"): member for member in tar}
        check_names(folder, members.keys())
        for wnid, member in members.items():
            with tarfile.open(fileobj=tar.extractfile(member)) as inner:
                files = (NewFile(image.name, image.size, partial(_read, inner, image)) for image in inner)
                written, number = fill_folder(folder / wnid, files, advance)
            extracted, total = extracted + written, total + number
    return SplitCounts(len(members), extracted, total - extracted)
