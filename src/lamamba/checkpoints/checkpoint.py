"""The checkpoint format: save and load networks, and find checkpoints by path, name or hub address.

A run folder holds `config.json` and `checkpoints/`, one folder each, named by the images seen:

    checkpoint.json         format, images, objective, class names, autoencoder; the SHA-256 of every other file; for
                            distilled networks, how they are sampled
    network/  ema/          weights and EMA weights, each a diffusers folder: config.json and safetensors
    teacher/  auxiliary/    of `lamamba distill`: the weights that the student learns from, and the auxiliary network
    training/               optimizer, random state, power-function EMAs, by torch.distributed.checkpoint: one
                            safetensors file from each rank that holds a part of them

A checkpoint is written under a temporary name, flushed to disk and renamed, so a checkpoint with its final name is
complete. Checksums detect later damage. Nothing is pickled. The shipped weights are such folders too, with `ema/` only.
This module also reads, but does not write, the folders of a `LaMambaDiffPipeline`, on disk or on the Hugging Face hub.
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
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from lamamba import __version__
from lamamba.checkpoints.dit import DIT_CLASSES, is_dit, load_dit
from lamamba.checkpoints.hub import fetch, is_repository
from lamamba.config import PRESETS, NetworkConfig, nearest
from lamamba.diffusion import NUM_TIMESTEPS, OBJECTIVES
from lamamba.errors import CheckpointError, ConfigError, reading
from lamamba.files import checksum, permit, write_text
from lamamba.files.records import is_run, order_names, read_record, read_versioned
from lamamba.files.weights import (
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
from lamamba.model import NETWORKS, LaMambaDiff

FORMAT = 1
DISTILLED_FORMAT = 2  # of distilled networks, so that versions that would sample them wrongly refuse them
SHIPPED = Path(__file__).parents[1] / "assets"
RECORD = "checkpoint.json"
_LOADABLE = ("LaMambaDiffPipeline", "LaMambaDiff", "DiTPipeline", *DIT_CLASSES)


@dataclass(frozen=True)
class Distilled:
    """How a distilled network is sampled."""

    steps: int
    """Sampler steps that it was distilled for."""
    sampler: str
    """The sampler that takes these steps."""
    guidance: float
    """Guidance scale that its predictions include; 1 is none."""

    def __str__(self) -> str:
        included = f"guidance {self.guidance:g} included" if self.guidance != 1 else "without guidance"
        return f"distilled for {describe_steps(self.steps)} of {self.sampler}, {included}"

    def why_unsuited(self, sampler: str, steps: int) -> str | None:
        """Explain why a sampler and a number of steps do not fit; None if they fit."""
        if (sampler, steps) == (self.sampler, self.steps):
            return None
        own = f"{describe_steps(self.steps)} of {self.sampler}"
        return f"this network was distilled for {own}: expect worse images from {describe_steps(steps)} of {sampler}"


def describe_steps(steps: int) -> str:
    """Write a number of steps with its noun."""
    return f"{steps} step{'s' * (steps != 1)}"


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint records beside its weights."""

    images: int = 0
    """Number of images seen in training."""
    step: int = 0
    """Number of optimizer steps."""
    objective: str = "diffusion"
    class_names: tuple[str, ...] = ()
    vae: str | None = None
    """Folder of the autoencoder of the network's latents; None for a network of pixels."""
    distilled: Distilled | None = None
    """How the network is sampled if it was distilled."""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A network, and where it was loaded from."""

    network: Any
    """A `lamamba.diffusion.Denoiser` that is an `nn.Module`."""
    info: CheckpointInfo
    path: Path

    def __post_init__(self) -> None:
        num_names, num_classes = len(self.info.class_names), self.network.config.num_classes
        if num_names not in (0, num_classes):
            raise CheckpointError(
                f"{self.path} names {num_names} classes, but its network has {num_classes}: they belong to different "
                "runs"
            )


def checkpoints_in(run: Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("*/checkpoint.json")
    return sorted((path.parent for path in folders if path.parent.name.isdigit()), key=lambda path: int(path.name))


def save_network(network: Any, folder: Path) -> None:
    """Write a network or a pipeline in diffusers' format."""
    network.save_pretrained(folder)
    permit(*folder.rglob("*.safetensors"))
    for path in folder.rglob("*.json"):
        record = json.loads(path.read_bytes())
        if record.pop("_name_or_path", None) is not None:  # a local path, which is private
            write_text(path, json.dumps(record, indent=2, sort_keys=True) + "\n")


