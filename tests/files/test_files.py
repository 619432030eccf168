"""Files that are there completely or not at all, also where a file system cannot sync folders."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lamamba import LaMambaDiff
from lamamba.checkpoints.checkpoint import CheckpointInfo, verify
from lamamba.checkpoints.saving import save_checkpoint
from lamamba.errors import CheckpointError
from lamamba.files import atomic_write, flush

SYNC, OPEN = os.fsync, os.open


def refuse_to_sync_folders(number: int) -> Callable[[int], None]:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        SYNC(descriptor)

    return fsync


def refuse_to_open_folders(path: str | Path, flags: int, *rest: int, **options: int) -> int:
    if flags == os.O_RDONLY and os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return OPEN(path, flags, *rest, **options)


@pytest.fixture(params=["EINVAL", "ENOTSUP", "EIO", "folders cannot be opened"])
def without_folder_sync(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param.startswith("E"):
        monkeypatch.setattr(os, "fsync", refuse_to_sync_folders(getattr(errno, request.param)))
    else:
        monkeypatch.setattr(os, "open", refuse_to_open_folders)


@pytest.mark.usefixtures("without_folder_sync")
def test_files_are_written_where_folders_cannot_be_synced(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("all of it")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "all of it")]
    flush(tmp_path)


@pytest.mark.usefixtures("without_folder_sync")
def test_checkpoints_are_written_where_folders_cannot_be_synced(tmp_path: Path) -> None:
    network = LaMambaDiff(
        sample_size=4, in_channels=1, embed_dim=4, num_heads=1, depths=(1, 1, 1, 1), bottleneck_depth=0
    )
    checkpoint = save_checkpoint(tmp_path, CheckpointInfo(images=3), {"ema": network}, {"state": torch.ones(2)})
    assert checkpoint == tmp_path / "checkpoints" / "000000000003"
    verify(checkpoint)


def test_a_file_that_cannot_be_synced_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"), atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("after")
    assert (tmp_path / "a.txt").read_text() == "before"
