"""The command `lamamba push`: write a checkpoint as a diffusers pipeline with a model card, to a folder or the hub.

Weights are float32 by default, so the pipeline gives bitwise the images of the checkpoint, and training can continue
from it. With float16, large networks take gigabytes less, and images may differ in the last gray levels.
"""

import re
import shlex
import tempfile
from pathlib import Path
from typing import Any, NotRequired
from urllib.parse import quote

import torch
from huggingface_hub import ModelCardData
from typing_extensions import TypedDict

from lamamba import __version__
from lamamba.checkpoints.checkpoint import Distilled, find_checkpoint, save_network, shipped_weights
from lamamba.checkpoints.hub import make_repository, send
from lamamba.config import PushConfig, SamplingConfig
from lamamba.config.checks import check_unset
from lamamba.config.sampling import DEFAULT_STEPS
from lamamba.data.fashion_mnist import HUB_REPOSITORY
from lamamba.data.latents import IMAGE_CHANNELS, Latents
from lamamba.errors import CheckpointError, ConfigError, DataError
from lamamba.files import TEMPORARY, write_text
from lamamba.files.records import read_record
from lamamba.files.weights import PIPELINE_INDEX, class_of
from lamamba.sampling import choose_device, make_grid
from lamamba.sampling.generate import ImageSampler, sample_with_bar
from lamamba.sampling.labels import why_unguided
from lamamba.sampling.pipeline import LaMambaDiffPipeline
from lamamba.terminal.output import say
from lamamba.terminal.streams import visible

CARD, PICTURE = "README.md", "samples.png"
_MOST_NAMES = 20  # class names listed in the card
_OBJECTIVES = {
    "diffusion": "noise prediction with learned variance, 1000 linear steps",
    "diffusion-v": "v-prediction with learned variance, 1000 linear steps",
    "diffusion-v-zero-snr": "v-prediction with learned variance, 1000 linear steps scaled to zero terminal SNR",
    "flow": "flow matching: velocity on the straight path from data to noise",
    "flow-x": "flow matching: prediction of the clean image on the straight path from data to noise",
}
_OF_WRITING = ("license", "dataset", "scores", "vae", "half", "num_per_label")


def push(config: PushConfig) -> None:
    """Write the pipeline, and upload it if the configuration names a repository.

    Raises:
        LamambaError: the checkpoint, an option or a file is invalid, or the hub refuses it or cannot be reached.
    """
    source = Path(config.checkpoint)
    if config.out is None and (source / PIPELINE_INDEX).is_file() and (source / CARD).is_file():
        why = (
            f"{config.checkpoint} has a card and is uploaded as it is (edit {CARD}, or write another folder with --out)"
        )
        check_unset(config, *_OF_WRITING, why=why)
        _make_repository(config)
        _send(config, source)
        return
    if config.out is not None and config.out.exists():
        raise ConfigError(f"out {config.out} exists already: choose another path, or move it away")
    path = find_checkpoint(config.checkpoint)
    pipe = LaMambaDiffPipeline.from_checkpoint(path, config.vae)
    if pipe.vae is None and pipe.network.config.in_channels not in IMAGE_CHANNELS:
        raise ConfigError(
            f"{config.checkpoint} samples latents with {pipe.network.config.in_channels} channels: give the folder of "
            "their AutoencoderKL (--vae)"
        )
    scores = None if config.scores is None else _read_scores(config.scores, pipe.config.images_seen)
    _make_repository(config)  # before the work, so that a refused name costs no time
    parent = None if config.out is None else config.out.absolute().parent
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=parent) as temporary:
        folder = Path(temporary) / "pipeline"
        _write_pipeline(pipe, folder, half=config.half)
        rows = _draw(folder, config)
        dataset = config.dataset or _dataset_of(path)
        write_text(folder / CARD, _card(pipe, config, rows, dataset, scores))
        if config.out is not None:
            folder = folder.replace(config.out)
            say(f"wrote {folder}; sample it with: lamamba sample {shlex.quote(str(folder))}")
        _send(config, folder)


def _make_repository(config: PushConfig) -> None:
    if config.repository is not None:
        make_repository(config.repository, private=config.private, branch=config.branch)


def _send(config: PushConfig, folder: Path) -> None:
    if config.repository is not None:
        message = f"Upload {class_of(folder)} with lamamba {__version__}"
        say(send(folder, config.repository, branch=config.branch, message=message))


