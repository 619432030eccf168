"""What happens to training when something goes wrong around it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from forked import Fork, wait_for
from lamamba.checkpoints.checkpoint import checkpoints_in, load_checkpoint, locked
from lamamba.cli import main
from lamamba.diffusion import Diffusion
from lamamba.errors import CheckpointError
from lamamba.sampling import Step, sample
from lamamba.training.trainer import Trainer
from small_network import TINY_NETWORK
from tiny_runs import weights

TINY = [
    *TINY_NETWORK,
    *("--data", "builtin", "--batch-size", "4", "--device", "cpu", "--sample-steps", "1", "--sample-every", "100000"),
]
TRAINING = "training/shard-00001-model-00001-of-00001.safetensors"
OFTEN = ["--log-every", "4", "--checkpoint-every", "4"]


def train(out: Path, *options: str) -> None:
    main(["train", "--out", str(out), *TINY, *options])


def refused(capsys: pytest.CaptureFixture[str], out: Path, *options: str) -> str:
    with pytest.raises(SystemExit, match="2"):
        train(out, *options)
    return capsys.readouterr().err


def same(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_killed_at_twelve_random_moments_it_ends_bitwise_like_an_unbroken_run(tmp_path: Path) -> None:
    server = str(Path(__file__).with_name("killing_server.py"))
    # All in forks of one process, with one thread: another order of sums would be another result.
    command = [sys.executable, server, str(tmp_path), "12", "0", *TINY, *OFTEN, "--num-images", "120"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    killed, inside_a_save = map(int, re.findall(r"\d+", done.stdout)[:2])
    assert killed == 12
    assert inside_a_save >= 2, "too few to say anything"
    whole, killed_runs = tmp_path / "whole", sorted(tmp_path.glob("killed-*"))
    assert killed_runs
    assert len(records(whole)) == 30
    for run in killed_runs:
        assert same(run, whole)
        compared = [[(r["images"], r["loss"]) for r in records(folder)] for folder in (run, whole)]
        assert compared[0] == compared[1]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_and_says_so(tmp_path: Path, name: str) -> None:
    number = getattr(signal, name)
    with Fork("-m", "lamamba", "train", "--out", str(tmp_path / "run"), *TINY, "--num-images", "8000") as run:
        wait_for(lambda: (tmp_path / "run" / "log.jsonl").is_file() and records(tmp_path / "run"))
        run.send_signal(number)
        _, error = run.communicate(timeout=120)
    images = int(checkpoints_in(tmp_path / "run")[-1].name)
    assert run.returncode == 128 + number
    assert error == f"lamamba: stopped by {name} at image {images}, all is saved: --resume goes on from here\n"
    assert 80 <= images < 8000
    train(tmp_path / "run", "--resume", "--num-images", str(images + 4))
    assert int(checkpoints_in(tmp_path / "run")[-1].name) == images + 4


def test_ctrl_c_that_ends_the_compilers_of_a_first_step_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A terminal sends it to all that run in it, and what fails then is whoever waits for a compiler."""
    take_step = Trainer.take_step

    def interrupted(trainer: Trainer, *batch: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        raise subprocess.CalledProcessError(-signal.SIGINT, ["gcc"])

    monkeypatch.setattr(Trainer, "take_step", interrupted)
    command = ["train", "--out", str(tmp_path / "run"), *TINY, "--num-images", "8"]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 128 + signal.SIGINT
    told = "stopped by SIGINT at image 0, in preparing the first step (CalledProcessError): --resume goes on from here"
    assert capsys.readouterr().err == f"lamamba: {told}\n"

    def fail(trainer: Trainer, *batch: Any) -> Any:
        raise subprocess.CalledProcessError(1, ["gcc"])

    monkeypatch.setattr(Trainer, "take_step", fail)
    with pytest.raises(subprocess.CalledProcessError):  # nobody has pressed anything: a fault, to be seen whole
        main(command)
    monkeypatch.setattr(Trainer, "take_step", take_step)
    train(tmp_path / "run", "--resume", "--num-images", "8")
    assert int(checkpoints_in(tmp_path / "run")[-1].name) == 8


def test_a_signal_ends_the_drawing_of_samples_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def draw(*arguments: Any, callback: Callable[[Step], None], **options: Any) -> Any:
        def note(step: Step) -> None:
            asked.append(step.index)
            signal.raise_signal(signal.SIGTERM)
            callback(step)

        return sample(*arguments, callback=note, **options)

    monkeypatch.setattr("lamamba.training.trainer.sample", draw)
    options = [*TINY, "--sample-every", "8", "--sample-steps", "50", "--log-every", "4", "--num-images", "40"]
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--out", str(tmp_path / "run"), *options])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err.endswith("stopped by SIGTERM at image 8, all is saved: --resume goes on from here\n")
    assert len(asked) == 1
    assert not (tmp_path / "run" / "samples").exists()
    assert [int(path.name) for path in checkpoints_in(tmp_path / "run")][-1] == 8


def test_a_signal_that_came_before_samples_leaves_them_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_step = Trainer.take_step

    def step(trainer: Trainer, *batch: Any) -> Any:
        terms = take_step(trainer, *batch)
        if trainer.images == 8:
            signal.raise_signal(signal.SIGTERM)
        return terms

    monkeypatch.setattr(Trainer, "take_step", step)
    monkeypatch.setattr(Trainer, "draw_samples", lambda *_: pytest.fail("there is no time for it"))
    with pytest.raises(SystemExit):
        main(["train", "--out", str(tmp_path / "run"), *TINY, "--sample-every", "8", "--num-images", "40"])
    assert int(checkpoints_in(tmp_path / "run")[-1].name) == 8


def test_resuming_what_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], [*TINY, "--data", str(tmp_path / "also mistyped")]):
        with pytest.raises(SystemExit, match="2"):
            main(["train", "--out", str(tmp_path / "mistyped"), "--resume", *more])
        assert f"no checkpoint in {tmp_path / 'mistyped'}: correct --out" in capsys.readouterr().err
    assert not (tmp_path / "mistyped").exists()


