"""A small setting for tests of the comparison of LaMamba with DiT, with random images."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pieces
import setting as settings

COMPARISON = Path(__file__).parent.parent / "experiments" / "comparison"


class Clock(settings.Clock):
    """A clock whose time is over after it was read this many times."""

    def __init__(self, looks: int = 1_000_000) -> None:
        super().__init__()
        self.looks = looks

    def check(self, *_: object) -> None:
        self.looks -= 1
        if self.looks < 0:
            raise settings.OutOfTimeError


def place(folder: Path, looks: int = 1_000_000, **changed: Any) -> settings.Setting:
    scale = replace(pieces.QUICK, **changed)
    data = clothes(folder / "clothes")
    return settings.Setting(folder / "out", folder / "results", scale, torch.device("cpu"), Clock(looks), data)


def clothes(folder: Path) -> Path:
    """Write a hundred random images in the file format of Fashion-MNIST."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        random = np.random.default_rng(0)
        for name in ("train", "t10k"):
            images = random.integers(0, 256, (100, 28, 28), np.uint8)
            header = b"\x00\x00\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (100, 28, 28))
            (folder / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
            labels = random.integers(0, 10, 100, np.uint8).tobytes()
            (folder / f"{name}-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01" + (100).to_bytes(4, "big") + labels)
    return folder


def read(setting: settings.Setting, name: str) -> dict[str, Any]:
    return json.loads((setting.results / f"{name}.json").read_text())