def _write_pipeline(pipe: LaMambaDiffPipeline, folder: Path, *, half: bool) -> None:
    if half:
        for name, module in pipe.components.items():
            if isinstance(module, torch.nn.Module) and not all(
                bool(weight.isfinite().all()) for weight in module.half().state_dict().values()
            ):
                raise CheckpointError(f"weights of the {name} exceed the range of float16: leave half out")
    save_network(pipe, folder)


def _draw(folder: Path, config: PushConfig) -> list[int]:
    """Sample the card's picture from the written folder, as `lamamba sample` does; return the labels of its rows."""
    if not config.num_per_label:
        return []
    model = ImageSampler(SamplingConfig(checkpoint=str(folder)), choose_device(config.device))
    model.say_notes()
    rows = model.labels.parse(None)
    labels = [label for label in rows for _ in range(config.num_per_label)]
    pixels = sample_with_bar(model, labels, range(len(labels)))
    make_grid(pixels, config.num_per_label).save(folder / PICTURE)
    return rows


def _dataset_of(path: Path) -> str | None:
    """Return the hub's name of the dataset that a checkpoint was trained on, if its run records it."""
    shipped = shipped_weights()
    if path in (shipped["nano"], shipped["nano-4-steps"]):
        return HUB_REPOSITORY
    try:
        data = read_record(path.parent.parent / "config.json", _Trained)["data"]
    except CheckpointError:  # not a run, or only weights
        return None
    return HUB_REPOSITORY if data in ("builtin", "fashion-mnist") else None


class _Trained(TypedDict):
    data: str


class _Generated(TypedDict):
    images: int


class _Reference(TypedDict):
    name: str
    images: NotRequired[int | None]


class _Features(TypedDict):
    name: str
    sha256: str


class _Scores(TypedDict):
    """The parts of scores.json that go into the card."""

    scores: dict[str, float]
    features: _Features
    generated: _Generated
    reference: _Reference
    generation: dict[str, Any] | None
    warnings: NotRequired[list[str]]
    lamamba: NotRequired[str]


def _read_scores(path: Path, images_seen: int) -> _Scores:
    """Read scores of `lamamba evaluate`, and check as far as possible that they are of the same weights."""
    scores = read_record(path, _Scores, DataError)
    theirs = (scores["generation"] or {}).get("images_seen", images_seen)
    if theirs != images_seen:
        raise ConfigError(
            f"scores {path} are of weights that had seen {theirs} images, but these have seen {images_seen}: score "
            "these"
        )
    return scores


def _card(
    pipe: LaMambaDiffPipeline,
    config: PushConfig,
    rows: list[int],
    dataset: str | None,
    scores: _Scores | None,
) -> str:
    """Write the model card: facts about the network, how to sample it, and its scores."""
    name = config.repository or Path(config.out or "").name
    header = ModelCardData(
        license=config.license,
        library_name="lamamba",
        pipeline_tag="unconditional-image-generation",
        tags=["diffusers", "diffusion", "mamba", *(["class-conditional"] if pipe.network.config.num_classes else [])],
        datasets=None if dataset is None else [dataset],
    )
    return "\n".join([
        "---", header.to_yaml().strip(), "---", "", f"# {_escaped(name.split('/')[-1])}", "",
        *_picture_lines(name, pipe, rows, config.num_per_label),
        *_table_lines(pipe, dataset, half=config.half),
        *_sampling_lines(pipe, name),
        *([] if scores is None else _score_lines(scores)),
    ])  # fmt: skip


def _picture_lines(name: str, pipe: LaMambaDiffPipeline, rows: list[int], num_per_label: int) -> list[str]:
    if not rows:
        return []
    shown = ", ".join(_names(pipe)[row] for row in rows) if pipe.network.config.num_classes else "without labels"
    command = f"lamamba sample {shlex.quote(visible(name))} --num-per-label {num_per_label} --out {PICTURE}"
    return [f"![samples]({PICTURE})", "", f"*Rows: {shown}. {_code(command)}*", ""]