def test_others_may_read_what_is_saved(tmp_path: Path) -> None:
    """safetensors writes for the owner alone."""
    before = os.umask(0o022)
    os.umask(before)
    train(tmp_path / "run", "--num-images", "4")
    main(["push", str(tmp_path / "run"), "--out", str(tmp_path / "pushed"), "--num-per-label", "0"])
    saved = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in saved) >= 3
    assert [path for path in saved if path.stat().st_mode & 0o777 != 0o666 & ~before] == []


def test_one_command_starts_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "second", "--num-images", "8")
    capsys.readouterr()
    train(tmp_path / "first", "--resume-or-start", "--num-images", "4")
    assert capsys.readouterr().out.startswith(f"no checkpoint in {tmp_path / 'first'}: starting a new run\n")
    train(tmp_path / "first", "--resume-or-start", "--num-images", "8")
    assert "no checkpoint" not in capsys.readouterr().out
    assert same(tmp_path / "first", tmp_path / "second")


def break_losses(monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Make the losses of some steps, counted from 1, NaN."""
    real, count = Diffusion.losses, iter(range(1, 1000))

    def losses(*arguments: object) -> dict[str, torch.Tensor]:
        broken = next(count) in calls
        return {name: value * float("nan" if broken else "1") for name, value in real(*arguments).items()}

    monkeypatch.setattr(Diffusion, "losses", losses)


def test_a_step_that_is_not_finite_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_losses(monkeypatch, 3, 4)
    train(
        tmp_path / "run", "--num-images", "24", "--log-every", "8", "--checkpoint-every", "4", "--keep-checkpoints", "0"
    )
    assert "2 of 2 steps skipped" in capsys.readouterr().out
    assert [record["skipped_steps"] for record in records(tmp_path / "run")] == [0, 2, 0]
    assert all(record["loss"] == record["loss"] for record in records(tmp_path / "run")), "no NaN in the log"
    networks = [
        load_file(path / "network" / "diffusion_pytorch_model.safetensors") for path in checkpoints_in(tmp_path / "run")
    ]
    moved = [
        any(not torch.equal(value, after[name]) for name, value in before.items())
        for before, after in pairwise(networks)
    ]
    assert moved == [True, False, False, True, True]
    state = load_file(checkpoints_in(tmp_path / "run")[-1] / TRAINING)
    assert {float(value) for name, value in state.items() if ".step." in name} == {4.0}


def test_too_many_of_them_in_a_row_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_losses(monkeypatch, 2, *range(4, 100))
    line = refused(capsys, tmp_path / "run", "--num-images", "80", *OFTEN, "--max-skipped-steps", "3")
    assert (
        "the gradient was not finite in 3 steps in a row, at image 24: lower learning_rate; the last checkpoint" in line
    )


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", [TRAINING, "network/diffusion_pytorch_model.safetensors"])
def test_a_flipped_bit_is_found_and_the_checkpoint_before_used_if_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    for name in ("whole", "damaged"):
        train(tmp_path / name, "--num-images", "12", *OFTEN)
    before, last = checkpoints_in(tmp_path / "damaged")
    flip_a_bit(last / file)
    line = refused(capsys, tmp_path / "damaged", "--resume", "--num-images", "16")
    assert f"{last / file} is damaged: its checksum does not match" in line
    assert f"the previous one is {before}; train --resume --fall-back continues from it" in line
    train(tmp_path / "damaged", "--resume", "--fall-back", "--num-images", "16")
    train(tmp_path / "whole", "--resume", "--num-images", "16")
    assert same(tmp_path / "damaged", tmp_path / "whole")


def test_where_no_checkpoint_is_whole_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", "--num-images", "8", *OFTEN)
    for checkpoint in checkpoints_in(tmp_path / "run"):
        (checkpoint / TRAINING).unlink()
    line = refused(capsys, tmp_path / "run", "--resume", "--fall-back", "--num-images", "16")
    assert "all checkpoints are damaged; the oldest one: " in line
    assert f"{TRAINING} is missing" in line


def test_two_cannot_train_into_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path / "run"):
        assert f"another process writes to {tmp_path / 'run'}" in refused(capsys, tmp_path / "run", "--num-images", "4")
    with pytest.raises(CheckpointError, match="another process"), locked(tmp_path), locked(tmp_path):
        pass
    train(tmp_path / "run", "--num-images", "4")


def test_a_run_whose_checkpoints_are_deleted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By someone who wanted the space: the next one is whole, and so is the run."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    take_step = Trainer.take_step

    def delete_once(trainer: Trainer, *batch: torch.Tensor) -> dict[str, torch.Tensor]:
        if trainer.step == 3:
            trainer.writer.finish()  # or it would write what is being deleted
            shutil.rmtree(out / "checkpoints")
        return take_step(trainer, *batch)

    train(whole, "--num-images", "20", *OFTEN)
    monkeypatch.setattr(Trainer, "take_step", delete_once)
    train(out, "--num-images", "20", *OFTEN)
    assert [int(path.name) for path in checkpoints_in(out)] == [16, 20]
    assert same(out, whole)


def test_a_run_whose_folder_is_gone_ends_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file in its place stands for whatever else cannot be written to, which a superuser always can."""
    out = tmp_path / "run"
    take_step = Trainer.take_step

    def lose(trainer: Trainer, *batch: torch.Tensor) -> dict[str, torch.Tensor]:
        if trainer.step == 3:
            trainer.writer.finish()
            out.rename(tmp_path / "elsewhere")
            out.write_text("")
        return take_step(trainer, *batch)

    monkeypatch.setattr(Trainer, "take_step", lose)
    said = refused(capsys, out, "--num-images", "20", *OFTEN)
    assert "could not be written" in said
    assert "free some space" in said
    assert [int(path.name) for path in checkpoints_in(tmp_path / "elsewhere")] == [8, 12]
    assert load_checkpoint(tmp_path / "elsewhere").info.images == 12
