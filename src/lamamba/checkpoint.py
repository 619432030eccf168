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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file

from lamamba import __version__
from lamamba.config import PRESETS, NetworkConfig, Objective, nearest
from lamamba.dit import DIT_CLASSES, DiT, DiTFolder, class_of
from lamamba.errors import CheckpointError, ConfigError
from lamamba.files import checksum, permit, write_text, written_whole
from lamamba.hub import fetch, is_repository
from lamamba.model import LaMambaDiff

FORMAT = 1
SHIPPED = Path(__file__).parent / "assets"
PIPELINE_INDEX = "model_index.json"  # of a folder that diffusers saved of a pipeline
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
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != "checkpoint.json")
    checksums = {path.relative_to(checkpoint).as_posix(): checksum(path) for path in files}
    record = {"format": FORMAT, "lamamba": __version__, **asdict(info), "sha256": checksums}
    write_text(checkpoint / "checkpoint.json", json.dumps(record, indent=2) + "\n")


def verify(checkpoint: Path, part: str = "") -> None:
    """Compare a checkpoint's files, or those of the folder `part` in it, with the checksums it was written with.

    Raises:
        CheckpointError: a file is damaged or missing; the message names it and the checkpoint before.
    """
    checksums = _read_record(checkpoint).get("sha256", {})
    for name, wanted in checksums.items():
        path = checkpoint / name
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
    path, record = checkpoint / "checkpoint.json", _read_record(checkpoint)
    try:
        if record["format"] > FORMAT:
            raise CheckpointError(f"{path} has format {record['format']}, this version reads {FORMAT}: update lamamba")
        fields = {name: record[name] for name in CheckpointInfo.__dataclass_fields__}
        fields["class_names"] = tuple(fields["class_names"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no checkpoint of lamamba ({type(error).__name__}: {error})") from error
    if fields["objective"] not in get_args(Objective):
        raise CheckpointError(f"{path} has the objective {fields['objective']!r}, this version knows no such")
    return CheckpointInfo(**fields)


def _read_record(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "checkpoint.json"
    try:
        record = json.loads(path.read_bytes())
        if not isinstance(record, dict):
            raise TypeError(f"it holds a {type(record).__name__}")
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is no checkpoint of lamamba ({type(error).__name__}: {error})") from error
    return record


def locate(path: Path, weights: str = "ema") -> tuple[Path, CheckpointInfo]:
    """Tell where in a folder that `find_checkpoint` found the network is, and what the folder says of it.

    Args:
        path: a checkpoint folder, a saved `LaMambaDiffPipeline`, or a network folder, which says nothing.
        weights: "ema" or "network", of a checkpoint.

    Raises:
        CheckpointError: it is damaged, of a later format than this version knows, or another pipeline.
    """
    if (path / "checkpoint.json").is_file():
        return path / weights, read_info(path)
    if (path / PIPELINE_INDEX).is_file():
        return path / "network", _read_pipeline_info(path)
    return path, CheckpointInfo()


def _read_pipeline_info(folder: Path) -> CheckpointInfo:
    path = folder / PIPELINE_INDEX
    if class_of(folder) != "LaMambaDiffPipeline":
        raise CheckpointError(f"{folder} holds a {class_of(folder)}, not a LaMambaDiffPipeline")
    try:
        index = json.loads(path.read_bytes())
        names = index.get("id2label") or {}
        class_names = tuple(str(names[str(label)]) for label in range(len(names)))
        vae = str(folder / "vae") if index.get("vae", [None])[0] else None
        info = CheckpointInfo(index.get("images_seen", 0), 0, index["objective"], class_names, vae)
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error} among what it says of its network and labels") from error
    except (OSError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if info.objective not in get_args(Objective):
        raise CheckpointError(f"{path} has the objective {info.objective!r}, this version knows no such")
    return info


def read_network_config(folder: Path) -> NetworkConfig:
    """Read what options a network folder's network was built with; raises CheckpointError."""
    try:
        content = json.loads((folder / "config.json").read_bytes())
        options = {name: content[name] for name in NetworkConfig.__dataclass_fields__ if name in content}
        return NetworkConfig(**{**options, "depths": tuple(options["depths"])})
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{folder} holds no network of lamamba ({type(error).__name__}: {error})") from error


def load_network(folder: Path) -> LaMambaDiff:
    """Load the network that `save_pretrained` wrote.

    Raises:
        CheckpointError: the folder is missing, damaged or another model's.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        if config.get("_class_name") != "LaMambaDiff":
            raise CheckpointError(f"{folder} holds a {config.get('_class_name')}, not a LaMambaDiff")
        with torch.device("meta"):  # drawing what is overwritten would take longer than reading it
            network = LaMambaDiff.from_config(config)
        weights = load_file(folder / "diffusion_pytorch_model.safetensors")
        if different := network.state_dict().keys() ^ weights.keys():
            raise CheckpointError(f"{folder}: weights and config.json disagree, for one on {min(different)}")
        network.to_empty(device="cpu").load_state_dict(weights)
        return network.eval()
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        RuntimeError,
        SafetensorError,
        AttributeError,
        ConfigError,
    ) as error:
        if isinstance(error, CheckpointError):
            raise
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{folder} cannot be read as a LaMambaDiff: {line}") from error


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
    if (path / "checkpoint.json").is_file():
        verify(path, weights)
    folder, info = locate(path, weights)
    return LoadedCheckpoint(load_network(folder).eval(), info, path)


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
    return LoadedDenoiser(folder.load(), info, path)


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
    if any((path / record).is_file() for record in ("checkpoint.json", PIPELINE_INDEX)) or (
        (path / "config.json").is_file() and not (path / "checkpoints").is_dir()
    ):
        return path
    whole = checkpoints_in(path)
    if not whole:
        raise CheckpointError(
            f"{path} holds no checkpoint: give a run folder, one of its checkpoints, or shipped weights"
        )
    return whole[-1]


def _fetch(name: str) -> Path:
    """Fetch a model from the hub, once its records, which are small, say that it is one to be loaded here."""
    folder = fetch(name, "*.json")
    if not (folder / "checkpoint.json").is_file() and class_of(folder) not in _LOADABLE:
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
