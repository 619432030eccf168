"""Train a LaMamba or a DiT with the same loop: the package's own trainer."""

import gc
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from contestants import build, cost, network_config
from lamamba.config import NetworkConfig, TrainConfig
from lamamba.data import ArraySource
from lamamba.data.latents import Pixels
from lamamba.errors import CheckpointError, LamambaError
from lamamba.files import atomic_write
from lamamba.sampling import make_grid
from lamamba.training.optimizers import ADAMW_KEYS, MUON_KEYS
from lamamba.training.trainer import Trainer
from pieces import Scale, Training
from scoring import FEATURES, Denoiser, InAutocast, score, spread
from setting import OutOfTimeError, Record, Setting, rounded

CHECKPOINT = "checkpoint.safetensors"


class ComparisonTrainer(Trainer):
    """The package's trainer, for any network of `contestants.py`. A checkpoint is one file.

    Args:
        setting: device and scale.
        piece: the training piece.
        source: the images.
        cuda_graph: launch a step as one CUDA graph.
    """

    def __init__(self, setting: Setting, piece: Training, source: ArraySource, cuda_graph: bool = True) -> None:
        self.name, self.quick = piece.network, setting.scale.quick
        self.path = setting.out / piece.name / CHECKPOINT
        config = train_config(setting.scale, piece, source)
        config = replace(config, out=self.path.parent, cuda_graph=cuda_graph)
        super().__init__(config, source, Pixels(), setting.device, setting.processes)
        if piece.compile:
            self.network.compile_blocks()
            self.average.compile_blocks()
        self.denoiser = Denoiser(InAutocast(self.average, self.autocast), config.objective, piece.data)

    def build(self) -> Any:
        return build(self.name, self.config.network, self.quick)

    def save(self) -> None:
        """Write a checkpoint atomically."""
        state = self._state()
        for name, parameter in self.network.named_parameters():
            for key, value in self.optimizer_of[parameter].state.get(parameter, {}).items():
                state[f"optimizer.{key}.{name}"] = value
        with atomic_write(self.path) as temporary:
            save_file(state, temporary, {"images": str(self.images), "step": str(self.step)})

    def restore(self, checkpoint: Path) -> None:
        """Continue from a checkpoint; raises CheckpointError."""
        with safe_open(checkpoint, "pt", device=str(self.device)) as file:
            saved, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        if "random_state" not in saved:
            raise CheckpointError(f"{checkpoint} holds averaged weights alone: delete it, and training begins anew")
        for name, tensor in self._state().items():
            if name != "random_state":
                tensor.copy_(saved[name])
        self.generator.set_state(saved["random_state"].cpu())
        for name, parameter in self.network.named_parameters():
            optimizer = self.optimizer_of[parameter]
            keys = MUON_KEYS if parameter in self.hidden else ADAMW_KEYS
            if f"optimizer.{keys[0]}.{name}" in saved:
                optimizer.state[parameter] = {key: saved[f"optimizer.{key}.{name}"] for key in keys}
        self.images, self.step = int(metadata["images"]), int(metadata["step"])

    def _state(self) -> dict[str, Tensor]:
        """Return what is saved beside the optimizer's state: weights, EMA weights, the generator's state."""
        parts = {"network": self.network, "ema": self.average}
        weights = {f"{part}.{name}": value for part, own in parts.items() for name, value in own.state_dict().items()}
        power = self.power_averages.state_dict() if self.power_averages else {}
        return {**weights, **{f"power.{name}": value for name, value in power.items()},
                "random_state": self.generator.get_state()}  # fmt: skip

    @contextmanager
    def with_average(self, sigma_rel: float) -> Iterator[None]:
        """Replace the EMA weights that are sampled from."""
        assert self.power_averages is not None
        prefix, own = f"{sigma_rel:.3f}.", {name: value.clone() for name, value in self.average.state_dict().items()}
        other = {name.removeprefix(prefix): value for name, value in self.power_averages.state_dict().items()
                 if name.startswith(prefix)}  # fmt: skip
        self.average.load_state_dict({**own, **other})
        try:
            yield
        finally:
            self.average.load_state_dict(own)


def train_config(scale: Scale, piece: Training, source: ArraySource) -> TrainConfig:
    """Make the trainer's configuration, which is the same for all networks."""
    network = network_config(piece.network, source.channels, source.image_size, source.num_classes, scale.quick)
    num_images = scale.num_images or piece.num_images
    return TrainConfig(
        out=Path(), data=piece.data, objective=piece.objective, num_images=num_images,
        warmup_images=round(piece.warmup * num_images),
        batch_size=scale.batch_size, learning_rate=piece.learning_rate, seed=piece.seed, network=network,
        power_averages=piece.averages, **piece.recipe,
    )  # fmt: skip


