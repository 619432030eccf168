"""What looks at a machine, at runs and at pictures: `lamamba doctor`, `plot`, `grid`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lamamba.config.checks import check, check_range
from lamamba.errors import ConfigError


@dataclass(frozen=True)
class DoctorConfig:
    """Say what of lamamba works on this machine, what does not, and what would help; exit code 1 is a fault."""

    json: bool = False
    """Print JSON, an object for each line: name, state (ok, note or fault), says, mend."""


@dataclass(frozen=True)
class PlotConfig:
    """Draw runs as they went: curves of all in one picture, and each one's samples as a filmstrip and a GIF."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders; they may still go on."""
    out: Path = Path("plots")
    """Folder for curves.png, and of each run with samples samples-NAME.png and samples-NAME.gif."""
    frames: int = 8
    """Sample grids in a filmstrip, at most."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("give one run folder or more, such as runs/first")
        check_range("frames", self.frames, 2, 1000)


@dataclass(frozen=True)
class GridConfig:
    """Arrange images of one size in a grid."""

    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FOLDER|IMAGE ...")]
    """Images, and folders with any number of them at any depth, in the order of their names."""
    out: Path = Path("images.png")
    """The grid, a PNG file."""
    columns: int | None = None
    """Images in a row; the default is about as many as there are rows."""
    rows: int | None = None
    """Rows; the default is as many as the images need, and more images than fit are left out."""
    scale: int = 1
    """How many times larger each pixel is drawn."""
    captions: bool = False
    """Write each image's name below it."""

    def __post_init__(self) -> None:
        check(len(self.images) >= 1, "images", self.images, "one image or folder, or more")
        check(self.out.suffix == ".png", "out", str(self.out), "a .png file")
        for name, most in (("columns", 10_000), ("rows", 10_000), ("scale", 64)):
            check_range(name, getattr(self, name), 1, most)
