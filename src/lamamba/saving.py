"""Checkpoints of a run: written beside training, by all processes that hold a part, and its state read back.

For their layout, and to load what is in them, see `lamamba.checkpoint`.
"""

import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lamamba.checkpoint import CheckpointInfo, checkpoints_in, save_network, write_info
from lamamba.errors import CheckpointError
from lamamba.files import TEMPORARY, flush, utf8_path
from lamamba.model import LaMambaDiff

# PyTorch's exception of several processes is no Exception.
_ERRORS = (OSError, SafetensorError, CheckpointException)


def save_checkpoint(
    run: Path,
    info: CheckpointInfo,
    networks: Mapping[str, LaMambaDiff],
    training_state: Mapping[str, Tensor],
    keep: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint whole or not at all, then delete the oldest beyond `keep` (0 keeps all).

    Args:
        run: the run folder.
        info: what the checkpoint says of itself.
        networks: folders of the checkpoint and what goes there; the first process's are written.
        training_state: plain tensors, of which the first process's are written, and parts of tensors from all.
        keep: how many checkpoints stay.
        group: of the processes that hold parts and all call this; None is this process alone.

    Raises:
        CheckpointError: it could not be written, for want of space say; earlier checkpoints are untouched.
    """
    final = run / "checkpoints" / f"{info.images:012d}"
    temporary = final.with_name(TEMPORARY + final.name)
    is_first = group is None or dist.get_rank(group) == 0
    try:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        _save_parts(training_state, temporary / "training", group)
        if is_first:
            for name, network in networks.items():
                save_network(network, temporary / name)
            write_info(temporary, info)
            _give_name(temporary, final)
    except _ERRORS as error:
        shutil.rmtree(temporary, ignore_errors=True)
        whole = checkpoints_in(run)
        kept = f"the last whole one is {whole[-1]}" if whole else "none was saved before"
        raise CheckpointError(
            f"checkpoint {final} could not be written ({_cause(error)}): free some space; {kept}"
        ) from error
    for old in checkpoints_in(run)[:-keep] if keep and is_first else []:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _save_parts(state: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a process alone is meant to be
        save(dict(state), storage_writer=writer, process_group=group, no_dist=group is None)


def _give_name(temporary: Path, final: Path) -> None:
    for path in temporary.rglob("*"):
        flush(path)
    replaced = final.with_name(f"{temporary.name}-replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():  # the same images again: the older goes only once the newer has its place
        final.rename(replaced)
    temporary.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    flush(final.parent)


def _cause(error: BaseException) -> BaseException:
    """Find what went wrong first, in any process, behind the collective error."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


class CheckpointWriter:
    """Writes a run's checkpoints while training goes on, one after the other.

    Args:
        run: the run folder.
        keep: see `save_checkpoint`.
        group: see `save_checkpoint`; of no other use meanwhile.
    """

    def __init__(self, run: Path, keep: int = 0, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self._run, self._keep = run, keep
        self._stager = BlockingAsyncStager()  # copies to the CPU, parts of tensors too
        self._staged: dict[str, torch.Size] = {}
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future[Path] | None = None

    def begin(
        self, info: CheckpointInfo, networks: Mapping[str, LaMambaDiff], training_state: Mapping[str, Tensor]
    ) -> None:
        """Copy the state, which may change afterwards, and begin to write it and the networks, which may not.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.finish()
        state = self._stage(dict(training_state))
        self._under_way = self._executor.submit(
            save_checkpoint, self._run, info, networks, state, self._keep, self.group
        )

    def _stage(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy to the CPU; what comes from CUDA to pinned memory, which is kept for the next checkpoint."""
        shapes = {name: tensor.shape for name, tensor in state.items()}
        if shapes != self._staged:  # the stager's memory is of one set of tensors
            keeps = any(tensor.device.type == "cuda" for tensor in state.values())
            self._stager, self._staged = BlockingAsyncStager(cache_staged_state_dict=keeps), shapes
        try:
            staged: dict[str, Tensor] = self._stager.stage(state)
        except RuntimeError:  # there is no more memory to be pinned
            self._stager = BlockingAsyncStager()
            staged = self._stager.stage(state)
        return staged

    def finish(self, wait: bool = True) -> Path | None:
        """Say where the checkpoint is that was begun and not asked for yet, or None; raises CheckpointError."""
        under_way = self._under_way
        if under_way is None or not (wait or under_way.done()):
            return None
        try:
            return under_way.result()
        finally:
            if under_way.done():  # and not only the waiting has ended, by Ctrl-C
                self._under_way = None

    def close(self) -> None:
        """End with the checkpoint that is being written."""
        self._executor.shutdown()


def describe_training_state(checkpoint: Path) -> dict[str, Tensor]:
    """List what a checkpoint holds of optimizer, random state and averages, as tensors on the meta device."""
    with _training_state_read(checkpoint):
        metadata = _training_reader(checkpoint).read_metadata().state_dict_metadata
        return {
            name: torch.empty(value.size, dtype=value.properties.dtype, device="meta")
            for name, value in metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }


def load_training_state(checkpoint: Path, state: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Read of a checkpoint's optimizer, random state and averages what is named.

    Args:
        checkpoint: written by any number of processes.
        state: to be filled, tensors or this process's parts of them.
        group: see `save_checkpoint`.

    Raises:
        CheckpointError: it cannot be read.
    """
    with _training_state_read(checkpoint), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(state, storage_reader=_training_reader(checkpoint), process_group=group, no_dist=group is None)


def _training_reader(checkpoint: Path) -> HuggingFaceStorageReader:
    return HuggingFaceStorageReader(str(utf8_path(checkpoint / "training")))


@contextmanager
def _training_state_read(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except (*_ERRORS, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint / 'training'} cannot be read ({_cause(error)}): resume from another checkpoint"
        ) from error
