"""Checkpoints are whole or not there, and what is damaged or foreign is named."""

import json
from pathlib import Path

import pytest
import torch

from forked import run_python
from lamamba.checkpoints.checkpoint import (
    CheckpointInfo,
    checkpoints_in,
    export,
    load_checkpoint,
    load_denoiser,
    load_network,
    shipped_weights,
)
from lamamba.checkpoints.saving import save_checkpoint
from lamamba.cli import main
from lamamba.config import TrainConfig
from lamamba.errors import CheckpointError, ConfigError
from lamamba.files.records import plain
from lamamba.model import LaMambaDiff
from lamamba.sampling.pipeline import LaMambaDiffPipeline

TINY = {"embed_dim": 8, "num_heads": 2, "in_channels": 1, "sample_size": 8, "num_classes": 2, "depths": (1, 1, 1, 1)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    network = LaMambaDiff(**TINY)
    for images in (8, 16, 24):
        save_checkpoint(
            tmp_path, CheckpointInfo(images), {"network": network, "ema": network}, {"x": torch.ones(3)}, keep=2
        )
    return tmp_path


def test_the_oldest_go_and_the_newest_is_loaded(run: Path) -> None:
    assert [int(path.name) for path in checkpoints_in(run)] == [16, 24]
    loaded = load_checkpoint(run)
    assert loaded.info.images == 24
    saved = LaMambaDiff.from_pretrained(run / "checkpoints" / f"{24:012d}" / "network").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in loaded.network.state_dict().items())


def test_a_folder_that_was_not_finished_is_ignored(run: Path) -> None:
    (run / "checkpoints" / f".incomplete-{32:012d}").mkdir()
    (run / "checkpoints" / f"{40:012d}").mkdir()
    assert load_checkpoint(run).info.images == 24


def test_a_full_disk_leaves_what_was_saved(run: Path) -> None:
    # A limit on the size of files makes the operating system refuse the write, as a full disk does.
    script = f"""
import resource, signal
import torch
from pathlib import Path
from lamamba.checkpoints.checkpoint import CheckpointInfo, CheckpointError
from lamamba.checkpoints.saving import save_checkpoint
from lamamba.model import LaMambaDiff
from lamamba.sampling.pipeline import LaMambaDiffPipeline
network = LaMambaDiff(**{TINY!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))
try:
    save_checkpoint(Path({str(run)!r}), CheckpointInfo(32), {{"network": network}}, {{"x": torch.ones(3)}}, keep=1)
except CheckpointError as error:
    print("CheckpointError", error)
"""
    result = run_python("-c", script)
    assert result.stdout.startswith("CheckpointError")
    assert f"{24:012d}" in result.stdout
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"{16:012d}", f"{24:012d}"]
    assert load_checkpoint(run).info.images == 24


def damage_weights(folder: Path) -> None:
    path = folder / "ema" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_model(folder: Path) -> None:
    path = folder / "ema" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "UNet2DModel"}))


def other_width(folder: Path) -> None:
    path = folder / "ema" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "embed_dim": 16}))


def no_weights(folder: Path) -> None:
    (folder / "ema" / "diffusion_pytorch_model.safetensors").unlink()


def garbage(folder: Path) -> None:
    (folder / "checkpoint.json").write_text("{")


def later_format(folder: Path) -> None:
    path = folder / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


def impossible_network(folder: Path) -> None:
    path = folder / "ema" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "embed_dim": 10}))


def network_of_words(folder: Path) -> None:
    path = folder / "ema" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "depths": "deep"}))


def a_list(folder: Path) -> None:
    (folder / "ema" / "config.json").write_text("[]")


def unknown_objective(folder: Path) -> None:
    path = folder / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "objective": "guesswork"}))


def no_class_names(folder: Path) -> None:
    path = folder / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "class_names": None}))


DAMAGE = [
    *(damage_weights, other_model, other_width, no_weights, garbage, later_format, impossible_network),
    *(network_of_words, a_list, unknown_objective, no_class_names),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_and_foreign_checkpoints_are_named(run: Path, damage: object) -> None:
    folder = run / "checkpoints" / f"{24:012d}"
    damage(folder)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=str(folder)) as error:
        load_checkpoint(run)
    assert "\n" not in str(error.value)


def test_what_is_shipped_goes_by_the_name_of_its_data_too() -> None:
    assert load_checkpoint("fashion-mnist").path == load_checkpoint("nano").path


def test_names_that_are_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean nano"):
        load_checkpoint("nanno")
    with pytest.raises(CheckpointError, match="no weights are shipped for xl-256"):
        load_checkpoint("xl-256")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["nano", "nano-4-steps", "emoji-64"])
def test_the_shipped_weights_are_small_and_whole(name: str) -> None:
    loaded = load_checkpoint(name)
    assert loaded.path == shipped_weights()[name]
    assert len(loaded.info.class_names) == 10
    assert sum(path.stat().st_size for path in loaded.path.rglob("*") if path.is_file()) <= 16e6
    assert all(value.isfinite().all() for value in loaded.network.state_dict().values())
    assert loaded.network.dtype == torch.float32


