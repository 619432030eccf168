"""What is known of a run beside its weights: the log, trackers, and who watches it."""

import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from lamamba.cli import main
from lamamba.commands import watch as watching
from lamamba.commands.watch import _line
from lamamba.config import NetworkConfig, TrainConfig, preset
from lamamba.terminal.output import describe_duration
from lamamba.training import log as logging_of_runs
from lamamba.training.cost import peak_tflops, training_flops
from lamamba.training.log import loss_parts
from lamamba.training.trainer import Trainer
from small_network import TINY_NETWORK

TINY = [
    *TINY_NETWORK,
    *("--data", "builtin", "--batch-size", "2", "--device", "cpu", "--sample-steps", "1", "--log-every", "2"),
]
RARE_SAMPLES = ["--sample-every", "1000"]


@pytest.fixture(autouse=True)
def files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads files of the same second by name, whose end counts the files of a process: 100 is before 99."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first"
    main(["train", "--out", str(out), "--num-images", "6", *TINY])
    return out


def test_the_time_left_and_what_took_it_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig(out=tmp_path, num_images=100, batch_size=10)
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(logging_of_runs, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    terms = {"loss": torch.tensor(0.5), "mse": torch.tensor(0.5), "skipped": torch.tensor(0.0)}
    terms |= {f"{kind}_q{quarter}": torch.tensor(1.0) for kind in ("loss", "share") for quarter in range(1, 5)}
    with logging_of_runs.TrainingLog(config, 50, torch.device("cpu")) as log:
        with log.first_step(minutes=False):
            clock.now += 100
        clock.now += 10
        log.step(10, terms)
        with log.pause("sample"):
            clock.now += 290
        log.write(60, 6, 1e-4)
        with log.pause("save"):
            clock.now += 3
        log.finish(60)
    shown = capsys.readouterr().out
    assert "60 of 100 images · loss 0.5000 · 1.0 images/s · 20 minutes left" in shown  # 300 s for 10 images
    times = "preparing the first step: 100 seconds, sample grids: 5 minutes, checkpoints: 3 seconds"
    assert f"time        7 minutes ({times})" in shown
    assert "rough samples are normal after 10 steps" in shown


def test_training_counts_three_forward_passes() -> None:
    """XL at 256 px takes 45.7 G multiply-adds forwards with a single state, as `lamamba info` says."""
    flops = training_flops(preset("xl-256"))
    assert flops == pytest.approx(6 * 45.72e9, rel=0.001)
    assert training_flops(preset("xl-512")) == pytest.approx(4 * flops, rel=0.01)


def test_the_log_says_how_much_is_computed(run: Path) -> None:
    content = json.loads((run / "config.json").read_text())["network"]
    network = NetworkConfig(**{**content, "depths": tuple(content["depths"])})
    for line in (run / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["tflop_per_s"] == pytest.approx(record["images_per_s"] * training_flops(network) / 1e12)
        assert "mfu" not in record  # of a processor whose peak nobody knows


def test_a_run_that_is_killed_as_it_goes_on_keeps_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "killed"
    main(["train", "--out", str(out), "--num-images", "4", *TINY])
    before = (out / "log.jsonl").read_text()

    def begin_to_write(path: Path, text: str) -> None:
        path.open("w").close()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(logging_of_runs, "write_text", begin_to_write)
        with pytest.raises(SystemExit, match="130"):
            main(["train", "--out", str(out), "--num-images", "6", "--resume"])
    assert (out / "log.jsonl").read_text() == before
    main(["train", "--out", str(out), "--num-images", "6", "--resume"])
    lines = (out / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["images"] for line in lines] == [2, 4, 6]


DAMAGED = [
    b"\xff", b"5", b"null", b'"images"', b"[1, 2]", b"{}", b"\0" * 200_000, b"[" * 60_000, b"1" * 9_000,
    b'{"images": null}', b'{"images": "4"}', b'{"images": true}', b'{"images": 4.5}', b'{"images": NaN}',
    b'{"images": -2, "loss": 1.0}', b'{"images": 1' + b"0" * 200 + b"}", b'{"loss": 1.0}', b'{"images": 4, "lo',
]  # fmt: skip
DOUBTFUL = (
    b'{"images": 3, "loss": NaN, "grad_norm": -Infinity, "images_per_s": "fast", "mfu": [], "skipped_steps": 1.5}'
)


def test_a_damaged_log_stops_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    whole = (out / "log.jsonl").read_bytes().splitlines()
    repeated = whole[1].replace(b'"step": 2', b'"step": 9')
    (out / "log.jsonl").write_bytes(
        b"\n".join([whole[0], repeated, b"", DOUBTFUL, *DAMAGED[:-1], *whole[1:], DAMAGED[-1]])
    )
    main(["watch", str(out)])
    assert "6 of 6 images, 100%, done" in " ".join(capsys.readouterr().out.split())
    main(["plot", str(out), "--out", str(tmp_path / "plots")])
    assert (tmp_path / "plots" / "curves.png").is_file()
    capsys.readouterr()
    main(["train", "--out", str(out), "--resume", "--num-images", "8"])
    assert f"{len(DAMAGED)} damaged lines of log.jsonl left out" in capsys.readouterr().out
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(record["images"], record.get("step")) for record in records] == [(2, 1), (3, None), (4, 2), (6, 3), (8, 4)]
    assert records[1] == {"images": 3, "skipped_steps": 1.5}
    (out / "log.jsonl").write_bytes(DOUBTFUL + b"\n" + DAMAGED[0])
    main(["watch", str(out)])
    assert "3 of 8 images, 38%, no speed in the log" in " ".join(capsys.readouterr().out.split())
    main(["plot", str(out), "--out", str(tmp_path / "plots")])
    (out / "log.jsonl").write_bytes(b"".join(DAMAGED))
    main(["watch", str(out)])
    assert "nothing logged yet" in " ".join(capsys.readouterr().out.split())


def test_only_parts_that_differ_from_the_loss_are_drawn() -> None:
    damaged = {"images": 1}
    flow = [{"images": 2, "loss": 0.5, "mse": 0.5}, {"images": 4, "loss": 0.25, "mse": 0.25}]
    diffusion = [{"images": 2, "loss": 0.75, "mse": 0.5, "vb": 0.25}]
    assert loss_parts([damaged, *flow]) == []
    assert loss_parts([*flow, damaged, *diffusion]) == ["mse", "vb"]


def points(run: Path) -> list[tuple[int, float]]:
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    return [(event.step, event.value) for event in board.Scalars("train/loss")]


def logged(run: Path) -> list[tuple[int, Any]]:
    records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [(record["images"], pytest.approx(record["loss"])) for record in records]


def test_every_point_of_a_run_in_parts_is_in_tensorboard_once(tmp_path: Path) -> None:
    out = tmp_path / "run"
    resume = ["train", "--out", str(out), "--resume", "--num-images"]
    main(["train", "--out", str(out), *TINY, *RARE_SAMPLES, "--num-images", "8", "--checkpoint-every", "4"])
    main([*resume, "12"])
    assert [images for images, _ in points(out)] == [2, 4, 6, 8, 10, 12]
    for checkpoint in (out / "checkpoints").glob("*[02]"):  # of 12 images: those after 8 are seen again
        shutil.rmtree(checkpoint)
    main([*resume, "14"])
    assert [images for images, _ in points(out)] == [2, 4, 6, 8, 10, 12, 14]
    assert points(out) == logged(out)


def test_a_run_that_is_killed_has_the_same_points_in_tensorboard_and_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen, take_step = tmp_path / "run", [], Trainer.take_step

    def look_first(trainer: Trainer, *batch: Any) -> Any:
        if trainer.images == 4:
            seen.append((points(out), logged(out)))
        return take_step(trainer, *batch)

    monkeypatch.setattr(Trainer, "take_step", look_first)
    main(["train", "--out", str(out), *TINY, *RARE_SAMPLES, "--num-images", "6"])
    ((shown, expected),) = seen
    assert [images for images, _ in shown] == [2, 4]
    assert shown == expected


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
        ("Tesla V100", None),
    ],
)
def test_peaks_are_found_by_name(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


class FakeTracker(SimpleNamespace):
    """Keeps what it is told, like wandb and trackio."""

    def __init__(self) -> None:
        super().__init__(begun=[], logged=[], finished=0)

    def init(self, project: str, name: str, config: dict[str, Any], resume: str, **others: str) -> None:
        assert resume == "allow"
        self.begun.append({"project": project, "name": name, "config": config, **others})

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_are_told_what_the_log_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = FakeTracker()
    monkeypatch.setitem(sys.modules, name, tracker)
    out = tmp_path / "tracked"
    main(["train", "--out", str(out), "--num-images", "4", "--tracker", name, "--project", "clothes", *TINY])
    main(["train", "--out", str(out), "--num-images", "6", "--resume"])
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [step for step, _ in tracker.logged] == [2, 4, 6]
    for (_, values), record in zip(tracker.logged, records, strict=True):
        assert values == {f"train/{key}": value for key, value in record.items()}
    first, second = tracker.begun
    assert (first["project"], first["name"]) == ("clothes", "tracked")
    assert first["config"]["network"]["embed_dim"] == 8
    assert first.get("id") == second.get("id")
    assert ("id" in first) == (name == "wandb")
    assert tracker.finished == 2


def test_trackers_are_told_of_names_in_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = FakeTracker()
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    name = os.fsdecode(b"a\xff\n")
    logging_of_runs._start_tracker(TrainConfig(out=Path(name), data=name, project=name, tracker="trackio"))
    (told,) = tracker.begun
    assert (told["project"], told["name"], told["config"]["data"]) == ("a\\xff\\n",) * 3


def test_a_tracker_that_is_not_there_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit):
        main(["train", "--out", str(tmp_path / "run"), "--num-images", "4", "--tracker", "wandb", *TINY])
    assert "wandb is not installed" in capsys.readouterr().err


