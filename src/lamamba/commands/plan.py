"""The command `lamamba plan`: predict what training a preset needs on a cluster.

A small model of the time of a step on n GPUs with b images on each, in h hosts of g GPUs:

    compute       = fixed + slope b                      a line fitted to steps measured on one GPU
    pass          = S (g - 1) / g / link + S / g (h - 1) / h / network         S: bytes of all gradients, float32
    reduce        = 2 passes, of an all-reduce during the backward pass
    gather        = 1 pass, of an all-gather at the end of a sharded step; else 0
    exposed       = max(latency + share reduce, reduce - overlap) + gather     a line fitted to two GPUs
    noise         = random numbers drawn for the other GPUs' images / speed
    step          = max(compute + exposed + noise, reading)

and of the memory of a GPU, which holds weights, EMA, two moments and p power-function EMAs, S bytes each:

    memory        = (4 + p) S + rest + slope b + NCCL + noise for the others   rest and slope: a line, as above
    sharded       = (1 + (3 + p) / n) S + the same

docs/scaling.md describes the measurements, the fit, and the assumptions.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from lamamba.config import NetworkConfig, PlanConfig, preset
from lamamba.errors import ConfigError
from lamamba.terminal.output import make_console
from lamamba.training.cost import PEAK_TFLOPS, count_all, peak_tflops

MEASURED = Path(__file__).parents[1] / "assets" / "scaling.json"
BACKWARD_SHARE = 2 / 3
"""Share of the time per image: a backward pass has twice the multiplications of a forward pass."""
NOT_COUNTED = (
    "latency and waiting for the slowest GPU, which grow with the number of GPUs; sample grids, checkpoints and "
    "startup; the effect of larger batches on learning"
)


@dataclass(frozen=True)
class Network:
    """The facts about a preset that the model needs."""

    config: NetworkConfig
    parameters: int
    multiply_adds: int

    @property
    def state_bytes(self) -> int:
        """Bytes of one float32 number per parameter, for example of all gradients."""
        return 4 * self.parameters

    @property
    def pixels(self) -> int:
        """Number of positions in the grid."""
        return self.config.sample_size**2


def network_of(name: str) -> Network:
    """Count a preset's parameters and multiply-adds; raises ConfigError if there is no such preset."""
    config = preset(name)
    return Network(config, *count_all(config))


@dataclass(frozen=True)
class Point:
    """A measured step on `gpus` GPUs of one host, with `images` images on each."""

    preset: str
    gpus: int
    images: int
    ms: float
    memory_gib: float
    shard: bool = False


@dataclass(frozen=True)
class Line:
    """A linear function, for example of the images per GPU."""

    fixed: float
    slope: float

    @classmethod
    def through(cls, points: Iterable[tuple[float, float]], relative: bool = True) -> "Line":
        """Fit by least squares of (relative) errors; through the origin if all points have the same place."""
        places, values = np.array(list(points), dtype=float).T
        columns = np.stack([np.ones_like(places), places] if len(set(places)) > 1 else [0 * places, places], axis=1)
        scale = values if relative else np.ones_like(values)
        fixed, slope = np.linalg.lstsq(columns / scale[:, None], values / scale)[0]
        return cls(float(fixed), float(slope))

    def at(self, place: float) -> float:
        return self.fixed + self.slope * place


