"""The commands `lamamba plot` and `lamamba grid`: draw runs, and arrange images in a grid."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from lamamba.config import GridConfig, PlotConfig
from lamamba.config.checks import MAX_GRID_PIXELS
from lamamba.data import read_image
from lamamba.data.folders import list_images_below, no_images
from lamamba.errors import CheckpointError, ConfigError, DataError
from lamamba.files import atomic_write
from lamamba.sampling import make_grid
from lamamba.terminal.output import say
from lamamba.terminal.streams import visible
from lamamba.training.log import draw_legend, draw_line, read_log, save_figure

# The loss of each quarter of the timesteps: its key in the log, its label, and its line style.
QUARTERS = {
    "loss_q1": ("timesteps 0 to 250", "-"),
    "loss_q2": ("250 to 500", "--"),
    "loss_q3": ("500 to 750", "-."),
    "loss_q4": ("750 to 1000", ":"),
}
MAX_FRAME_WIDTH = 1280  # in pixels; wider sample grids are scaled down
MAX_GIF_FRAMES = 100
_FRAME_MS, _LAST_FRAME_MS = 250, 2000
_CAPTION_HEIGHT = 14


def plot(config: PlotConfig) -> None:
    """Draw the curves of runs in one figure, and the samples of each run over time. Print the files written.

    Raises:
        CheckpointError: a folder is not a run or its log is empty, or a file cannot be written.
    """
    names = name_runs(config.runs)
    records = {name: read_log(run)[0] for name, run in names.items()}
    for name, run in names.items():
        if not records[name]:
            raise CheckpointError(f"the log of {run} is still empty: wait for the first line of log.jsonl")
    written = [config.out / "curves.png"]
    figure = draw_curves(records)
    with atomic_write(written[0]) as temporary:
        save_figure(figure, temporary)
    for name, run in names.items():
        frames = read_frames(run)
        if not frames:
            continue
        stem = "samples-" + re.sub(r"[^\w.-]+", "-", name).strip("-")
        if config.out / f"{stem}.png" in written:  # taken by another run whose name differs only in replaced characters
            stem += f"-{list(names).index(name)}"
        chosen = choose_evenly(frames, config.frames)
        strip = make_grid(np.stack([np.asarray(frame).transpose(2, 0, 1) for frame in chosen]), columns=1, scale=1)
        written += [config.out / f"{stem}.png", config.out / f"{stem}.gif"]
        with atomic_write(written[-2]) as temporary:
            strip.save(temporary, format="PNG")
        first, *others = choose_evenly(frames, MAX_GIF_FRAMES)
        durations = [_FRAME_MS] * len(others) + [_LAST_FRAME_MS]
        with atomic_write(written[-1]) as temporary:
            first.save(temporary, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)
    say(*written)


def name_runs(runs: Iterable[Path]) -> dict[str, Path]:
    """Name runs by their folders, or by their full paths if two folders have the same name."""
    runs = list(dict.fromkeys(runs))
    short = [run.resolve().name or str(run.resolve()) for run in runs]  # the root folder has no name
    return {name if short.count(name) == 1 else str(run.resolve()): run for name, run in zip(short, runs, strict=True)}


def draw_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Draw the logs of runs in one figure: loss, loss by quarter of the timesteps, images/s, gradient norm.

    Values that a record of log.jsonl lacks are skipped.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    losses, quarters, speed, gradient = figure.subplots(2, 2).flat
    for index, (run, records) in enumerate(runs.items()):
        style = {"color": f"C{index}"}
        for axes, name in ((losses, "loss"), (speed, "images_per_s"), (gradient, "grad_norm")):
            draw_line(axes, records, name, label=run, **style)
        for number, (name, (timesteps, line)) in enumerate(QUARTERS.items()):
            alone = len(runs) == 1
            own = {"color": f"C{number}"} if alone else {"linestyle": line, **style}
            label = timesteps if alone else f"{timesteps}, {run}"
            draw_line(quarters, records, name, label=label, **own)
    titles = {losses: "loss", quarters: "loss by timestep", speed: "images/s", gradient: "gradient norm"}
    for axes, title in titles.items():
        axes.set(xlabel="images seen", title=title)
        if axes.lines:
            draw_legend(axes, fontsize="small")
        else:
            axes.text(0.5, 0.5, "not in the log", ha="center", transform=axes.transAxes)
        if axes is not speed:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    speed.set_ylim(bottom=0)
    return figure


def read_frames(run: Path) -> list[Image.Image]:
    """Read a run's sample grids, oldest first, and caption them with the images seen.

    Unreadable files are skipped. Grids of a resumed run may differ in size; they are enlarged to the largest one.
    """
    grids = {}
    for path in sorted((run / "samples").glob("*.png")):
        if not path.stem.isdigit():
            continue
        try:
            grid = read_image(path, 3)
        except DataError:
            continue  # it is still being written
        if grid.width > MAX_FRAME_WIDTH:
            size = MAX_FRAME_WIDTH, round(grid.height * MAX_FRAME_WIDTH / grid.width)
            grid = grid.resize(size, Image.Resampling.LANCZOS)
        grids[int(path.stem)] = grid
    sizes = [grid.size for grid in grids.values()] or [(0, 0)]
    size = max(width for width, _ in sizes), max(height for _, height in sizes)
    return [
        add_caption(ImageOps.pad(grid, size, Image.Resampling.NEAREST, "white", (0, 0)), f"{images:,} images")
        for images, grid in grids.items()
    ]


def choose_evenly(items: Sequence[Any], number: int) -> list[Any]:
    """Choose at most `number` items (at least 2), evenly spaced, including the first and the last."""
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, min(number, len(items)))]


def add_caption(image: Image.Image, text: str) -> Image.Image:
    """Add a line of text on white below an image. Text that is too long is cut off."""
    font, text = ImageFont.load_default(), visible(text)
    while text and font.getlength(text) > image.width:
        text = text[:-1]
    captioned = Image.new("RGB", (image.width, image.height + _CAPTION_HEIGHT), "white")
    captioned.paste(image)
    ImageDraw.Draw(captioned).text((0, image.height + 1), text, fill="black", font=font)
    return captioned


def grid(config: GridConfig) -> None:
    """Arrange images in a grid, and print the file written.

    Raises:
        DataError: an image or folder is missing or unreadable, or the images differ in size.
        ConfigError: the grid would be too large.
        CheckpointError: the grid cannot be written.
    """
    paths = _list_images(config.images)
    columns = config.columns or (math.ceil(len(paths) / config.rows) if config.rows else math.isqrt(len(paths) - 1) + 1)
    shown = paths[: columns * config.rows] if config.rows else paths
    first = read_image(shown[0], 3)
    if len(shown) * first.width * first.height * config.scale**2 > MAX_GRID_PIXELS:
        raise ConfigError(
            f"a grid of {len(shown):,} images of {first.width}x{first.height} would be too large: "
            "use fewer rows (--rows) and columns (--columns)"
        )
    tiles = []
    for path in shown:
        tile = read_image(path, 3)
        if tile.size != first.size:
            raise DataError(
                f"{path} is {tile.width}x{tile.height}, but {shown[0]} is {first.width}x{first.height}: "
                "give images of the same size"
            )
        tile = tile.resize((tile.width * config.scale, tile.height * config.scale), Image.Resampling.NEAREST)
        tiles.append(np.asarray(add_caption(tile, Path(path).stem) if config.captions else tile).transpose(2, 0, 1))
    picture = make_grid(np.stack(tiles), columns, scale=1)
    with atomic_write(config.out) as temporary:
        picture.save(temporary, format="PNG")
    left_out = f", {len(paths) - len(shown):,} left out" if len(shown) < len(paths) else ""
    say(f"{config.out}: {len(shown):,} images{left_out}")


def _list_images(paths: Iterable[Path]) -> list[str]:
    listed: list[str] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} is missing: give images, or folders of them")
        if not path.is_dir():
            listed.append(str(path))
            continue
        found = list_images_below(path)
        if not found.images:
            raise DataError(no_images(path, found))
        if found.left_out:
            say(f"left out of {path}: {found.left_out}")
        listed += found.images
    return listed