def load_trained(setting: Setting, piece: Training) -> tuple[Denoiser, ArraySource]:
    """Load the EMA weights of a trained piece, or those that `weights.py` unpacked, and open its images.

    Raises:
        CheckpointError: there are no weights.
    """
    path = setting.out / piece.name / CHECKPOINT
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: run {piece.name} first, or bring its weights back with weights.py")
    source = setting.open_training_images(piece.data)
    # No training: the trainer builds everything, and knows what runs in bf16.
    trainer = ComparisonTrainer(setting, replace(piece, compile=False), source)
    weights = read_average(path)
    trainer.average.load_state_dict({name: value.float() for name, value in weights.items()})
    trainer.close()
    return trainer.denoiser, source


def read_average(path: Path) -> dict[str, Tensor]:
    """Read the EMA weights of a checkpoint, by their names in the network."""
    with safe_open(path, "pt") as file:
        return {name[4:]: file.get_tensor(name) for name in file.keys() if name.startswith("ema.")}  # noqa: SIM118


def train(setting: Setting, piece: Training) -> None:
    """Run a piece from its current state to the end.

    Raises:
        OutOfTimeError: time ran out; the work so far was saved.
    """
    source = setting.open_training_images(piece.data)
    config = train_config(setting.scale, piece, source)
    if not setting.processes.is_first:
        _follow(setting, piece, source)
        return
    record = Record(setting, piece, {"train": settings_of(config)})
    trainer = ComparisonTrainer(setting, piece, source)
    try:
        if trainer.path.is_file():
            trainer.restore(trainer.path)
        _forget_what_was_lost(record, trainer.images)
        record["parts"][-1]["first_image"] = trainer.images
        record.write(**_introduction(setting, trainer, config.network, piece, source))
        _train(setting, trainer, record, piece.num_scores)
        _conclude(setting, trainer, record, piece, source)
    finally:
        trainer.close()
    record.finish()


def _follow(setting: Setting, piece: Training, source: ArraySource) -> None:
    """Run this rank's share of every step; rank 0 scores and writes."""
    trainer = ComparisonTrainer(setting, piece, source)
    try:
        if trainer.path.is_file():
            trainer.restore(trainer.path)
        reader = trainer.batches()
        while trainer.images < trainer.config.num_images:
            end = _next_line(setting, trainer)
            while trainer.images < end:
                trainer.take_step(*next(reader))
            try:
                setting.check_time()
            except OutOfTimeError:
                setting.processes.barrier()  # while rank 0 saves, because torchrun ends all ranks when one has failed
                raise
    finally:
        trainer.close()


