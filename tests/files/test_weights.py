"""Weights are read in every form that diffusers writes, and a loader that does not get all of them says so."""

import argparse
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from lamamba.checkpoints.checkpoint import load_denoiser, load_network
from lamamba.cli import main
from lamamba.config import SamplingConfig
from lamamba.data.latents import Latents, check_autoencoder
from lamamba.errors import CheckpointError, ConfigError
from lamamba.files.weights import read_pickle
from lamamba.model import LaMambaDiff
from lamamba.sampling.generate import ImageSampler
from lamamba.sampling.pipeline import LaMambaDiffPipeline

TINY = {"embed_dim": 8, "num_heads": 2, "in_channels": 1, "sample_size": 8, "num_classes": 2, "depths": (1, 1, 1, 1)}
WEIGHTS = "diffusion_pytorch_model.safetensors"
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp16": {"variant": "fp16"},
    "bf16": {"variant": "bf16"},
    "shards": {"max_shard_size": "5KB"},
    "named variant": {"variant": "non-ema"},
    "named variant shards": {"variant": "ema-v1.0", "max_shard_size": "5KB"},
    "named variant pickle": {"variant": "ema-v1.0", "safe_serialization": False},
    "fp16 shards": {"variant": "fp16", "max_shard_size": "5KB"},
    "pickle": {"safe_serialization": False},
    "fp16 pickle": {"variant": "fp16", "safe_serialization": False},
    "pickle shards": {"safe_serialization": False, "max_shard_size": "5KB"},
}


def build_network() -> LaMambaDiff:
    torch.manual_seed(0)
    return LaMambaDiff(**TINY)


def build_dit() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=4, num_layers=2, sample_size=8
    )


def build_autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=2, sample_size=16,
    )  # fmt: skip


def open_dit(folder: Path) -> Any:
    return load_denoiser(folder).network.transformer


def open_autoencoder(folder: Path) -> Any:
    return Latents.open(folder, torch.device("cpu")).autoencoder


KINDS: dict[str, tuple[Callable[[], Any], Callable[[Path], Any]]] = {
    "network": (build_network, load_network),
    "dit": (build_dit, open_dit),
    "autoencoder": (build_autoencoder, open_autoencoder),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_that_diffusers_writes_is_read(kind: str, form: str, tmp_path: Path) -> None:
    build, load = KINDS[kind]
    model = build()
    wanted = model.state_dict()
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(FORMS[form].get("variant", ""), torch.float32)
    model.to(dtype).save_pretrained(tmp_path, **FORMS[form])
    assert (tmp_path / WEIGHTS).exists() == (form == "plain")
    if "shards" in form:
        assert len(list(tmp_path.glob("*-of-*"))) > 1
    loaded = load(tmp_path).state_dict()
    assert loaded.keys() == wanted.keys()
    for name, value in wanted.items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], value.to(dtype).float()), name


@pytest.mark.parametrize("kind", KINDS)
def test_of_several_variants_the_most_exact_is_read(kind: str, tmp_path: Path) -> None:
    build, load = KINDS[kind]
    for number, options in ((2, {"variant": "bf16"}), (1, {"variant": "fp16"}), (0, {})):
        model = build()
        for value in model.parameters():
            value.data.fill_(number)
        model.save_pretrained(tmp_path, **options)
        assert all(bool((value == number).all()) for value in load(tmp_path).parameters())


def prefix(weights: dict[str, Tensor]) -> None:
    for name in list(weights):
        weights[f"module.{name}"] = weights.pop(name)


def remove(weights: dict[str, Tensor]) -> None:
    del weights[min(weights)]


def add(weights: dict[str, Tensor]) -> None:
    weights["something.else"] = torch.ones(1)


def reshape(weights: dict[str, Tensor]) -> None:
    weights[min(weights)] = torch.ones(3, 5)


def break_value(weights: dict[str, Tensor]) -> None:
    weights[min(weights)].view(-1)[0] = float("nan")


def round_to_whole(weights: dict[str, Tensor]) -> None:
    weights[min(weights)] = weights[min(weights)].long()