def write_info(checkpoint: Path, info: CheckpointInfo) -> None:
    """Write checkpoint.json, with the checksums of all files in the checkpoint."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != RECORD)
    checksums = {path.relative_to(checkpoint).as_posix(): checksum(path) for path in files}
    number = DISTILLED_FORMAT if info.distilled else FORMAT
    record = {"format": number, "lamamba": __version__, **asdict(info), "sha256": checksums}
    if info.distilled is None:
        del record["distilled"]
    write_text(checkpoint / RECORD, json.dumps(record, indent=2) + "\n")


def verify(checkpoint: Path, part: str = "") -> None:
    """Compare the files of a checkpoint, or of the folder `part` in it, with their checksums.

    Raises:
        CheckpointError: a file is damaged or missing. The message names it and the previous checkpoint.
    """
    for name, wanted in read_versioned(checkpoint / RECORD, _Record, DISTILLED_FORMAT).get("sha256", {}).items():
        path = checkpoint / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{checkpoint / RECORD}: sha256 names {name!r}, which is not in the checkpoint")
        if not name.startswith(part):
            continue
        if not path.is_file() or checksum(path) != wanted:
            earlier = [other for other in checkpoints_in(checkpoint.parent.parent) if other < checkpoint]
            advice = "there is no earlier checkpoint"
            if earlier:
                advice = f"the previous one is {earlier[-1]}; train --resume --fall-back continues from it"
            fault = "is damaged: its checksum does not match" if path.is_file() else "is missing"
            raise CheckpointError(f"{path} {fault}, so the checkpoint cannot be used: {advice}")


def newest_undamaged(checkpoints: Sequence[Path]) -> Path:
    """Return the newest undamaged checkpoint; raises CheckpointError if all are damaged."""
    for checkpoint in reversed(checkpoints):
        try:
            read_info(checkpoint)
            verify(checkpoint)
            return checkpoint
        except CheckpointError as error:
            fault = error
    raise CheckpointError(f"all checkpoints are damaged; the oldest one: {fault}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a folder, and lock it against other processes that write to it.

    Raises:
        CheckpointError: another process has locked it, or it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise CheckpointError(f"another process writes to {folder}: wait for it, or choose another --out") from None
    except OSError as error:
        raise CheckpointError(f"folder {folder} cannot be created: {error}") from error
    with lock:
        yield


def read_info(checkpoint: Path) -> CheckpointInfo:
    """Read checkpoint.json.

    Raises:
        CheckpointError: it is damaged, or has a later format than this version reads.
    """
    record = read_versioned(checkpoint / RECORD, _Record, DISTILLED_FORMAT)
    return CheckpointInfo(
        record["images"],
        record["step"],
        record["objective"],
        tuple(record["class_names"]),
        record["vae"],
        record.get("distilled"),
    )


_Count = Annotated[int, Field(ge=0, lt=1 << 63)]
_ClassNames = Annotated[list[str], Field(max_length=1_000_000)]


def _known_objective(name: str) -> str:
    if name not in OBJECTIVES:
        raise PydanticCustomError("objective", "it should be {known}", {"known": " or ".join(map(repr, OBJECTIVES))})
    return name


_Objective = Annotated[str, AfterValidator(_known_objective)]


def _sampled_by(record: Distilled) -> Distilled:
    known = {sampler for objective in OBJECTIVES.values() for sampler in objective.samplers}
    if record.sampler not in known or not 1 <= record.steps <= NUM_TIMESTEPS:
        allowed = {"samplers": ", ".join(sorted(known)), "most": NUM_TIMESTEPS}
        raise PydanticCustomError("distilled", "it should have 1 to {most} steps of {samplers}", allowed)
    return record


_DistilledRecord = Annotated[Distilled, AfterValidator(_sampled_by)]


class _Record(TypedDict):
    """checkpoint.json."""

    images: _Count
    step: _Count
    objective: _Objective
    class_names: _ClassNames
    vae: str | None
    distilled: NotRequired[_DistilledRecord]
    sha256: NotRequired[dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]]


class _PipelineRecord(TypedDict):
    """model_index.json of a LaMambaDiffPipeline."""

    objective: _Objective
    id2label: NotRequired[Annotated[dict[str, str], Field(max_length=1_000_000)] | None]
    images_seen: NotRequired[_Count]
    distilled: NotRequired[_DistilledRecord | None]
    network: tuple[str, Literal["LaMambaDiff"]]
    vae: NotRequired[tuple[str | None, Literal["AutoencoderKL"] | None]]


def locate(path: Path, weights: str = "ema") -> tuple[Path, CheckpointInfo]:
    """Return the network's folder inside a folder that `find_checkpoint` found, and what is recorded about it.

    Args:
        path: a checkpoint folder, a saved `LaMambaDiffPipeline`, or a network folder, which records nothing.
        weights: "ema" or "network"; for checkpoints.

    Raises:
        CheckpointError: it is damaged, has a later format than this version reads, or is another pipeline.
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
    class_names = tuple(order_names(index.get("id2label") or {}, f"{path}: id2label"))
    vae = str(folder / "vae") if any(index.get("vae", ())) else None
    return CheckpointInfo(index.get("images_seen", 0), 0, index["objective"], class_names, vae, index.get("distilled"))