@dataclass(frozen=True)
class Model:
    """The measurements of benchmarks/scaling.py, and what is derived from them."""

    gpu: str
    versions: str
    points: tuple[Point, ...]
    sent_gb_per_s: dict[str, float]
    """Bandwidth from each of two GPUs to the other, by kind of collective."""
    noise_numbers_per_ns: float
    latents_per_s: dict[str, float]
    """Latents per second that a process reads from cached files, by the side of their grid."""

    @classmethod
    @cache
    def shipped(cls) -> "Model":
        return cls.read(json.loads(MEASURED.read_bytes()))

    @classmethod
    def read(cls, content: dict[str, Any]) -> "Model":
        return cls(**{**content, "points": tuple(Point(**point) for point in content["points"])})

    def of(self, name: str, gpus: int) -> list[Point]:
        """Return the points of a preset on so many GPUs, without sharding."""
        return [point for point in self.points if (point.preset, point.gpus, point.shard) == (name, gpus, False)]

    def reference(self, name: str) -> str:
        """Name the measured preset to calculate from: the one nearest in states, then in width, then in pixels."""
        ours = network_of(name)

        def distance(other: str) -> tuple[float, ...]:
            theirs = network_of(other)
            ratios = (
                theirs.config.ssm_state_size / ours.config.ssm_state_size,
                theirs.config.embed_dim / ours.config.embed_dim,
                theirs.pixels / ours.pixels,
            )
            return tuple(abs(math.log(ratio)) for ratio in ratios)

        return min(sorted({point.preset for point in self.points if point.gpus == 1}), key=distance)

    def covers(self, name: str) -> bool:
        """Return whether a preset can be predicted: with several states, one of its width must have been measured.

        Other numbers of states run other kernels, whose speed depends on the width.
        """
        ours, theirs = network_of(name).config, network_of(self.reference(name)).config
        same_width = ours.embed_dim == theirs.embed_dim
        return ours.ssm_state_size == theirs.ssm_state_size and (ours.ssm_state_size == 1 or same_width)

    def milliseconds(self, name: str) -> Line:
        """Fit the time on one GPU. An unmeasured preset is scaled by parameters and, at equal MFU, multiply-adds."""
        other = self.reference(name)
        line = Line.through((point.images, point.ms) for point in self.of(other, gpus=1))
        ours, theirs = network_of(name), network_of(other)
        return Line(
            line.fixed * ours.parameters / theirs.parameters, line.slope * ours.multiply_adds / theirs.multiply_adds
        )

    def other_gib(self, name: str) -> Line:
        """Fit the memory beside weights, EMA and moments. An unmeasured preset is scaled by width and pixels."""
        other = self.reference(name)
        ours, theirs = network_of(name), network_of(other)
        held = 4 * theirs.state_bytes / 2**30
        line = Line.through((point.images, point.memory_gib) for point in self.of(other, gpus=1))
        larger = ours.pixels * ours.config.embed_dim / (theirs.pixels * theirs.config.embed_dim)
        return Line(line.fixed - held, line.slope * larger)

    @cached_property
    def exposed_ms(self) -> Line:
        """Fit the additional time of two GPUs over one, as a function of the time of the bare all-reduce."""
        pairs = []
        for point in self.points:
            if point.gpus == 2 and not point.shard:
                alone = {one.images: one.ms for one in self.of(point.preset, gpus=1)}
                before = alone.get(point.images, self.milliseconds(point.preset).at(point.images))
                pairs.append((self.communication(point_plan(point)).reduce_ms, point.ms - before))
        return Line.through(pairs, relative=False)

    @cached_property
    def together_gib(self) -> float:
        """Average the memory of NCCL: what two GPUs have in use beyond one GPU."""
        pairs = [point for point in self.points if point.gpus == 2 and not point.shard]
        held = [4 * network_of(point.preset).state_bytes / 2**30 for point in pairs]
        others = [self.other_gib(point.preset).at(point.images) for point in pairs]
        in_use = [point.memory_gib for point in pairs]
        return float(np.mean(np.array(in_use) - held - others))

    def communication(self, config: PlanConfig) -> "Communication":
        """Compute the time of a step's collectives alone, and what they send."""
        state = network_of(config.preset).state_bytes / 1e9
        in_host, hosts = config.gpus_in_host, config.hosts
        inside, between = state * (in_host - 1) / in_host, state / in_host * (hosts - 1) / hosts

        def pass_ms(kind: str) -> float:
            link = config.link_gbytes_per_s or self.sent_gb_per_s[kind]
            return 1e3 * (inside / link + between / config.network_gbytes_per_s)

        passes = 3 if config.shard else 2
        gather_ms = pass_ms("all_gather") if config.shard else 0.0
        return Communication(2 * pass_ms("all_reduce"), gather_ms, passes * inside, passes * between)


class Communication(NamedTuple):
    """What the GPUs of a run send to each other in a step."""

    reduce_ms: float
    """Time to all-reduce gradients, which the backward pass can hide."""
    gather_ms: float
    """Time to gather the weights after a sharded step, which nothing hides."""
    in_host_gb: float
    """GB that a GPU sends inside its host."""
    out_gb: float
    """GB that it sends to other hosts."""


