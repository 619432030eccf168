"""Distill a network to one step, and score teacher and students with the same seeds at several numbers of steps."""

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
from lamamba.training.distillation import plan_rounds, student_objective, student_sampler
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
    """Distill in rounds down to one step, score, and draw; what is done is not done again.

    Raises:
        OutOfTimeError: time ran out; the work so far was saved.
    """
    teacher = _find_teacher(setting, piece)
    config, info = _make_config(setting, piece, teacher)
    record = Record(setting, piece, {"train": settings_of(config), "distillation": vars(config.distillation)})
    _train(setting, record, config)
    students = {str(own.steps): config.out / "checkpoints" / f"{own.end:012d}" for own in plan_rounds(config)}
    points = record.rows("points")
    there = {Way(point["who"], point["sampler"], point["steps"]) for point in points}
    for way in _ways(setting, config, info):
        if way not in there:
            denoiser = _load(setting, students.get(way.who, teacher))
            guidance = piece.guidance if way.who == "teacher" else 1.0  # students include it
            scores = denoiser.score(
                setting, setting.scale.num_samples, sampler=way.sampler, steps=way.steps, guidance=guidance,
                clip_sample=True,
            )  # fmt: skip
            points.append({"who": way.who, **scores})
            print(json.dumps(points[-1]), flush=True)
            record.write()
            forget(setting.device)
    _draw(setting, record, config, info, {**students, "teacher": teacher}, piece.guidance)
    best = "4" if "4" in students else min(students)
    export(students[best], record.folder / f"student-{best}")  # in float16, to bring home and to ship
    record.finish()


def _find_teacher(setting: Setting, piece: Distilling) -> Path:
    """Return the folder of the teacher's checkpoint, which its piece trained."""
    folder = setting.out / piece.name / "teacher"
    if not folder.is_dir():
        release(setting.out / piece.of.name, folder)
    return folder


def _make_config(setting: Setting, piece: Distilling, teacher: Path) -> tuple[TrainConfig, CheckpointInfo]:
    scale = setting.scale
    folder, info = locate(teacher)
    teacher_steps = 8 if scale.quick else piece.teacher_steps
    config = TrainConfig(
        out=setting.out / piece.name / "run", data=DATA, num_images=scale.num_images or piece.num_images,
        batch_size=scale.batch_size, learning_rate=piece.learning_rate, decay="linear", keep_checkpoints=0,
        objective=student_objective(info.objective), network=replace(read_network_config(folder), label_dropout=0.0),
        distillation=DistillationOptions(piece.steps, piece.guidance, teacher_steps, info.objective),
        start_from=str(teacher),
    )  # fmt: skip
    return config, info


def _train(setting: Setting, record: Record, config: TrainConfig) -> None:
    """Train all rounds, with a checkpoint after each; check the time at each point of the curve."""
    ends = [own.end for own in plan_rounds(config)]
    saved = checkpoints_in(config.out)
    if saved and int(saved[-1].name) == ends[-1]:
        return
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
        while trainer.images < ends[-1]:
            end = min(next(end for end in ends if end > trainer.images), (trainer.images // every + 1) * every)
            row = meter.train_to(end, reader)
            distilled = trainer.info().distilled
            curve.append({"steps": distilled and distilled.steps, **row})
            print(json.dumps(curve[-1]), flush=True)
            over = None
            try:
                setting.clock.check()
            except OutOfTimeError as error:
                over = error
            if over or trainer.images in ends:
                record.write()
                trainer.save()
                trainer.writer.finish()
            if over:
                raise over
    finally:
        trainer.close()
    forget(setting.device)


def _ways(setting: Setting, config: TrainConfig, info: CheckpointInfo) -> Iterator[Way]:
    """List what is scored: the teacher by its default sampler and by the students' one, and each student.

    Students are sampled in their own steps. The one of four steps, or of the most below, also shows what other numbers
    of steps make of it.
    """
    counts, sampler = setting.scale.few_steps, student_sampler(OBJECTIVES[config.objective])
    rounds = plan_rounds(config)
    yield from (Way("teacher", OBJECTIVES[info.objective].default_sampler, steps) for steps in counts)
    yield from (Way("teacher", sampler, steps) for steps in sorted({*counts, rounds[0].teacher_steps}))
    yield from (Way(str(own.steps), sampler, own.steps) for own in rounds)
    shown = max(own.steps for own in rounds if own.steps <= 4)
    yield from (Way(str(shown), sampler, steps) for steps in counts if steps != shown)


def _load(setting: Setting, checkpoint: Path) -> Denoiser:
    loaded = load_checkpoint(checkpoint)
    bf16 = uses_bf16("auto", setting.device)
    autocast = torch.autocast(setting.device.type, torch.bfloat16) if bf16 else nullcontext()
    return Denoiser(InAutocast(loaded.network.to(setting.device), autocast), loaded.info.objective, DATA)


def _draw(
    setting: Setting,
    record: Record,
    config: TrainConfig,
    info: CheckpointInfo,
    checkpoints: dict[str, Path],
    guidance: float,
) -> None:
    """Draw the same seeds by the teacher and by each student, one below the other."""
    most, sampler = max(setting.scale.few_steps), student_sampler(OBJECTIVES[config.objective])
    ways = [Way("teacher", OBJECTIVES[info.objective].default_sampler, steps) for steps in (most, 4)]
    ways += [Way(str(own.steps), sampler, own.steps) for own in plan_rounds(config)]
    columns, rows = 2 * setting.scale.num_grid, []
    for way in ways:
        scale: Any = guidance if way.who == "teacher" else 1.0
        denoiser = _load(setting, checkpoints[way.who])
        rows.append(denoiser.draw(setting, columns, scale, way.sampler, way.steps, clip_sample=True).cpu())
        forget(setting.device)
    names = [f"{'teacher' if way.who == 'teacher' else 'student'}, {describe_steps(way.steps)}" for way in ways]
    with atomic_write(record.folder / "grid.png") as temporary:
        make_grid(torch.cat(rows).numpy(), columns, scale=2, row_names=names).save(temporary, "PNG")
