"""What leaves PyTorch samples the same images: the examples with onnxruntime and AOTInductor."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import lamamba
from forked import run_python
from lamamba.checkpoints.checkpoint import CheckpointInfo, Distilled, load_checkpoint, write_weights
from lamamba.cli import main
from lamamba.config import NetworkConfig
from lamamba.diffusion import OBJECTIVES
from lamamba.model import Block, LaMambaDiff
from lamamba.ops.backend import use_backend
from lamamba.ops.residual_norm import add_gated

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


def no_draw(shape: tuple[int, ...]) -> np.ndarray:
    raise AssertionError("these samplers draw no noise in their steps")


@pytest.mark.parametrize("steps", [1, 2, 3, 25])
@pytest.mark.parametrize("objective", ["diffusion", "flow"])
def test_the_example_samples_what_pytorch_does(
    weights: Path, tmp_path: Path, objective: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    import onnx_sampling

    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    network = load_checkpoint(weights / "weights").network
    write_weights(tmp_path / "weights", network, CheckpointInfo(objective=objective))
    main(["export", str(tmp_path / "weights"), "--format", "onnx", "--guidance", "--out", str(tmp_path)])
    options = {"num_steps": steps, "guidance_scale": 3.0, "clip_sample": True, "noise": noise}
    wanted = lamamba.sample(network, OBJECTIVES[objective], [0, 1], [0, 0], **options).numpy()
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
    found = onnx_sampling.sample(session, [0, 1], noise.numpy(), steps, 3.0, no_draw)
    assert wanted.std() > 0.1
    np.testing.assert_allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize(("objective", "sampler"), [("flow", "ancestral"), ("diffusion-v", "ancestral-cosine")])
def test_the_example_samples_students(
    weights: Path, tmp_path: Path, objective: str, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    import onnx_sampling

    network = load_checkpoint(weights / "weights").network
    write_weights(
        tmp_path / "student", network, CheckpointInfo(objective=objective, distilled=Distilled(4, sampler, 2.0))
    )
    main(["export", str(tmp_path / "student"), "--format", "onnx", "--out", str(tmp_path)])
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {"sampler": sampler, "num_steps": 4, "clip_sample": True, "noise": noise}
    wanted = lamamba.sample(network, OBJECTIVES[objective], [0, 1], [0, 0], **options).numpy()
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
    properties = json.loads(session.get_modelmeta().custom_metadata_map["lamamba"])
    generator = torch.Generator().manual_seed(0)  # of an image: all have the same seed
    found = onnx_sampling.sample_student(
        session, properties, [0, 1], noise.numpy(), lambda shape: torch.randn(shape[1:], generator=generator).numpy()
    )
    assert wanted.std() > 0.1
    np.testing.assert_allclose(found, wanted, atol=1e-3)

    # On the command line, one generator draws all noise, so that no step repeats the noise of the start.
    seeds, make_generator = [], np.random.default_rng

    def seeded(seed: int) -> np.random.Generator:
        seeds.append(seed)
        return make_generator(seed)

    monkeypatch.setattr(np.random, "default_rng", seeded)
    arguments = ["onnx_sampling.py", str(tmp_path / "network.onnx"), "--seed", "3", "--out", str(tmp_path / "row.ppm")]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(EXAMPLES / "onnx_sampling.py"), run_name="__main__")
    assert seeds == [3]


def test_the_example_writes_a_picture(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--label", "1", "--number", "3", "--steps", "2", "--out", str(tmp_path / "row.ppm")]
    monkeypatch.setattr(sys, "argv", ["onnx_sampling.py", str(weights / "network.onnx"), *options])
    runpy.run_path(str(EXAMPLES / "onnx_sampling.py"), run_name="__main__")
    assert (tmp_path / "row.ppm").read_bytes().startswith(b"P6 24 8 255\n")
    assert (tmp_path / "row.ppm").stat().st_size == len("P6 24 8 255\n") + 3 * 24 * 8


@pytest.mark.slow
def test_a_block_compiles_for_servers(tmp_path: Path) -> None:
    """A scan and an MLP, with AOTInductor, as examples/aoti compiles a whole network, which takes minutes."""
    if not shutil.which("g++"):
        pytest.skip("needs a C++ compiler: apt-get install g++")
    torch.manual_seed(0)
    config = NetworkConfig(embed_dim=8, num_heads=2, use_attention=False, ssm_state_size=2)
    block = WholeBlock(config).eval().requires_grad_(False)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)

    def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(batch, 4, 4, 8), torch.randn(batch, 32)

    batch = {0: torch.export.Dim("batch", min=1)}
    with use_backend("portable"), torch.no_grad():
        block(*inputs(3))
        torch.export.save(torch.export.export(block, inputs(3), dynamic_shapes=(batch, batch)), tmp_path / "block.pt2")
    arguments = [str(tmp_path / "block.pt2"), str(tmp_path / "package.pt2")]
    done = run_python(str(EXAMPLES / "aoti" / "compile.py"), *arguments)
    assert done.returncode == 0, done.stderr
    package = torch._inductor.aoti_load_package(str(tmp_path / "package.pt2"))
    for number in (1, 4):
        given = inputs(number)
        torch.testing.assert_close(package(*given), block(*given), atol=1e-4, rtol=1e-4)


class WholeBlock(torch.nn.Module):
    """A block, after which the last residual is added."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.block = Block(config, 8, shifted=True, project=True)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return add_gated(*self.block(x, condition))
