"""Signals that ask a process to end: its work is saved first, and worker processes leave the signal to their parent."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from lamamba.errors import SignalError

# Sent by Ctrl-C and Ctrl-\, by whoever ends a job, by a terminal that closes, by schedulers that warn before they kill,
# at a limit on time, and before the power goes.
NAMES = ("SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU", "SIGPWR")
NUMBERS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
# Sent by someone at a keyboard, who sees what the process does.
_FROM_KEYBOARD = ("SIGINT", "SIGQUIT")


class WaitInterrupted(BaseException):
    """A signal came while something was waited for; no Exception, which what is waited for might catch."""


class SignalsNoted:
    """A context in which a signal to end is noted, for a loop to look at; a later Ctrl-C ends the process as usual.

    A Ctrl-C that follows at once does not: whoever signals all processes of a job reaches some of them twice, directly
    and through torchrun, which forwards signals. No other signal ends the process while it saves: schedulers send
    several in a row (SIGUSR1 as a warning, then SIGTERM) and SIGKILL when time is up.

    A signal that is ignored stays so, as nohup wants it, except SIGINT, which shells ignore in whatever they start in
    the background. Handlers of a program around this one are left alone.
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
        """Raise SignalError if a signal came.

        Args:
            where: the work stands, and how it goes on.
            silent: another process says so.
        """
        if self.number:
            raise SignalError(self.number, where, silent)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Raise WaitInterrupted in this context as soon as a signal comes, or at once if one came before.

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
    """Block the signals to end in this worker process, but for a SIGTERM from the process that started it.

    A signal to the whole process group, or to all processes of a job, must not end a worker from which its parent still
    waits for a batch. By SIGTERM multiprocessing ends workers.
    """
    if not hasattr(signal, "pthread_sigmask"):  # on Windows, where no such signal is sent
        return
    if not hasattr(signal, "sigwaitinfo"):  # on macOS, where nobody can tell who sent a signal
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
