"""The Noto emoji of the npm package emoji-datasource-google to class folders that `FolderSource` reads.

emoji.json: 1f600.png is of the category "Smileys & Emotion"
package/img/google/64/1f600.png -> out/Smileys & Emotion/1f600.png, on white

Google's images are under the Apache License 2.0, the package around them under MIT's. What has its final name is whole;
what is not yet whole is hidden, `.incomplete-*`.
"""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import textwrap
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.progress import MofNCompleteColumn

from lamamba.config import PrepareEmojiConfig
from lamamba.data.decoding import decode_image
from lamamba.data.preparing import SplitCounts, is_there, list_names, make_folder, rename, using
from lamamba.errors import DataError
from lamamba.files import TEMPORARY
from lamamba.output import progress_bars, say

PACKAGE = "emoji-datasource-google"
REGISTRY = "https://registry.npmjs.org"
SIZE = 64

_LIST = "emoji.json"
_IMAGES = f"img/google/{SIZE}"
_IMAGE_NAME = re.compile(r"[0-9a-f-]+\.png")
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Expected:
    """The complete package: its version, the SHA-512 that npm published for its tarball, its categories and images."""

    version: str
    integrity: str
    num_classes: int
    num_images: int


NOTO = Expected(
    version="16.0.0",
    integrity="sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    num_classes=10,
    num_images=3786,
)


@dataclass(frozen=True)
class EmojiCounts(SplitCounts):
    """The counts of `prepare_emoji`.

    Attributes:
        images_of_class: how many images each class has.
    """

    images_of_class: dict[str, int]


def prepare(config: PrepareEmojiConfig) -> None:
    """Run `lamamba prepare emoji`: write the emoji, and print the counts; raises as `prepare_emoji` does."""
    counts = prepare_emoji(**vars(config))
    say(f"{config.out}: {counts.num_classes} classes, {counts.describe_images()}")
    say(", ".join(f"{name} {number:,}" for name, number in counts.images_of_class.items()))


def prepare_emoji(out: Path, *, source: Path | None = None, expected: Expected = NOTO) -> EmojiCounts:
    """Write the emoji to `out`, one folder per category: PNG files of 64x64 pixels in color, on white.

    A call that was stopped, killed or ran out of space is repeated as it was, and goes on with the first category that
    is not whole. A progress bar is shown in a terminal.

    Args:
        out: folder for the categories; made where missing.
        source: the package's tarball, as `npm pack emoji-datasource-google` fetches it, or the folder it unpacks to.
            By default the tarball is fetched (74 MB) from the registry that the environment variable
            NPM_CONFIG_REGISTRY or npm names, else from npm's own, and deleted when all is done.
        expected: what a whole package is.

    Raises:
        DataError: the package is missing, damaged, another version or cannot be fetched; or `out` holds something else
            or cannot be written.
    """
    make_folder(out)
    if source is None and (numbers := _whole(out, expected)):
        return EmojiCounts(len(numbers), 0, expected.num_images, numbers)
    with progress_bars(MofNCompleteColumn(), "images ·") as bar:
        fetched = None
        if source is None:
            fetched = source = _fetch(out / f"{TEMPORARY}{PACKAGE}-{expected.version}.tgz", expected)
        elif source.is_file():
            _check_integrity(source, expected, f"fetch it with 'npm pack {PACKAGE}@{expected.version}'")
        files = _read_folder(source) if source.is_dir() else _read_tarball(source)
        names = _list_images(source, files, expected)
        counts = _write(out, files, names, source, bar("emoji", expected.num_images))
    if fetched is not None:
        with using(fetched, "deleted"):
            fetched.unlink()
    return counts


def _whole(out: Path, expected: Expected) -> dict[str, int]:
    """Return the number of images per category if all are there, so that nothing needs to be downloaded."""
    numbers = {name: len(list_names(out / name)) for name in sorted(list_names(out)) if (out / name).is_dir()}
    whole = (len(numbers), sum(numbers.values())) == (expected.num_classes, expected.num_images)
    return numbers if whole else {}


def _fetch(tarball: Path, expected: Expected) -> Path:
    """Download the tarball, unless the complete file is there."""
    by_hand = (
        f"try again, or fetch it elsewhere with 'npm pack {PACKAGE}@{expected.version}' and give source (--source)"
    )
    if is_there(tarball) and _integrity(tarball) == expected.integrity:
        return tarball
    registry = _registry()
    where = f"{registry}/{PACKAGE}/{expected.version}"
    try:
        with urllib.request.urlopen(where, timeout=60) as answer:
            address = json.load(answer)["dist"]["tarball"]
        with urllib.request.urlopen(address, timeout=60) as answer, tarball.open("wb") as file:
            shutil.copyfileobj(answer, file, _PIECE_BYTES)
    except (OSError, ValueError, KeyError, TypeError) as error:  # no network is an OSError, no JSON a ValueError
        reason = textwrap.shorten(str(getattr(error, "reason", error)), 300)
        raise DataError(f"{where} could not be fetched to {tarball} ({reason}): {by_hand}") from error
    _check_integrity(tarball, expected, by_hand)
    return tarball


def _registry() -> str:
    named = os.environ.get("NPM_CONFIG_REGISTRY")
    npm = shutil.which("npm")
    if not named and npm is not None:
        command = [npm, "config", "get", "registry"]
        asked = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=60)
        named = asked.stdout.strip()
    return (named if named and named.startswith("http") else REGISTRY).rstrip("/")


