"""A third network and a third objective take one file each."""

import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

import lamamba
from lamamba.checkpoints.checkpoint import CheckpointInfo
from lamamba.config import AverageConfig, NetworkConfig
from lamamba.data import FASHION_MNIST_CLASSES
from lamamba.diffusion import OBJECTIVES
from lamamba.model import NETWORKS
from lamamba.sampling.schedulers import check_scheduler, make_scheduler
from lamamba.training.averages import average


def load(name: str) -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def network() -> Iterator[ModuleType]:
    yield load("network")
    del NETWORKS["ConvNet"]


def test_a_network_is_added_in_one_file(network: ModuleType, tmp_path: Path) -> None:
    options = {"batch_size": 64, "device": "cpu", "sample_steps": 1, "power_averages": (0.05, 0.1)}
    network.main(tmp_path / "run", num_images=1280, checkpoint_every=640, log_every=128, **options)
    assert Image.open(tmp_path / "run" / "samples.png").width == 2 * (10 * 34 + 2)
    run = lamamba.Run(tmp_path / "run")
    losses = [record["loss"] for record in run.records]
    assert losses[-1] < 0.7 * losses[0]
    loaded = lamamba.load_checkpoint(run.checkpoint)
    assert isinstance(loaded.network, network.ConvNet)
    assert not loaded.network.training
    assert loaded.info == CheckpointInfo(1280, 20, "flow", FASHION_MNIST_CLASSES)
    # Resumed from the middle, it ends with the same weights.
    wanted = {name: value.clone() for name, value in loaded.network.state_dict().items()}
    shutil.rmtree(run.checkpoint)
    assert int(run.checkpoint.name) == 640
    lamamba.train(replace(run.config, resume=True))
    resumed = lamamba.load_checkpoint(tmp_path / "run").network.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in resumed.items())
    average(AverageConfig(tmp_path / "run", 0.07, tmp_path / "averaged"))
    assert isinstance(lamamba.load_denoiser(tmp_path / "averaged").network, network.ConvNet)
    with pytest.raises(lamamba.CheckpointError, match="holds a ConvNet, and this pipeline a LaMambaDiff"):
        lamamba.LaMambaDiffPipeline.from_checkpoint(tmp_path / "run")
    with pytest.raises(lamamba.CheckpointError, match="only from a LaMambaDiff to another LaMambaDiff"):
        lamamba.train(lamamba.TrainConfig(tmp_path / "other", start_from=str(tmp_path / "run"), objective="flow"))


def test_a_network_that_is_not_registered_is_named(network: ModuleType, tmp_path: Path) -> None:
    config = lamamba.TrainConfig(tmp_path / "run", network_class="ConvNets", device="cpu")
    with pytest.raises(lamamba.ConfigError, match=r"no network is named 'ConvNets' .* did you mean ConvNet\?"):
        lamamba.train(config)
    own = network.ConvNet(1, 8, 2)
    own.save_pretrained(tmp_path / "own")
    record = json.loads((tmp_path / "own" / "config.json").read_text())
    (tmp_path / "own" / "config.json").write_text(json.dumps({**record, "widths": 3}))
    with pytest.raises(lamamba.CheckpointError, match=r"config.json does not fit the network ConvNet .*'widths'"):
        lamamba.load_checkpoint(tmp_path / "own")
    (tmp_path / "own" / "config.json").write_text(json.dumps({**record, "_class_name": "Unknown"}))
    with pytest.raises(lamamba.CheckpointError, match="Unknown"):
        lamamba.load_checkpoint(tmp_path / "own")


def test_blocks_like_vmamba_train_and_scan_in_two_ways() -> None:
    example = load("vmamba")
    losses = example.main(num_images=512)
    assert sum(losses[-2:]) < 0.95 * sum(losses[:2])
    scan, x = example.CrossScan(width=32, num_states=2), torch.randn(2, 4, 6, 32)
    fused = scan(x)
    scan.fused = False
    torch.testing.assert_close(scan(x), fused, rtol=1e-4, atol=1e-5)


@pytest.fixture
def objective() -> Iterator[ModuleType]:
    yield load("objective")
    del OBJECTIVES["x"]


def test_the_equations_of_the_objective_fit_together(objective: ModuleType) -> None:
    kind = objective.XPrediction()
    x_0, noise, other = torch.randn((3, 4, 1, 6, 6), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1, 200, 700, 998])
    signal, noise_share = (level[:, None, None, None] for level in kind.levels(t))
    x_t = signal * x_0 + noise_share * noise
    torch.testing.assert_close(kind.predict_x_0(x_t, t, kind.move_x_0(x_t, t, x_0, other)), other)
    wrong = x_0 + 0.1
    losses = kind.losses(lambda *_: torch.cat([wrong, x_0], dim=1), x_0, t, t, noise)
    snr = (signal / noise_share).square().flatten()
    torch.testing.assert_close(losses["loss"], 0.01 * snr.clamp(min=1.0), atol=1e-5, rtol=1e-3)
    # Where it is 1 or more, the weighted error of x_0 is that of noise prediction.
    noise_error = (signal * 0.1 / noise_share).square().flatten()
    torch.testing.assert_close(losses["loss"][:2], noise_error[:2], atol=1e-5, rtol=1e-3)
    weighted = kind.min_snr_weight(t, 5.0) * losses["mse"]
    torch.testing.assert_close(weighted, 0.01 * snr.clamp(max=5.0), atol=1e-5, rtol=1e-3)


def test_an_objective_is_added_in_one_file(objective: ModuleType, tmp_path: Path) -> None:
    for sampler in objective.XPrediction.samplers:  # reach data whose right samples are known
        scheduler = make_scheduler(objective.XPrediction(), sampler, 25)
        for strength in (1.0, 0.5):
            check_scheduler(scheduler, objective.XPrediction(), 1, pixels=False, num_steps=25, strength=strength)
    tiny = NetworkConfig(
        in_channels=1, sample_size=32, num_classes=10, embed_dim=8, num_heads=2, depths=(1, 1, 1, 1),
        bottleneck_depth=1, decoder_extra_depth=0,
    )  # fmt: skip
    options = {"batch_size": 8, "sample_steps": 1, "device": "cpu", "network": tiny}
    objective.main(tmp_path / "run", num_images=16, **options)
    assert (tmp_path / "run" / "samples.png").is_file()
    assert lamamba.load_checkpoint(tmp_path / "run").info == CheckpointInfo(16, 2, "x", FASHION_MNIST_CLASSES)
    run = lamamba.Run(tmp_path / "run")
    lamamba.train(replace(run.config, num_images=24, resume=True, device="cpu"))
    assert [record["images"] for record in run.records] == [8, 16, 24]
    pipe = lamamba.LaMambaDiffPipeline.from_checkpoint(tmp_path / "run")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config["prediction_type"] == "sample"
    assert len(pipe([1, 2], num_inference_steps=2).images) == 2
    pipe.scheduler = make_scheduler(lamamba.Diffusion(), "dpm++", 2)
    with pytest.raises(lamamba.ConfigError, match="takes epsilon, and this network predicts the clean image"):
        pipe([1], num_inference_steps=2)