def point_plan(point: Point) -> PlanConfig:
    """Describe a measured step as a plan."""
    return PlanConfig(point.preset, gpus=point.gpus, batch_size=point.images * point.gpus, shard=point.shard)


@dataclass(frozen=True)
class Prediction:
    """The predicted time and memory of a step on each GPU."""

    images: int
    """Images per GPU."""
    compute_ms: float
    exposed_ms: float
    """Additional time because of communication."""
    communication_ms: float
    """Time of communication alone."""
    noise_ms: float
    reading_ms: float
    read_mb: float
    """MB that a host reads in a step."""
    sent_in_host_gb: float
    sent_out_gb: float
    held_gib: float
    """Memory of weights, EMAs and moments."""
    memory_gib: float

    @property
    def ms(self) -> float:
        return max(self.compute_ms + self.exposed_ms + self.noise_ms, self.reading_ms)

    @property
    def efficiency(self) -> float:
        """Speed per GPU, divided by the speed of a single GPU with as many images."""
        return self.compute_ms / self.ms

    @property
    def limit(self) -> str:
        if self.reading_ms == self.ms:
            return "reading"
        return "communication" if self.exposed_ms > self.compute_ms else "computing"

    def images_per_s(self, gpus: int) -> float:
        return 1e3 * self.images * gpus / self.ms


def predict(config: PlanConfig, model: Model | None = None) -> Prediction:
    """Predict a step.

    Raises:
        ConfigError: the preset or the GPU is unknown, its number of states was not measured, or the batch or the GPUs
            cannot be divided.
    """
    model = model or Model.shipped()
    network, images = network_of(config.preset), config.images_of_a_gpu
    states = network.config.ssm_state_size
    if not model.covers(config.preset) and not config.images_per_s:
        raise ConfigError(
            f"{config.preset} has {states} state{'s' * (states > 1)}, and no step of its width with as many was "
            "measured: give images_per_s, measured on one GPU"
        )
    line = model.milliseconds(config.preset)
    slower = _slower(config, model, line.at(images))
    compute_ms, overlap_ms = slower * line.at(images), slower * line.slope * images
    sent = model.communication(config)
    partly = model.exposed_ms.at(sent.reduce_ms) if config.gpus > 1 else 0.0
    bound = sent.reduce_ms - BACKWARD_SHARE * overlap_ms
    # An image is pixels (uint8), or latents: mean and deviation (float16), from which a sample is drawn.
    is_of_latents = network.config.in_channels == 4
    values = network.config.in_channels * network.pixels
    numbers_of_others = images * (config.gpus - 1) * values * (2 if is_of_latents else 1)
    noise_ms = numbers_of_others / model.noise_numbers_per_ns / 1e6
    read_mb = config.gpus_in_host * images * values * (4 if is_of_latents else 1) / 1e6
    reading_ms = read_mb / config.data_gbytes_per_s if config.data_gbytes_per_s else 0.0
    divided = 3 + config.power_averages  # the EMA and two moments
    held = (1 + divided / (config.gpus if config.shard else 1)) * network.state_bytes / 2**30
    other_gib = model.other_gib(config.preset).at(images) + 4 * numbers_of_others / 2**30
    if config.gpus > 1:
        other_gib += model.together_gib
    return Prediction(
        images=images, compute_ms=compute_ms, exposed_ms=max(partly, bound) + sent.gather_ms,
        communication_ms=sent.reduce_ms + sent.gather_ms, noise_ms=noise_ms, reading_ms=reading_ms,
        read_mb=read_mb, sent_in_host_gb=sent.in_host_gb, sent_out_gb=sent.out_gb,
        held_gib=held, memory_gib=held + other_gib,
    )  # fmt: skip


def _slower(config: PlanConfig, model: Model, ms: float) -> float:
    """Compute the time of a step relative to the measured GPU: from the given speed, else from peak TFLOP/s."""
    if config.images_per_s:
        return 1e3 * config.images_of_a_gpu / config.images_per_s / ms
    ours, theirs = peak_tflops(config.gpu), peak_tflops(model.gpu)
    if ours is None or theirs is None:
        raise ConfigError(
            f"gpu {config.gpu!r} is unknown: give images_per_s, measured on one of these GPUs, or use one of "
            f"{', '.join(PEAK_TFLOPS)}"
        )
    return theirs / ours


