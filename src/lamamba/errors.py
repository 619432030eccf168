"""What can go wrong, by kind. The command line prints any of these as one line and exits with 2."""

import signal


class LamambaError(Exception):
    """Base of every error that lamamba raises on purpose; its message names the thing, the fault and the mend."""


class ConfigError(LamambaError):  # no ValueError, which the option parser would wrap in a text of its own
    """An option has a value that cannot work."""


class DataError(LamambaError, ValueError):
    """Images or labels cannot be read or do not fit what was asked."""


class CheckpointError(LamambaError, RuntimeError):
    """A checkpoint is missing, damaged, foreign, or could not be written."""


class OtherProcessError(LamambaError):
    """Another of the processes that train together failed; that one says why."""


class SignalError(LamambaError):
    """Work ended because of a signal, and lost nothing.

    Args:
        number: of the signal, the attribute `signal`.
        where: it stands, and how it goes on.
        silent: another process says so.
    """

    def __init__(self, number: int, where: str, silent: bool = False) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} at {where}")
        self.signal, self.silent = number, silent
