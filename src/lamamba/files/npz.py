"""Read arrays from .npz files. The size in a header is checked against the file before memory is allocated."""

import math
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from lamamba.errors import reading

_AGAIN = "download or create it again"


@dataclass(frozen=True)
class OpenedArray:
    """An array whose values have not been read yet, with the shape and dtype of its header."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    is_fortran: bool
    """Whether the first index varies fastest."""
    file: IO[bytes]
    """The open file, positioned at the first value."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Read all values; raises DataError."""
        values = np.frombuffer(self.read_bytes(self.num_bytes), self.dtype)
        return values.reshape(self.shape, order="F" if self.is_fortran else "C")

    def read_bytes(self, number: int) -> bytes:
        """Read the next bytes of the values; raises DataError."""
        with reading(f"the array {self.name} of {self.path} is damaged", _AGAIN):
            content = self.file.read(number)
            if len(content) != number:
                raise EOFError(f"{len(content):,} of {number:,} bytes")
        return content


def list_arrays(path: Path) -> list[str]:
    """List the names of a file's arrays; raises DataError."""
    with reading(f"{path} cannot be read as a .npz file", _AGAIN), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


@contextmanager
def opened_array(path: Path, name: str) -> Iterator[OpenedArray]:
    """Open an array, to read it at once or in parts.

    Raises:
        DataError: there is no array with that name, its header is damaged, or its size does not match the header.
    """
    with ExitStack() as stack:
        with reading(f"{path} cannot be read as a .npz file", _AGAIN):
            archive = stack.enter_context(zipfile.ZipFile(path))
            file = stack.enter_context(archive.open(f"{name}.npy"))
            array = _read_header(path, name, archive.getinfo(f"{name}.npy"), file)
        yield array


def _read_header(path: Path, name: str, info: zipfile.ZipInfo, file: IO[bytes]) -> OpenedArray:
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read_header(file)
    array = OpenedArray(path, name, shape, dtype, is_fortran, file)
    if not all(type(side) is int and side >= 0 for side in shape):  # NumPy accepts True and negative numbers
        raise ValueError(f"{name} has the shape {shape}")
    if dtype.hasobject or not dtype.itemsize:
        raise ValueError(f"{name} holds {dtype}, not numbers")
    there = info.file_size - file.tell()
    if array.num_bytes != there:
        raise ValueError(f"{name} claims {array.num_bytes:,} bytes for {dtype} {shape}, but has {there:,}")
    # The archive's directory may be wrong too. Deflate, NumPy's compression, expands one byte to at most 1,032.
    most = info.compress_size * (1 if info.compress_type == zipfile.ZIP_STORED else 1032)
    if info.compress_size > path.stat().st_size or info.file_size > most:
        raise ValueError(f"{name} claims {array.num_bytes:,} bytes, more than the file can contain")
    return array
