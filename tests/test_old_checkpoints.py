"""Checkpoints of earlier versions load, sample and train on as they did: a run of each format, kept in golden/.

`python tests/test_old_checkpoints.py VERSION` records a run of a format, and what is made of it.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lamamba import load_checkpoint, sample
from lamamba.checkpoints.checkpoint import DISTILLED_FORMAT, FORMAT, checkpoints_in
from lamamba.cli import main
from lamamba.diffusion import OBJECTIVES, Diffusion

GOLDEN = Path(__file__).parent / "golden"
STUDENT = "checkpoint-2"  # of progressive distillation, which earlier versions had
OPTIONS = [
    *("--data", "builtin", "--batch-size", "4", "--learning-rate", "0.001", "--warmup-images", "8", "--device", "cpu"),
    *("--embed-dim", "4", "--num-heads", "1", "--depths", "1", "1", "1", "1", "--bottleneck-depth", "0"),
    *("--window-size", "2", "--mlp-ratio", "1", "--log-every", "4", "--sample-every", "100", "--sample-steps", "1"),
]


def record(version: int) -> None:
    """Train for 4 steps of 4 images, and keep the run and what is made of it."""
    kept = GOLDEN / f"checkpoint-{version}"
    kept.mkdir()  # fails where there is one, which is to stay
    os.chdir(GOLDEN)  # so that the run's configuration holds no path of this machine
    main(["train", "--out", kept.name, *OPTIONS, "--num-images", "16", "--checkpoint-every", "16"])
    for path in kept.iterdir():
        if path.name not in ("config.json", "checkpoints"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    images = paint(kept)
    shutil.copytree(kept, "going-on")
    save_file({"images": images, **train_on(Path("going-on"))}, kept / "expected.safetensors")
    shutil.rmtree("going-on")


def paint(run: Path) -> Tensor:
    loaded = load_checkpoint(run)
    network, own = loaded.network, loaded.info.distilled
    if own:
        objective = OBJECTIVES[loaded.info.objective]
        return sample(network, objective, [0, 9], [0, 1], sampler=own.sampler, num_steps=own.steps)
    # By a sampler that has its steps from its paper, whatever is the default.
    return sample(network, Diffusion(), [0, 9], [0, 1], sampler="ddim", num_steps=4, guidance_scale=2.0)


def train_on(run: Path) -> dict[str, Tensor]:
    """Resume for 4 steps; the losses, the norms of the gradients, and those of the weights at the end."""
    main(["train", "--out", str(run), "--resume", "--num-images", "32"])
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    curves = {name: torch.tensor([record[name] for record in records]) for name in ("loss", "grad_norm")}
    weights = load_file(checkpoints_in(run)[-1] / "network" / "diffusion_pytorch_model.safetensors")
    return {**curves, "weights": torch.stack([weights[name].norm() for name in sorted(weights)])}


KEPT = sorted(GOLDEN.glob("checkpoint-*"))


@pytest.fixture(params=KEPT, ids=lambda path: path.name)
def kept(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.mark.parametrize("version", [FORMAT, DISTILLED_FORMAT])
def test_the_present_formats_are_kept(version: int) -> None:
    assert (GOLDEN / f"checkpoint-{version}" / "expected.safetensors").is_file(), "record it: see golden/README.md"


def test_it_samples_what_it_did(kept: Path) -> None:
    expected = load_file(kept / "expected.safetensors")["images"]
    # After four steps of training values reach hundreds: versions of the operations differ by rounding of those.
    torch.testing.assert_close(paint(kept), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kept", [path for path in KEPT if path.name != STUDENT], ids=lambda path: path.name)
def test_it_trains_on_as_it_did(kept: Path, tmp_path: Path) -> None:
    expected = load_file(kept / "expected.safetensors")
    run = Path(shutil.copytree(kept, tmp_path / "run"))
    for name, values in train_on(run).items():
        torch.testing.assert_close(
            values, expected[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text
        )
    assert int(checkpoints_in(run)[-1].name) == 32


def test_a_student_of_rounds_is_not_distilled_further(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(GOLDEN / STUDENT, tmp_path / "run"))
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--out", str(run), "--resume"])
    assert "is from an earlier version, which used another method: distill again" in capsys.readouterr().err


if __name__ == "__main__":
    record(int(sys.argv[1]))
