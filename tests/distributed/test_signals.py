"""Signals, dead workers and images that cannot be read end a run with a checkpoint and one line."""

import multiprocessing
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forked import Fork, run_ranks, wait_for
from lamamba.checkpoints.checkpoint import checkpoints_in
from lamamba.cli import main
from lamamba.commands import encode as encoding
from lamamba.data import FolderSource, batches, open_source
from lamamba.distributed.processes import Processes
from lamamba.distributed.signals import NAMES, SignalsNoted
from lamamba.errors import DataError, LamambaError
from lamamba.sampling import generate as generating
from lamamba.training.trainer import Trainer
from small_network import TINY_NETWORK

TINY = [
    *TINY_NETWORK,
    *("--batch-size", "2", "--device", "cpu", "--sample-steps", "1", "--sample-every", "100000", "--log-every", "2"),
    *("--checkpoint-every", "100000", "--image-size", "16"),
]


@pytest.fixture
def handlers() -> Iterator[None]:
    """Handlers as a new process has them; whoever starts tests in the background has SIGINT ignored."""
    before = {name: signal.getsignal(getattr(signal, name)) for name in NAMES if hasattr(signal, name)}
    for name in before:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("name", NAMES)
def test_every_signal_to_end_is_noted(name: str) -> None:
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip("this system has no such signal")
    before = signal.getsignal(number)
    with SignalsNoted() as signals:
        assert signals.number == 0
        signal.raise_signal(number)
        assert signals.number == number
    assert signal.getsignal(number) == before


@pytest.mark.usefixtures("handlers")
def test_signals_that_come_at_once_are_one_and_a_later_ctrl_c_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with SignalsNoted() as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert signals.number == signal.SIGTERM
        monkeypatch.setattr(SignalsNoted, "AT_ONCE_S", 0.0)
        signal.raise_signal(signal.SIGXCPU)  # the kernel sends it each second
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)  # schedulers send it after a warning, while the run saves
        assert signals.number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("handlers")
def test_signals_that_are_ignored_or_handled_stay_so() -> None:
    handled = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a shell's background
    signal.signal(signal.SIGUSR2, lambda *_: handled.append(1))
    with SignalsNoted() as signals:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGUSR2)
        assert (signals.number, handled) == (0, [1])
        signal.raise_signal(signal.SIGINT)
        assert signals.number == signal.SIGINT


def test_workers_leave_signals_to_their_parent(images: Path) -> None:
    source, child_handler = open_source(str(images), image_size=16), signal.getsignal(signal.SIGCHLD)
    others = set(multiprocessing.active_children())
    with closing(batches(source, batch_size=2, seed=0, num_workers=1)) as reader:
        next(reader)
        (worker,) = set(multiprocessing.active_children()) - others
        for name in ("TERM", "INT", "HUP", "USR1"):  # by a process that is not the parent
            subprocess.run(["/bin/sh", "-c", f"kill -{name} {worker.pid}"], check=True)
        for _ in range(4):
            next(reader)
        assert worker.is_alive()
        assert signal.getsignal(signal.SIGCHLD) == child_handler, "its death would be raised anywhere"
        worker.terminate()
        worker.join(60)
        assert worker.exitcode == 0


def test_workers_end_with_the_reader(images: Path) -> None:
    others = set(multiprocessing.active_children())
    with closing(batches(open_source(str(images), image_size=16), batch_size=2, seed=0, num_workers=2)) as reader:
        next(reader)
        assert len(set(multiprocessing.active_children()) - others) == 2
    assert set(multiprocessing.active_children()) <= others


def stopped_at(run: Path, line: str) -> int:
    """Read where a run has stopped; a checkpoint has to be there."""
    found = re.search(r"stopped (?:by \w+ )?at image (\d+), all is saved: --resume goes on from here\n$", line)
    assert found, line
    assert line.count("\n") == 1
    assert int(found[1]) > 0
    assert int(checkpoints_in(run)[-1].name) == int(found[1])
    return int(found[1])


def test_a_signal_to_all_processes_of_a_run_with_workers_saves(tmp_path: Path, images: Path) -> None:
    run = tmp_path / "run"
    options = ["--out", str(run), *TINY, "--data", str(images), "--num-workers", "2", "--num-images", "100000"]
    with Fork("-m", "lamamba", "train", *options, start_new_session=True) as job:
        wait_for(lambda: (run / "log.jsonl").is_file() and (run / "log.jsonl").read_text().count("\n") > 2)
        for _ in range(2):  # as torchrun does, which passes on what it gets
            os.killpg(job.pid, signal.SIGTERM)
        _, error = job.communicate(timeout=240)
    assert job.returncode == 128 + signal.SIGTERM
    assert error.startswith("lamamba: stopped by SIGTERM at image ")
    stopped_at(run, error)