def test_the_shipped_student_takes_four_steps() -> None:
    distilled = load_checkpoint("nano-4-steps").info.distilled
    assert distilled is not None
    assert (distilled.steps, distilled.sampler) == (4, "ancestral")


def test_a_later_checkpoint_of_the_same_images_replaces_the_first(run: Path) -> None:
    network = LaMambaDiff(**TINY)
    save_checkpoint(run, CheckpointInfo(24, step=7), {"ema": network}, {"x": torch.zeros(1)})
    assert [int(path.name) for path in checkpoints_in(run)] == [16, 24]
    assert load_checkpoint(run).info.step == 7


def test_what_a_checkpoint_says_of_itself_is_read_again(tmp_path: Path) -> None:
    info = CheckpointInfo(8, 2, "flow", ("a", "b"), "/somewhere/vae")
    path = save_checkpoint(tmp_path, info, {"ema": LaMambaDiff(**TINY)}, {"x": torch.ones(1)})
    for name in (tmp_path, path, str(path)):
        loaded = load_checkpoint(name)
        assert (loaded.info, loaded.path) == (info, path)
        assert not loaded.network.training


def test_loading_leaves_the_global_generator_alone(run: Path) -> None:
    before = torch.get_rng_state()
    load_network(checkpoints_in(run)[-1] / "ema")
    assert torch.equal(torch.get_rng_state(), before)


def test_an_exported_network_is_small_and_loads_as_it_was(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "exported")
    exported, whole = load_checkpoint(tmp_path / "exported"), load_checkpoint(run)
    assert exported.info == whole.info
    assert exported.network.dtype == torch.float32
    torch.testing.assert_close(exported.network.state_dict(), whole.network.state_dict(), rtol=1e-3, atol=1e-6)
    weights = "ema/diffusion_pytorch_model.safetensors"
    assert (exported.path / weights).stat().st_size < 0.7 * (whole.path / weights).stat().st_size


def test_what_is_written_does_not_say_where_it_was_loaded_from(run: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(run)
    saved = save_checkpoint(tmp_path / "again", CheckpointInfo(8), {"ema": loaded.network}, {"x": torch.ones(1)})
    export(run, tmp_path / "exported")
    plain = json.loads((run / "checkpoints" / f"{24:012d}" / "ema" / "config.json").read_text())
    for folder in (saved, tmp_path / "exported"):
        text = (folder / "ema" / "config.json").read_text()
        assert json.loads(text) == plain
        assert str(run) not in text


@pytest.fixture
def pipeline(run: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "pipeline"
    LaMambaDiffPipeline.from_checkpoint(run).save_pretrained(folder)
    edit_index(folder, id2label={"0": "cat", "1": "dog"})
    return folder


def edit_index(pipeline: Path, **values: object) -> None:
    path = pipeline / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_saved_pipeline_is_a_checkpoint_too(run: Path, pipeline: Path) -> None:
    for load in (load_checkpoint, load_denoiser):
        loaded = load(pipeline)
        assert (loaded.info, loaded.path) == (CheckpointInfo(24, class_names=("cat", "dog")), pipeline)
        for name, value in load_checkpoint(run).network.state_dict().items():
            assert torch.equal(loaded.network.state_dict()[name], value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, "(holds|is) a StableDiffusionPipeline"),
        ({"objective": "score"}, "objective is 'score': it should be 'diffusion' or 'diffusion-v'"),
        ({"id2label": {"0": "cat", "2": "dog"}}, "id2label names 2 classes, but not 1"),
        ({"id2label": ["cat"]}, r"model_index.json: id2label is \['cat'\]: it should be an object"),
    ],
)
def test_a_pipeline_that_cannot_be_read_is_named(pipeline: Path, values: dict[str, object], said: str) -> None:
    edit_index(pipeline, **values)
    for load in (load_checkpoint, load_denoiser):
        with pytest.raises(CheckpointError, match=said):
            load(pipeline)


COMMANDS = {
    "sample": ["RUN", "--out", "OUT.png"],
    "generate": ["RUN", "--out", "OUT"],
    "finetune": ["RUN", "--out", "OUT", "--data", "builtin"],
    "push": ["RUN", "--out", "OUT"],
    "convert": ["RUN", "OUT.pt"],
    "info": ["RUN"],
    "demo": ["RUN"],
    "average": ["RUN", "--sigma-rel", "0.05", "--out", "OUT"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("is_saving", [False, True], ids=["new", "saving"])
def test_a_run_without_checkpoints_is_one_line(
    command: str, is_saving: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "my run"
    (run / "samples").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(plain(TrainConfig(out=run))))
    if is_saving:
        (run / "checkpoints" / f".incomplete-{8:012d}").mkdir(parents=True)
    arguments = [word.replace("RUN", str(run)).replace("OUT", str(tmp_path / "out")) for word in COMMANDS[command]]
    with pytest.raises(SystemExit):
        main([command, *arguments])
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"lamamba: error: {run} has no checkpoint yet: wait for the run's first one, or start the run again with "
        f"lamamba train --out '{run}' --resume"
    )
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_checkpoint(run / "samples")
    with pytest.raises(CheckpointError, match=r"config\.json is a file: give a folder"):
        load_checkpoint(run / "config.json")
