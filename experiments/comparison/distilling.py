"""Distill a network, and score teacher and student with the same seeds at several numbers of steps."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lamamba.checkpoints.checkpoint import (
    CheckpointInfo,
    checkpoints_in,
    describe_steps,
    export,
    load_checkpoint,
    locate,
    read_network_config,
)
from lamamba.config import DistillationOptions, TrainConfig
from lamamba.data.latents import Pixels
from lamamba.diffusion import OBJECTIVES
from lamamba.files import atomic_write
from lamamba.sampling import make_grid, uses_bf16
from lamamba.training.distillation import student_objective, student_sampler
from lamamba.training.trainer import Trainer
from pieces import Distilling
from scoring import Denoiser, InAutocast
from setting import OutOfTimeError, Record, Setting
from training import Meter, forget, settings_of
from weights import release

DATA = "fashion-mnist"


class Way(NamedTuple):
    """A way to sample."""

    who: str
    """The teacher, or the number of steps that a student was distilled for."""
    sampler: str
    steps: int

    def __str__(self) -> str:
        return f"{self.who}, {describe_steps(self.steps)} of {self.sampler}"


def distill(setting: Setting, piece: Distilling) -> None:
    """Distill, score, and draw; what is done is not done again.

    Raises:
        OutOfTimeError: time ran out; the work so far was saved.
    """
    teacher = _find_teacher(setting, piece)
    config, info = _make_config(setting, piece, teacher)
    record = Record(setting, piece, {"train": settings_of(config), "distillation": vars(config.distillation)})
    student = _train(setting, record, config)
    kept = record.folder / f"student-{piece.steps}"  # in float16, to bring home and to ship
    if not kept.is_dir():
        export(student, kept)
    points = record.rows("points")
    there = {Way(point["who"], point["sampler"], point["steps"]) for point in points}
    for way in _ways(setting, config, info):
        if way not in there:
            denoiser = _load(setting, teacher if way.who == "teacher" else student)
            guidance = piece.guidance if way.who == "teacher" else 1.0  # the student includes it
            scores = denoiser.score(
                setting, setting.scale.num_samples, sampler=way.sampler, steps=way.steps, guidance=guidance,
                clip_sample=True,
            )  # fmt: skip
            points.append({"who": way.who, **scores})
            print(json.dumps(points[-1]), flush=True)
            record.write()
            forget(setting.device)
    _draw(setting, record, config, info, teacher, student)
    record.finish()


def _find_teacher(setting: Setting, piece: Distilling) -> Path:
    """Return the folder of the teacher's checkpoint, which its piece trained."""
    folder = setting.out / piece.name / "teacher"
    if not folder.is_dir():
        release(setting.out / piece.of.name, folder)
    return folder


def _make_config(setting: Setting, piece: Distilling, teacher: Path) -> tuple[TrainConfig, CheckpointInfo]:
    folder, info = locate(teacher)
    num_images = setting.scale.num_images or piece.num_images
    config = TrainConfig(
        out=setting.out / piece.name / "run", data=DATA, num_images=num_images, warmup_images=num_images // 50,
        batch_size=setting.scale.batch_size, learning_rate=piece.learning_rate, decay="linear", keep_checkpoints=1,
        ema_decay=piece.ema_decay, objective=student_objective(info.objective),
        network=replace(read_network_config(folder), label_dropout=0.0),
        distillation=DistillationOptions(piece.steps, piece.guidance, info.objective), start_from=str(teacher),
    )  # fmt: skip
    return config, info


def _train(setting: Setting, record: Record, config: TrainConfig) -> Path:
    """Train, check the time at each point of the curve, and return the last checkpoint."""
    saved = checkpoints_in(config.out)
    if saved and int(saved[-1].name) >= config.num_images:
        return saved[-1]
    trainer = Trainer(config, setting.open_training_images(DATA), Pixels(), setting.device)
    try:
        if saved:
            trainer.restore(saved[-1])
        else:
            trainer.begin_with(str(config.start_from))
        curve = record.rows("curve")
        curve[:] = [row for row in curve if row["images"] <= trainer.images]
        meter = Meter(trainer, curve[-1]["seconds"] if curve else 0.0)
        reader, every = trainer.batches(), setting.scale.log_every
        while trainer.images < config.num_images:
            curve.append(meter.train_to(min(config.num_images, (trainer.images // every + 1) * every), reader))
            print(json.dumps(curve[-1]), flush=True)
            over = None
            try:
                setting.clock.check()
            except OutOfTimeError as error:
                over = error
            if over or trainer.images >= config.num_images:
                record.write()
                trainer.save()
                trainer.writer.finish()
            if over:
                raise over
    finally:
        trainer.close()
    forget(setting.device)
    return checkpoints_in(config.out)[-1]


def _ways(setting: Setting, config: TrainConfig, info: CheckpointInfo) -> Iterator[Way]:
    """List what is scored: the teacher by its default sampler and by the student's one, and the student.

    The student is scored in its own steps first, and then in other numbers of steps.
    """
    counts, sampler = setting.scale.few_steps, student_sampler(OBJECTIVES[config.objective])
    assert config.distillation is not None
    steps = config.distillation.steps
    yield from (Way("teacher", OBJECTIVES[info.objective].default_sampler, count) for count in counts)
    yield from (Way("teacher", sampler, count) for count in counts)
    yield from (Way(str(steps), sampler, count) for count in (steps, *(count for count in counts if count != steps)))


def _load(setting: Setting, checkpoint: Path) -> Denoiser:
    loaded = load_checkpoint(checkpoint)
    bf16 = uses_bf16("auto", setting.device)
    autocast = torch.autocast(setting.device.type, torch.bfloat16) if bf16 else nullcontext()
    return Denoiser(InAutocast(loaded.network.to(setting.device), autocast), loaded.info.objective, DATA)


def _draw(
    setting: Setting, record: Record, config: TrainConfig, info: CheckpointInfo, teacher: Path, student: Path
) -> None:
    """Draw the same seeds by the teacher in many and in few steps, and by the student, one below the other."""
    assert config.distillation is not None
    steps, guidance = config.distillation.steps, config.distillation.guidance
    default, own = OBJECTIVES[info.objective].default_sampler, student_sampler(OBJECTIVES[config.objective])
    ways = [Way("teacher", default, count) for count in (max(setting.scale.few_steps), steps)]
    ways.append(Way("student", own, steps))
    columns, rows = 2 * setting.scale.num_grid, []
    for way in ways:
        scale: Any = guidance if way.who == "teacher" else 1.0
        denoiser = _load(setting, teacher if way.who == "teacher" else student)
        rows.append(denoiser.draw(setting, columns, scale, way.sampler, way.steps, clip_sample=True).cpu())
        forget(setting.device)
    names = [f"{way.who}, {describe_steps(way.steps)}" for way in ways]
    with atomic_write(record.folder / "grid.png") as temporary:
        make_grid(torch.cat(rows).numpy(), columns, scale=2, row_names=names).save(temporary, "PNG")
