"""Standard streams that cannot fail, and text that a terminal shows as it is.

Commands must not depend on a terminal's encoding, on which standard streams are open, or on whether anyone still reads
what they print; and names of files and classes must not command the terminal.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

# Control characters, line separators and bidirectional overrides, which a terminal obeys; and surrogates that no file
# name holds (U+DC80 to U+DCFF stand for a name's bytes that are not UTF-8).
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udc7f\udd00-\udfff]")
# The symbols of our own texts, for terminals that lack them.
_IN_ASCII = str.maketrans(dict(zip("·–—×±…▁▂▃▄▅▆▇█", ["-", "-", "-", "x", "+-", "...", *"_.:-=+*#"], strict=True)))


def visible(text: object) -> str:
    r"""Escape what a terminal would obey and what cannot be encoded: `\n`, `\x1b`, or `\xff` for a byte of a name."""
    escaped = _CONTROL.sub(_escape, str(text))
    # Python reads names as another encoding where the locale says so: valid UTF-8 in them is text all the same.
    decoded = escaped.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return _CONTROL.sub(_escape, decoded)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


class StandardStream:
    """A standard stream on which writing never fails; `failure` is the last error, of a reader that is gone, say.

    Args:
        stream: what is written to; characters that its encoding lacks are replaced.
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
        """Flush; what cannot be written is dropped, so that Python does not fail on it when it ends."""
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
    """Make standard streams that cannot fail out of whatever this process was started with; gives standard output."""
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
    """Give "stdout" or "stderr" as a stream that cannot fail."""
    stream = getattr(sys, name)
    if isinstance(stream, StandardStream):
        return stream
    # Programs without a console, such as services, have no streams.
    return StandardStream(_open_nothing("w") if stream is None or stream.closed else stream)


def _open_nothing(mode: str) -> TextIO:
    return cast(TextIO, open(os.devnull, mode, encoding="utf-8"))


def _open_descriptors() -> None:
    """Open the null device in place of standard streams that are closed.

    Otherwise the next file that is opened, such as a checkpoint, would get the number of standard error, and whatever a
    library prints would be written into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it takes the lowest number, which is this one
