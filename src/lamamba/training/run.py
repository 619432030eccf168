"""`lamamba.train` and the command `lamamba train`: opens the data, builds the trainer, and loops over its steps."""

import ctypes
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.utils.checkpoint
from torch import Tensor

from lamamba.checkpoints.checkpoint import (
    RECORD,
    checkpoints_in,
    locked,
    newest_undamaged,
    read_info,
)
from lamamba.config import TrainConfig
from lamamba.data import NAMED_SOURCES, LatentSource, Source, open_source
from lamamba.data.latent_files import are_latents
from lamamba.data.latents import Latents, Space, identify, open_space
from lamamba.distributed.processes import Processes, joined
from lamamba.distributed.signals import SignalsNoted, WaitInterrupted
from lamamba.errors import CheckpointError, ConfigError, DataError, LamambaError, OtherProcessError, SignalError
from lamamba.files import write_json
from lamamba.files.records import OriginRecord, changes, is_run, plain, read_record, read_train_config
from lamamba.files.weights import PIPELINE_INDEX
from lamamba.sampling import choose_device
from lamamba.sampling.labels import why_unguided
from lamamba.terminal.output import say
from lamamba.training.log import SHORT_RUN_STEPS, SilentLog, TrainingLog, read_log
from lamamba.training.optimizers import learning_rate
from lamamba.training.resuming import compare_origin, describe_origin, same_places
from lamamba.training.trainer import Trainer