def _next_line(setting: Setting, trainer: ComparisonTrainer) -> int:
    """Return after how many images the next point of the curve is due."""
    every = setting.scale.log_every
    return min(trainer.config.num_images, (trainer.images // every + 1) * every)


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Select the options that determine the numbers."""
    names = (
        *("objective", "timesteps", "contrast", "num_images", "batch_size", "optimizer", "learning_rate"),
        *("warmup_images", "decay", "weight_decay", "max_grad_norm", "ema_decay", "dropout", "horizontal_flip"),
        *("precision", "seed", "network"),
    )
    content: dict[str, Any] = json.loads(json.dumps({name: getattr(config, name) for name in names}, default=vars))
    return content


def _introduction(
    setting: Setting, trainer: ComparisonTrainer, network: NetworkConfig, piece: Training, source: ArraySource
) -> dict[str, Any]:
    launched = "one CUDA graph" if trainer.captures else "kernel by kernel"
    how = {
        "precision": "bf16 autocast, float32 weights" if trainer.uses_bf16 else "float32",
        "step": f"{'compiled' if piece.compile else 'not compiled'}, {launched}",
        "num_training_images": len(source),
    }
    return {"network": {**cost(piece.network, network, setting.scale.quick), **how}}


def _forget_what_was_lost(record: Record, images: int) -> None:
    """Reduce the record to its state at the checkpoint, because the rest will be repeated."""
    for name in ("curve", "evaluations"):
        rows = record.rows(name)
        rows[:] = [row for row in rows if row["images"] <= images]


def _train(setting: Setting, trainer: ComparisonTrainer, record: Record, num_scores: int) -> None:
    """Train to the end, with a point of the curve per interval and scores; check the time after each."""
    total = trainer.config.num_images
    curve, evaluations = record.rows("curve"), record.rows("evaluations")
    meter = Meter(trainer, curve[-1]["seconds"] if curve else 0.0)
    saved_at, saved_images = time.monotonic(), trainer.images
    reader = trainer.batches()

    def save() -> None:
        nonlocal saved_at, saved_images
        if saved_images < trainer.images:
            record.write()  # before the checkpoint: the record may be newer than the checkpoint, but not older
            trainer.save()
        saved_at, saved_images = time.monotonic(), trainer.images

    if trainer.images == 0 and not evaluations:
        record.write(training_images=_score_training_images(setting, trainer))
    while True:
        scored = evaluations[-1]["images"] if evaluations else 0
        due = trainer.images * num_scores // total > scored * num_scores // total
        if due and trainer.config.data in FEATURES:
            save()  # scoring takes long, and time may run out meanwhile
            seconds = curve[-1]["seconds"]
            scores = trainer.denoiser.score(setting, setting.scale.num_samples, guidance=1.0)
            losses = trainer.denoiser.losses(setting, trainer.source)
            evaluations.append({"images": trainer.images, "seconds": seconds, **scores, "losses": losses})
            print(json.dumps(evaluations[-1]), flush=True)
            record.write()
        if trainer.images >= total:
            save()
            return
        row = meter.train_to(_next_line(setting, trainer), reader)
        curve.append(row)
        print(json.dumps(row), flush=True)
        if row.get("compile_s") and trainer.device.type == "cuda":  # before any score
            peak_gib = torch.cuda.max_memory_allocated(trainer.device) / 2**30
            record["network"]["peak_gib"] = rounded(peak_gib, 4)
        try:
            setting.check_time()
        except OutOfTimeError:
            save()
            setting.processes.barrier()
            raise
        if time.monotonic() - saved_at >= setting.scale.checkpoint_every_s:
            save()


_QUARTERS = (1, 2, 3, 4)  # of the timesteps
# For each quarter, the trainer returns its share of the batch's loss, and its share of the images.
_SUMS = tuple(f"{name}_q{quarter}" for quarter in _QUARTERS for name in ("loss", "share"))


class Meter:
    """Takes steps, and measures loss and speed. Seconds exclude the first step, which compiles."""

    def __init__(self, trainer: Trainer, seconds: float) -> None:
        self.trainer, self.seconds = trainer, seconds
        self.compiles = True

    def train_to(self, end: int, reader: Any) -> dict[str, Any]:
        """Train until `images` images are seen; return the point of the curve."""
        trainer = self.trainer
        sums: dict[str, Tensor] = {}
        steps = timed = 0
        synchronize(trainer.device)
        start = time.perf_counter()
        compile_s = 0.0
        while trainer.images < end:
            terms = trainer.take_step(*next(reader))
            for name in ("loss", "gap" if trainer.config.distillation else "mse", "grad_norm", "skipped", *_SUMS):
                sums[name] = sums.get(name, 0) + terms[name]
            steps += 1
            timed += trainer.config.batch_size
            if self.compiles:
                synchronize(trainer.device)
                compile_s, start, timed, self.compiles = time.perf_counter() - start, time.perf_counter(), 0, False
        means: dict[str, Any] = {
            name: rounded(float(value) / steps) for name, value in sums.items()
        }  # waits for the device
        passed = time.perf_counter() - start
        if means["skipped"] or not means["loss"] < float("inf"):
            raise LamambaError(f"a gradient was not finite before image {trainer.images}: lower learning_rate")
        self.seconds += passed
        quarters = [(means.pop(f"loss_q{quarter}"), means.pop(f"share_q{quarter}")) for quarter in _QUARTERS]
        means["loss_by_quarter"] = [rounded(loss / share) if share else None for loss, share in quarters]
        row = {"images": trainer.images, "seconds": rounded(self.seconds), **means}
        row.pop("skipped")
        if timed:
            row["images_per_s"] = rounded(timed / passed, 4)
        return {**row, "compile_s": rounded(compile_s, 3)} if compile_s else row


def synchronize(device: torch.device) -> None:
    """Wait for the device before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget(device: torch.device) -> None:
    """Free memory and compiled code; a trainer and its recorded step refer to each other."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _score_training_images(setting: Setting, trainer: ComparisonTrainer) -> dict[str, float] | None:
    """Score as many training images as samples: the score of a perfect network."""
    if trainer.config.data not in FEATURES:
        return None
    return score(setting, trainer.config.data, spread(trainer.source, setting.scale.num_samples)[0])


def _conclude(
    setting: Setting, trainer: ComparisonTrainer, record: Record, piece: Training, source: ArraySource
) -> None:
    """Sweep guidance, score further EMAs and draw a grid, each once."""
    scored = piece.data in FEATURES
    if piece.sweep and scored:
        sweep = record.rows("sweep")
        for guidance in setting.scale.sweep[len(sweep) :]:
            sweep.append(trainer.denoiser.score(setting, setting.scale.num_sweep_samples, guidance=guidance))
            record.write()
        if "best" not in record.content:
            best = min(sweep, key=lambda row: row["distance"])
            scores = trainer.denoiser.score(setting, setting.scale.num_samples, guidance=best["guidance"])
            record.write(best={"images": trainer.images, **scores})
    if piece.averages and scored:
        averages = record.rows("averages")
        for sigma_rel in piece.averages[len(averages) :]:
            with trainer.with_average(sigma_rel):
                scores = trainer.denoiser.score(setting, setting.scale.num_samples)
            averages.append({"sigma_rel": sigma_rel, **scores})
            record.write()
    grid = record.folder / "grid.png"
    if not grid.is_file():
        columns, classes = setting.scale.num_grid, source.num_classes
        images = trainer.denoiser.draw(setting, columns * classes, guidance=2.0)
        by_class = images.view(columns, classes, *images.shape[1:]).transpose(0, 1).flatten(0, 1)  # one class per row
        with atomic_write(grid) as temporary:
            make_grid(by_class.cpu().numpy(), columns, scale=1).save(temporary, "PNG")
