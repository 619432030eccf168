"""Shows and records a training run: progress, log.jsonl, TensorBoard and trackers, the loss curve, sample grids."""

import json
import math
import re
import secrets
import shlex
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from rich.progress import MofNCompleteColumn
from torch import Tensor, nn
from typing_extensions import TypedDict

from lamamba.config import TrainConfig
from lamamba.data import Source
from lamamba.errors import CheckpointError, ConfigError, reading
from lamamba.files import atomic_write, utf8_path, write_text
from lamamba.files.records import plain, read_record
from lamamba.terminal.output import describe_duration, make_console, make_progress, say
from lamamba.terminal.streams import visible
from lamamba.training.cost import peak_tflops, training_flops

SHOWN_EVERY_S = 5.0  # loss and speed beside the progress bar; reading the loss waits for the device
SHORT_RUN_STEPS = 5000  # of training from fresh weights
MAX_LINE_BYTES = 1 << 16  # a longer line of log.jsonl is damaged
MAX_VALUE = 1e100  # a larger value in log.jsonl is damaged, and sums with it would overflow
# Names in texts of matplotlib: "$" and "_" in them are not formulas.
AS_IT_IS: dict[str, Any] = {"parse_math": False, "usetex": False}


class TrainingLog:
    """Collects the loss terms of steps and writes their means at each interval; a context manager.

    The configuration is resolved. `images` is the number of images seen before, in a resumed run.
    """

    def __init__(self, config: TrainConfig, images: int, device: torch.device) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.config, self.device = config, device
        self.console = make_console()
        self.path = config.out / "log.jsonl"
        self.records, self.damaged_lines = self._read_earlier_records(images)
        self.file = self.path.open("a", buffering=1, encoding="utf-8")
        # TensorBoard drops points after the checkpoint, which are logged again now.
        folder = config.out / "tensorboard"
        folder.mkdir(exist_ok=True)
        self.board = SummaryWriter(str(utf8_path(folder)), purge_step=images + 1)
        self.tracker = _start_tracker(config)
        self.tflop_per_image = 0.0
        self.peak_tflops: float | None = None
        shown = "images · loss {task.fields[loss]} · {task.fields[speed]} images/s ·"
        self.progress = make_progress(self.console, MofNCompleteColumn(), shown, transient=False)
        total = max(config.num_images, images)
        self.task = self.progress.add_task("train", total=total, completed=images, loss="–", speed="–")
        self.sums: dict[str, Tensor] = {}
        self.steps = self.images = 0
        self.started = self.since = self.shown = time.perf_counter()
        self.paused_s = self.waited_s = 0.0
        self.images_before = images
        self.seconds_of: dict[str, float] = {}  # what interrupts training: "sample", "save", "compile"

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()
        self.file.close()
        self.board.close()
        if self.tracker:
            self.tracker.finish()

    def _read_earlier_records(self, images: int) -> tuple[list[dict[str, float]], int]:
        """Keep the lines up to the checkpoint that the run resumes from; the others are logged again."""
        if not self.path.is_file():
            return [], 0
        records, damaged_lines = _read_records(self.path)
        records = [record for record in records if record["images"] <= images]
        with atomic_write(self.path) as temporary:  # so that a kill here loses no line
            write_text(temporary, "".join(json.dumps(record) + "\n" for record in records))
        return records, damaged_lines

    def introduce(self, source: Source, network: nn.Module, num_processes: int, uses_bf16: bool) -> None:
        """Describe data and network, and work out the TFLOP of an image and the peak of the devices."""
        if self.config.network_class == "LaMambaDiff" and not self.config.distillation:  # the teacher computes too
            self.tflop_per_image = training_flops(self.config.network) / 1e12
        peak = peak_tflops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        self.peak_tflops = peak * num_processes if peak and uses_bf16 else None
        name = self.config.preset if self.config.network_class == "LaMambaDiff" else self.config.network_class
        kind = "gray" if source.channels == 1 else "color"
        classes = f"{source.num_classes} classes" if source.num_classes else "no classes"
        self.note(
            f"{len(source):,} {kind} images of {source.name}, {source.image_size}x{source.image_size}, {classes} · "
            f"network {name}, {sum(p.numel() for p in network.parameters()):,} parameters · {self.device}"
            + (f" and {num_processes - 1} more" if num_processes > 1 else "")
        )
        if self.damaged_lines:
            self.note(f"{self.damaged_lines} damaged line{'s' * (self.damaged_lines > 1)} of log.jsonl left out")
        if source.left_out:
            self.note(f"left out of {source.name}: {source.left_out}")
        if source.bad_files:
            self.note(f"left out {len(source.bad_files)} images that cannot be read: {', '.join(source.bad_files)}")

    def note(self, text: str) -> None:
        say(text, console=self.console)

    def step(self, images: int, terms: dict[str, Tensor]) -> None:
        """Add the loss terms of a step, without waiting for the device."""
        skipped = terms["skipped"]  # the terms of a skipped step may not be finite
        for name, value in terms.items():
            taken = value if name == "skipped" else torch.where(skipped > 0, torch.zeros_like(value), value)
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + taken
        self.steps += 1
        self.images += images
        self.progress.advance(self.task, images)
        now = time.perf_counter()
        if now - self.shown >= SHOWN_EVERY_S and not self.progress.disable:
            self.shown = now
            num_taken = self.steps - float(self.sums["skipped"])  # waits for the device
            loss = float(self.sums["loss"]) / num_taken if num_taken else math.nan
            self._show(loss, self.images / max(now - self.since - self.paused_s, 1e-9))

    def waiting_for(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches, and measure the time spent waiting for them."""
        start = time.perf_counter()
        for batch in batches:
            self.waited_s += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def write(self, images: int, step: int, learning_rate: float) -> float:
        """Log the means over the steps since the last call that were not skipped; return the mean loss."""
        sums = {name: float(value) for name, value in self.sums.items()}  # waits for the device
        skipped = round(sums.pop("skipped"))
        means = {name: value / max(1, self.steps - skipped) for name, value in sums.items()}
        for quarter in range(1, 5):  # of the timesteps; few steps may have no image in one of them
            loss, share = means.pop(f"loss_q{quarter}"), means.pop(f"share_q{quarter}")
            means.update({f"loss_q{quarter}": loss / share} if share else {})
        seconds = time.perf_counter() - self.since - self.paused_s
        record = {
            "images": images,
            "step": step,
            **means,
            "skipped_steps": skipped,
            "learning_rate": learning_rate,
            "images_per_s": self.images / seconds,
            "data_wait": self.waited_s / seconds,
            "seconds": time.perf_counter() - self.started,
        }
        if self.tflop_per_image:
            record["tflop_per_s"] = record["images_per_s"] * self.tflop_per_image
        if self.peak_tflops and self.tflop_per_image:
            record["mfu"] = record["tflop_per_s"] / self.peak_tflops
        if self.device.type == "cuda":
            record["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.file.write(json.dumps(record) + "\n")
        self.records.append(record)
        for name, value in record.items():
            if name not in ("images", "step"):
                self.board.add_scalar(f"train/{name}", value, images)
        self.board.flush()  # so that after a kill TensorBoard has the same points as log.jsonl
        if self.tracker:
            self.tracker.log({f"train/{name}": value for name, value in record.items()}, step=images)
        speed = self._show(means["loss"], record["images_per_s"])
        if skipped:
            self.note(f"{skipped} of {self.steps} steps skipped: their gradient was not finite")
        if self.progress.disable:
            left = f" · {self._time_left(images)} left" if images < self.config.num_images else ""
            done = f"{images:,} of {self.config.num_images:,} images"
            self.note(f"{done} · loss {means['loss']:.4f} · {speed} images/s{left}")
        self.sums, self.steps, self.images = {}, 0, 0
        self.paused_s = self.waited_s = 0.0
        self.since = time.perf_counter()
        return means["loss"]

    def _time_left(self, images: int) -> str:
        """Estimate the time left from the speed of this command so far, sample grids and checkpoints included."""
        seconds = time.perf_counter() - self.started - self.seconds_of.get("compile", 0.0)
        return describe_duration(seconds / (images - self.images_before) * max(0, self.config.num_images - images))

    def _show(self, loss: float, images_per_s: float) -> str:
        """Show loss and speed beside the progress bar; return the speed as it is shown."""
        speed = f"{images_per_s:,.0f}" if images_per_s >= 10 else f"{images_per_s:.1f}"
        self.progress.update(self.task, loss=f"{loss:.4f}", speed=speed)
        return speed

    @contextmanager
    def pause(self, doing: str) -> Iterator[None]:
        """Show what interrupts training, and exclude its time from images/s."""
        start = time.perf_counter()
        self.progress.update(self.task, description=doing)
        yield
        self.progress.update(self.task, description="train")
        seconds = time.perf_counter() - start
        self.paused_s += seconds
        self.seconds_of[doing] = self.seconds_of.get(doing, 0.0) + seconds

    @contextmanager
    def first_step(self, minutes: bool) -> Iterator[None]:
        """Announce that the first step takes longer, and exclude its time from images/s."""
        self.note(f"preparing the first step, which takes {'some minutes' if minutes else 'up to a minute'}")
        with self.pause("compile"), warnings.catch_warnings():
            # PyTorch suggests TF32, which would round float32 and has no effect in bf16.
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
            yield

    def save_samples(self, grid: Any, images: int) -> None:
        """Write a sample grid, and the loss curve up to now."""
        folder = self.config.out / "samples"
        folder.mkdir(exist_ok=True)
        grid.save(folder / f"{images:012d}.png")
        self._plot()

    def note_checkpoint(self, path: Path | None) -> None:
        """Name the checkpoint that was written, if there is one."""
        if path and self.progress.disable:
            self.note(f"checkpoint {path}")

    def finish(self, images: int) -> None:
        """Summarize the run: time, files, and how to sample."""
        self.progress.stop()
        out = self.config.out
        # A run that fell back to an earlier checkpoint may have later grids from before.
        names = [path.stem for path in (out / "samples").glob("*.png")]
        seen = [name for name in names if name.isdecimal() and int(name) <= images]
        self.note(f"done: {images:,} images seen")
        kinds = {"compile": "preparing the first step", "sample": "sample grids", "save": "checkpoints"}
        parts = [f"{kinds[key]}: {describe_duration(seconds)}" for key, seconds in self.seconds_of.items()]
        took = describe_duration(time.perf_counter() - self.started)
        self.note(f"time        {took}" + (f" ({', '.join(parts)})" if parts else ""))
        if seen:
            self.note(f"samples     {out / 'samples' / max(seen, key=int)}.png")
        if (out / "loss.png").is_file():
            self.note(f"loss curve  {out / 'loss.png'}")
        self.note(f"sample more with: lamamba sample {shlex.quote(str(out))} --out grid.png")
        steps = self.config.num_images // self.config.batch_size
        if steps < SHORT_RUN_STEPS and self.config.start_from is None:
            self.note(f"rough samples are normal after {steps:,} steps; docs/own_images.md shows what to expect when")

    def _plot(self) -> None:
        from matplotlib.figure import Figure

        if not self.records:
            return
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        draw_line(axes, self.records, "loss", label="loss")
        for part in loss_parts(self.records):
            draw_line(axes, self.records, part, label=part, alpha=0.6)
        axes.set(xlabel="images seen", ylabel="loss", yscale="log")
        axes.set_title(visible(f"{self.config.preset} on {self.config.data}"), **AS_IT_IS)
        axes.grid(alpha=0.3)
        draw_legend(axes)
        save_figure(figure, self.config.out / "loss.png")


def loss_parts(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the parts of the loss that differ from it: flow matching logs its whole loss as `mse`."""
    parts = ("mse", "vb", "gap")
    return [part for part in parts if any(row.get(part) not in (None, row.get("loss")) for row in records)]


def draw_line(axes: Any, records: Sequence[Mapping[str, Any]], name: str, **style: Any) -> None:
    """Draw a value over the images seen, if the log has it; `style` has keywords of matplotlib."""
    points = [(record["images"], record[name]) for record in records if name in record]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def draw_legend(axes: Any, **options: Any) -> None:
    """Draw a legend that shows all labels unchanged; matplotlib would leave out labels that begin with "_"."""
    labels = [visible(line.get_label()) for line in axes.lines]
    legend = axes.legend(axes.lines, ["line"] * len(labels), **options)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set(text=label, **AS_IT_IS)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG."""
    with warnings.catch_warnings():
        # Names may be in any script; matplotlib draws boxes for characters that its font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, format="png", dpi=120)


def read_log(run: Path) -> tuple[list[dict[str, float]], int]:
    """Read the log of a run, and the number of images that it is to see.

    Raises:
        CheckpointError: the folder holds no run.
    """
    if not run.is_dir():
        raise CheckpointError(f"{run} does not exist: give the folder of a run")
    if not (run / "config.json").is_file():
        raise CheckpointError(f"{run} holds no run of lamamba: give the --out of a training")
    total = read_record(run / "config.json", _Length)["num_images"]
    with reading(f"{run / 'log.jsonl'} cannot be read", "make it readable", CheckpointError):
        return _read_records(run / "log.jsonl")[0] if (run / "log.jsonl").is_file() else [], total


class _Length(TypedDict):
    num_images: Annotated[int, Field(ge=1)]


def _read_records(path: Path) -> tuple[list[dict[str, float]], int]:
    """Read a log: its records sorted by images seen, the last one for each number; and count the damaged lines.

    A damaged log must not stop a run, so lines that are not records of numbers are skipped: half a line after a kill,
    or bytes of a failing disk.
    """
    records, damaged_lines, at_start = {}, 0, True
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES):
            record = _parse_record(line) if at_start else None
            if record:
                records[record["images"]] = record
            elif at_start and line.strip():
                damaged_lines += 1
            at_start = line.endswith(b"\n")  # otherwise the rest of a line that is too long follows
    return [records[images] for images in sorted(records)], damaged_lines


def _parse_record(line: bytes) -> dict[str, float] | None:
    """Read the numbers of a line of the log; None where it is no record."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):  # of brackets in brackets, thousands deep
        return None
    if not isinstance(content, dict):
        return None
    record = {
        name: value
        for name, value in content.items()
        if type(value) in (int, float) and -MAX_VALUE < value < MAX_VALUE  # not NaN
    }
    return record if type(record.get("images")) is int and record["images"] >= 0 else None


def _start_tracker(config: TrainConfig) -> Any:
    """Start or continue the run at a tracker; wandb and trackio have the same functions.

    Raises:
        ConfigError: the tracker is not installed.
    """
    if config.tracker == "none":
        return None
    with reading(f"tracker {config.tracker} is not installed", f"pip install {config.tracker}", ConfigError):
        tracker = import_module(config.tracker)
    # Trackers take only UTF-8, and names of files may be anything.
    options = {name: visible(value) if isinstance(value, str) else value for name, value in plain(config).items()}
    names = {"project": visible(config.project), "name": visible(config.out.resolve().name)}
    run: dict[str, Any] = {**names, "config": options}
    if config.tracker == "wandb":  # which knows runs by an identity
        identity = config.out / "wandb-id"
        if not identity.is_file() or not re.fullmatch(rb"[0-9a-f]{16}", identity.read_bytes()):  # or it is damaged
            write_text(identity, secrets.token_hex(8))
        run |= {"id": identity.read_text(encoding="utf-8"), "dir": str(utf8_path(config.out))}
    tracker.init(**run, resume="allow")
    return tracker


class SilentLog:
    """Replaces the log in ranks other than the first, which neither write nor print."""

    def step(self, *_: Any) -> None: ...

    save_samples = note_checkpoint = finish = step

    def pause(self, *_: Any) -> AbstractContextManager[None]:
        return nullcontext()

    first_step = pause

    def waiting_for(self, batches: Iterator[Any]) -> Iterator[Any]:
        return batches

    def write(self, *_: Any) -> float:
        return 0.0  # the first rank checks the loss
