"""The errors that lamamba raises. The command line prints each as one line and exits with code 2."""

import signal
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class name if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class LamambaError(Exception):
    """Base class of all errors that lamamba raises. The message says what is wrong and what to do."""


class ConfigError(LamambaError):  # not a ValueError: the option parser would wrap its message
    """The value of an option is invalid."""


class DataError(LamambaError, ValueError):
    """Images or labels cannot be read, or do not fit the options."""


class CheckpointError(LamambaError, RuntimeError):
    """A checkpoint is missing, damaged, of another kind, or could not be written."""


@contextmanager
def reading(what: str, advice: str, kind: type[LamambaError] = DataError) -> Iterator[None]:
    """Turn any error into `what (the reason): advice`: readers raise nearly every kind on damaged files.

    Errors of lamamba and a lack of memory are passed on.
    """
    try:
        yield
    except (MemoryError, LamambaError):
        raise
    except Exception as error:
        cause = error.__cause__ or error
        reason = textwrap.shorten(f"{type(cause).__name__}: {cause}", 300)
        raise kind(f"{what} ({reason.rstrip('.')}): {advice}") from error


class OtherProcessError(LamambaError):
    """Another rank failed and reports why."""


class SignalError(LamambaError):
    """A signal ended the work; nothing is lost.

    Args:
        number: the signal; available as the attribute `signal`.
        where: where the work stopped, and how to continue it.
        silent: do not print this error, because another process does.
    """

    def __init__(self, number: int, where: str, silent: bool = False) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} at {where}")
        self.signal, self.silent = number, silent