def test_a_worker_that_is_killed_ends_the_run_with_a_checkpoint(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, take_step, others = tmp_path / "run", Trainer.take_step, set(multiprocessing.active_children())

    def kill_first(trainer: Trainer, *batch: Any) -> Any:
        if trainer.images == 4:
            for worker in set(multiprocessing.active_children()) - others:
                assert worker.pid is not None
                os.kill(worker.pid, signal.SIGKILL)
        return take_step(trainer, *batch)

    options = ["--out", str(run), "--num-images", "16"]
    monkeypatch.setattr(Trainer, "take_step", kill_first)
    with pytest.raises(SystemExit, match="2"):
        main(["train", *options, *TINY, "--data", str(images), "--num-workers", "1"])
    line = capsys.readouterr().err
    assert re.match(r"lamamba: error: a worker that reads .* died \(.*\), perhaps for lack of memory: ", line)
    assert 6 <= stopped_at(run, line) < 16
    monkeypatch.setattr(Trainer, "take_step", take_step)
    main(["train", *options, "--resume"])
    assert int(checkpoints_in(run)[-1].name) == 16


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_signal_ends_a_read_that_hangs(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], num_workers: int
) -> None:
    gather, take_step, calls = FolderSource.gather, Trainer.take_step, 0

    def hang(source: FolderSource, indices: np.ndarray, flipped: np.ndarray) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # in a worker too, which is a fork
            time.sleep(120)  # as when a file server is down
        return gather(source, indices, flipped)

    def signal_soon(trainer: Trainer, *batch: Any) -> Any:
        if trainer.images == 2:
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return take_step(trainer, *batch)

    monkeypatch.setattr(FolderSource, "gather", hang)
    monkeypatch.setattr(Trainer, "take_step", signal_soon)
    others = set(multiprocessing.active_children())
    options = [*TINY, "--data", str(images), "--num-images", "16", "--num-workers", str(num_workers)]
    start = time.monotonic()
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        main(["train", "--out", str(tmp_path / "run"), *options])
    assert time.monotonic() - start < 60
    assert stopped_at(tmp_path / "run", capsys.readouterr().err) == 4
    assert set(multiprocessing.active_children()) <= others


def test_a_signal_before_the_first_step_ends_the_run_before_it(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gather = FolderSource.gather

    def interrupt(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return gather(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FolderSource, "gather", interrupt)
        patch.setattr(Trainer, "take_step", lambda *_: pytest.fail("it may take minutes"))
        command = ["train", "--out", str(tmp_path / "run"), *TINY, "--data", str(images), "--num-images", "2"]
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            main(command)
    assert capsys.readouterr().err == "lamamba: stopped by SIGTERM at image 0: --resume goes on from here\n"
    main([*command, "--resume"])
    assert int(checkpoints_in(tmp_path / "run")[-1].name) == 2


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DataError("3.png is damaged"), "3.png is damaged"),
        (OSError(116, "Stale file handle"), "could not be read (OSError: [Errno 116] Stale file handle)"),
        (MemoryError(), "could not be read (out of memory)"),
        (RuntimeError("a bug"), None),  # to be seen whole
    ],
)
def test_images_that_cannot_be_read_end_the_run_with_a_checkpoint(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    error: Exception, said: str | None, num_workers: int,
) -> None:  # fmt: skip
    gather, calls = FolderSource.gather, 0

    def fail(source: FolderSource, indices: np.ndarray, flipped: np.ndarray) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error
        return gather(source, indices, flipped)

    monkeypatch.setattr(FolderSource, "gather", fail)
    options = [*TINY, "--data", str(images), "--num-images", "16", "--num-workers", str(num_workers)]
    command = ["train", "--out", str(tmp_path / "run"), *options]
    if said is None:
        with pytest.raises(RuntimeError, match="a bug"):
            main(command)
    else:
        with pytest.raises(SystemExit, match="2"):
            main(command)
        line = capsys.readouterr().err
        assert f"{said}; stopped at" in line
        assert stopped_at(tmp_path / "run", line) == 4
    assert int(checkpoints_in(tmp_path / "run")[-1].name) == 4


