"""Write a run's checkpoints while training continues, on all ranks that hold a part, and read its state back.

`lamamba.checkpoints.checkpoint` describes the format and loads networks.
"""

import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

from lamamba.checkpoints.checkpoint import CheckpointInfo, checkpoints_in, save_network, write_info
from lamamba.errors import CheckpointError
from lamamba.files import TEMPORARY, flush, utf8_path

# PyTorch's CheckpointException is not an Exception.
_ERRORS = (OSError, SafetensorError, CheckpointException)


def save_checkpoint(
    run: Path,
    info: CheckpointInfo,
    networks: Mapping[str, Any],
    training_state: Mapping[str, Tensor],
    keep: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint atomically, then delete all but the newest `keep` (0 keeps all).

    Args:
        run: the run folder.
        info: what checkpoint.json records.
        networks: networks by their folder in the checkpoint; rank 0 writes them.
        training_state: plain tensors, which rank 0 writes, and sharded tensors, whose parts all ranks write.
        keep: how many checkpoints to keep.
        group: the ranks that hold parts; all of them call this. None is this process alone.

    Raises:
        CheckpointError: it could not be written, for example because the disk is full. Earlier checkpoints are
            untouched.
    """
    final = run / "checkpoints" / f"{info.images:012d}"
    temporary = final.with_name(TEMPORARY + final.name)
    is_first = group is None or dist.get_rank(group) == 0
    try:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True, exist_ok=True)  # another rank may have begun to write
        _save_parts(training_state, temporary / "training", group)
        if is_first:
            for name, network in networks.items():
                save_network(network, temporary / name)
            write_info(temporary, info)
            _give_name(temporary, final)
    except _ERRORS as error:
        shutil.rmtree(temporary, ignore_errors=True)
        whole = checkpoints_in(run)
        kept = f"the last complete one is {whole[-1]}" if whole else "there is no earlier one"
        raise CheckpointError(
            f"checkpoint {final} could not be written ({_cause(error)}): free some space; {kept}"
        ) from error
    for old in checkpoints_in(run)[:-keep] if keep and is_first else []:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _save_parts(state: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended for a single process
        save(dict(state), storage_writer=writer, process_group=group, no_dist=group is None)


def _give_name(temporary: Path, final: Path) -> None:
    for path in temporary.rglob("*"):
        flush(path)
    replaced = final.with_name(f"{temporary.name}-replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():  # the same number of images: remove the old one only after the new one is in place
        final.rename(replaced)
    temporary.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    flush(final.parent)


def _cause(error: BaseException) -> BaseException:
    """Return the first error of any rank behind a collective error."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


class CheckpointWriter:
    """Writes a run's checkpoints while training continues, one at a time; arguments as of `save_checkpoint`.

    Do not use `group` for anything else meanwhile.
    """

    def __init__(self, run: Path, keep: int = 0, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self._run, self._keep = run, keep
        self._stager = BlockingAsyncStager()  # copies to the CPU, parts of tensors too
        self._staged: dict[str, torch.Size] = {}
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future[Path] | None = None

    def begin(self, info: CheckpointInfo, networks: Mapping[str, Any], training_state: Mapping[str, Tensor]) -> None:
        """Copy the state and start writing it and the networks. The networks must not change until that is done.

        Raises:
            CheckpointError: the previous checkpoint could not be written.
        """
        self.finish()
        state = self._stage(dict(training_state))
        self._under_way = self._executor.submit(
            save_checkpoint, self._run, info, networks, state, self._keep, self.group
        )

    def _stage(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors to the CPU; CUDA tensors to pinned memory, which is kept for the next checkpoint."""
        shapes = {name: tensor.shape for name, tensor in state.items()}
        if shapes != self._staged:  # the stager's memory fits one set of tensors
            keeps = any(tensor.device.type == "cuda" for tensor in state.values())
            self._stager, self._staged = BlockingAsyncStager(cache_staged_state_dict=keeps), shapes
        try:
            return self._stager.stage(state)
        except RuntimeError:  # no more memory can be pinned
            self._stager = BlockingAsyncStager()
            return self._stager.stage(state)

    def finish(self, wait: bool = True) -> Path | None:
        """Return the path of the checkpoint that `begin` started, once, or None; raises CheckpointError."""
        under_way = self._under_way
        if under_way is None or not (wait or under_way.done()):
            return None
        try:
            return under_way.result()
        finally:
            if under_way.done():  # not if Ctrl-C ended only the waiting
                self._under_way = None

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and stop."""
        self._executor.shutdown()


def describe_training_state(checkpoint: Path) -> dict[str, Tensor]:
    """Describe the training state in a checkpoint, as tensors on the meta device."""
    with _training_reader(checkpoint) as reader:
        metadata = reader.read_metadata().state_dict_metadata
        return {
            name: torch.empty(value.size, dtype=value.properties.dtype, device="meta")
            for name, value in metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }


def load_training_state(checkpoint: Path, state: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Read the training state of a checkpoint, written by any number of ranks, into the tensors in `state`.

    Sharded tensors receive this rank's parts. For `group`, see `save_checkpoint`.

    Raises:
        CheckpointError: it cannot be read.
    """
    with _training_reader(checkpoint) as reader, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(state, storage_reader=reader, process_group=group, no_dist=group is None)


@contextmanager
def _training_reader(checkpoint: Path) -> Iterator[HuggingFaceStorageReader]:
    try:
        yield HuggingFaceStorageReader(str(utf8_path(checkpoint / "training")))
    except (*_ERRORS, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint / 'training'} cannot be read ({_cause(error)}): resume from another checkpoint"
        ) from error