def read_network_config(folder: Path) -> NetworkConfig:
    """Read the options of the network in a network folder; raises CheckpointError."""
    check_class(folder, ("LaMambaDiff",))
    return read_record(folder / CONFIG, NetworkConfig)


def check_network(folder: Path) -> NetworkConfig:
    """Read a network's options, and check that its weight files have matching shapes, without reading values.

    Raises:
        CheckpointError: an option is wrong, or weights are missing, unexpected or of the wrong shape.
    """
    config = read_network_config(folder)
    with torch.device("meta"):
        network = LaMambaDiff(**vars(config))
    check_weights(folder, network.state_dict(), describe_weights(find_weights(folder)))
    return config


def load_network(folder: Path) -> Any:
    """Load a network that `save_pretrained` wrote, in any of its formats, in float32 on the CPU.

    Raises:
        CheckpointError: the folder is missing, damaged or of another model, or weights are missing or unexpected.
    """
    network = build_empty(folder)
    fill(network, read_weights(find_weights(folder)), folder)
    return network.eval()


def build_empty(folder: Path) -> Any:
    """Build the network that a folder describes, without its weights; raises CheckpointError."""
    name = class_of(folder)
    if name not in NETWORKS or NETWORKS[name] is LaMambaDiff:
        with torch.device("meta"):  # initializing weights would take longer than reading them
            return LaMambaDiff(**vars(read_network_config(folder)))
    options = read_record(folder / CONFIG, dict[str, Any])
    with reading(f"{folder / CONFIG} does not fit the network {name}", "use the code that wrote it", CheckpointError):
        return NETWORKS[name](**{key: value for key, value in options.items() if not key.startswith("_")})


def load_checkpoint(name: str | Path, weights: str = "ema") -> LoadedCheckpoint:
    """Load a network: of a run (its newest checkpoint), a checkpoint, a pipeline, a network folder, or shipped weights.

    Args:
        name: a path, the name of shipped weights, or "user/name" on the Hugging Face hub; see `find_checkpoint`.
        weights: "ema" or "network".

    Raises:
        CheckpointError: nothing loadable is there; the message says what was looked for.
        ConfigError: neither a path nor a name that is known.
    """
    path = find_checkpoint(name)
    if (path / RECORD).is_file():
        verify(path, weights)
    folder, info = locate(path, weights)
    return LoadedCheckpoint(load_network(folder), info, path)


def load_denoiser(name: str | Path) -> LoadedCheckpoint:
    """Load what `load_checkpoint` loads, or a DiT that diffusers saved: a pipeline or the model alone.

    Raises:
        CheckpointError: nothing loadable is there; the message says what was looked for.
        ConfigError: neither a path nor a name that is known.
    """
    path = find_checkpoint(name)
    if not is_dit(path):
        return load_checkpoint(path)
    network, class_names, vae = load_dit(path)
    return LoadedCheckpoint(network, CheckpointInfo(class_names=class_names, vae=vae), path)


def find_checkpoint(name: str | Path) -> Path:
    """Find the folder that `load_checkpoint` reads.

    A name of the form "user/name" is a model on the Hugging Face hub if there is neither such a path nor a local folder
    "user". It is downloaded to huggingface_hub's cache, where it is found later without a network. A mistyped path in
    an existing folder never contacts the hub.

    Raises:
        CheckpointError: there is no such checkpoint, or the hub cannot be reached.
        ConfigError: the name is neither a path nor known.
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
        raise CheckpointError(f"{path} is a file: give a folder; lamamba convert makes one from a released checkpoint")
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
    """Download a model from the hub, after its small JSON files show that this package can load it."""
    folder = fetch(name, "*.json")
    if not (folder / RECORD).is_file() and class_of(folder) not in _LOADABLE:
        raise CheckpointError(
            f"{name} on the Hugging Face hub is a {class_of(folder)}: only {', '.join(_LOADABLE)} can be loaded"
        )
    return fetch(name, "*.json", "*.safetensors", "*.bin")  # the official DiT has .bin weights


def shipped_weights() -> dict[str, Path]:
    """Return the folders of the shipped weights by name. `nano` is also called `fashion-mnist`, after its data."""
    folders = {"nano": "nano", "nano-4-steps": "nano-4-steps", "fashion-mnist": "nano", "emoji-64": "emoji-64"}
    return {name: SHIPPED / folder for name, folder in folders.items()}


def export(checkpoint: Path, folder: Path) -> None:
    """Write only the EMA weights of a checkpoint, in float16, in the layout of a checkpoint."""
    loaded = load_checkpoint(checkpoint)
    write_weights(folder, loaded.network.half(), loaded.info)


def write_weights(folder: Path, network: Any, info: CheckpointInfo, trained: Any = None) -> None:
    """Write EMA weights, and optionally trained ones, in the layout of a checkpoint; raises CheckpointError."""
    with reading(f"{folder} could not be written", "free some space", CheckpointError):
        save_network(network, folder / "ema")
        if trained is not None:
            save_network(trained, folder / "network")
        write_info(folder, info)
