"""The command `lamamba sample`: a checkpoint, labels and seeds to PNG files."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lamamba import __version__
from lamamba.checkpoint import CheckpointInfo, load_checkpoint
from lamamba.config import SampleConfig, nearest
from lamamba.diffusion import OBJECTIVES
from lamamba.errors import CheckpointError, ConfigError
from lamamba.latents import open_space
from lamamba.pipeline import check_labels, choose_device, make_grid, sample


def generate(config: SampleConfig) -> None:
    """Sample what the configuration asks for and write the grid, and single images where wanted.

    Raises:
        LamambaError: the checkpoint, a label, the sampler or a path is at fault.
    """
    device = choose_device(config.device)
    loaded = load_checkpoint(config.checkpoint)
    network, info = loaded.network.to(device), loaded.info
    objective = OBJECTIVES[info.objective]
    vae = config.vae or (Path(info.vae) if info.vae else None)
    space = open_space(vae, device)
    num_classes = int(network.config.num_classes)
    classes = parse_labels(config.labels, num_classes, info.class_names)
    labels = [label for label in classes for _ in range(config.num_per_label)]
    seeds = [config.seed + index for index in range(len(labels))]
    guidance = config.guidance if config.guidance is not None else (2.0 if num_classes else 1.0)
    size = None if config.size is None else (space.grid_size(config.size[0]), space.grid_size(config.size[1]))
    sampler = config.sampler or objective.default_sampler
    # Before the work: a sampler that does not fit, or a folder that cannot be written, should not cost a minute.
    evaluations = len(objective.scheduler(sampler, config.steps).timesteps)
    _make_folders(config)

    console = Console()
    images = []
    with Progress(
        TextColumn("[bold]sample"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=evaluations * len(labels))
        for start in range(0, len(labels), config.batch_size):
            part = slice(start, start + config.batch_size)
            x = sample(
                network,
                objective,
                labels[part],
                seeds[part],
                sampler=sampler,
                num_steps=config.steps,
                guidance_scale=guidance,
                guidance_interval=config.guidance_interval,
                size=size,
                on_step=lambda number: progress.advance(task, number),
            )
            images.append(space.decode(x).cpu().numpy())
    pixels = np.concatenate(images)

    settings = {
        "checkpoint": str(config.checkpoint),
        "images_seen": info.images,
        "vae": None if vae is None else str(vae),
        "sampler": sampler,
        "steps": config.steps,
        "guidance": guidance,
        "guidance_interval": config.guidance_interval,
        "lamamba": __version__,
        "torch": torch.__version__,
    }
    grid = make_grid(pixels, columns=config.num_per_label, scale=max(1, 64 // pixels.shape[-1]))
    _save(grid, config.out, {**settings, "labels": classes, "num_per_label": config.num_per_label, "seed": config.seed})
    if config.images_out is not None:
        for index, (image, label, seed) in enumerate(zip(pixels, labels, seeds, strict=True)):
            picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
            _save(picture, config.images_out / f"{index:06d}.png", {**settings, "label": label, "seed": seed})
    named = ", ".join(label_name(label, num_classes, info) for label in classes)
    console.print(f"{len(labels)} images ({named}) · {sampler}, {config.steps} steps", highlight=False, soft_wrap=True)
    console.print(f"grid   {config.out}", highlight=False, soft_wrap=True)
    if config.images_out is not None:
        console.print(f"images {config.images_out}", highlight=False, soft_wrap=True)


def parse_labels(text: str | None, num_classes: int, class_names: tuple[str, ...]) -> list[int]:
    """Read labels given by name or number, separated by commas; None is all classes, at most the first 10.

    A name wins over a number. Where a class is named by a number, numbers are names throughout, but for the number of
    "no label": in folders 1, 2 and 3, "2" is not the third.

    Raises:
        ConfigError: a label is unknown or out of range.
    """
    if text is None:
        return list(range(min(num_classes, 10))) if num_classes else [0]
    exact = {name: index for index, name in enumerate(class_names)}
    lower = {name.lower(): index for name, index in exact.items()}
    numbers_are_names = any(name.isdecimal() for name in class_names)
    labels = []
    for part in (part.strip() for part in text.split(",")):
        named = exact.get(part, lower.get(part.lower()))
        if named is not None:
            labels.append(named)
        elif part.removeprefix("-").isdecimal() and (not numbers_are_names or int(part) == num_classes):
            labels.append(int(part))
        else:
            numbers = f"give numbers from 0 to {num_classes - 1}" if num_classes else "this network is unconditional"
            why = "classes are named by numbers here, so a number is a name; " if part.isdecimal() else ""
            raise ConfigError(f"no class is named {part!r}: {why + nearest(part, lower) if lower else numbers}")
    check_labels(labels, num_classes)
    return labels


def label_name(label: int, num_classes: int, info: CheckpointInfo) -> str:
    """Name a label for people, with its number where the name is another number."""
    if label == num_classes:
        return "no label"
    name = info.class_names[label] if label < len(info.class_names) else str(label)
    return f"{name} = label {label}" if name.isdecimal() and name != str(label) else name


def _make_folders(config: SampleConfig) -> None:
    if config.out.suffix.lower() != ".png":
        raise ConfigError(f"out {config.out} is not a .png file: the grid is written as PNG")
    for folder in (config.out.parent, config.images_out):
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(f"folder {folder} cannot be made: {error}") from error


def _save(picture: Image.Image, path: Path, settings: dict[str, object]) -> None:
    metadata = PngInfo()
    metadata.add_text("lamamba", json.dumps(settings))
    temporary = path.with_name(f".incomplete-{path.name}")
    try:
        picture.save(temporary, format="PNG", pnginfo=metadata)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path} could not be written: {error}") from error