def print_plan(config: PlanConfig) -> None:
    """Print a prediction and its basis; raises ConfigError as `predict` does."""
    predicted, model, console = predict(config), Model.shipped(), make_console()
    speed = predicted.images_per_s(config.gpus)
    hours = config.num_images / speed / 3600
    fits = "fits" if predicted.memory_gib <= config.gpu_memory_gib else "does not fit"
    hosts = f"{config.hosts} host{'s' * (config.hosts > 1)}"
    table = Table(show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    rows = {
        "images/s": f"{speed:,.0f}",
        "scaling efficiency": f"{predicted.efficiency:.1%}",
        "limited by": predicted.limit,
        "time of a step, ms": f"{predicted.ms:.1f}",
        "  computing": f"{predicted.compute_ms:.1f}",
        f"  communication, of {predicted.communication_ms:.1f} not hidden": f"{predicted.exposed_ms:.1f}",
        "  noise for the other GPUs' images": f"{predicted.noise_ms:.1f}",
        "sent per GPU and step, GB, inside its host": f"{predicted.sent_in_host_gb:.2f}",
        "  to other hosts": f"{predicted.sent_out_gb:.2f}",
        "read per host, MB/s": f"{1e3 * predicted.read_mb / predicted.ms:,.1f}",
        f"memory per GPU, GiB of {config.gpu_memory_gib:g}": f"{predicted.memory_gib:.1f}, {fits}",
        "  weights, EMAs, moments": f"{predicted.held_gib:.1f}",
        f"GPU-hours for {config.num_images:,} images": f"{hours * config.gpus:,.0f}",
        "days": f"{hours / 24:,.1f}",
    }
    for what, value in rows.items():
        table.add_row(what, value)
    console.print(
        f"{config.preset} on {config.gpus} {config.gpu} in {hosts}, batches of {predicted.images * config.gpus:,}, "
        f"{predicted.images} per GPU{', sharded' * config.shard}"
    )
    console.print(table)
    for line in basis(config, model):
        console.print(line)


def basis(config: PlanConfig, model: Model) -> list[str]:
    """Describe the basis of a prediction: one line each for what was measured, given, assumed and not counted."""
    other = model.reference(config.preset)
    measured = sorted({point.images for point in model.of(other, gpus=1)})
    given = [
        f"{name} {value:g}"
        for name in ("images_per_s", "link_gbytes_per_s", "data_gbytes_per_s")
        if (value := getattr(config, name))
    ]
    assumed = []
    states, measured_states = (network_of(name).config.ssm_state_size for name in (config.preset, other))
    if states != measured_states:
        assumed.append(f"the memory per image of {other}, whose number of states is {measured_states}, not {states}")
    if other != config.preset and not config.images_per_s:
        assumed.append(f"the MFU of {other}, because {config.preset} was not measured")
    elif not min(measured) <= config.images_of_a_gpu <= max(measured):
        assumed.append(f"linear time up to {config.images_of_a_gpu} images per GPU, which was not measured")
    if config.gpu not in model.gpu and not config.images_per_s:
        assumed.append(f"times scaled by peak TFLOP/s from {model.gpu} to {config.gpu}")
    if config.gpus > 2:
        assumed.append("the same link speed and overlap as on two GPUs")
    if config.hosts > 1:
        assumed.append(f"{config.network_gbytes_per_s:g} GB/s from each GPU's network card")
    if config.shard:
        assumed.append("that nothing hides the all-gather of the weights")
    if not config.data_gbytes_per_s:
        assumed.append("no waiting for data")
    of_two = " and ".join(sorted({point.preset for point in model.points if point.gpus == 2}))
    return [
        f"Measured: {other} with {min(measured)} to {max(measured)} images on one {model.gpu}; communication with "
        f"{of_two} on two.",
        *([f"Given: {', '.join(given)}."] if given else []),
        f"Assumed: {'; '.join(assumed) or 'nothing'}.",
        f"Not counted: {NOT_COUNTED}. docs/scaling.md has the model and its fit.",
    ]
