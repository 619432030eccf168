"""DiTs that diffusers saved, sampled as diffusers' own pipeline samples them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

from lamamba.checkpoints.checkpoint import load_denoiser
from lamamba.cli import main
from lamamba.data.latents import Latents
from lamamba.diffusion import Diffusion
from lamamba.errors import CheckpointError, ConfigError
from lamamba.model import LaMambaDiff
from lamamba.sampling import sample
from tiny_autoencoder import write_autoencoder

LABELS, SEEDS = [3, 998, 3], [5, 6, 7]
NAMES = {**{str(label): f"thing {label}" for label in range(1000)}, "0": "tench, Tinca", "4": "crane", "9": "crane"}


def write_pipeline(folder: Path, out_channels: int = 4) -> Path:
    """Save a DiTPipeline as small as they come; it has a thousand classes, as diffusers' code has throughout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=out_channels, num_layers=2,
            sample_size=8, num_embeds_ada_norm=1000,
        )  # fmt: skip
        for parameter in transformer.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    vae = AutoencoderKL.from_pretrained(write_autoencoder(folder / "vae", shift_factor=None), low_cpu_mem_usage=False)
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    DiTPipeline(transformer, vae, scheduler).save_pretrained(folder)
    edit(folder / "model_index.json", id2label=NAMES)
    return folder


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_images_are_those_of_the_pipeline_of_diffusers(pipeline: Path, guidance_scale: float) -> None:
    theirs = DiTPipeline.from_pretrained(pipeline, low_cpu_mem_usage=False)
    theirs.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    wanted = theirs(LABELS, guidance_scale, generators, num_inference_steps=20, output_type="np").images

    loaded = load_denoiser(pipeline)
    x = sample(loaded.network, Diffusion(), LABELS, SEEDS, sampler="ddim", num_steps=20, guidance_scale=guidance_scale)
    assert loaded.info.vae is not None
    images = Latents.open(Path(loaded.info.vae), torch.device("cpu")).decode(x).numpy().transpose(0, 2, 3, 1)
    assert np.abs(images - 255 * wanted).max() < 0.51, "but for rounding to whole numbers"
    for first, second in ((0, 1), (0, 2)):
        assert np.abs(images[first].astype(int) - images[second]).max() > 3
    assert wanted.std() > 0.01


def test_the_denoiser_answers_noise_and_variance(pipeline: Path) -> None:
    network = load_denoiser(pipeline).network
    assert (network.null_label, network.config.sample_size, network.device.type) == (1000, 8, "cpu")
    x, t, y = torch.randn(2, 2, 8, 8), torch.tensor([10, 900]), torch.tensor([1, 1000])
    out = network(x, t, y)
    assert out.shape == (2, 4, 8, 8)
    assert torch.equal(out, network(x, t, y)), "no label is dropped at random"
    assert bool((network(x, t, torch.tensor([2, 1000]))[0] != out[0]).any())
    with pytest.raises(ConfigError, match="square latents whose side is a multiple of 2, not 8 by 6"):
        network(x[..., :6], t, y)


@pytest.mark.parametrize("sampler", Diffusion.samplers)
def test_every_sampler_of_noise_prediction_applies(pipeline: Path, sampler: str) -> None:
    network = load_denoiser(pipeline).network
    x = sample(network, Diffusion(), [3, 4], [5, 6], sampler=sampler, num_steps=4, guidance_scale=2.0)
    alone = sample(network, Diffusion(), [4], [6], sampler=sampler, num_steps=4, guidance_scale=2.0)
    assert x.shape == (2, 2, 8, 8)
    torch.testing.assert_close(x[1:], alone, rtol=1e-4, atol=1e-4)


def test_the_command_samples_a_pipeline_by_the_names_of_its_classes(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid.png"
    options = ["--steps", "2", "--num-per-label", "1", "--device", "cpu", "--out", str(out)]
    main(["sample", str(pipeline), "--labels", "tench,crane 9,THING 7,1000", *options])
    assert "4 images (tench, crane 9, thing 7, no label)" in capsys.readouterr().out
    settings = json.loads(Image.open(out).info["lamamba"])
    assert (settings["labels"], settings["guidance"]) == ([0, 9, 7, 1000], 2.0)


def test_a_transformer_alone_needs_an_autoencoder(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(checkpoint: Path, name: str, *options: str) -> np.ndarray:
        arguments = ["--labels", "3", "--steps", "2", "--device", "cpu", "--out", str(tmp_path / name)]
        main(["sample", str(checkpoint), *arguments, *options])
        return np.asarray(Image.open(tmp_path / name))

    alone = draw(pipeline / "transformer", "alone.png", "--vae", str(pipeline / "vae"))
    assert np.array_equal(alone, draw(pipeline, "whole.png"))
    with pytest.raises(SystemExit):
        draw(pipeline / "transformer", "none.png")
    assert "samples latents, of 2 channels: give (--vae) the folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        draw(pipeline, "wide.png", "--size", "16", "32")
    assert "a DiT samples square latents" in capsys.readouterr().err


def test_the_layout_of_the_official_weights_is_read(pipeline: Path, tmp_path: Path) -> None:
    wanted = load_denoiser(pipeline).network.state_dict()
    old = write_pipeline(tmp_path / "old")
    weights = old / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    unused = {"cross_attention_dim": None, "num_vector_embeds": None, "only_cross_attention": False}
    edit(old / "transformer" / "config.json", _class_name="Transformer2DModel", **unused)
    edit(old / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    for path in (old, old / "transformer"):
        state = load_denoiser(path).network.state_dict()
        assert all(torch.equal(state[name], value) for name, value in wanted.items())


def test_what_cannot_be_sampled_is_named(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "fixed variance", out_channels=2)
    with pytest.raises(
        CheckpointError, match="2 input and 2 output channels: only DiTs that also predict the variance"
    ):
        load_denoiser(folder)
    edit(folder / "model_index.json", id2label={"0": "cat", "2": "dog"})
    with pytest.raises(CheckpointError, match="names 2 classes, but not 1"):
        load_denoiser(folder)
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    with pytest.raises(CheckpointError, match="prediction_type 'v_prediction': only DiTs trained with 'epsilon'"):
        load_denoiser(folder)
    edit(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(CheckpointError, match="is a StableDiffusionPipeline: only LaMambaDiffPipeline and DiT"):
        load_denoiser(folder)
    edit(folder / "transformer" / "config.json", _class_name="UNet2DModel")
    with pytest.raises(CheckpointError, match="holds a UNet2DModel, and no LaMambaDiff"):
        load_denoiser(folder / "transformer")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    edit(folder / "transformer" / "config.json", _class_name="DiTTransformer2DModel")
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model.safetensors cannot be read as safetensors"):
        load_denoiser(folder / "transformer")


def test_checkpoints_of_this_package_load_as_before() -> None:
    assert isinstance(load_denoiser("nano").network, LaMambaDiff)
