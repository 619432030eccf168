"""The command `lamamba distill`: trains a student that samples in a few steps.

`lamamba.training.distillation` has the method.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lamamba.checkpoints.checkpoint import RECORD, check_network, find_checkpoint, locate, shipped_weights
from lamamba.config import DistillConfig
from lamamba.data import NAMED_SOURCES
from lamamba.data.latent_files import are_latents
from lamamba.diffusion import OBJECTIVES
from lamamba.errors import ConfigError, DataError
from lamamba.files.records import OriginRecord, is_run, read_record, read_train_config
from lamamba.sampling.labels import choose_guidance
from lamamba.training.distillation import student_objective, student_sampler
from lamamba.training.run import Run, train


def distill(config: DistillConfig) -> Run:
    """Distill a teacher as configured, or continue with `resume`.

        run = lamamba.distill(lamamba.DistillConfig(start_from="nano", out=Path("runs/fast")))
        lamamba.LaMambaDiffPipeline.from_checkpoint(run.folder)(class_labels=["Bag"])  # in 4 steps, without guidance

    Returns:
        The run of the student.

    Raises:
        LamambaError: the options, the teacher, its data or the run folder are wrong.
    """
    is_complete = config.network is not None  # as in a run that is continued
    return train(config if is_complete else complete(config))


def complete(config: DistillConfig) -> DistillConfig:
    """Take from the teacher what the configuration leaves open: network, objective, guidance, data, autoencoder.

    Raises:
        CheckpointError: there is no such teacher.
        ConfigError: it cannot be distilled, or does not say what it was trained on.
        DataError: what it was trained on is gone.
    """
    path = find_checkpoint(config.start_from)
    folder, info = locate(path)
    network = check_network(folder)
    if info.distilled:
        raise ConfigError(f"{config.start_from} is a student already, {info.distilled}: distill its teacher instead")
    objective = student_objective(info.objective)
    student_sampler(OBJECTIVES[objective])  # refuses objectives that have none
    options = replace(
        config.distillation,
        guidance=choose_guidance(network, config.distillation.guidance),
        teacher_objective=info.objective,
    )
    changes: dict[str, Any] = {
        "preset": f"of {config.start_from}",
        "network": replace(network, label_dropout=0.0),  # the student never sees "no label", as guidance is included
        "objective": objective,
        "distillation": options,
        "vae": config.vae or (Path(info.vae) if info.vae else None),
        **_data_options(config, path),
    }
    if changes["data"] not in NAMED_SOURCES and not are_latents(changes["data"]) and not changes["vae"]:
        changes.setdefault("image_size", config.image_size or network.sample_size)
        changes.setdefault("channels", config.channels or network.in_channels)
    return replace(config, **changes)


def _data_options(config: DistillConfig, path: Path) -> dict[str, Any]:
    """Return the data options of the configuration, or of the teacher's run if it names none."""
    record = path.parent.parent / "config.json"
    is_of_run = (path / RECORD).is_file() and is_run(record.parent)
    started = read_train_config(record) if is_of_run else None
    flips = {"horizontal_flip": bool(started and started.horizontal_flip)}
    if config.data is not None:
        return {"data": config.data, **flips}
    if path == shipped_weights()["nano"]:
        return {"data": "builtin", **flips}
    if started is None:
        raise ConfigError(f"{config.start_from} does not record the images that it was trained on: give them (--data)")
    known = read_record(record, OriginRecord).get("paths", {})
    if "data" in known and not Path(started.data).expanduser().exists():
        raise DataError(
            f"the images that {config.start_from} was trained on are gone from {started.data}: give them (--data)"
        )
    names = ("data", "data_folder", "image_size", "channels", "skip_bad_images", "dataset")
    return {name: getattr(started, name) for name in names} | flips
