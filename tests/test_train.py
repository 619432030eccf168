"""Training on real images from one command: it stops and goes on exactly, and refuses what it cannot do."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lamamba.checkpoint import checkpoints_in, load_checkpoint
from lamamba.cli import main
from lamamba.errors import LamambaError

TINY = [
    *("--embed-dim", "8", "--num-heads", "2", "--depths", "1", "1", "1", "1", "--bottleneck-depth", "1"),
    *("--data", "builtin", "--batch-size", "4", "--device", "cpu", "--seed", "3", "--sample-steps", "1"),
]


def train(out: Path, *options: str) -> None:
    main(["train", "--out", str(out), *TINY, *options])


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoints_in(run)[-1]
    return {f"{path.parent.name}/{k}": v for path in newest.rglob("*.safetensors") for k, v in load_file(path).items()}


def losses(run: Path) -> list[tuple[int, float]]:
    return [(r["images"], r["loss"]) for r in map(json.loads, (run / "log.jsonl").read_text().splitlines())]


@pytest.mark.parametrize("extra", [[], ["--horizontal-flip", "--accumulate", "2"], ["--objective", "flow"]])
def test_ten_and_ten_steps_are_bitwise_twenty(tmp_path: Path, extra: list[str]) -> None:
    train(tmp_path / "whole", "--num-images", "80", "--sample-every", "80", "--log-every", "4", *extra)
    train(tmp_path / "parts", "--num-images", "40", "--sample-every", "20", "--log-every", "4", *extra)
    torch.manual_seed(99)  # the program around a run has no say in it
    main(["train", "--out", str(tmp_path / "parts"), "--resume", "--num-images", "80"])
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert len(whole) > 500
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_a_run_leaves_its_configuration_log_and_pictures(tmp_path: Path) -> None:
    train(tmp_path / "run", "--num-images", "16")
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
    train(
        tmp_path / "run", "--num-images", "160", "--learning-rate", "0.01", "--log-every", "40", "--sample-every", "160"
    )
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
    from lamamba import train as module

    calls = 0

    def losses_that_break(*arguments: object, **options: object) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        terms = real(*arguments, **options)
        return {name: value * (float("nan") if calls > 2 else 1) for name, value in terms.items()}

    real = module.training_losses
    monkeypatch.setattr(module, "training_losses", losses_that_break)
    from lamamba.cli import _parse, _train_defaults
    from lamamba.config import TrainConfig

    arguments = ["--out", str(tmp_path / "run"), *TINY, "--num-images", "16"]
    config = _parse(TrainConfig, "train", arguments, _train_defaults(arguments))
    with pytest.raises(LamambaError, match=r"nan at image 12.*000000000008"):
        module.train(config)
