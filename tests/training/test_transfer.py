"""Training on from other weights: what fits is taken over, what does not is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lamamba.checkpoints.checkpoint import CheckpointInfo, checkpoints_in, load_checkpoint
from lamamba.checkpoints.saving import save_checkpoint
from lamamba.cli import main
from lamamba.diffusion import OBJECTIVES
from lamamba.errors import CheckpointError
from lamamba.model import LaMambaDiff
from lamamba.training.transfer import transfer_weights
from small_network import TINY_NETWORK

OPTIONS: dict[str, Any] = {
    "in_channels": 1, "sample_size": 8, "num_classes": 3, "embed_dim": 8, "num_heads": 2, "depths": (1, 1, 1, 1),
    "bottleneck_depth": 1,
}  # fmt: skip
RUN = ["--num-images", "4", "--batch-size", "2", "--device", "cpu", "--sample-steps", "1", "--sample-every", "4"]


def build(seed: int, **options: Any) -> LaMambaDiff:
    torch.manual_seed(seed)
    return LaMambaDiff(**{**OPTIONS, **options})


def write_images(folder: Path, classes: tuple[str, ...], size: int) -> Path:
    for index, name in enumerate(classes * 2):
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (size, size), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    info = CheckpointInfo(100, 10, "diffusion", ("cat", "dog", "owl"))
    return save_checkpoint(tmp_path / "before", info, {"network": build(0), "ema": build(1)}, {"none": torch.zeros(1)})


def test_classes_are_told_apart_by_name() -> None:
    before, after = build(0), build(1, num_classes=4)
    notes = transfer_weights(after, before, ("ant", "cat", "dog", "eel"), ("dog", "cat", "owl"))
    assert notes == ["2 of 4 classes are new and start as no label: ant, eel"]
    table = before.label_embedding.weight
    assert torch.equal(after.label_embedding.weight, table[[3, 1, 0, 3, 3]])
    for name, value in before.named_parameters():
        if name != "label_embedding.weight":
            assert torch.equal(value, after.get_parameter(name))


def test_the_same_classes_are_copied_without_a_word() -> None:
    before, after = build(0), build(1)
    assert transfer_weights(after, before, (), ("a", "b", "c")) == []
    assert torch.equal(after.label_embedding.weight, before.label_embedding.weight)


def test_another_resolution_predicts_what_the_network_did_there() -> None:
    before, after = build(0), build(1, sample_size=12)
    assert transfer_weights(after, before, (), ()) == ["the position embedding is resized from 8x8 to 12x12"]
    torch.nn.init.normal_(before.head.output.weight)
    after.head.load_state_dict(before.head.state_dict())
    x, t, y = torch.randn(2, 1, 12, 12), torch.tensor([3, 700]), torch.tensor([0, 2])
    torch.testing.assert_close(after(x, t, y), before(x, t, y))


def test_what_does_not_fit_is_named() -> None:
    after = build(1, in_channels=3, ssm_conv_bias=True)
    notes = transfer_weights(after, build(0), (), ())
    assert len(notes) == 2
    assert notes[0].startswith(
        "the images have 3 channels and the weights are for 1: the first and the last layer start"
    )
    assert "weights do not fit and start from scratch: " in notes[1]
    for name in ("patch_projection.weight", "head.output.weight", "encoder.0.0.ssm.convolution.bias"):
        assert name in notes[1]
    assert transfer_weights(build(1), build(0, ssm_conv_bias=True), (), ())[0].startswith("13 weights are not used: ")
    with pytest.raises(CheckpointError, match=r"only [\d,]+ of [\d,]+ parameters fit"):
        transfer_weights(build(1, embed_dim=16), build(0), (), ())


def test_a_run_starts_from_the_averaged_weights(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images(tmp_path / "images", ("bat", "cat"), size=12)
    data = ["--data", str(images), "--image-size", "12", "--channels", "1", "--out", str(tmp_path / "run")]
    main(["finetune", str(checkpoint), *data, *RUN, "--learning-rate", "1e-9", "--ema-decay", "0"])
    said = capsys.readouterr().out
    assert f"starts from the EMA weights of {checkpoint}" in said
    assert "1 of 2 classes are new and start as no label: bat" in said
    assert "the position embedding is resized from 8x8 to 12x12" in said
    before, after = load_checkpoint(checkpoint), load_checkpoint(tmp_path / "run")
    assert after.info.class_names == ("bat", "cat")
    assert (after.network.config.sample_size, after.network.config.num_classes) == (12, 2)
    weight = "encoder.0.0.mlp.linear_1.weight"
    torch.testing.assert_close(after.network.get_parameter(weight), before.network.get_parameter(weight))
    # What was begun is resumed, and not begun again.
    main(
        [
            "finetune",
            str(checkpoint),
            "--out",
            str(tmp_path / "run"),
            "--resume",
            "--num-images",
            "6",
            "--device",
            "cpu",
        ]
    )
    assert "starts from" not in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run").info.images == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a checkpoint first"),
        (["--out", "run"], "give a checkpoint first"),
        (["nanoo", "--out", "run"], "did you mean nano"),
        (["nano", "--out", "run", "--objective", "diffusion", *RUN], "was trained with the objective flow"),
    ],
)
def test_faults_are_said(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["finetune", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("embed_dim", 8192), ("sample_size", 4096), ("num_classes", 1_000_000)])
def test_sizes_that_the_weights_do_not_have_are_refused_before_the_start(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: int
) -> None:
    path = checkpoint / "ema" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), option: value}))
    with pytest.raises(SystemExit, match="2"):
        main(["finetune", str(checkpoint), "--data", "builtin", "--out", str(tmp_path / "run"), "--dry-run"])
    said = capsys.readouterr().err
    assert "of another shape" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", ["diffusion", "flow"])
def test_min_snr_weights_the_error_of_x_0(name: str) -> None:
    """For a denoiser that is off by a known amount, the loss is min(SNR, 5) times the squared error of x_0."""
    objective = OBJECTIVES[name]
    t = torch.tensor([1, 50, 400, 900]) if name == "diffusion" else torch.tensor([1.0, 100.0, 400.0, 900.0])
    torch.manual_seed(0)
    x_0, noise, error = torch.randn(3, 4, 1, 8, 8).double()

    def denoiser(x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        prediction = (noise if name == "diffusion" else noise - x_0) + error
        return torch.cat([prediction, torch.zeros_like(prediction)], dim=1)

    mse = objective.losses(denoiser, x_0, t, torch.zeros(4), noise)["mse"]
    sigma = objective.sigma(t).double()
    # x_0 = (x_t - sigma' noise) / signal: off by sigma times the error, of the velocity by t / 1000 times it.
    of_x_0 = error.square().mean((1, 2, 3)) * (sigma if name == "diffusion" else t / 1000).square()
    wanted = (1 / sigma**2).clamp(max=5) * of_x_0
    torch.testing.assert_close(objective.min_snr_weight(t, 5.0).double() * mse, wanted, rtol=1e-4, atol=0)


def test_min_snr_is_an_option_of_training(tmp_path: Path) -> None:
    losses = []
    for gamma in ("0", "5"):
        run = tmp_path / gamma
        main(["train", "--data", "builtin", "--out", str(run), *TINY_NETWORK, *RUN, "--min-snr-gamma", gamma])
        losses.append(json.loads((run / "log.jsonl").read_text().splitlines()[0]))
    assert losses[0]["mse"] == losses[1]["mse"]
    assert losses[0]["loss"] > losses[1]["loss"]


def lose_checkpoints(run: Path) -> None:
    """Leave what a run leaves that was killed before its first checkpoint."""
    shutil.rmtree(run / "checkpoints")
    (run / "samples" / "000000000999.png").write_bytes(b"of the earlier start")


def test_a_start_without_checkpoints_is_set_aside_and_begins_with_the_same_weights(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "data", ("cat", "dog", "owl"), 8)
    before, run = str(tmp_path / "before"), tmp_path / "run"
    arguments = ["finetune", before, "--data", str(data), "--image-size", "8", "--channels", "1", *RUN]
    main([*arguments, "--out", str(run)])
    wanted = load_checkpoint(run).network.state_dict()
    lose_checkpoints(run)
    log = (run / "log.jsonl").read_text()
    capsys.readouterr()
    main([*arguments, "--out", str(run)])
    said = capsys.readouterr().out
    assert f"moved files of an earlier start in {run} to {run / 'earlier-1'}" in said
    assert f"starts from the EMA weights of {before}" in said
    assert f"samples     {run / 'samples' / '000000000004.png'}" in said
    assert "999" not in said
    assert (run / "earlier-1" / "log.jsonl").read_text() == log
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["000000000004.png"]
    config = json.loads((run / "config.json").read_text())
    assert (config["start_from"], config["network"]["embed_dim"], config["preset"]) == (before, 8, f"of {before}")
    assert all(torch.equal(value, wanted[name]) for name, value in load_checkpoint(run).network.state_dict().items())


def test_resuming_names_what_the_run_began_with(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "data", ("cat", "dog", "owl"), 8)
    options = ["--data", str(data), "--image-size", "8", "--channels", "1", *RUN]
    main(["finetune", str(tmp_path / "before"), *options, "--out", str(tmp_path / "run")])
    for lose in (False, True):
        if lose:
            lose_checkpoints(tmp_path / "run")
        with pytest.raises(SystemExit):
            main(["finetune", "nano", *options, "--out", str(tmp_path / "run"), "--resume"])
        said = capsys.readouterr().err
        assert f"{tmp_path / 'run'} started from {tmp_path / 'before'}, not from nano" in said
    main(["finetune", str(tmp_path / "before"), *options, "--out", str(tmp_path / "run"), "--resume"])
    assert f"starts from the EMA weights of {tmp_path / 'before'}" in capsys.readouterr().out
    assert len(checkpoints_in(tmp_path / "run")) > 0