def _table_lines(pipe: LaMambaDiffPipeline, dataset: str | None, *, half: bool) -> list[str]:
    network, vae = pipe.network, pipe.vae
    number = network.num_parameters()
    factor, channels = (1, network.config.in_channels) if vae is None else (Latents(vae).factor, vae.config.in_channels)
    side = factor * network.config.sample_size
    kind = {1: "gray", 3: "color"}.get(channels, f"{channels} channels")
    images = f"{side}x{side}, {kind}"
    if vae is not None:
        images += f"; the network works on latents of the AutoencoderKL in vae/, which are {factor} times smaller"
    names = _names(pipe)
    classes = ", ".join(names[:_MOST_NAMES]) if names else "none: the network is unconditional"
    if len(names) > _MOST_NAMES:
        classes += f" and {len(names) - _MOST_NAMES:,} more, all in {PIPELINE_INDEX}"
    link = None if dataset is None else f"https://huggingface.co/datasets/{quote(dataset, errors='surrogateescape')}"
    why = None if pipe.config.distilled else why_unguided(network.config)
    rows = {
        "network": f"LaMamba-Diff ([arXiv 2408.02615](https://arxiv.org/abs/2408.02615)), {number:,} parameters",
        "weights": "float16" if half else "float32",
        "images": images,
        "objective": _OBJECTIVES.get(pipe.config.objective, pipe.config.objective),
        "training": f"{pipe.config.images_seen:,} images seen" if pipe.config.images_seen else None,
        "data": None if dataset is None else f"[{_escaped(dataset)}]({link})",
        "classes": classes,
        "guidance": f"off: {why}" if why and network.config.num_classes else None,
        "sampling": str(Distilled(**pipe.config.distilled)) if pipe.config.distilled else None,
    }
    return ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items() if value), ""]


def _sampling_lines(pipe: LaMambaDiffPipeline, name: str) -> list[str]:
    # The first class, by its name if `--labels` can express it.
    names = [name for name in list(pipe.labels)[:1] if "," not in name and visible(name) == name]
    label: str | int | None = names[0] if names else 0 if pipe.network.config.num_classes else None
    option = "" if label is None else f"--labels {shlex.quote(visible(label))} "
    return [
        "## Sample", "", "In Python, with the package `lamamba` (this is a diffusers pipeline):", "",
        "```python", "from lamamba import LaMambaDiffPipeline", "",
        f"pipe = LaMambaDiffPipeline.from_pretrained({name!r})  # .to(\"cuda\") for a GPU",
        f"images = pipe({'' if label is None else f'class_labels=[{label!r}], '}"
        f"num_inference_steps={(pipe.config.distilled or {}).get('steps', DEFAULT_STEPS)}).images",
        "```", "", "From the shell, as files or as a grid:", "",
        f"    lamamba generate {shlex.quote(visible(name))} --num-images 1000 --out images",
        f"    lamamba sample {shlex.quote(visible(name))} {option}--out grid.png", "",
    ]  # fmt: skip


def _score_lines(scores: _Scores) -> list[str]:
    """Write the scores and the settings that they depend on. File names are given without folders."""
    generated, reference, features = scores["generated"], scores["reference"], scores["features"]
    against = f"{reference['images']:,} images" if reference.get("images") else "published statistics"
    settings, always = scores["generation"] or {}, ("sampler", "steps", "guidance")
    how = {key: value for key, value in settings.items() if key in always or (key.startswith("guidance_") and value)}
    if "guidance_checkpoint" in how:
        how["guidance_checkpoint"] = Path(str(how["guidance_checkpoint"])).name
    made = ", ".join(_escaped(f"{key.replace('_', ' ')} {value}") for key, value in how.items())
    return [
        "## Scores", "",
        f"`lamamba evaluate` compared {generated['images']:,} generated images ({made or 'settings not recorded'}) "
        f"with {against} of {_escaped(Path(reference['name']).name)}, using the features "
        f"{_escaped(features['name'])} (sha256 {_escaped(features['sha256'][:12])}), lamamba "
        f"{_escaped(str(scores.get('lamamba')))}.", "",
        "| score | value |", "| --- | --- |",
        *(f"| {_escaped(key)} | {value:.5g} |" for key, value in scores["scores"].items()), "",
        *(f"* {_escaped(warning)}" for warning in scores.get("warnings", [])),
    ]  # fmt: skip


def _names(pipe: LaMambaDiffPipeline) -> list[str]:
    """Return the name of each class, escaped for a Markdown table; its number if it has no name."""
    names = {label: name for name, label in pipe.labels.items()}
    return [_escaped(names.get(label, str(label))) for label in range(pipe.network.config.num_classes)]


def _escaped(text: str) -> str:
    """Escape text for Markdown, so that it is shown literally: no formatting, links, HTML, formulas or emoji codes."""
    return re.sub(r"([\\|*_`<>\[\]&~$#:@!])|^([-+=]|\d+[.)])", _escape, visible(text))


def _escape(found: re.Match[str]) -> str:
    return f"{found[0][:-1]}\\{found[0][-1]}"  # "1." begins a list, and "1\." does not


def _code(text: str) -> str:
    """Write text as inline code in Markdown."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"
