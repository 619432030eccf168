"""The environment of pieces: folders, device, time left, data, and records."""

import json
import math
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cifar import load_cifar
from lamamba import __version__
from lamamba.data import ArraySource, FolderSource, load_fashion_mnist
from lamamba.distributed.processes import Processes
from lamamba.errors import ConfigError
from lamamba.files import write_json
from lamamba.files.records import changes
from pieces import Piece, Scale

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
_LEAST_S = 90.0


class OutOfTimeError(Exception):
    """Time ran out. Only the work since the last checkpoint is lost."""


@dataclass
class Clock:
    """A time limit that starts when this is created."""

    seconds: float = math.inf
    start: float = field(default_factory=time.monotonic)

    def check(self, *_: object) -> None:
        """Raise OutOfTimeError if the time is over."""
        self._check(0.0)

    def check_to_begin(self) -> None:
        """Raise OutOfTimeError if too little time is left to start a network, because compilation cannot be stopped."""
        self._check(_LEAST_S)

    def _check(self, needed: float) -> None:
        if self.seconds - (time.monotonic() - self.start) < needed:
            raise OutOfTimeError


@dataclass(frozen=True)
class Setting:
    """The environment of pieces.

    Attributes:
        out: folder for checkpoints and unfinished records, with one folder per piece.
        results: folder for finished records, which are small.
        scale: sizes of the experiments.
        device: the device to use.
        clock: the time left.
        data_folder: folder of Fashion-MNIST's idx files; None is Debian's.
        emoji: the folder that `lamamba prepare emoji` made.
        cifar: the folder that `cifar.py` made.
        features: the folder of feature networks that `features.py` made; without it, there are fewer scores.
        commit: the commit, for a copy without history.
        processes: this rank and the number of ranks.
    """

    out: Path
    results: Path
    scale: Scale
    device: torch.device
    clock: Clock = field(default_factory=Clock)
    data_folder: Path | None = None
    emoji: Path | None = None
    commit: str | None = None
    processes: Processes = field(default_factory=Processes)
    cifar: Path | None = None
    features: Path | None = None

    def check_time(self, to_begin: bool = False) -> None:
        """Raise OutOfTimeError on all ranks if time is over for one of them, or too short to start a network."""
        try:
            if to_begin:
                self.clock.check_to_begin()
            else:
                self.clock.check()
            over = False
        except OutOfTimeError:
            over = True
        if self.processes.all_reduce_max(over):
            raise OutOfTimeError

    def open_training_images(self, data: str) -> ArraySource:
        """Decode all images into memory once, even from a folder."""
        if data == "fashion-mnist":
            return _first(load_fashion_mnist("train", folder=self.data_folder), self.scale.num_training_images)
        if data == "cifar-10":
            return _first(load_cifar("train", self.cifar), self.scale.num_training_images)
        if self.emoji is None:
            raise ConfigError("emoji is not given: make the folder with 'lamamba prepare emoji' and give --emoji")
        key = str(self.emoji)
        if key not in _decoded:
            folder = FolderSource(self.emoji, image_size=64)
            images, labels = folder.gather(torch.arange(len(folder)).numpy(), torch.zeros(len(folder)).bool().numpy())
            _decoded[key] = ArraySource("emoji", images, labels, folder.class_names)
        return _decoded[key]

    def open_test_images(self, data: str) -> ArraySource:
        """Open the images that samples are compared with; emoji have none."""
        if data == "cifar-10":
            return _first(load_cifar("test", self.cifar), self.scale.num_test_images)
        return _first(load_fashion_mnist("test", folder=self.data_folder), self.scale.num_test_images)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Describe the process for the record."""
        on_cuda = self.device.type == "cuda"
        return {
            "started": datetime.now(UTC).isoformat(timespec="seconds"), "commit": self.commit or _commit(),
            "lamamba": __version__,
            "device": torch.cuda.get_device_name(self.device) if on_cuda else platform.processor() or "cpu",
            "torch": torch.__version__, "cuda": torch.version.cuda, "diffusers": version("diffusers"),
            "triton": _version("triton"), "python": platform.python_version(), "processes": self.processes.world_size,
        }  # fmt: skip


_decoded: dict[str, ArraySource] = {}


def _first(source: ArraySource, number: int | None) -> ArraySource:
    return ArraySource(source.name, source.images[:number], source.labels[:number], source.class_names)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    run = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=HERE, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


class Record:
    """A piece's JSON record, written atomically: beside the checkpoint and, when finished, to the results.

    Raises:
        ConfigError: there is an unfinished record with other settings.
    """

    def __init__(self, setting: Setting, piece: Piece, settings: Mapping[str, Any]) -> None:
        self.folder = setting.out / piece.name
        self.path = self.folder / "record.json"
        self.result = setting.results / f"{piece.name}.json"
        told = json.loads(json.dumps({**asdict(piece), "scale": asdict(setting.scale), **settings}))
        begun = {"piece": piece.name, "kind": type(piece).__name__.lower(), "finished": False, "settings": told}
        self.content = json.loads(self.path.read_text()) if self.path.is_file() else {**begun, "parts": []}
        now, before = begun["settings"], self.content["settings"]
        if changed := changes(before, now):
            raise ConfigError(f"{self.path} was begun with other settings ({'; '.join(changed)}): delete {self.folder}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.content["parts"].append(dict(setting.environment))

    def __getitem__(self, name: str) -> Any:
        return self.content[name]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the list with this name, to append to; empty at first."""
        rows: list[dict[str, Any]] = self.content.setdefault(name, [])
        return rows

    def write(self, **changed: Any) -> None:
        """Write the results so far."""
        self.content.update(changed)
        write_json(self.path, self.content)

    def finish(self) -> None:
        """Mark the record as finished, and copy it to the results."""
        self.write(finished=True)
        keep(self.folder, self.result)


def keep(folder: Path, result: Path) -> None:
    """Copy a piece's record and pictures to the results."""
    result.parent.mkdir(parents=True, exist_ok=True)
    for picture in sorted(folder.glob("*.png")):
        shutil.copy(picture, result.with_name(f"{result.stem}-{picture.name}"))
    write_json(result, json.loads((folder / "record.json").read_text()))


def is_finished(setting: Setting, piece: Piece) -> bool:
    """Return whether a piece is finished; restore its record if the results folder lacks it."""
    result, own = setting.results / f"{piece.name}.json", setting.out / piece.name / "record.json"
    for path in (result, own):
        content = json.loads(path.read_text()) if path.is_file() else {}
        if content.get("finished") and content["settings"]["scale"]["quick"] == setting.scale.quick:
            if not result.is_file():
                keep(own.parent, result)
            return True
    return False


def rounded(value: float, digits: int = 6) -> float:
    """Round to a few significant digits, to keep records small."""
    return float(f"{value:.{digits}g}")


def of_learning_rate(piece: Piece, learning_rate: float | None) -> Piece:
    """Replace the learning rate of a training piece, if one is given."""
    if learning_rate is None:
        return piece
    if hasattr(piece, "learning_rate"):
        return replace(piece, learning_rate=learning_rate)
    return replace(piece, of=replace(piece.of, learning_rate=learning_rate)) if hasattr(piece, "of") else piece