def _integrity(path: Path) -> str:
    """Compute the SHA-512 of a tarball in base 64, which npm publishes."""
    digest = hashlib.sha512()
    with using(path, "read"), path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return f"sha512-{base64.b64encode(digest.digest()).decode()}"


def _check_integrity(path: Path, expected: Expected, mend: str) -> None:
    found = _integrity(path)
    if found != expected.integrity:
        raise DataError(
            f"{path} is not the tarball of {PACKAGE} {expected.version}, whose integrity is "
            f"{expected.integrity[:20]}... and not {found[:20]}...: {mend}"
        )


def _read_tarball(path: Path) -> dict[str, bytes]:
    """Return the list of emoji and their images; files are named as in the package."""
    files = {}
    with _reading(path), tarfile.open(path, "r:gz") as tar:
        for member in tar:
            name = member.name.partition("/")[2]  # all files of npm's tarballs are in the folder package
            if member.isreg() and _is_wanted(name):
                files[name] = cast(Any, tar.extractfile(member)).read()
    return files


def _read_folder(folder: Path) -> dict[str, bytes]:
    within = folder / "package" if is_there(folder / "package" / _LIST) else folder
    for path in (within / _LIST, within / _IMAGES):
        if not is_there(path):
            raise DataError(f"{path} is missing: give the tarball of {PACKAGE}, or the folder it unpacks to")
    names = [_LIST, *(f"{_IMAGES}/{name}" for name in sorted(list_names(within / _IMAGES)))]
    with _reading(folder):
        return {name: (within / name).read_bytes() for name in names if _is_wanted(name)}


def _is_wanted(name: str) -> bool:
    folder, _, last = name.rpartition("/")
    return name == _LIST or (folder == _IMAGES and _IMAGE_NAME.fullmatch(last) is not None)


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(
            f"{source} cannot be read as {PACKAGE} ({error}): give its tarball, or the folder it unpacks to"
        ) from error


def _list_images(source: Path, files: Mapping[str, bytes], expected: Expected) -> dict[str, list[str]]:
    """Return the images of each category, and check that none is missing."""
    mend = f"take {PACKAGE} {expected.version}"
    categories: dict[str, list[str]] = {}
    try:
        for emoji in json.loads(files[_LIST]):
            for picture in (emoji, *emoji.get("skin_variations", {}).values()):
                if picture["has_img_google"]:
                    categories.setdefault(emoji["category"], []).append(picture["image"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{source}: {_LIST} is not the list of emoji ({type(error).__name__}: {error}): {mend}"
        ) from error
    unfit = [name for name in categories if not re.fullmatch(r"\w[\w &-]*", name)]
    if unfit:
        raise DataError(f"{source} has a category {unfit[0]!r}, which cannot be a folder's name: {mend}")
    listed = Counter(f"{_IMAGES}/{name}" for names in categories.values() for name in names)
    odd = sorted(listed.keys() ^ (files.keys() - {_LIST})) or [name for name, number in listed.items() if number > 1]
    if odd:
        raise DataError(f"{source}: {odd[0]} is not once in {_LIST} and once among the images: {mend}")
    numbers = {"categories": (len(categories), expected.num_classes), "images": (len(listed), expected.num_images)}
    for what, (found, wanted) in numbers.items():
        if found != wanted:
            raise DataError(f"{source} has {found:,} {what}, not {wanted:,}: {mend}")
    return {name: sorted(categories[name]) for name in sorted(categories)}


def _write(
    out: Path,
    files: Mapping[str, bytes],
    categories: Mapping[str, list[str]],
    source: Path,
    advance: Callable[[int], None],
) -> EmojiCounts:
    others = sorted(set(list_names(out)) - categories.keys())
    if others:
        raise DataError(
            f"{out} also holds {others[0]!r}, which is no category of emoji: give out (--out) another folder"
        )
    extracted = 0
    for category, names in categories.items():
        final, temporary = out / category, out / f"{TEMPORARY}{category}"
        if is_there(final):
            if sorted(list_names(final)) != names:
                raise DataError(
                    f"{final} does not hold the {len(names)} images of its category: delete it, and run again"
                )
            advance(len(names))
            continue
        make_folder(temporary)
        for name in names:
            content = _on_white(files[f"{_IMAGES}/{name}"], f"{source}: {_IMAGES}/{name}")
            with using(temporary / name, "written"):
                (temporary / name).write_bytes(content)
            advance(1)
        rename(temporary, final)
        extracted += len(names)
    numbers = {category: len(names) for category, names in categories.items()}
    return EmojiCounts(len(categories), extracted, sum(numbers.values()) - extracted, numbers)


def _on_white(content: bytes, where: str) -> bytes:
    """Convert an image to a color PNG without transparency."""
    try:
        image = decode_image(io.BytesIO(content), 3)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly everything on damaged files
        raise DataError(
            f"{where} cannot be decoded ({type(error).__name__}): take another copy of {PACKAGE}"
        ) from error
    if image.size != (SIZE, SIZE):
        raise DataError(f"{where} is {image.width}x{image.height}, not {SIZE}x{SIZE}: take another copy of {PACKAGE}")
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()
