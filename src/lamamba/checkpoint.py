"""Everything lamamba writes to disk to read again.

A run folder holds `config.json` and `checkpoints/`, one folder each, named by the images seen:

    checkpoint.json         format, images, objective, class names, autoencoder; the SHA-256 of every other file
    network/  ema/          weights and averaged weights, each a diffusers folder: config.json and safetensors
    training/               optimizer, random state, power function averages, by torch.distributed.checkpoint: a
                            safetensors file from each process that holds a part of them

A checkpoint is written under a temporary name, flushed to disk and renamed, so that what has its final name is whole;
what a disk does to it later shows in the checksums. Nothing is pickled. The weights shipped with the package are such a
folder too, with `ema/` only. Read, and not written here, are the folders of a `LaMambaDiffPipeline`, on disk or on the
Hugging Face hub.
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NotRequired

import torch
from filelock import FileLock, Timeout
from pydantic import Field
from safetensors import SafetensorError
from typing_extensions import TypedDict

from lamamba import __version__
from lamamba.config import PRESETS, NetworkConfig, Objective, nearest
from lamamba.dit import DIT_CLASSES, DiT, DiTFolder
from lamamba.errors import CheckpointError, ConfigError
from lamamba.files import checksum, permit, write_text, written_whole
from lamamba.hub import fetch, is_repository
from lamamba.model import LaMambaDiff
from lamamba.records import is_run, read_record
from lamamba.weights import (
    CONFIG,
    PIPELINE_INDEX,
    check_class,
    check_weights,
    class_of,
    describe_weights,
    fill,
    find_weights,
    read_weights,
)

FORMAT = 1
SHIPPED = Path(__file__).parent / "assets"
RECORD = "checkpoint.json"
_LOADABLE = ("LaMambaDiffPipeline", "LaMambaDiff", "DiTPipeline", *DIT_CLASSES)
_WRITE_ERRORS = (OSError, SafetensorError)


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself beside its weights."""

    images: int = 0
    """Images seen in training."""
    step: int = 0
    """Steps of the optimizer."""
    objective: str = "diffusion"
    class_names: tuple[str, ...] = ()
    vae: str | None = None
    """Folder of the autoencoder whose latents the network works on; None is pixels."""


@dataclass(frozen=True)
class LoadedDenoiser:
    """A network to sample from, and where it came from."""

    network: LaMambaDiff | DiT
    info: CheckpointInfo
    path: Path


@dataclass(frozen=True)
class LoadedCheckpoint(LoadedDenoiser):
    """A network of this package, and where it came from."""

    network: LaMambaDiff


def checkpoints_in(run: Path) -> list[Path]:
    """List a run's whole checkpoints, oldest first."""
    folders = (run / "checkpoints").glob("*/checkpoint.json")
    return sorted((path.parent for path in folders if path.parent.name.isdigit()), key=lambda path: int(path.name))


def save_network(network: LaMambaDiff, folder: Path) -> None:
    """Write a network as diffusers does."""
    network.save_pretrained(folder)
    permit(*folder.glob("*.safetensors"))
    path = folder / "config.json"
    config = json.loads(path.read_bytes())
    config.pop("_name_or_path", None)  # where it was loaded from is of this machine, not of the network
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_info(checkpoint: Path, info: CheckpointInfo) -> None:
    """Write what a checkpoint says of itself, and the checksums of all that is there."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != RECORD)
    checksums = {path.relative_to(checkpoint).as_posix(): checksum(path) for path in files}
    record = {"format": FORMAT, "lamamba": __version__, **asdict(info), "sha256": checksums}
    write_text(checkpoint / RECORD, json.dumps(record, indent=2) + "\n")


def verify(checkpoint: Path, part: str = "") -> None:
    """Compare a checkpoint's files, or those of the folder `part` in it, with the checksums it was written with.

    Raises:
        CheckpointError: a file is damaged or missing; the message names it and the checkpoint before.
    """
    for name, wanted in _read_record(checkpoint).get("sha256", {}).items():
        path = checkpoint / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{checkpoint / RECORD}: sha256 names {name!r}, which is not in the checkpoint")
        if not name.startswith(part):
            continue
        if not path.is_file() or checksum(path) != wanted:
            earlier = [other for other in checkpoints_in(checkpoint.parent.parent) if other < checkpoint]
            mend = "there is none before it"
            if earlier:
                mend = f"the one before is {earlier[-1]}; train --resume --fall-back goes on from that"
            fault = "is not what was written" if path.is_file() else "is missing"
            raise CheckpointError(f"{path} {fault}, so the checkpoint cannot be used: {mend}")


def newest_whole(checkpoints: Sequence[Path]) -> Path:
    """Choose the newest of a run's checkpoints that is not damaged; raises CheckpointError where all are."""
    for checkpoint in reversed(checkpoints):
        try:
            read_info(checkpoint)
            verify(checkpoint)
        except CheckpointError as error:
            fault = error
            continue
        return checkpoint
    raise CheckpointError(f"no checkpoint is whole; of the oldest: {fault}")


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Make a run folder and keep other processes from training into it.

    Raises:
        CheckpointError: another one does, or the folder cannot be made.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(f"another process trains into {run}: wait for it, or choose another --out") from None
    except OSError as error:
        raise CheckpointError(f"run folder {run} cannot be made: {error}") from error
    try:
        yield
    finally:
        lock.release()


