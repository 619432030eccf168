"""Whatever stands in a file that is read, a wrong value is named with its file and key, at once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_weights import TINY, build_autoencoder, build_dit

from lamamba.checkpoints.checkpoint import (
    CheckpointInfo,
    find_checkpoint,
    load_checkpoint,
    load_denoiser,
    shipped_weights,
)
from lamamba.checkpoints.saving import save_checkpoint
from lamamba.config import TrainConfig
from lamamba.data.latents import Latents
from lamamba.errors import CheckpointError, DataError
from lamamba.files.records import MAX_BYTES, SchedulerRecord, parse_record, plain, read_record, read_train_config
from lamamba.model import LaMambaDiff
from lamamba.training.log import read_log


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    network = LaMambaDiff(**TINY)
    return save_checkpoint(run, CheckpointInfo(8, 2, "flow", ("a", "b")), {"ema": network}, {"x": torch.ones(1)})


def refused(path: Path, what: str, load: Any, **values: Any) -> None:
    before = path.read_text()
    edit(path, **values)
    with pytest.raises(CheckpointError) as error:
        load()
    path.write_text(before)
    assert str(error.value).startswith(f"{path}: {what}"), error.value
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


WRONG = [None, True, "8", 1.5, -1, 1 << 80, [], {}, [[]], ["a", 3]]


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize("key", ["format", "images", "step", "objective", "class_names", "vae", "sha256"])
def test_a_wrong_value_in_a_checkpoint_is_named(checkpoint: Path, key: str, value: Any) -> None:
    fits = {"class_names": ([],), "vae": (None, "8"), "sha256": ({},)}
    if any(value == other for other in fits.get(key, ())):
        return
    path = checkpoint / "checkpoint.json"
    before = path.read_text()
    edit(path, **{key: value})
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(checkpoint)
    path.write_text(before)
    said = str(error.value)
    if (key, value) == ("format", 1 << 80):
        assert said.startswith(f"{path} has format {1 << 80}, this version reads 2")
    elif key == "class_names" and isinstance(value, list):
        assert said.startswith(f"{path}: class_names[{len(value) - 1}] is {value[-1]!r}: it should be a valid string")
    else:
        assert said.startswith(f"{path}: {key} is {value!r}: it should ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("depths", [100_000] * 4, "depths is (100000, 100000, 100000, 100000): it must be smaller"),
        ("depths", [1, 1, 1], "depths[3] is missing"),
        ("depths", [1, 1, 1, "1"], "depths[3] is '1'"),
        ("embed_dim", 1 << 40, "embed_dim is 1099511627776: it must be from 4 to 8,192"),
        ("embed_dim", "8", "embed_dim is '8'"),
        ("num_classes", True, "num_classes is True"),
        ("scan", 3, "scan is 3"),
        ("use_ssm", "no", "use_ssm is 'no'"),
        ("ssm_ratio", None, "ssm_ratio is None"),
        ("_class_name", 5, "_class_name is 5"),
    ],
)
def test_a_wrong_value_in_a_network_is_named(tmp_path: Path, key: str, value: Any, said: str) -> None:
    LaMambaDiff(**TINY).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    refused(path, said, lambda: load_denoiser(tmp_path), **{key: value})


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("block_out_channels", [4, 1 << 40], "block_out_channels[1] is 1099511627776"),
        ("block_out_channels", [4] * 1000, "block_out_channels is [4, 4"),
        ("layers_per_block", 10**6, "layers_per_block is 1000000"),
        ("norm_num_groups", 0, "norm_num_groups is 0"),
        ("scaling_factor", "half", "scaling_factor is 'half'"),
        ("scaling_factor", 0, "scaling_factor is 0"),
        ("shift_factor", [], "shift_factor is []"),
        ("force_upcast", 1, "force_upcast is 1"),
    ],
)
def test_a_wrong_value_in_an_autoencoder_is_named(tmp_path: Path, key: str, value: Any, said: str) -> None:
    build_autoencoder().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    refused(path, said, lambda: Latents.open(tmp_path, torch.device("cpu")), **{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_layers", 10**6), ("sample_size", 10**6), ("num_embeds_ada_norm", 10**12), ("num_attention_heads", "2")],
)
def test_a_wrong_value_in_a_dit_is_named(tmp_path: Path, key: str, value: Any) -> None:
    build_dit().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    refused(path, f"{key} is {value!r}: it should", lambda: load_denoiser(tmp_path), **{key: value})


@pytest.mark.parametrize("key", ["batch_size", "learning_rate", "power_averages", "data", "vae", "network", "compile"])
def test_a_wrong_value_in_a_run_is_named(tmp_path: Path, key: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(plain(TrainConfig(out=tmp_path))))
    assert read_train_config(path) == TrainConfig(out=tmp_path)
    refused(path, f"{key} is ", lambda: read_train_config(path), **{key: {"a": 1} if key != "network" else 7})


def test_infinity_is_read_over_where_nobody_asks_for_it(tmp_path: Path) -> None:
    """As diffusers writes it for DPM-Solver++."""
    path = tmp_path / "scheduler_config.json"
    path.write_text('{"num_train_timesteps": 1000, "lambda_min_clipped": -Infinity}')
    assert read_record(path, SchedulerRecord)["num_train_timesteps"] == 1000
    path.write_text('{"beta_end": Infinity}')
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        read_record(path, SchedulerRecord)


def test_a_wrong_length_of_a_run_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"num_images": "many"}')
    refused(path, "num_images is 'many'", lambda: read_log(tmp_path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a":' * 200_000, "is not valid JSON: recursion limit exceeded"),
        ("[" * 200_000 + "]" * 200_000, "is not valid JSON: recursion limit exceeded"),
        ('{"images": 1', "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[]", ": the content is []: it should be an object"),
        ("{}", ": format is missing"),
    ],
    ids=range(6),
)
def test_what_is_no_record_is_refused(tmp_path: Path, text: str, said: str) -> None:
    for name in ("checkpoint.json", "model_index.json", "config.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text(text)
        with pytest.raises(CheckpointError) as error:
            load_denoiser(folder)
        if not (name != "checkpoint.json" and text == "{}"):
            assert str(error.value).startswith(f"{folder / name}")
            assert said in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", ["NaN", "1e999", "-Infinity"])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, number: str) -> None:
    (tmp_path / "checkpoint.json").write_text(f'{{"format": {number}}}')
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/checkpoint\.json is not valid JSON"):
        load_denoiser(tmp_path)


def test_large_files_and_other_errors(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.json"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(CheckpointError, match=f"{MAX_BYTES + 1:,} bytes"):
        load_checkpoint(tmp_path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match="is not valid JSON"):
        read_record(path, dict, DataError)
    with pytest.raises(DataError, match=r"^lengths: \[1\] is 'b': it should be a valid number$"):
        parse_record('[1, "b"]', "lengths", list[float], DataError)
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_record(tmp_path, dict, DataError)


def test_checksums_stay_in_the_checkpoint(checkpoint: Path) -> None:
    path = checkpoint / "checkpoint.json"
    for name in ("../../config.json", "/etc/passwd", "ema/../../x"):
        refused(path, f"sha256 names '{name}'", lambda: load_checkpoint(checkpoint), sha256={name: "0" * 64})


def test_names_of_classes_are_those_of_the_network(checkpoint: Path) -> None:
    path = checkpoint / "checkpoint.json"
    before = path.read_text()
    edit(path, class_names=["a", "b", "c"])
    with pytest.raises(CheckpointError, match="names 3 classes, but its network has 2"):
        load_checkpoint(checkpoint)
    path.write_text(before)
    assert find_checkpoint("nano") == shipped_weights()["nano"]


def test_names_that_are_not_utf_8_are_read_as_they_were_written(tmp_path: Path) -> None:
    names = ["caf\udce9", "\U0001f480\udcff", "\\udc80", "plain", "\U0001fc80"]
    config = TrainConfig(out=tmp_path / names[0], data=names[1], vae=Path(names[2]))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(plain(config)))
    assert read_train_config(path) == config
    path.write_text(json.dumps({"names": names, names[0]: {names[1]: 3}}))
    assert read_record(path, dict[str, Any]) == {"names": names, names[0]: {names[1]: 3}}
    path.write_text(r'{"names": "\ud83d"}')
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        read_record(path, dict[str, Any])