DAMAGE = {
    prefix: r"\d+ missing \(.*, \.\.\.\); \d+ unexpected \(module\..*, \.\.\.\)",
    remove: r"1 missing \({first}\)",
    add: r"1 unexpected \(something\.else\)",
    reshape: r"1 of another shape \({first} \(3, 5\) instead of \([0-9, ]+\)\)",
    break_value: r"1 not finite \({first}\)",
    round_to_whole: r"1 not of floating point numbers \({first}\)",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_weights_that_do_not_fit_are_named(kind: str, damage: Callable[..., None], tmp_path: Path) -> None:
    build, load = KINDS[kind]
    build().save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    first = min(weights)
    damage(weights)
    save_file(weights, tmp_path / WEIGHTS)
    said = DAMAGE[damage].replace("{first}", first.replace(".", r"\."))
    with pytest.raises(CheckpointError, match=rf"^{tmp_path} does not hold .* needs: {said}$") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["network", "vae"])
def test_a_pipeline_of_diffusers_is_checked_too(part: str, tmp_path: Path) -> None:
    pipe = LaMambaDiffPipeline.from_checkpoint("nano")
    LaMambaDiffPipeline(LaMambaDiff(**{**TINY, "in_channels": 2}), pipe.scheduler, build_autoencoder()).save_pretrained(
        tmp_path
    )
    LaMambaDiffPipeline.from_pretrained(tmp_path)
    weights = load_file(tmp_path / part / WEIGHTS)
    first = min(weights)
    remove(weights)
    save_file(weights, tmp_path / part / WEIGHTS)
    for load in (LaMambaDiffPipeline.from_pretrained, LaMambaDiffPipeline.from_checkpoint):
        with pytest.raises(CheckpointError, match=rf"/{part} does not hold .*: 1 missing \({first}\)"):
            load(tmp_path)
    if part == "network":
        with pytest.raises(CheckpointError, match=rf": 1 missing \({first}\)"):
            LaMambaDiff.from_pretrained(tmp_path / part)


PIPELINE_FAULTS: dict[str, tuple[str, Any, str]] = {
    "no autoencoder": ("model_index.json", {"vae": ["diffusers", "UNet2DModel"]}, "vae[1] is 'UNet2DModel'"),
    "no network": ("model_index.json", {"network": ["diffusers", "UNet2DModel"]}, "network[1] is 'UNet2DModel'"),
    "names": ("model_index.json", {"id2label": [1]}, "id2label is [1]"),
    "network": ("network/config.json", {"depths": [100_000] * 4}, "depths is (100000, 100000, 100000, 100000)"),
    "scheduler": ("scheduler/scheduler_config.json", {"num_train_timesteps": "x"}, "num_train_timesteps is 'x'"),
    "autoencoder": ("vae/config.json", {"layers_per_block": 10**6}, "layers_per_block is 1000000"),
    "nesting": ("model_index.json", '{"a":' * 200_000, "recursion limit"),
    "nesting of the network": ("network/config.json", '{"a":' * 200_000, "recursion limit"),
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    scheduler = LaMambaDiffPipeline.from_checkpoint("nano").scheduler
    network = LaMambaDiff(**{**TINY, "in_channels": 2})
    LaMambaDiffPipeline(network, scheduler, build_autoencoder()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fault", PIPELINE_FAULTS)
def test_a_wrong_value_of_a_pipeline_is_named(pipeline: Path, fault: str, tmp_path: Path) -> None:
    name, change, said = PIPELINE_FAULTS[fault]
    folder = Path(shutil.copytree(pipeline, tmp_path / "pipeline"))
    path = folder / name
    path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))
    for load in (LaMambaDiffPipeline.from_pretrained, LaMambaDiffPipeline.from_checkpoint):
        with pytest.raises(CheckpointError, match=rf"^{path}.*{re.escape(said)}"):
            load(folder)


def test_another_model_is_no_autoencoder_and_no_network(tmp_path: Path) -> None:
    for build, name in ((build_network, "LaMambaDiff"), (build_dit, "DiTTransformer2DModel")):
        build().save_pretrained(tmp_path / name)
        for check in (open_autoencoder, check_autoencoder):
            with pytest.raises(CheckpointError, match=rf"{name} holds a {name}, and no AutoencoderKL"):
                check(tmp_path / name)
    build_autoencoder().save_pretrained(tmp_path / "vae")
    with pytest.raises(CheckpointError, match="vae holds a AutoencoderKL, and no LaMambaDiff"):
        load_denoiser(tmp_path / "vae")
    with pytest.raises(CheckpointError, match=f"holds no autoencoder.*, such as {tmp_path / 'vae'}"):
        open_autoencoder(tmp_path)
    (tmp_path / "vae" / "config.json").write_text('{"architectures": ["CLIPTextModel"]}')
    with pytest.raises(CheckpointError, match="vae holds a CLIPTextModel, and no LaMambaDiff"):
        load_denoiser(tmp_path / "vae")


