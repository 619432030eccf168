"""What leaves PyTorch samples the same images: the example with onnxruntime and NumPy."""

import runpy
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import lamamba
from lamamba.checkpoints.checkpoint import CheckpointInfo, load_checkpoint, write_weights
from lamamba.cli import main
from lamamba.model import LaMambaDiff

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of color images that predicts some noise."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    network = LaMambaDiff(
        in_channels=3, sample_size=8, num_classes=2, embed_dim=8, num_heads=2, depths=(1, 1, 1, 1), bottleneck_depth=1,
        decoder_extra_depth=0,
    )  # fmt: skip
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    write_weights(folder / "weights", network, CheckpointInfo())
    main(["export", str(folder / "weights"), "--format", "onnx", "--guidance", "--out", str(folder)])
    return folder


@pytest.mark.parametrize("steps", [1, 2, 25])
def test_the_example_samples_what_pytorch_does(weights: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    import onnx_sampling

    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    network = load_checkpoint(weights / "weights").network
    options = {"num_steps": steps, "guidance_scale": 3.0, "clip_sample": True, "noise": noise}
    wanted = lamamba.sample(network, lamamba.Diffusion(), [0, 1], [0, 0], **options).numpy()
    session = onnxruntime.InferenceSession(weights / "network.onnx")
    found = onnx_sampling.sample(session, [0, 1], noise.numpy(), steps, 3.0)
    assert wanted.std() > 0.1
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_the_example_writes_a_picture(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--label", "1", "--number", "3", "--steps", "2", "--out", str(tmp_path / "row.ppm")]
    monkeypatch.setattr(sys, "argv", ["onnx_sampling.py", str(weights / "network.onnx"), *options])
    runpy.run_path(str(EXAMPLES / "onnx_sampling.py"), run_name="__main__")
    assert (tmp_path / "row.ppm").read_bytes().startswith(b"P6 24 8 255\n")
    assert (tmp_path / "row.ppm").stat().st_size == len("P6 24 8 255\n") + 3 * 24 * 8