# Options of the GNU C library's `mallopt`, man page mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def resolve(config: TrainConfig) -> tuple[TrainConfig, Source, Space, torch.device]:
    """Open the data and complete the configuration: the network's classes, channels and grid, and the intervals.

    Raises:
        ConfigError: options do not fit together.
        DataError: the data cannot be opened.
        CheckpointError: the autoencoder cannot be opened.
    """
    device = choose_device(config.device)
    latents = open_source(config.data, image_size=config.image_size) if are_latents(config.data) else None
    assert latents is None or isinstance(latents, LatentSource)
    if latents and config.vae is None:
        config = replace(config, vae=Path(latents.autoencoder["folder"]))
    space = open_space(config.vae, device)
    if latents and config.vae and identify(config.vae) != latents.autoencoder["sha256"]:
        raise ConfigError(f"{config.vae} is not the autoencoder that {config.data} was encoded with: leave vae out")
    size = config.image_size
    # Named sources and latents have a size of their own.
    if size is None and isinstance(space, Latents) and config.data not in NAMED_SOURCES and not latents:
        size = config.network.sample_size * space.factor
    channels = config.channels or (3 if isinstance(space, Latents) else None)
    source = latents or open_source(
        config.data,
        image_size=size,
        channels=channels,
        folder=config.data_folder,
        skip_bad_images=config.skip_bad_images,
        dataset=config.dataset,
    )
    if config.horizontal_flip and not source.is_mirrored:
        raise ConfigError(f"{config.data} has no mirrored images: give --no-horizontal-flip, or encode them too")
    if source.latent_shape:
        if not isinstance(space, Latents):
            raise ConfigError(f"{config.data} has latents: give vae (--vae), the autoencoder that made them")
        if not latents:  # a dataset, which does not say how large its images were
            source.image_size = source.latent_shape[-1] * space.factor
        grid = space.grid_size(source.image_size)
        wanted = (space.channels(source.channels), grid, grid)
        if source.latent_shape != wanted:
            raise DataError(
                f"{config.data} has latents of {source.latent_shape}, and its autoencoder makes {wanted} of images of "
                f"{source.image_size}: encode the images again"
            )
    network = replace(
        config.network,
        in_channels=space.channels(source.channels),
        sample_size=space.grid_size(source.image_size),
        num_classes=source.num_classes,
    )

    def every(images: int | None, share: int) -> int:
        return images or max(config.batch_size, config.num_images // share)

    resolved = replace(
        config,
        network=network,
        log_every=every(config.log_every, 100),
        sample_every=every(config.sample_every, 4 if device.type == "cpu" else 10),  # a CPU samples slowly
        checkpoint_every=every(config.checkpoint_every, 10),
        snapshot_every=every(config.snapshot_every, 20),
    )
    return resolved, source, space, device


# Options that may differ when a run is resumed, because they do not change what it has computed so far. Data and
# autoencoder are compared by their contents instead.
_FREE_TO_CHANGE = {
    *("out", "num_images", "device", "cuda_graph", "compile", "num_workers", "resume", "resume_or_start", "fall_back"),
    *("dry_run", "allow_changed", "data", "dataset", "data_folder", "vae", "keep_checkpoints", "shard", "accumulate"),
    *("max_skipped_steps", "tracker", "project", "log_every", "sample_every", "checkpoint_every", "snapshot_every"),
    *("sample_steps", "sample_guidance"),
}


def check_resumable(config: TrainConfig, origin: Mapping[str, Any], checkpoint: Path) -> list[str]:
    """Check that a run can be resumed with these resolved options, data and autoencoder (`describe_origin`).

    Returns:
        A line for each path that has moved, and for each difference that `allow_changed` allows.

    Raises:
        CheckpointError: something else differs from the start of the run.
    """
    path = config.out / "config.json"
    started = {**plain(read_record(path, TrainConfig)), **read_record(path, OriginRecord)}
    now = plain(config)
    places = {**now, **origin}
    # Compare data first: some options follow from it, and its message explains more.
    notes = compare_origin(started, places, read_info(checkpoint).class_names, config.allow_changed)
    for options in (started, now):
        options.update(options.pop("network", {}))
        options.update(options.pop("distillation", None) or {})
    # With a decay, every learning rate depends on num_images; so does the regression of a distillation.
    free = _FREE_TO_CHANGE - ({"num_images"} if config.decay != "none" or config.distillation else set())
    if changed := changes(started, now, free | same_places(started, places)):
        raise CheckpointError(
            f"{config.out} was started with other options, leave them out to resume: {'; '.join(changed)}"
        )
    return notes


@dataclass(frozen=True)
class Run:
    """A training run, read from its folder."""

    folder: Path

    @property
    def config(self) -> TrainConfig:
        """The resolved configuration; `replace(run.config, resume=True, num_images=...)` continues the run."""
        return read_train_config(self.folder / "config.json")

    @property
    def records(self) -> list[dict[str, float]]:
        """The lines of log.jsonl, each with the images seen, the loss, the speed and others."""
        return read_log(self.folder)[0]

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint. Functions that take a checkpoint take the folder of the run too."""
        saved = checkpoints_in(self.folder)
        if not saved:
            raise CheckpointError(f"{self.folder} holds no checkpoint yet")
        return saved[-1]


def train(config: TrainConfig) -> Run:
    """Train as configured: a new run or, with `resume`, from the newest checkpoint of the run in `config.out`.

        run = lamamba.train(lamamba.TrainConfig(out=Path("runs/first"), num_images=20_000, learning_rate=1e-3))
        run.records[-1]["loss"], lamamba.load_checkpoint(run.folder).network

    Under torchrun, all ranks train together, each on its share of every batch.

    Returns:
        The run.

    Raises:
        LamambaError: the options, the data or the run folder are wrong, or the loss is no longer finite.
        SignalError: a signal such as Ctrl-C ended the run; a checkpoint was saved.
    """
    with joined(config.device) as (processes, device_name):
        saved = [] if config.dry_run else _find_checkpoints(config, processes.is_first)
        opened = resolve(replace(config, device=device_name))
        _train(replace(opened[0], device=config.device), *opened[1:], processes, saved)
    return Run(config.out)


def _find_checkpoints(config: TrainConfig, says: bool) -> list[Path]:
    """List the checkpoints to resume from, oldest first; none where a run starts.

    Raises:
        CheckpointError: a run would be mixed up with what the folder holds, or there is none to resume.
    """
    saved = checkpoints_in(config.out)
    if saved and not config.resumes:
        raise CheckpointError(f"{config.out} already holds a run: add --resume to continue it, or choose another --out")
    if not saved:
        _check_can_begin(config.out)
        if config.resume and not config.resume_or_start and not is_run(config.out):
            raise CheckpointError(
                f"no checkpoint in {config.out}: correct --out, or start a new run there with --resume-or-start"
            )
        if config.resumes and says:
            say(f"no checkpoint in {config.out}: starting a new run")
    return saved


def _train(
    config: TrainConfig,
    source: Source,
    space: Space,
    device: torch.device,
    processes: Processes,
    saved: Sequence[Path],
) -> None:
    if config.dry_run:
        if processes.is_first:
            say(*json.dumps(plain(config), indent=2).splitlines())
        return
    resumed = (newest_undamaged(saved) if config.fall_back else saved[-1]) if saved else None
    origin = describe_origin(config, source) if processes.is_first else {}
    moved = check_resumable(config, origin, resumed) if resumed and processes.is_first else []
    trainer = Trainer(config, source, space, device, processes)
    notes: list[str] = []
    if resumed:
        trainer.restore(resumed)
    elif config.start_from is not None:
        notes = trainer.begin_with(config.start_from)
    processes.barrier()  # until all ranks have read the folder
    with SignalsNoted() as signals, closing(trainer):
        if not processes.is_first:
            _run(trainer, SilentLog(), signals)
            return
        try:
            with locked(config.out):
                if not saved and (aside := _set_aside(config.out)):
                    say(f"moved files of an earlier start in {config.out} to {aside}")
                write_json(config.out / "config.json", {**plain(config), **origin})
                with TrainingLog(config, trainer.images, device) as log:
                    log.introduce(source, trainer.network, processes.world_size, trainer.uses_bf16)
                    if len(trainer.parts) < config.accumulate:
                        log.note(f"accumulate {config.accumulate} is limited to {len(trainer.parts)}, a rank's images")
                    if config.recipe == "best" and config.horizontal_flip and not saved:
                        log.note("half of the images are mirrored: for letters and the like, give --no-horizontal-flip")
                    if config.network.num_classes and not config.distillation and (why := why_unguided(config.network)):
                        log.note(f"sample grids are without guidance: {why}")
                    if not saved and config.start_from is None and (advice := advise_short_run(config)):
                        log.note(advice)
                    for note in moved:
                        log.note(note)
                    if config.start_from is not None and not saved:
                        log.note(f"starts from the EMA weights of {config.start_from}")
                        for note in notes:
                            log.note(f"  {note}")
                    _run(trainer, log, signals)
        except OSError as error:
            raise CheckpointError(f"run folder {config.out} could not be written ({error}): free some space") from error


def advise_short_run(config: TrainConfig) -> str:
    """Advise a higher learning rate where a short run has that of a long one; "" where there is nothing to advise."""
    steps = config.num_images // config.batch_size
    if steps >= SHORT_RUN_STEPS or config.learning_rate > 1e-4:
        return ""
    return (
        f"learning rate {config.learning_rate:g} suits long runs: after {steps:,} steps samples may still be noise. "
        "Try --recipe best"
    )


# Files of a run. An earlier start that saved no checkpoint leaves some, which must not mix with those of this run.
_WRITTEN = (
    *("config.json", "log.jsonl", "loss.png", "samples", "averages", "checkpoints", "tensorboard"),
    *("wandb", "wandb-id"),
)


def _check_can_begin(out: Path) -> None:
    """Raise CheckpointError if the folder holds a checkpoint, a pipeline or a network instead of a run."""
    foreign = [name for name in (RECORD, PIPELINE_INDEX) if (out / name).is_file()]
    if not foreign and (out / "config.json").is_file() and not is_run(out):
        foreign = ["config.json"]
    if foreign:
        raise CheckpointError(f"{out} holds something else than a run ({foreign[0]}): choose another --out")


def _set_aside(out: Path) -> Path | None:
    """Move the files of an earlier start to a subfolder, and return it; None if there is nothing to move."""
    left = [out / name for name in _WRITTEN if (out / name).exists()]
    if all(path.name == "config.json" for path in left):  # it ended before anything else was written
        return None
    aside = next(path for number in count(1) if not (path := out / f"earlier-{number}").exists())
    aside.mkdir()
    for path in left:
        path.rename(aside / path.name)
    return aside


def _diverged(trainer: Trainer, fault: str) -> LamambaError:
    trainer.writer.finish()
    saved = checkpoints_in(trainer.config.out)
    advice = f"the last checkpoint is {saved[-1]}" if saved else "nothing was saved"
    return LamambaError(f"{fault} at image {trainer.images}: lower learning_rate; {advice}")


def _read(
    reader: Iterator[tuple[Tensor, Tensor]], signals: SignalsNoted
) -> tuple[tuple[Tensor, Tensor] | None, Exception | None]:
    """Read a batch; None at a signal. Return an error instead of raising it: all ranks must learn of it first."""
    try:
        with signals.interrupting():
            return next(reader), None
    except WaitInterrupted:
        return None, None
    except Exception as error:
        return None, error


def _reading_failed(failure: Exception | None, where: str) -> Exception:
    """Make the error for images that could not be read, by this rank or (None) by another one."""
    if failure is None:
        return OtherProcessError("another rank could not read its images")
    if isinstance(failure, LamambaError):
        return DataError(f"{failure}{where}")
    return failure  # a bug: show all of it


def _run(trainer: Trainer, log: TrainingLog | SilentLog, signals: SignalsNoted) -> None:
    with closing(trainer.batches()) as batches:  # closing ends its workers
        _take_steps(trainer, log.waiting_for(batches), log, signals)
    log.finish(trainer.images)


def _write_log(trainer: Trainer, log: TrainingLog | SilentLog) -> None:
    """Log the steps since the last time; raises LamambaError if the loss or too many gradients were not finite."""
    loss = log.write(trainer.images, trainer.step, learning_rate(trainer.config, trainer.images))
    if not math.isfinite(loss):
        raise _diverged(trainer, f"the loss is {loss}")
    skipped = int(trainer.skipped_in_a_row)
    if skipped >= trainer.config.max_skipped_steps:
        raise _diverged(trainer, f"the gradient was not finite in {skipped} step{'s' * (skipped > 1)} in a row,")


def keep_freed_memory() -> None:
    """Keep freed memory in this process for reuse. Does nothing without the GNU C library.

    By default, that library returns large blocks to the system at once and gets new pages of zeros later, with one page
    fault each. In a training step, whose tensors always have the same sizes, this costs about a tenth of the time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)


