"""Atomic writes and checksums of files."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lamamba.errors import CheckpointError, first_line

# Prefix of files that are not complete yet. They are hidden, and nothing reads them.
TEMPORARY = ".incomplete-"
_UMASK = os.umask(0o022)  # reading the umask requires setting it
os.umask(_UMASK)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, then flush it to disk and rename it to `path`.

    Raises:
        CheckpointError: the file cannot be written. An existing file stays unchanged.
    """
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        permit(temporary)
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} could not be written ({first_line(error)}): free some space, or choose another place"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    r"""Write text as UTF-8, whatever the locale. A byte of a name that is not UTF-8 becomes `\udcff`, as in JSON."""
    path.write_bytes(text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically; raises CheckpointError."""
    with atomic_write(path) as temporary:
        write_text(temporary, json.dumps(content, indent=2) + "\n")


def utf8_path(path: Path) -> Path:
    """Return a UTF-8 path to a file or folder, for libraries that accept no other paths.

    If the path itself is not UTF-8, this is a symbolic link, which is removed when the process ends.
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
    """Give files the permissions of any new file, if the file system has permissions.

    safetensors makes files that only the owner can read.
    """
    for path in paths:
        with suppress(OSError):
            path.chmod(0o666 & ~_UMASK)


def flush(path: Path) -> None:
    """Flush a file to disk. For a folder, flush its list of files if the system supports that.

    Raises:
        OSError: a file could not be written. For a folder, errors are ignored: network file systems refuse to sync
            folders, Windows cannot open them, and the files inside are written either way.
    """
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def checksum(*paths: Path) -> str:
    """Compute the SHA-256 of the concatenated contents of files."""
    together = sha256()
    for path in paths:
        with path.open("rb") as file:
            file_digest(file, lambda: together)
    return together.hexdigest()
