"""Checkpoints are written beside training as it was when they began, and what cannot be written or read is said."""

import threading
from contextlib import closing
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from lamamba.checkpoints import saving
from lamamba.checkpoints.checkpoint import CheckpointInfo, checkpoints_in, load_network
from lamamba.checkpoints.saving import CheckpointWriter, describe_training_state, load_training_state, save_checkpoint
from lamamba.config import NetworkConfig, TrainConfig
from lamamba.errors import CheckpointError
from lamamba.model import LaMambaDiff
from lamamba.training.run import resolve
from lamamba.training.trainer import Trainer

TINY = {"embed_dim": 8, "num_heads": 2, "in_channels": 1, "sample_size": 8, "num_classes": 2, "depths": (1, 1, 1, 1)}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Hold up what writes until this is set."""
    event, write = threading.Event(), saving.save_checkpoint

    def wait_and_write(*arguments: object) -> Path:
        assert event.wait(60)
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(saving, "save_checkpoint", wait_and_write)
    return event


def test_what_is_written_is_what_there_was_at_the_beginning(tmp_path: Path, gate: threading.Event) -> None:
    network = LaMambaDiff(**TINY)
    state = {"moment": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(3.0), "random": torch.arange(5).byte()}
    wanted = {name: value.clone() for name, value in state.items()}
    writer = CheckpointWriter(tmp_path)
    writer.begin(CheckpointInfo(8), {"ema": network}, state)
    for value in state.values():
        value.zero_()
    assert writer.finish(wait=False) is None, "it goes on beside"
    assert not checkpoints_in(tmp_path)
    gate.set()
    path = writer.finish()
    assert path == checkpoints_in(tmp_path)[0]
    assert writer.finish() is None, "it is said once"
    writer.close()
    assert describe_training_state(path).keys() == wanted.keys()
    found = {name: torch.zeros_like(value) for name, value in wanted.items()}
    load_training_state(path, found)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    for name, value in load_network(path / "ema").state_dict().items():
        assert torch.equal(value, network.state_dict()[name]), name


def test_the_next_waits_for_the_one_before_and_closing_for_the_last(tmp_path: Path, gate: threading.Event) -> None:
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.begin(CheckpointInfo(8), {}, {"x": torch.zeros(2)})
    threading.Timer(0.2, gate.set).start()
    writer.begin(CheckpointInfo(16), {}, {"x": torch.ones(2)})
    assert [int(path.name) for path in checkpoints_in(tmp_path)][:1] in ([8], [16])
    writer.close()
    assert [int(path.name) for path in checkpoints_in(tmp_path)] == [16]


def test_what_waited_and_was_interrupted_waits_again(tmp_path: Path, gate: threading.Event) -> None:
    writer = CheckpointWriter(tmp_path)
    writer.begin(CheckpointInfo(8), {}, {"x": torch.zeros(2)})
    assert writer._under_way is not None
    with patch.object(writer._under_way, "result", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        writer.finish()
    assert writer.finish(wait=False) is None, "it is not written yet"
    gate.set()
    assert writer.finish() == checkpoints_in(tmp_path)[0]
    writer.close()


def test_weights_are_copied_once_those_before_are_written(tmp_path: Path, gate: threading.Event) -> None:
    network = {**TINY, "sample_size": 32, "num_classes": 10, "depths": (1, 1, 1, 1)}
    config = TrainConfig(out=tmp_path, batch_size=2, network=NetworkConfig(**network), device="cpu")  # type: ignore[arg-type]
    with closing(Trainer(*resolve(config))) as trainer:
        reader, wanted = trainer.batches(), []
        for _ in range(2):
            trainer.take_step(*next(reader))
            wanted.append({name: value.clone() for name, value in trainer.network.state_dict().items()})
            threading.Timer(0.3, gate.set).start()
            trainer.save()
        trainer.writer.finish()
    for path, weights in zip(checkpoints_in(tmp_path), wanted, strict=True):
        for name, value in load_network(path / "network").state_dict().items():
            assert torch.equal(value, weights[name]), name


def test_a_checkpoint_that_could_not_be_written_is_said_when_asked_for(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path)
    (tmp_path / "checkpoints").write_text("in the way")
    writer.begin(CheckpointInfo(8), {}, {"x": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"000000000008 could not be written .*there is no earlier one"):
        writer.finish()
    assert writer.finish() is None
    (tmp_path / "checkpoints").unlink()
    writer.begin(CheckpointInfo(8), {}, {"x": torch.zeros(2)})
    assert writer.finish() == tmp_path / "checkpoints" / "000000000008"


def test_another_rank_may_make_the_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = saving.shutil.rmtree

    def remove_and_lose_the_race(folder: Path, **options: bool) -> None:
        remove(folder, **options)
        if folder.name == ".incomplete-000000000008":
            (folder / "training").mkdir(parents=True)

    monkeypatch.setattr(saving.shutil, "rmtree", remove_and_lose_the_race)
    path = save_checkpoint(tmp_path, CheckpointInfo(8), {}, {"x": torch.ones(2)})
    found = {"x": torch.zeros(2)}
    load_training_state(path, found)
    assert torch.equal(found["x"], torch.ones(2))


def test_a_training_state_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, CheckpointInfo(8), {}, {"x": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"training cannot be read .*resume from another"):
        load_training_state(path, {"x": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"training cannot be read .*y.*resume from another"):
        load_training_state(path, {"y": torch.zeros(2)})
    (file,) = (path / "training").iterdir()
    file.write_bytes(file.read_bytes()[:9])
    with pytest.raises(CheckpointError, match=r"training cannot be read"):
        describe_training_state(path)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"training cannot be read"):
        load_training_state(path, {"x": torch.zeros(2)})