def _take_steps(
    trainer: Trainer, reader: Iterator[tuple[Tensor, Tensor]], log: TrainingLog | SilentLog, signals: SignalsNoted
) -> None:
    config = trainer.config
    if trainer.device.type == "cpu":
        keep_freed_memory()
    before = started = trainer.images
    prepares = trainer.device.type == "cuda" or config.compile
    first_step: AbstractContextManager[None] = log.first_step(config.compile) if prepares else nullcontext()
    is_first = trainer.processes.is_first

    def give_up(_: object) -> None:
        """Stop drawing samples after a signal, to have time to save."""
        if signals.number:
            raise SignalError(signals.number, "its samples")

    def due(interval: int | None) -> bool:
        """Return whether the step reached a multiple of an interval, or the end of the run."""
        reached = interval is not None and trainer.images // interval > before // interval
        return reached or trainer.images >= config.num_images

    while True:
        last, has_stepped = trainer.images >= config.num_images, trainer.images > started
        # Read the next batch before saving: a signal, or a batch that cannot be read, is a reason to save.
        batch, failure = (None, None) if last else _read(reader, signals)
        stop = trainer.processes.all_reduce_max(2 * signals.number + (failure is not None))
        if has_stepped and (due(config.checkpoint_every) or stop):
            if not trainer.is_finite():
                raise _diverged(trainer, "a weight is not finite")
            with log.pause("save"):
                log.note_checkpoint(trainer.writer.finish())
                trainer.save()
        if has_stepped and (stop or last):
            log.note_checkpoint(trainer.writer.finish())
            trainer.processes.barrier()
        if stop and not last:
            where = f"image {trainer.images}{', all is saved' * has_stepped}: --resume goes on from here"
            if stop > 1:
                raise SignalError(stop // 2, where, silent=not is_first)
            raise _reading_failed(failure, f"; stopped at {where}" * has_stepped)
        if batch is None:
            return
        before = trainer.images
        try:
            with first_step:
                terms = trainer.take_step(*batch)
        except Exception as error:
            # Ctrl-C also ends the compilers of the first step, which then fails in one of many ways.
            if signals.number and trainer.images == started:
                kind = type(error).__name__  # in case the cause was something else, such as memory
                where = f"image {started}, in preparing the first step ({kind}): --resume goes on from here"
                raise SignalError(signals.number, where) from error
            raise
        first_step = nullcontext()
        log.step(config.batch_size, terms)
        if due(config.log_every):
            _write_log(trainer, log)
        draws = is_first or trainer.shards
        if due(config.sample_every) and not trainer.processes.all_reduce_max(signals.number) and draws:
            with log.pause("sample"), suppress(SignalError):
                log.save_samples(trainer.draw_samples(give_up), trainer.images)
        if trainer.power_averages and due(config.snapshot_every):
            with log.pause("save"):
                trainer.save_snapshot()
        log.note_checkpoint(trainer.writer.finish(wait=False))
