"""Training on real images from one command: it stops and goes on exactly, and refuses what it cannot do."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lamamba
from lamamba.checkpoints.checkpoint import checkpoints_in, load_checkpoint
from lamamba.cli import main
from lamamba.config import PRESETS, NetworkConfig, TrainConfig
from lamamba.diffusion import Diffusion
from lamamba.errors import LamambaError
from lamamba.files.records import read_train_config
from lamamba.training import run as training
from lamamba.training.run import _set_aside
from small_network import TINY_CONFIG
from tiny_runs import TINY, losses, make_trainer, same, train, weights


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--horizontal-flip", "--accumulate", "2"],
        ["--objective", "flow", "--dropout", "0.2"],
        ["--optimizer", "muon"],
        ["--objective", "flow-x", "--timesteps", "logit-normal", "--timestep-logits", "0.8", "0.8"],
    ],
)
def test_four_and_four_steps_are_bitwise_eight(tmp_path: Path, extra: list[str]) -> None:
    intervals = ["--log-every", "4", "--checkpoint-every", "16"]
    train(tmp_path / "whole", "--num-images", "32", "--sample-every", "32", *intervals, *extra)
    train(tmp_path / "parts", "--num-images", "16", "--sample-every", "8", *intervals, *extra)
    torch.manual_seed(99)  # the program around a run has no say in it
    main(["train", "--out", str(tmp_path / "parts"), "--resume", "--num-images", "32"])
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert len(whole) > 500
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


@pytest.mark.usefixtures("loss_curves")
def test_a_run_leaves_its_configuration_log_and_pictures(tmp_path: Path) -> None:
    train(tmp_path / "run", "--num-images", "16", "--sample-every", "4")
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["network"]["num_classes"] == 10
    assert record["log_every"] == 4
    assert losses(tmp_path / "run")[-1][0] == 16
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 4
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert len(checkpoints_in(tmp_path / "run")) == 2, "the two newest are kept"
    info = load_checkpoint(tmp_path / "run").info
    assert (info.images, info.step) == (16, 4)


def test_the_objective_is_remembered(tmp_path: Path) -> None:
    train(tmp_path / "run", "--num-images", "4", "--objective", "flow")
    assert load_checkpoint(tmp_path / "run").info.objective == "flow"
    out = tmp_path / "grid.png"
    main(["sample", str(tmp_path / "run"), "--labels", "1", "--num-per-label", "1", "--steps", "2", "--out", str(out)])
    assert out.is_file()


def test_training_learns(tmp_path: Path) -> None:
    train(tmp_path / "run", "--num-images", "80", "--learning-rate", "0.01", "--log-every", "20")
    first, *_, last = losses(tmp_path / "run")
    assert last[1] < 0.7 * first[1]


def test_dry_run_prints_the_resolved_configuration_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", "--dry-run")
    assert json.loads(capsys.readouterr().out)["network"]["in_channels"] == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*TINY], "already holds a run"),
        (["--resume", "--batch-size", "8"], "batch_size was 4, now 8"),
        (["--resume", "--scan", "raster"], "continuous"),
    ],
)
def test_a_run_is_neither_overwritten_nor_changed(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", "--num-images", "4")
    before = weights(tmp_path / "run")
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--out", str(tmp_path / "run"), *options])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path / "run").items())


def test_an_infinite_loss_stops_the_run_and_names_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lamamba.training import run as module

    calls = 0

    def losses_that_break(*arguments: object, **options: object) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        terms = real(*arguments, **options)
        return {name: value * (float("nan") if calls > 2 else 1) for name, value in terms.items()}

    real = Diffusion.losses
    monkeypatch.setattr(Diffusion, "losses", losses_that_break)
    from lamamba.config import OptionReader, TrainConfig

    arguments = ["--out", str(tmp_path / "run"), *TINY, "--num-images", "16", "--max-skipped-steps", "1"]
    config = OptionReader(TrainConfig, "train", defaults={"network": PRESETS["nano"]}).read(arguments)
    with pytest.raises(LamambaError, match=r"gradient was not finite in 1 step in a row, at image 12.*000000000008"):
        module.train(config)


def test_the_optimizer_steps_once_a_batch(tmp_path: Path) -> None:
    train(tmp_path / "run", "--num-images", "12", "--accumulate", "2", "--sample-every", "12")
    assert load_checkpoint(tmp_path / "run").info.step == 3
    steps = {float(value) for name, value in weights(tmp_path / "run").items() if ".step." in name}
    assert steps == {3.0}


def test_compiling_is_announced_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    train(tmp_path / "compiled", "--num-images", "12", "--compile")
    assert len(compiled) == 1
    assert capsys.readouterr().out.count("preparing the first step, which takes some minutes") == 1
    train(tmp_path / "eager", "--num-images", "12")
    assert len(compiled) == 1
    assert "preparing" not in capsys.readouterr().out
    assert same(weights(tmp_path / "compiled"), weights(tmp_path / "eager"))


def test_a_run_neither_uses_nor_disturbs_the_global_generator(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(tmp_path / "first", "--num-images", "8", "--sample-every", "4")
    main(["train", "--out", str(tmp_path / "first"), "--resume", "--num-images", "12"])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    train(tmp_path / "second", "--num-images", "12")
    assert same(weights(tmp_path / "first"), weights(tmp_path / "second"))


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    intervals = ["--sample-every", "24", "--log-every", "4", "--checkpoint-every", "8", "--keep-checkpoints", "0"]
    train(tmp_path / "whole", "--num-images", "24", *intervals)
    train(tmp_path / "killed", "--num-images", "24", *intervals)
    *_, before, last = checkpoints_in(tmp_path / "killed")
    last.rename(last.with_name(f".incomplete-{last.name}"))
    with (tmp_path / "killed" / "log.jsonl").open("a") as file:
        file.write('{"images": 28, "lo')
    main(["train", "--out", str(tmp_path / "killed"), "--resume"])
    assert [path.name for path in checkpoints_in(tmp_path / "killed")][-2:] == [before.name, last.name]
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    names = [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()]
    assert not [name for name in names if name.startswith(".")], "the unfinished folder is gone"


def test_resuming_takes_what_is_not_given_from_the_run(tmp_path: Path) -> None:
    train(tmp_path / "run", "--num-images", "4", "--learning-rate", "0.002", "--horizontal-flip")
    main(["train", "--preset", "nano", "--out", str(tmp_path / "run"), "--resume", "--num-images", "8"])
    config = read_train_config(tmp_path / "run" / "config.json")
    assert (config.learning_rate, config.horizontal_flip, config.network.embed_dim) == (0.002, True, 8)
    assert (config.num_images, load_checkpoint(tmp_path / "run").info.images) == (8, 8)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    main(["train", "--out", str(tmp_path / "moved"), "--resume", "--num-images", "12"])
    assert load_checkpoint(tmp_path / "moved").info.images == 12
    assert not (tmp_path / "run").exists()


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", "--num-images", "4")
    before = weights(tmp_path / "run")
    main(["train", "--out", str(tmp_path / "run"), "--resume"])
    assert "done: 4 images seen" in capsys.readouterr().out
    assert same(weights(tmp_path / "run"), before)


def test_changed_options_are_named_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", "--num-images", "4")
    arguments = ["train", "--out", str(tmp_path / "run"), "--resume", "--embed-dim", "16", "--objective", "flow"]
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    line = capsys.readouterr().err
    assert "embed_dim was 8, now 16" in line
    assert "objective was diffusion, now flow" in line
    assert "window_size" not in line, "only what changed is named"


def forget_checksums(checkpoint: Path) -> None:
    """Make of a checkpoint what versions wrote that had none."""
    record = json.loads((checkpoint / "checkpoint.json").read_text())
    del record["sha256"]
    (checkpoint / "checkpoint.json").write_text(json.dumps(record))


def test_a_checkpoint_without_the_optimizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", "--num-images", "4")
    checkpoint = checkpoints_in(tmp_path / "run")[-1]
    (path,) = (checkpoint / "training").iterdir()
    kept = {name: value for name, value in load_file(path).items() if "exp_avg_sq" not in name}
    save_file(kept, path)
    forget_checksums(checkpoint)
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--out", str(tmp_path / "run"), "--resume", "--num-images", "8"])
    assert f"{checkpoint}/training does not hold the weights that its configuration needs: " in capsys.readouterr().err


def test_records_and_pictures_say_what_happened(tmp_path: Path) -> None:
    train(tmp_path / "run", "--num-images", "16", "--log-every", "8", "--sample-every", "16")
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(record["images"], record["step"]) for record in records] == [(8, 2), (16, 4)]
    for record in records:
        assert record["loss"] == pytest.approx(record["mse"] + record["vb"], rel=1e-5)
        assert record["grad_norm"] > 0
        assert record["images_per_s"] > 0
        assert record["learning_rate"] == 1e-4
        assert 0 <= record["data_wait"] < 1
        quarters = [record[f"loss_q{quarter}"] for quarter in range(1, 5) if f"loss_q{quarter}" in record]
        assert min(quarters) <= record["loss"] <= max(quarters)
    assert records[1]["seconds"] > records[0]["seconds"]
    with Image.open(tmp_path / "run" / "samples" / f"{16:012d}.png") as grid:
        assert (grid.mode, grid.height) == ("L", 2 * (10 * 34 + 2))  # one row per class, after its name
        names = np.asarray(grid)[:, : -2 * (2 * 34 + 2)]
        assert all((names[68 * row : 68 * row + 68] < 128).any() for row in range(10))
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert shown == [(record["images"], pytest.approx(record["loss"])) for record in records]


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_nothing_that_is_not_finite_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    # The log is written rarely here: it is the checkpoint that has to notice.
    def take_step(trainer: training.Trainer, *batch: torch.Tensor) -> dict[str, torch.Tensor]:
        terms = take_good_step(trainer, *batch)
        if trainer.images == 12 and what == "weight":
            next(trainer.network.parameters()).data[0] = float("inf")
        if trainer.images == 12 and what == "loss":
            terms["loss"] = terms["loss"] * float("nan")
        return terms

    take_good_step = training.Trainer.take_step
    monkeypatch.setattr(training.Trainer, "take_step", take_step)
    config = make_trainer(
        tmp_path, num_images=24, checkpoint_every=4, log_every=12 if what == "loss" else 24, sample_steps=1,
        sample_every=24,
    ).config  # fmt: skip
    with pytest.raises(LamambaError, match=rf"{what} is n.* at image 12: lower learning_rate.*{8:012d}$"):
        training.train(config)
    assert [int(path.name) for path in checkpoints_in(tmp_path)] == [4, 8]
    assert all(bool(value.float().isfinite().all()) for value in weights(tmp_path).values())


def test_a_run_whose_rate_falls_keeps_its_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--decay", "cosine", "--warmup-images", "8", "--checkpoint-every", "8", "--sample-every", "16"]
    for name in ("whole", "parts"):
        train(tmp_path / name, "--num-images", "16", *options)
    shutil.rmtree(checkpoints_in(tmp_path / "parts")[-1])
    main(["train", "--out", str(tmp_path / "parts"), "--resume"])
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--out", str(tmp_path / "parts"), "--resume", "--num-images", "24"])
    assert "num_images was 16, now 24" in capsys.readouterr().err


def test_grids_of_a_run_that_never_drops_labels_are_without_guidance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scales = []

    def note_scale(network: Any, *arguments: Any, guidance_scale: float, **options: Any) -> torch.Tensor:
        scales.append(guidance_scale)
        return torch.zeros(20, 1, 32, 32)

    monkeypatch.setattr("lamamba.training.trainer.sample", note_scale)
    for dropout in ("0", "0.1"):
        train(tmp_path / dropout, "--num-images", "4", "--label-dropout", dropout)
        said = "sample grids are without guidance: this network was trained with label_dropout 0"
        assert (said in capsys.readouterr().out) == (dropout == "0")
    assert scales == [1.0, 2.0]


def test_a_run_begins_in_no_folder_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (
        ("checkpoint.json", "{}"), ("model_index.json", "{}"), ("config.json", '{"_class_name": "LaMambaDiff"}')
    ):  # fmt: skip
        out = tmp_path / name.partition(".")[0]
        out.mkdir()
        (out / name).write_text(content)
        with pytest.raises(SystemExit, match="2"):
            train(out, "--num-images", "4")
        assert f"{out} holds something else than a run ({name}): choose another --out" in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == [name]


def test_what_earlier_starts_left_is_moved_and_not_lost(tmp_path: Path) -> None:
    assert _set_aside(tmp_path) is None
    (tmp_path / "config.json").touch()
    (tmp_path / "notes.txt").touch()
    assert _set_aside(tmp_path) is None, "nothing was written yet"
    for number in (1, 2):
        (tmp_path / "log.jsonl").write_text(str(number))
        (tmp_path / "checkpoints" / ".incomplete-8").mkdir(parents=True)
        aside = tmp_path / f"earlier-{number}"
        assert _set_aside(tmp_path) == aside
        assert (aside / "log.jsonl").read_text() == str(number)
        assert (aside / "checkpoints" / ".incomplete-8").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier-1", "earlier-2", "notes.txt"]


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ({}, True),
        ({"num_images": 10_000_000}, False),
        ({"learning_rate": 5e-4}, False),
        ({"batch_size": 8, "num_images": 40_000}, False),
    ],
)
def test_a_short_run_at_the_rate_of_a_long_one_is_warned(options: dict[str, Any], warns: bool) -> None:
    advice = training.advise_short_run(TrainConfig(out=Path("run"), **options))
    assert ("learning rate 0.0001 suits long runs: after 1,562 steps" in advice, bool(advice)) == (warns, warns)


def test_a_cpu_draws_fewer_grids(tmp_path: Path) -> None:
    config, *_ = training.resolve(TrainConfig(out=tmp_path, device="cpu", num_images=10_000))
    assert (config.sample_every, config.checkpoint_every) == (2500, 1000)


def test_python_trains_and_gets_the_run(tmp_path: Path) -> None:
    network = replace(PRESETS["nano"], **TINY_CONFIG)
    options = {"batch_size": 4, "device": "cpu", "network": network, "sample_steps": 1}
    run = lamamba.train(lamamba.TrainConfig(out=str(tmp_path / "run"), num_images=8, **options))
    assert isinstance(run, lamamba.Run)
    assert [record["images"] for record in run.records] == [4, 8]
    assert run.checkpoint == checkpoints_in(tmp_path / "run")[-1]
    more = lamamba.train(replace(run.config, num_images=12, resume=True))
    assert (more, int(more.checkpoint.name), more.config.num_images) == (run, 12, 12)
    with pytest.raises(LamambaError, match="already holds a run"):
        lamamba.train(run.config)


def test_the_preset_decides_the_network_in_python_too() -> None:
    assert TrainConfig(out=Path("run"), preset="b-256").network == PRESETS["b-256"]
    assert TrainConfig(out=Path("run")).network == PRESETS["nano"]
    own = NetworkConfig(embed_dim=8, num_heads=2)
    assert TrainConfig(out=Path("run"), preset="b-256", network=own).network == own


COUNT_PAGE_FAULTS = """
import resource
import torch
from lamamba.training.run import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        large = [torch.ones(1 << 23) for _ in range(2)]
        del large
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
keep_freed_memory()
for _ in range(3):  # what is kept grows until all fits
    faults()
print(first, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only the GNU C library returns memory like this")
def test_freed_memory_is_used_again() -> None:
    printed = subprocess.run(
        [sys.executable, "-c", COUNT_PAGE_FAULTS], capture_output=True, text=True, check=True
    ).stdout
    given_back, kept = map(int, printed.split())
    assert given_back > 10_000
    assert kept < given_back / 20