def read_info(checkpoint: Path) -> CheckpointInfo:
    """Read what a checkpoint says of itself.

    Raises:
        CheckpointError: it is damaged, or of a later format than this version knows.
    """
    record = _read_record(checkpoint)
    return CheckpointInfo(
        record["images"], record["step"], record["objective"], tuple(record["class_names"]), record["vae"]
    )


_Count = Annotated[int, Field(ge=0, lt=1 << 63)]
_ClassNames = Annotated[list[str], Field(max_length=1_000_000)]


class _Format(TypedDict):
    format: Annotated[int, Field(ge=1)]


class _Record(_Format):
    """checkpoint.json."""

    images: _Count
    step: _Count
    objective: Objective
    class_names: _ClassNames
    vae: str | None
    sha256: NotRequired[dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]]


class _PipelineRecord(TypedDict):
    """model_index.json of a LaMambaDiffPipeline."""

    objective: Objective
    id2label: NotRequired[Annotated[dict[str, str], Field(max_length=1_000_000)] | None]
    images_seen: NotRequired[_Count]
    network: tuple[str, Literal["LaMambaDiff"]]
    vae: NotRequired[tuple[str | None, Literal["AutoencoderKL"] | None]]


def _read_record(checkpoint: Path) -> _Record:
    path = checkpoint / RECORD
    version = read_record(path, _Format)["format"]
    if version > FORMAT:
        raise CheckpointError(f"{path} has format {version}, this version reads {FORMAT}: update lamamba")
    return read_record(path, _Record)


def locate(path: Path, weights: str = "ema") -> tuple[Path, CheckpointInfo]:
    """Tell where in a folder that `find_checkpoint` found the network is, and what the folder says of it.

    Args:
        path: a checkpoint folder, a saved `LaMambaDiffPipeline`, or a network folder, which says nothing.
        weights: "ema" or "network", of a checkpoint.

    Raises:
        CheckpointError: it is damaged, of a later format than this version knows, or another pipeline.
    """
    if (path / RECORD).is_file():
        return path / weights, read_info(path)
    if (path / PIPELINE_INDEX).is_file():
        return path / "network", _read_pipeline_info(path)
    return path, CheckpointInfo()


def _read_pipeline_info(folder: Path) -> CheckpointInfo:
    path = folder / PIPELINE_INDEX
    if class_of(folder) != "LaMambaDiffPipeline":
        raise CheckpointError(f"{folder} holds a {class_of(folder)}, not a LaMambaDiffPipeline")
    index = read_record(path, _PipelineRecord)
    names = index.get("id2label") or {}
    missing = [label for label in map(str, range(len(names))) if label not in names]
    if missing:
        raise CheckpointError(f"{path}: id2label names {len(names)} classes, but not {missing[0]}")
    class_names = tuple(names[str(label)] for label in range(len(names)))
    vae = str(folder / "vae") if any(index.get("vae", ())) else None
    return CheckpointInfo(index.get("images_seen", 0), 0, index["objective"], class_names, vae)


def read_network_config(folder: Path) -> NetworkConfig:
    """Read what options a network folder's network was built with; raises CheckpointError."""
    check_class(folder, ("LaMambaDiff",))
    return read_record(folder / CONFIG, NetworkConfig)


def check_network(folder: Path) -> NetworkConfig:
    """Read a network's options and check that its weight files have these sizes, without reading their values.

    Raises:
        CheckpointError: an option is wrong, or weights are missing, unexpected or misshaped.
    """
    config = read_network_config(folder)
    with torch.device("meta"):
        network = LaMambaDiff(**vars(config))
    check_weights(folder, network.state_dict(), describe_weights(find_weights(folder)))
    return config


def load_network(folder: Path) -> LaMambaDiff:
    """Load the network that `save_pretrained` wrote, in any of its forms, in float32 on the CPU.

    Raises:
        CheckpointError: the folder is missing, damaged or another model's, or has not all weights or others too.
    """
    config = read_network_config(folder)
    found = find_weights(folder)
    with torch.device("meta"):  # drawing what is overwritten would take longer than reading it
        network = LaMambaDiff(**vars(config))
    fill(network, read_weights(found), folder)
    return network.eval()


