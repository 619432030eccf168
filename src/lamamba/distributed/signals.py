"""Terminating signals: a process saves its work first, and worker processes leave the signal to their parent."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from lamamba.errors import SignalError

# Sent by Ctrl-C and Ctrl-\, when a job is terminated, when a terminal closes, by schedulers before they kill a job, at
# a time limit, and before a power failure.
NAMES = ("SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU", "SIGPWR")
NUMBERS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
# Sent from a keyboard, by someone who sees what the process does.
_FROM_KEYBOARD = ("SIGINT", "SIGQUIT")


class WaitInterrupted(BaseException):
    """A signal arrived during a wait. Not an Exception, because the interrupted code might catch those."""


class SignalsNoted:
    """A context that records a terminating signal, for a loop to check.

    A second Ctrl-C ends the process as usual, unless it follows within `AT_ONCE_S`: a signal to all processes of a job
    reaches some of them twice, directly and forwarded by torchrun. Other signals do not end the process while it saves:
    schedulers send several in a row (SIGUSR1 as a warning, then SIGTERM), and SIGKILL when time is up.

    Ignored signals stay ignored, as nohup requires, except SIGINT, which shells ignore in background jobs. Handlers of
    a surrounding program are kept.
    """

    AT_ONCE_S = 2.0

    def __init__(self) -> None:
        self.number = 0
        self._interrupts = False

    def __enter__(self) -> Self:
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            replaced = (signal.SIG_DFL, signal.default_int_handler)
            for number in NUMBERS:
                handler = signal.getsignal(number)
                if handler in replaced or (number == signal.SIGINT and handler == signal.SIG_IGN):
                    self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def end_if_noted(self, where: str, silent: bool = False) -> None:
        """Raise SignalError, with these arguments, if a signal has arrived."""
        if self.number:
            raise SignalError(self.number, where, silent)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Raise WaitInterrupted in this context when a signal arrives, or at once if one has arrived.

        For waits that may never end, such as reading from a file server that is down.
        """
        self._interrupts = True
        try:
            if self.number:
                raise WaitInterrupted
            yield
        finally:
            self._interrupts = False

    def _note(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self.noted = number, now
            if self._interrupts:
                raise WaitInterrupted
        elif now - self.noted > self.AT_ONCE_S and signal.Signals(number).name in _FROM_KEYBOARD:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


def leave_signals_to_parent(*_: object) -> None:
    """Block terminating signals in this worker process, except SIGTERM from its parent.

    A signal to the whole process group, or to all processes of a job, must not end a worker while its parent waits for
    a batch from it. multiprocessing ends workers with SIGTERM.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows, which has no such signals
        return
    if not hasattr(signal, "sigwaitinfo"):  # macOS, which does not tell who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {*NUMBERS} - {signal.SIGTERM})
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
    parent = multiprocessing.parent_process()
    parent_number = parent.pid if parent else os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo(NUMBERS).si_pid != parent_number:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
