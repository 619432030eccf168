"""Shared by the commands that prepare a dataset: counts, and errors of the disk."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lamamba.errors import DataError


@dataclass(frozen=True)
class SplitCounts:
    """The counts of a split: classes (0 without classes), images extracted now, and images that were there before."""

    num_classes: int
    num_extracted: int
    num_present: int

    def describe_images(self) -> str:
        """Describe in words how many images were extracted, and how many were there before."""
        present = f", {self.num_present:,} were there" if self.num_present else ""
        return f"{self.num_extracted:,} images extracted{present}"


def make_folder(folder: Path) -> None:
    """Create a folder and its parents if they are missing."""
    with using(folder, "made"):
        folder.mkdir(parents=True, exist_ok=True)


def is_there(path: Path) -> bool:
    """Whether a file or folder exists."""
    with using(path, "looked at"):
        return path.exists()


def rename(temporary: Path, final: Path) -> None:
    """Give a complete file or folder its final name."""
    with using(final, "made"):
        temporary.rename(final)


def list_names(folder: Path) -> list[str]:
    """List the names in a folder that are not hidden."""
    with using(folder, "listed"):
        return [name for name in os.listdir(folder) if not name.startswith(".")]


@contextmanager
def using(path: Path, verb: str) -> Iterator[None]:
    """Turn an error of the disk into a DataError that says what cannot be done with `path`, why, and what to do."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path} cannot be {verb}: file names are in {error.encoding} here, which lacks a character of it: set "
            "LC_ALL=C.UTF-8 or PYTHONUTF8=1"
        ) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        mend = "free some space" if full else "make its folder readable and writable, or give another"
        raise DataError(
            f"{path} cannot be {verb} ({error.strerror or error}): {mend}, then run the command again to continue"
        ) from error