def load_checkpoint(name: str | Path, weights: str = "ema") -> LoadedCheckpoint:
    """Load the network of a run (its newest checkpoint), a checkpoint, a pipeline, a network folder, or shipped ones.

    Args:
        name: a path, shipped weights by their name, or "user/name" on the Hugging Face hub, see `find_checkpoint`.
        weights: "ema" or "network".

    Raises:
        CheckpointError: nothing loadable is there; the message says what was looked for.
        ConfigError: neither a path nor a name that is known.
    """
    path = find_checkpoint(name)
    if (path / RECORD).is_file():
        verify(path, weights)
    folder, info = locate(path, weights)
    network = load_network(folder)
    _check_names(info, network.config.num_classes, path)
    return LoadedCheckpoint(network, info, path)


def _check_names(info: CheckpointInfo, num_classes: int, path: Path) -> None:
    if info.class_names and len(info.class_names) != num_classes:
        raise CheckpointError(
            f"{path} names {len(info.class_names)} classes, and its network has {num_classes}: they are of two runs"
        )


def load_denoiser(name: str | Path) -> LoadedDenoiser:
    """Load what `load_checkpoint` does or, to be sampled alike, a DiT that diffusers saved: its pipeline or itself.

    Raises:
        CheckpointError: nothing loadable is there; the message says what was looked for.
        ConfigError: neither a path nor a name that is known.
    """
    path = find_checkpoint(name)
    folder = DiTFolder.find(path)
    if folder is None:
        return load_checkpoint(path)
    info = CheckpointInfo(class_names=folder.class_names, vae=str(folder.vae) if folder.vae else None)
    network = folder.load()
    _check_names(info, network.config.num_classes, path)
    return LoadedDenoiser(network, info, path)


def find_checkpoint(name: str | Path) -> Path:
    """Find the folder that `load_checkpoint` reads.

    A name that is no path here, of the form "user/name" with no folder "user" here, is a model on the Hugging Face hub:
    it is fetched to huggingface_hub's cache, and found there without a network the next time. A mistyped path in a
    folder that exists never asks the hub.

    Raises:
        CheckpointError: there is none, or the hub cannot be asked.
        ConfigError: neither a path nor a name that is known.
    """
    path = Path(name)
    if not path.exists():
        shipped = shipped_weights()
        if str(name) in shipped:
            return shipped[str(name)]
        if str(name) in PRESETS:
            raise CheckpointError(f"no weights are shipped for {name}, only {', '.join(shipped)}: train it")
        if len(path.parts) == 1:
            raise ConfigError(
                f"{name!r} is neither a folder nor a preset: {nearest(str(name), {**shipped, **PRESETS})}"
            )
        if not is_repository(str(name)):
            raise CheckpointError(f"{path} does not exist")
        path = _fetch(str(name))
    if path.is_file():
        raise CheckpointError(f"{path} is a file: give a folder; lamamba convert makes one of a released checkpoint")
    if any((path / record).is_file() for record in (RECORD, PIPELINE_INDEX)):
        return path
    saved = checkpoints_in(path)
    if saved:
        return saved[-1]
    if is_run(path):
        raise CheckpointError(
            f"{path} has no checkpoint yet: wait for the run's first one, or start the run again with lamamba train "
            f"--out {shlex.quote(str(path))} --resume"
        )
    if not (path / CONFIG).is_file():
        raise CheckpointError(
            f"{path} holds no checkpoint: give a run folder, one of its checkpoints, or shipped weights"
        )
    return path


def _fetch(name: str) -> Path:
    """Fetch a model from the hub, once its records, which are small, say that it is one to be loaded here."""
    folder = fetch(name, "*.json")
    if not (folder / RECORD).is_file() and class_of(folder) not in _LOADABLE:
        raise CheckpointError(
            f"{name} on the Hugging Face hub holds a {class_of(folder)}: only {', '.join(_LOADABLE)} can be loaded"
        )
    return fetch(name, "*.json", "*.safetensors", "*.bin")  # the official DiT's weights are .bin


def shipped_weights() -> dict[str, Path]:
    """Find the weights that come with the package, by their names: of a preset, or of what they were trained on."""
    return {"nano": SHIPPED / "nano", "fashion-mnist": SHIPPED / "nano", "emoji-64": SHIPPED / "emoji-64"}


def export(checkpoint: Path, folder: Path) -> None:
    """Write a checkpoint's averaged weights alone, in float16, in the layout of a checkpoint."""
    loaded = load_checkpoint(checkpoint)
    write_weights(folder, loaded.network.half(), loaded.info)


def write_weights(folder: Path, network: LaMambaDiff, info: CheckpointInfo, trained: LaMambaDiff | None = None) -> None:
    """Write weights alone in the layout of a checkpoint, averaged and maybe those trained; raises CheckpointError."""
    try:
        save_network(network, folder / "ema")
        if trained is not None:
            save_network(trained, folder / "network")
        write_info(folder, info)
    except _WRITE_ERRORS as error:
        raise CheckpointError(f"{folder} could not be written ({error}): free some space") from error


def write_json(path: Path, content: Any) -> None:
    """Write a small JSON file whole or not at all."""
    try:
        with written_whole(path) as temporary:
            write_text(temporary, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}") from error
