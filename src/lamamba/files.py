"""Files that are there whole or not at all, and their checksums."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

# How the name of what is not whole yet begins; it is hidden, and nothing reads it.
TEMPORARY = ".incomplete-"
_UMASK = os.umask(0o022)  # it can only be read by being set
os.umask(_UMASK)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, which is flushed to disk and takes its name once all is written.

    Raises:
        OSError: it cannot be written; a file that was there before is as it was.
    """
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        yield temporary
        permit(temporary)
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    r"""Write UTF-8, whatever the locale says; a byte of a file name that is not UTF-8 becomes `\udcff`, as in JSON."""
    path.write_bytes(text.encode("utf-8", "backslashreplace"))


def utf8_path(path: Path) -> Path:
    """Name a file or folder in UTF-8, for libraries that take no other path: by a link, where its own path is not.

    Links are removed when the process ends.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        link = Path(_links().name) / sha256(os.fsencode(path.absolute())).hexdigest()
        with suppress(FileExistsError):
            link.symlink_to(path.absolute())
        return link
    return path


@cache
def _links() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="lamamba-")


def permit(*paths: Path) -> None:
    """Let others read files as they may read any new one, where the file system knows of that.

    safetensors writes for the owner alone.
    """
    for path in paths:
        with suppress(OSError):
            path.chmod(0o666 & ~_UMASK)


def flush(path: Path) -> None:
    """Wait until a file is on the disk; for a folder, until its list of files is, where the system can do that.

    Raises:
        OSError: a file could not be written. A folder raises nothing: network file systems refuse to sync one, Windows
            cannot even open one, and the files in it are written either way.
    """
    if path.is_dir():
        with suppress(OSError):
            _sync(path)
    else:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(*paths: Path) -> str:
    """Compute the SHA-256 of files, one after the other."""
    together = sha256()
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                together.update(piece)
    return together.hexdigest()
