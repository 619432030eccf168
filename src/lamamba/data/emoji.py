"""The Noto emoji of the npm package emoji-datasource-google to class folders that `FolderSource` reads.

emoji.json: 1f600.png is of the category "Smileys & Emotion"
package/img/google/64/1f600.png -> out/Smileys & Emotion/1f600.png, on white

Google's images are under the Apache License 2.0, the package around them under MIT's.
"""

import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, cast

from rich.progress import MofNCompleteColumn

from lamamba.config import PrepareEmojiConfig
from lamamba.data.decoding import decode_image
from lamamba.data.preparing import NewFile, SplitCounts, check_names, fill_folder, list_names, using
from lamamba.errors import DataError, reading
from lamamba.files import TEMPORARY
from lamamba.terminal.output import progress_bars, say

PACKAGE = "emoji-datasource-google"
REGISTRY = "https://registry.npmjs.org"


@dataclass(frozen=True)
class Expected:
    """A version of the package: the SHA-512 that npm published for its tarball, its categories and images."""

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
    """The counts of `prepare_emoji`, also of each class."""

    images_of_class: dict[str, int]


def prepare(config: PrepareEmojiConfig) -> None:
    """Run `lamamba prepare emoji`: write the emoji, and print the counts; raises as `prepare_emoji` does."""
    counts = prepare_emoji(**vars(config))
    say(f"{config.out}: {counts.num_classes} classes, {counts.describe_images()}")
    say(", ".join(f"{name} {number:,}" for name, number in counts.images_of_class.items()))


def prepare_emoji(out: Path, *, source: Path | None = None, expected: Expected = NOTO) -> EmojiCounts:
    """Write the emoji to `out`, one folder per category: PNG files of 64x64 pixels in color, on white.

    If a call was stopped or ran out of space, the same call continues with the first incomplete category. A terminal
    shows a progress bar.

    Args:
        out: folder for the categories; created if missing.
        source: the package's tarball, as `npm pack emoji-datasource-google` downloads it. By default it is downloaded
            (74 MB) from the registry that the environment variable NPM_CONFIG_REGISTRY or npm names, or from npm's own,
            and deleted at the end.
        expected: the version of the package.

    Raises:
        DataError: the tarball is missing, is not this version's, or cannot be downloaded; or `out` holds something else
            or cannot be written.
    """
    by_hand = f"'npm pack {PACKAGE}@{expected.version}'"
    with using(out, "made"):
        out.mkdir(parents=True, exist_ok=True)
    numbers = {name: len(list_names(out / name)) for name in sorted(list_names(out)) if (out / name).is_dir()}
    if source is None and (len(numbers), sum(numbers.values())) == (expected.num_classes, expected.num_images):
        return EmojiCounts(expected.num_classes, 0, expected.num_images, numbers)
    tarball = source or out / f"{TEMPORARY}{PACKAGE}-{expected.version}.tgz"
    with progress_bars(MofNCompleteColumn(), "images ·") as bar:
        if source is None and not (tarball.exists() and _integrity(tarball) == expected.integrity):
            _download(tarball, expected, f"try again, or run {by_hand} elsewhere and give source (--source)")
        if (found := _integrity(tarball)) != expected.integrity:
            raise DataError(
                f"{tarball} is not the tarball of {PACKAGE} {expected.version}, whose integrity is "
                f"{expected.integrity[:20]}... and not {found[:20]}...: download it with {by_hand}"
            )
        counts = _write(out, tarball, bar("emoji", expected.num_images))
    if source is None:
        with using(tarball, "deleted"):
            tarball.unlink()
    return counts


def _download(tarball: Path, expected: Expected, advice: str) -> None:
    where = f"{_registry()}/{PACKAGE}/{expected.version}"
    with reading(f"{where} could not be downloaded to {tarball}", advice):
        with urllib.request.urlopen(where, timeout=60) as answer:
            address = json.load(answer)["dist"]["tarball"]
        with urllib.request.urlopen(address, timeout=60) as answer, tarball.open("wb") as file:
            shutil.copyfileobj(answer, file)


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
    with using(path, "read"), path.open("rb") as file:
        return f"sha512-{base64.b64encode(hashlib.file_digest(file, 'sha512').digest()).decode()}"


def _write(out: Path, tarball: Path, advance: Callable[[int], None]) -> EmojiCounts:
    """Write the images of a tarball, whose content needs no checks because its checksum was right."""
    with tarfile.open(tarball, "r:gz") as tar:
        # In the order of the tar: a compressed file cannot be read at random.
        kept = {"package/emoji.json", "package/img/google/64"}
        content = {
            member.name: cast(IO[bytes], tar.extractfile(member)).read()
            for member in tar
            if member.isreg() and {member.name, member.name.rpartition("/")[0]} & kept
        }
    categories: dict[str, list[str]] = {}
    for emoji in json.loads(content["package/emoji.json"]):
        for picture in (emoji, *emoji.get("skin_variations", {}).values()):
            if picture["has_img_google"]:
                categories.setdefault(emoji["category"], []).append(picture["image"])
    check_names(out, categories.keys())
    extracted = 0
    for category in sorted(categories):
        images = {name: content[f"package/img/google/64/{name}"] for name in sorted(categories[category])}
        files = (NewFile(name, None, partial(_on_white, image)) for name, image in images.items())
        extracted += fill_folder(out / category, files, advance)[0]
    numbers = {category: len(categories[category]) for category in sorted(categories)}
    return EmojiCounts(len(numbers), extracted, sum(numbers.values()) - extracted, numbers)


def _on_white(content: bytes) -> bytes:
    """Convert an image to a color PNG without transparency."""
    file = io.BytesIO()
    decode_image(io.BytesIO(content), 3).save(file, "PNG", optimize=True)
    return file.getvalue()
