"""Standard streams that never fail, and text that a terminal shows literally.

Commands must not depend on the encoding of a terminal, on which standard streams are open, or on whether anyone still
reads their output. And names of files and classes must not control the terminal.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

# Control characters, line separators and bidirectional overrides, which a terminal would interpret; and surrogates that
# cannot occur in file names (U+DC80 to U+DCFF represent bytes of a name that are not UTF-8).
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udc7f\udd00-\udfff]")
# Replacements for the symbols in our own output, for encodings that lack them.
_IN_ASCII = str.maketrans(dict(zip("·–—×±…▁▂▃▄▅▆▇█", ["-", "-", "-", "x", "+-", "...", *"_.:-=+*#"], strict=True)))


def visible(text: object) -> str:
    r"""Escape control characters and what cannot be encoded: `\n`, `\x1b`, or `\xff` for a byte of a file name."""
    escaped = _CONTROL.sub(_escape, str(text))
    # Depending on the locale, Python decodes file names with another encoding. Valid UTF-8 in them is text anyway.
    decoded = escaped.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return _CONTROL.sub(_escape, decoded)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


class StandardStream:
    """A standard stream on which writing never fails. Characters that its encoding lacks are replaced.

    `failure` is the last error, for example because the reader is gone.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                encoding = self.stream.encoding
                replaced = text.translate(_IN_ASCII).encode(encoding, "backslashreplace")
                self.stream.write(replaced.decode(encoding))
        except OSError as error:
            self.failure = error
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self.failure = error

    def settle(self) -> None:
        """Flush, and drop what cannot be written, so that Python does not fail on it at exit."""
        self.flush()
        if self.failure is None:
            return
        try:
            self.stream.flush()  # the disk may have space again
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            self.flush()


@contextmanager
def standard_streams() -> Iterator[StandardStream]:
    """Replace the standard streams by ones that never fail, and yield standard output."""
    _open_descriptors()
    if sys.stdin is None or sys.stdin.closed:
        sys.stdin = _open_nothing("r")
    before = sys.stdout, sys.stderr
    output, errors = unfailing("stdout"), unfailing("stderr")
    sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, errors)
    try:
        yield output
    finally:
        sys.stdout, sys.stderr = before
        output.settle()
        errors.settle()


def unfailing(name: str) -> StandardStream:
    """Return "stdout" or "stderr" as a stream that never fails."""
    stream = getattr(sys, name)
    if isinstance(stream, StandardStream):
        return stream
    # Programs without a console, such as services, have no streams.
    return StandardStream(_open_nothing("w") if stream is None or stream.closed else stream)


def _open_nothing(mode: str) -> TextIO:
    return cast(TextIO, open(os.devnull, mode, encoding="utf-8"))


def _open_descriptors() -> None:
    """Open the null device in place of closed standard streams.

    Otherwise the next file, such as a checkpoint, could get the descriptor of standard error, and a library's warnings
    would be written into that file.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number is this one
