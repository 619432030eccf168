"""Shared by the commands that prepare a dataset: folders that are complete once they have their name."""

import os
import shutil
from collections.abc import Callable, Iterable, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

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


def fill_folder(final: Path, files: Iterable[tuple[str, bytes]], advance: Callable[[int], None]) -> int:
    """Write files, by their names below the folder, to a hidden folder, which then gets its name; return their number.

    Raises:
        DataError: a file cannot be written.
    """
    hidden, number = final.with_name(TEMPORARY + final.name), 0
    shutil.rmtree(hidden, ignore_errors=True)  # of a call that was stopped
    for name, content in files:
        path = hidden / name
        with using(path, "written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        number += 1
        advance(1)
    with using(final, "made"):
        hidden.rename(final)
    return number


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
