"""Options of `lamamba doctor`, `plot` and `grid`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lamamba.config.checks import check, check_option, check_range
from lamamba.config.options import Option
from lamamba.errors import ConfigError


@dataclass(frozen=True)
class DoctorConfig:
    """Check what works on this machine and suggest what would help; the exit code is 1 if something is broken."""

    json: bool = False
    """Print JSON: one object per check, with name, state (ok, note or broken), detail and fix."""


@dataclass(frozen=True)
class PlotConfig:
    """Draw the curves of runs in one picture, and the samples of each run over time as a filmstrip and a GIF."""

    runs: Annotated[tuple[Path, ...], Option(positional=True, metavar="RUN [RUN ...]")]
    """Run folders; the runs may still be training."""
    out: Path = Path("plots")
    """Folder for curves.png and, for each run with samples, samples-NAME.png and samples-NAME.gif."""
    frames: int = 8
    """Largest number of sample grids in a filmstrip."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("give one run folder or more, such as runs/first")
        check_range(self, 2, 1000, "frames")


@dataclass(frozen=True)
class GridConfig:
    """Arrange images of one size in a grid."""

    images: Annotated[tuple[Path, ...], Option(positional=True, metavar="FOLDER|IMAGE ...")]
    """Images, and folders that are searched for images at any depth, sorted by name."""
    out: Path = Path("images.png")
    """The grid, a PNG file."""
    columns: int | None = None
    """Images in a row; by default the grid is about square."""
    rows: int | None = None
    """Rows; images that do not fit are left out. By default all images fit."""
    scale: int = 1
    """Factor by which to enlarge each pixel."""
    captions: bool = False
    """Write each image's name below it."""

    def __post_init__(self) -> None:
        check_option(self, "images", len(self.images) >= 1, "one image or folder, or more")
        check(self.out.suffix == ".png", "out", str(self.out), "a .png file")
        check_range(self, 1, 10_000, "columns", "rows")
        check_range(self, 1, 64, "scale")