@pytest.mark.parametrize(
    ("name", "said"),
    [("../weights.safetensors", "which is not a file beside it"), ("gone.safetensors", "gone.safetensors is missing")],
)
def test_an_index_names_files_beside_it(name: str, said: str, tmp_path: Path) -> None:
    build_network().save_pretrained(tmp_path, max_shard_size="5KB")
    index = tmp_path / f"{WEIGHTS}.index.json"
    shutil.copy(min(tmp_path.glob("*-of-*")), tmp_path.parent / "weights.safetensors")
    index.write_text(f'{{"weight_map": {{"head.output.bias": "{name}"}}}}')
    with pytest.raises(CheckpointError, match=said):
        load_network(tmp_path)


class Runs:
    """Pickled, it names a function, which would be called where pickles are run."""

    def __init__(self, function: Callable[..., Any], argument: str) -> None:
        self.call = (function, (argument,))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return self.call


@pytest.mark.parametrize("is_new", [True, False], ids=["zip", "legacy"])
def test_a_pickle_gives_tensors_and_runs_nothing(is_new: bool, tmp_path: Path) -> None:
    path, done = tmp_path / "checkpoint.pt", tmp_path / "done"
    content = {"model": {"a": torch.arange(3.0), "b": torch.ones(2, 2).bfloat16()}, "args": argparse.Namespace(x=1)}
    torch.save({**content, "print": Runs(print, "it runs")}, path, _use_new_zipfile_serialization=is_new)
    read = read_pickle(path)
    assert torch.equal(read["model"]["a"], torch.arange(3.0))
    assert (read["model"]["b"].dtype, read["args"], read["print"]) == (torch.bfloat16, {}, {})
    for function, name in ((os.system, "os.system"), (eval, "builtins.eval")):
        torch.save({**content, "x": Runs(function, f"touch {done}")}, path, _use_new_zipfile_serialization=is_new)
        with pytest.raises(CheckpointError, match=rf"^{path} refers to {name}, which is code .* it was not run"):
            read_pickle(path)
    torch.save({**content, "x": torch.ones(1).expand(9, 9)}, path, _use_new_zipfile_serialization=is_new)
    with pytest.raises(CheckpointError, match=r"contains a tensor of shape \(9, 9\) with fewer values"):
        read_pickle(path)
    endless = {"a": torch.ones(1)}
    endless["again"] = endless  # type: ignore[assignment]
    torch.save(endless, path, _use_new_zipfile_serialization=is_new)
    assert read_pickle(path)["again"]["a"] == 1
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot be read as a PyTorch checkpoint") as error:
        read_pickle(path)
    assert "weights_only" not in str(error.value)
    assert not done.exists()


def test_an_autoencoder_of_other_latents_is_refused(tmp_path: Path) -> None:
    build_autoencoder().save_pretrained(tmp_path)
    said = r"latents of 2 channels, and the network samples 1: give \(--vae\)"
    with pytest.raises(ConfigError, match=said):
        LaMambaDiffPipeline.from_checkpoint("nano", tmp_path)
    with pytest.raises(ConfigError, match=said):
        ImageSampler(SamplingConfig(checkpoint="nano", vae=tmp_path), torch.device("cpu"))


def test_attention_of_autoencoders_of_2022_is_read_under_its_names(tmp_path: Path) -> None:
    build_autoencoder().save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in weights.items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        renamed[name] = value
    assert renamed.keys() != weights.keys()
    save_file(renamed, tmp_path / WEIGHTS)
    loaded = open_autoencoder(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


def test_the_variant_of_a_whole_pipeline_is_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LaMambaDiffPipeline.from_checkpoint("nano").to(torch.float16).save_pretrained(tmp_path / "pipe", variant="fp16")
    main(["sample", str(tmp_path / "pipe"), "--labels", "bag", "--num-per-label", "1", "--steps", "1",
          "--device", "cpu", "--out", str(tmp_path / "grid.png")])  # fmt: skip
    assert (tmp_path / "grid.png").is_file()