def test_a_run_is_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["watch", str(run)])  # once, where the output is no terminal
    shown = capsys.readouterr().out
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    for part in ("6 of 6 images, 100%, done", f"{last['loss']:.4f}", "images/s", "checkpoint of 6 images"):
        assert part in shown
    assert "mfu" not in shown


def test_watching_ends_with_the_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    followed = tmp_path / "followed"
    followed.mkdir()
    (followed / "config.json").write_text((run / "config.json").read_text())
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    states = ["", lines[0], lines[0] + lines[1][:20], "".join(lines)]
    looks: list[float] = []

    def look(seconds: float) -> None:
        looks.append(seconds)
        (followed / "log.jsonl").write_text(states[len(looks)])

    monkeypatch.setattr(watching.time, "sleep", look)
    monkeypatch.setattr(watching, "make_console", lambda: Console(force_terminal=True, width=80))
    main(["watch", str(followed)])
    assert looks == [2.0] * 3


def test_the_bar_shows_loss_and_speed_before_the_first_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(logging_of_runs, "SHOWN_EVERY_S", 0.0)
    terminal = Console(force_terminal=True, width=120, file=io.StringIO())
    monkeypatch.setattr(logging_of_runs, "make_console", lambda: terminal)
    update = Progress.update

    def note(progress: Any, task: Any, **fields: Any) -> None:
        if "loss" in fields:
            shown.append(f"{fields['loss']} {fields['speed']}")
        update(progress, task, **fields)

    monkeypatch.setattr(Progress, "update", note)
    out = tmp_path / "run"
    main(["train", "--out", str(out), "--num-images", "8", *TINY[:-2], "--log-every", "8"])
    assert len(shown) == 5, "each of four steps, and the line"
    record = json.loads((out / "log.jsonl").read_text())
    assert shown[3].split()[0] == shown[4].split()[0] == f"{record['loss']:.4f}"
    assert all(float(speed.split()[1].replace(",", "")) > 0 for speed in shown)


def test_a_folder_without_a_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["watch", str(tmp_path)])
    assert "holds no run of lamamba" in capsys.readouterr().err


def test_a_curve_fits_its_line() -> None:
    assert _line([1.0, 2.0, 3.0], 80) == "▁▅█"
    assert _line([4.0] * 5, 3) == "▁▁▁"
    assert len(_line([float(value) for value in range(1000)], 40)) == 40
    assert _line([], 40) == ""
    assert [describe_duration(seconds) for seconds in (5, 300, 9000, 500_000)] == [
        "5 seconds", "5 minutes", "2.5 hours", "5.8 days",
    ]  # fmt: skip
