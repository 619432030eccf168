"""Run Python programs as forks of a process that has already imported torch and lamamba.

A program that a test starts with `subprocess` spends five seconds on imports; a fork starts in milliseconds. A test of
how a process starts (environment variables that are read at import, the standard streams) still needs `subprocess`.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Self

from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["warm_up"])


class Fork:
    """What `subprocess.Popen([sys.executable, *arguments])` is, with its output in files.

    Args:
        arguments: of Python: `-m MODULE ...`, `-c PROGRAM ...` or `FILE ...`. The ranks of
            `-m torch.distributed.run ...` are forks too.
        cwd: working directory.
        env: all environment variables.
        start_new_session: in a process group of its own, as a job has.
    """

    def __init__(
        self, *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None,
        start_new_session: bool = False,
    ) -> None:  # fmt: skip
        self.arguments = arguments
        self.output = tempfile.TemporaryDirectory(prefix="lamamba-fork-")
        self.files = [str(Path(self.output.name) / name) for name in ("stdout", "stderr")]
        environment = dict(os.environ if env is None else env)
        self.process = _forks.Process(
            target=_start, args=(arguments, self.files, str(cwd or Path.cwd()), environment, start_new_session)
        )
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
        try:
            self.process.start()  # the first one starts the server, which has to find `warm_up`
        finally:
            os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(ProcessLookupError):
            if self.process.exitcode is None:
                os.kill(self.pid, signal.SIGKILL)
        self.process.join()
        self.output.cleanup()

    @property
    def returncode(self) -> int | None:
        """The exit code so far: negative after a signal, None while it runs."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for its end; return what it wrote to standard output and standard error."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            os.kill(self.pid, signal.SIGKILL)
            self.process.join()
            raise subprocess.TimeoutExpired(self.arguments, timeout, *(Path(file).read_bytes() for file in self.files))
        stdout, stderr = (Path(file).read_text() for file in self.files)
        return stdout, stderr


def run_python(
    *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 240
) -> "subprocess.CompletedProcess[str]":
    """Do what `subprocess.run([sys.executable, *arguments], capture_output=True, text=True)` does, in a fork."""
    with Fork(*arguments, cwd=cwd, env=env) as fork:
        stdout, stderr = fork.communicate(timeout)
        assert fork.returncode is not None
        return subprocess.CompletedProcess(arguments, fork.returncode, stdout, stderr)


def run_ranks(
    number: int, *arguments: str, cwd: Path | None = None, restarts: int = 0
) -> "subprocess.CompletedProcess[str]":
    """Run the program with torchrun, as `number` ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    return run_python(*torchrun, f"--max-restarts={restarts}", *arguments, cwd=cwd)


def _start(
    arguments: tuple[str, ...], files: list[str], cwd: str, environment: dict[str, str], start_new_session: bool
) -> None:
    """Become a new program, as far as a fork can."""
    if start_new_session:
        os.setsid()
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    multiprocessing.set_start_method(None, force=True)  # Python's default, not how this process was started
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if arguments[:2] == ("-m", "torch.distributed.run"):
        SubprocessHandler._popen = lambda handler, arguments, environment: _Rank(arguments, environment)
    _execute(*arguments)


class _Rank:
    """As much of a `subprocess.Popen` as torchrun uses."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.process = multiprocessing.get_context("fork").Process(target=_rank, args=(arguments[1:], environment))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid
        os.setpgid(self.pid, self.pid)  # torchrun signals the group

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float) -> None:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("rank", timeout)


def _rank(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    for number in signal.valid_signals():  # a new program has no handlers of torchrun's
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.update(environment)
    _execute(*arguments)


def _execute(*arguments: str) -> None:
    kind, *others = (argument for argument in arguments if argument != "-u")
    try:
        if kind == "-m":
            sys.argv = others
            runpy.run_module(others[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv = ["-c", *others[1:]]
            sys.modules["__main__"] = main = ModuleType("__main__")
            exec(compile(others[0], "<string>", "exec"), vars(main))
        else:
            sys.argv = [kind, *others]
            sys.path.insert(0, str(Path(kind).parent))
            runpy.run_path(kind, run_name="__main__")
    except Exception:  # as Python does: torch would keep it to itself
        traceback.print_exc()
        sys.exit(1)


def wait_for(happened: Callable[[], object], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