def test_where_one_rank_cannot_read_all_save(tmp_path: Path, images: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """
import os
from lamamba.cli import main
from lamamba.data import FolderSource

gather, calls = FolderSource.gather, 0

def fail(source, indices, flipped):
    global calls
    calls += 1
    if calls == 3 and os.environ["RANK"] == "1":
        raise OSError("stale file handle")
    return gather(source, indices, flipped)

FolderSource.gather = fail
main()
"""
    )
    run = tmp_path / "run"
    command = ["train", "--out", str(run), *TINY, "--data", str(images), "--num-images", "16"]
    done = run_ranks(2, str(program), *command)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines(keepends=True) if line.startswith("lamamba: ")]
    assert len(ours) == 1
    assert "stale file handle" in ours[0]
    assert stopped_at(run, ours[0]) == 4


@pytest.mark.parametrize("number", [0, signal.SIGINT])
def test_a_closed_output_does_not_end_training(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    """`| head -1`; and Ctrl-C with `| tee log`, which ends both."""
    run, take_step = tmp_path / "run", Trainer.take_step
    reader, writer = os.pipe()
    os.close(reader)

    def interrupt(trainer: Trainer, *batch: Any) -> Any:
        if trainer.images == 4 and number:
            signal.raise_signal(number)
        return take_step(trainer, *batch)

    monkeypatch.setattr(Trainer, "take_step", interrupt)
    options = [*TINY, "--data", str(images), "--num-images", "8"]
    with open(writer, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", pipe)
        if number:
            with pytest.raises(SystemExit, match=str(128 + number)):
                main(["train", "--out", str(run), *options])
        else:
            main(["train", "--out", str(run), *options])
    if number:
        assert stopped_at(run, capsys.readouterr().err) == 6
    assert int(checkpoints_in(run)[-1].name) == (6 if number else 8)


def test_generating_stops_at_a_signal_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "nano", "--num-images", "3", "--steps", "2", "--images-per-shard", "1", "--device", "cpu"]
    sample, calls = generating.sample, 0

    def interrupt(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            signal.raise_signal(signal.SIGTERM)
        return sample(*arguments, **options)

    monkeypatch.setattr(generating, "sample", interrupt)
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        main([*command, "--out", str(tmp_path / "parts")])
    said = "stopped by SIGTERM at image 2 of 3: the same command goes on after the last whole shard"
    assert capsys.readouterr().err == f"lamamba: {said}\n"
    assert len(list((tmp_path / "parts").glob("*.png"))) == 2
    for name in ("parts", "whole"):
        main([*command, "--out", str(tmp_path / name)])
    for index in range(3):
        parts, whole = ((tmp_path / name / f"{index:08d}.png").read_bytes() for name in ("parts", "whole"))
        assert parts == whole


def test_encoding_stops_at_a_signal_and_goes_on(
    tmp_path: Path, images: Path, autoencoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["encode", "--data", str(images), "--vae", str(autoencoder), "--image-size", "16", "--batch-size", "2"]
    command += ["--images-per-shard", "4", "--device", "cpu", "--out"]
    encode_batch, calls = encoding._encode_batch, 0

    def interrupt(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            signal.raise_signal(signal.SIGTERM)
        return encode_batch(*arguments)

    monkeypatch.setattr(encoding, "_encode_batch", interrupt)
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        main([*command, str(tmp_path / "parts")])
    said = "stopped by SIGTERM at shard 2 of 2: the same command continues there"
    assert capsys.readouterr().err == f"lamamba: {said}\n"
    for name in ("parts", "whole"):
        main([*command, str(tmp_path / name)])
    shards = sorted((tmp_path / "whole").glob("shard-*"))
    assert len(shards) == 2
    for shard in shards:
        assert (tmp_path / "parts" / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("command", ["generate", "encode"])
def test_a_signal_to_ranks_that_wait_for_others_is_told(
    tmp_path: Path, images: Path, autoencoder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], command: str,
) -> None:  # fmt: skip
    """Other ranks end at the signal, and the wait for them fails."""
    options = {
        "generate": ["nano", "--num-images", "1", "--steps", "2"],
        "encode": ["--data", str(images), "--vae", str(autoencoder), "--image-size", "16"],
    }[command]
    waits = 0

    def wait(processes: Processes) -> None:
        nonlocal waits
        waits += 1
        if waits == 2:
            signal.raise_signal(signal.SIGTERM)
            raise LamambaError("another process has ended")

    monkeypatch.setattr(Processes, "barrier", wait)
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        main([command, *options, "--device", "cpu", "--out", str(tmp_path / "out")])
    said = "stopped by SIGTERM at the end of its share: the same command continues"
    assert capsys.readouterr().err == f"lamamba: {said}\n"
