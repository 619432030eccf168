"""Shared by the commands that prepare a dataset: folders that are complete once they have their name."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lamamba.errors import DataError, reading
from lamamba.files import TEMPORARY


@dataclass(frozen=True)
class SplitCounts:
    """The counts of a split: classes, images extracted now, and images that were there before."""

    num_classes: int
    num_extracted: int
    num_present: int

    def describe_images(self) -> str:
        present = f", {self.num_present:,} were there" if self.num_present else ""
        return f"{self.num_extracted:,} images extracted{present}"


class NewFile(NamedTuple):
    """A file to write: its name below the folder, its size in bytes if that is known, and a function that reads it."""

    name: str
    size: int | None
    read: Callable[[], bytes]


def fill_folder(final: Path, files: Iterable[NewFile], advance: Callable[[int], None]) -> tuple[int, int]:
    """Write files below a hidden folder, which is renamed to `final` once all are there.

    If `final` exists, only the number of files in its folders is checked. Files of the right size that an earlier call
    left in the hidden folder are kept.

    Returns:
        The number of files that were written, and of all files.

    Raises:
        DataError: a file cannot be written, or a folder holds more or fewer files.
    """
    with using(final, "looked at"):
        exists = final.exists()
    top = final if exists else final.with_name(TEMPORARY + final.name)
    written, numbers, names = 0, Counter[Path](), set[str]()
    for file in files:
        path = top / file.name
        numbers[path.parent] += 1
        names.add(file.name.partition("/")[0])
        if not exists:
            with using(path.parent, "made"):
                path.parent.mkdir(parents=True, exist_ok=True)
            written += _write(path, file)
        advance(1)
    for folder, number in numbers.items():
        there = len(list_names(folder))
        if there != number:
            raise DataError(f"{folder} has {there} files, not {number}: delete {top}, and it is extracted again")
    check_names(top, names)
    if not exists:
        with using(final, "made"):
            top.rename(final)
    return written, numbers.total()


def _write(path: Path, file: NewFile) -> bool:
    """Write a file unless it is there with its full size; return whether it was written."""
    if file.size is not None and path.exists() and path.stat().st_size == file.size:
        return False
    content = file.read()
    with using(path, "written"):
        path.write_bytes(content)
        arrived = path.stat().st_size
        if arrived != len(content):
            raise OSError(f"{arrived} bytes arrived of {len(content)}")
    return True


def check_names(folder: Path, allowed: Set[str]) -> None:
    """Raise DataError if a folder holds anything else than what the tar has; hidden names are ignored."""
    others = sorted(set(list_names(folder)) - allowed)
    if others:
        raise DataError(f"{folder} also holds {others[0]!r}, which is not in the tar: move it elsewhere")


def list_names(folder: Path) -> list[str]:
    """List the names in a folder that are not hidden; none if there is no such folder."""
    with using(folder, "listed"):
        return [name for name in os.listdir(folder) if not name.startswith(".")] if folder.exists() else []


def using(path: Path, verb: str) -> AbstractContextManager[None]:
    """Turn an error of the disk into a DataError that says what cannot be done with `path`, why, and what to do."""
    advice = "free some space, make its folder readable and writable, or set PYTHONUTF8=1 for a name that is not ASCII"
    return reading(f"{path} cannot be {verb}", f"{advice}; then run the command again to continue")
