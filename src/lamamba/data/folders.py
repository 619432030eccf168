"""Finds the images in a folder: reads each real folder once, and counts everything that is left out."""

import os
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lamamba.data.decoding import IMAGE_SUFFIXES
from lamamba.errors import DataError

_MOST_NAMED = 5  # suffixes and links named in a message; of the others, only the number


@dataclass
class Found:
    """The contents of a folder, at any depth.

    Attributes:
        images: paths of files whose suffix is an image's, sorted.
        others: paths of files with other suffixes, and of what is no file.
        dangling: paths of links that lead nowhere.
        num_hidden: files and folders whose names begin with a dot, which are not read.
        num_repeated: links to folders that are read already.
    """

    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    dangling: list[str] = field(default_factory=list)
    num_hidden: int = 0
    num_repeated: int = 0

    def add(self, other: "Found") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def left_out(self) -> str:
        """Describe in words everything that is not an image; empty if there is nothing."""
        suffixes = Counter(Path(path).suffix.lower() or "without suffix" for path in self.others)
        kinds = [f"{number:,} {suffix}" for suffix, number in suffixes.most_common(_MOST_NAMED)]
        rest = sum(suffixes.values()) - sum(number for _, number in suffixes.most_common(_MOST_NAMED))
        more = [f"{rest:,} of {len(suffixes) - _MOST_NAMED:,} more kinds"] if rest else []
        dangling = ", ".join(self.dangling[:_MOST_NAMED]) + ", ..." * (len(self.dangling) > _MOST_NAMED)
        more += [f"{len(self.dangling):,} dangling links ({dangling})"] if self.dangling else []
        more += [f"{self.num_hidden:,} hidden"] if self.num_hidden else []
        more += [f"{self.num_repeated:,} links to folders that are read already"] if self.num_repeated else []
        return ", ".join([*kinds, *more]).encode(errors="backslashreplace").decode()


class ClassFolders(NamedTuple):
    """The images of a training set: class names, the path and label of each image, and a description of other files."""

    class_names: tuple[str, ...]
    paths: list[str]
    labels: list[int]
    left_out: str


def list_images_below(folder: Path) -> Found:
    """Find the image files in a folder at any depth; raises DataError if a folder is unreadable."""
    return _walk(str(folder), os.path.realpath(folder))


def list_classes(folder: Path) -> ClassFolders:
    """Find a training set: one subfolder a class, in the order of their names; or images directly inside.

    Raises:
        DataError: the folder is missing, empty, mixes images with class folders, has one class, a class twice, or one
            without images.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is {'a file' if folder.exists() else 'missing'}: give an existing folder of images")
    here = Found()
    classes = [entry.path for entry in _read_folder(str(folder), here)]
    if here.images and classes:
        raise DataError(
            f"{folder} has both images ({Path(here.images[0]).name}) and class folders ({Path(classes[0]).name}): move "
            "the images into class folders, or all of them to the top for training without classes"
        )
    if here.images:
        return ClassFolders((), here.images, [0] * len(here.images), here.left_out)
    if here.dangling:
        raise DataError(
            f"{here.dangling[0]} is a link that leads nowhere: restore the class folder that it leads to, or delete it"
        )
    if not classes:
        raise DataError(no_images(folder, here))
    if len(classes) == 1:
        name = Path(classes[0]).name
        raise DataError(
            f"{folder} has a single class folder, {name}: give {classes[0]} for training without classes, or add a "
            "second class"
        )
    _check_distinct(str(folder), classes)
    found = [_walk(path, os.path.realpath(folder), os.path.islink(path)) for path in classes]
    for path, below in zip(classes, found, strict=True):
        if not below.images:
            which = f" ({below.left_out})" if below.left_out else ""
            raise DataError(f"the class folder {path} has no images{which}: add some or remove the folder")
        here.add(below)
    labels = [label for label, below in enumerate(found) for _ in below.images]
    paths = [path for below in found for path in below.images]
    # Escape bytes that are not UTF-8: class names are written to text files that other programs read.
    names = tuple(os.fsencode(Path(path).name).decode(errors="backslashreplace") for path in classes)
    return ClassFolders(names, paths, labels, here.left_out)


def no_images(folder: Path, found: Found) -> str:
    """Write the error for a folder without images: what it has, and what to do."""
    has = f"; it has {found.left_out}" if found.left_out else ""
    return f"{folder} has no images: put files in it that end in .png, .jpg, .webp or another suffix of Pillow's{has}"


def _check_distinct(root: str, classes: Sequence[str]) -> None:
    """Refuse two class folders that are the same real folder, because its images would have two labels."""
    names = {os.path.realpath(root): root}
    for path in classes:
        other = names.setdefault(os.path.realpath(path), path)
        if other != path:
            raise DataError(f"the class folder {path} is the same folder as {other}: remove one of them")


def _walk(root: str, top: str, linked: bool = False) -> Found:
    """Find the contents of a folder, or of a link to one, in the set whose real path is `top`.

    Each real folder is read once. A link into the set adds nothing, because its images are read where they really lie,
    with the label of their own class folder. A folder elsewhere belongs to each class that links to it.
    """
    found, known, waiting = Found(), set[str](), deque([(root, linked)])
    while waiting:
        path, linked = waiting.popleft()
        real = os.path.realpath(path)
        if real in known or (linked and _is_read_in(real, top)):
            found.num_repeated += 1
            continue
        known.add(real)
        waiting += [(entry.path, linked or entry.is_symlink()) for entry in _read_folder(path, found)]
    found.images.sort()
    return found


def _is_read_in(real: str, top: str) -> bool:
    """Return whether a real folder is the set or in it, and is not hidden."""
    below = os.path.relpath(real, top)
    return below == "." or not any(part.startswith(".") for part in below.split(os.sep))


def _read_folder(folder: str, found: Found) -> list[os.DirEntry[str]]:
    """Read one folder; return its subfolders and its links to folders, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be listed ({error.strerror or error}): make it readable") from error
    folders = []
    for entry in listed:
        if entry.name.startswith("."):
            found.num_hidden += 1
            continue
        if _is(entry.is_dir):
            folders.append(entry)
            continue
        is_file = _is(entry.is_file)
        is_dangling = not is_file and entry.is_symlink() and not os.path.exists(entry.path)
        if entry.name.lower().endswith(IMAGE_SUFFIXES) and (is_file or is_dangling):
            found.images.append(entry.path)  # a dangling link is reported as an image that cannot be read
        else:
            (found.dangling if is_dangling else found.others).append(entry.path)
    return folders


def _is(kind: Callable[[], bool]) -> bool:
    """Check whether an entry is a folder or a file; a circular or unreachable link is neither."""
    try:
        return kind()
    except OSError:
        return False
