"""Averages of the weights whose length is chosen after training (Karras et al. 2024, arXiv 2312.02696, section 3).

A power function average over the first t steps is, with theta(tau) the weights after step ceil(tau),

    average(t) = integral of p(tau) theta(tau) dtau,   p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t].

p is its profile; sigma_rel, the standard deviation of p as a share of t, says how long it is. Two or three averages are
tracked in training, and snapshots of them stored every now and then. Any other profile is nearly a linear combination
of the profiles of the snapshots, so its average is nearly the same combination of the snapshots.

A run folder holds them in `averages/`, one safetensors file each, named by the images seen. Its header says what it
holds, with a SHA-256 of that and of all weights.
"""

import hashlib
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lamamba.checkpoint import find_checkpoint, read_info, read_network_config, write_weights
from lamamba.config import AverageConfig
from lamamba.errors import CheckpointError, ConfigError
from lamamba.files import utf8_path, written_whole
from lamamba.model import LaMambaDiff
from lamamba.output import say
from lamamba.records import parse_record
from lamamba.weights import fill, first_line

FORMAT = 1
MAX_SIGMA_REL = 12**-0.5
"""Of the plain mean of all steps, gamma = 0."""
MAX_RESIDUAL = 0.1
"""The largest relative residual that `reconstruct` takes: that of a profile too long or short by about an eighth."""
MAX_ROUNDING = 2**-8
"""The largest error from rounding that `reconstruct` takes, relative to a weight: the precision of bfloat16."""

Array = NDArray[np.float64]


def sigma_rel_of(gamma: float) -> float:
    """Compute the relative length of a power function average from its exponent (section 3.1).

    Args:
        gamma: 0 or more.

    Returns:
        sigma_rel, in (0, 12^-1/2].

    Raises:
        ValueError: gamma is negative or not finite.
    """
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma {gamma} is not the exponent of an average: use 0 or more")
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of(sigma_rel: float) -> float:
    """Compute the exponent of a power function average from its relative length: the inverse of `sigma_rel_of`.

    It is the largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2.

    Args:
        sigma_rel: in (0, 12^-1/2], about 0.289; 0.05 gives 16.97 and 0.10 gives 6.94.

    Returns:
        gamma, 0 or more.

    Raises:
        ValueError: sigma_rel is out of range.
    """
    if not 0 < sigma_rel <= MAX_SIGMA_REL:
        raise ValueError(f"sigma_rel {sigma_rel} is not the length of an average: use one above 0 and up to 0.288")
    # To the right of its largest root the cubic is convex and rises, so Newton's steps go down to the root and stop.
    slope = sigma_rel**-2
    gamma, lower = math.inf, 1 / sigma_rel - 2
    while lower < gamma:
        gamma = lower
        excess = (gamma + 2) ** 2 * (gamma + 3) - slope * (gamma + 1)
        lower = gamma - excess / ((gamma + 2) * (3 * gamma + 8) - slope)
    return max(0.0, gamma)


class PowerAverages:
    """Power function averages of a module's parameters, in float32 on their device; buffers are left out.

    Args:
        module: whose parameters are averaged.
        sigma_rels: relative lengths, each with at most three decimals, which become part of names.

    Raises:
        ValueError: a length is out of range, has more decimals or comes twice, or there is none.
    """

    def __init__(self, module: nn.Module, sigma_rels: Sequence[float] = (0.05, 0.10)) -> None:
        if not sigma_rels or len(set(sigma_rels)) < len(sigma_rels):
            raise ValueError(f"sigma_rels {tuple(sigma_rels)}: give one or more that differ")
        for sigma_rel in sigma_rels:
            if round(sigma_rel, 3) != sigma_rel:
                raise ValueError(f"sigma_rel {sigma_rel} has more than three decimals: use {sigma_rel:.3f}")
        self.sigma_rels = tuple(sigma_rels)
        self._gammas = [gamma_of(sigma_rel) for sigma_rel in sigma_rels]
        self._averages = [
            {name: parameter.detach().float().clone() for name, parameter in module.named_parameters()}
            for _ in sigma_rels
        ]

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after a step of the optimizer (section 3.1); to be called after each one.

            average(t) = beta average(t - 1) + (1 - beta) theta(t),   beta = (1 - 1 / t)^(gamma + 1)

        Args:
            module: the one that was given at the start.
            step: t, counted from 1, where the average becomes the weights.

        Raises:
            ValueError: step is less than 1.
        """
        if step < 1:
            raise ValueError(f"step {step} is none: count them from 1")
        parameters = [parameter.float() for parameter in module.parameters()]
        for gamma, average in zip(self._gammas, self._averages, strict=True):
            share = -math.expm1((gamma + 1) * math.log1p(-1 / step)) if step > 1 else 1.0
            torch._foreach_lerp_(list(average.values()), parameters, share)

    def state_dict(self) -> dict[str, Tensor]:
        """Name the averages "0.050.<parameter>"; the tensors are not copied, so `update` goes on changing them."""
        return {
            f"{_prefix(sigma_rel)}{name}": value
            for sigma_rel, average in zip(self.sigma_rels, self._averages, strict=True)
            for name, value in average.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` returned, whose tensors are copied.

        Raises:
            CheckpointError: names or shapes are others than those of these averages.
        """
        own = self.state_dict()
        different = sorted(
            name
            for name in {*own, *state}
            if name not in own or name not in state or own[name].shape != state[name].shape
        )
        if different:
            raise CheckpointError(
                f"the saved averages do not fit, for one in {different[0]}: use the network and sigma_rels of the run"
            )
        for name, value in own.items():
            value.copy_(state[name])


def snapshots_in(run: Path) -> list[Path]:
    """List a run's snapshots of averages, oldest first."""
    paths = (run / "averages").glob("*.safetensors")
    return sorted((path for path in paths if path.stem.isdigit()), key=lambda path: int(path.stem))


def save_snapshot(
    run: Path, averages: Mapping[str, Tensor], step: int, images: int, dtype: torch.dtype = torch.float16
) -> Path:
    """Write a snapshot of averages whole or not at all; one of the same images is replaced.

    Args:
        run: the run folder.
        averages: whole tensors, named as `PowerAverages.state_dict` does, as they are after `step`.
        step: steps of the optimizer so far, the t of the profiles.
        images: images seen so far, which name the file.
        dtype: of the weights in the file, float16 or float32.

    Returns:
        The file.

    Raises:
        CheckpointError: it could not be written, or a weight is not finite in dtype; earlier snapshots are untouched.
        ValueError: another dtype, or step is less than 1.
    """
    if dtype not in (torch.float16, torch.float32):
        raise ValueError(f"averages are not stored in {dtype}: use torch.float16 or torch.float32")
    if step < 1:
        raise ValueError(f"no averages exist at step {step}: save them after the first one")
    final = run / "averages" / f"{images:012d}.safetensors"
    tensors = {name: value.to("cpu", dtype).contiguous() for name, value in averages.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{final} was not written, {name} is not finite in {dtype}: store float32, or lower the learning rate"
            )
    record = {
        "format": str(FORMAT),
        "step": str(step),
        "images": str(images),
        "sigma_rels": json.dumps(sorted({_sigma_rel_of(name) for name in averages})),
    }
    checksum = _Checksum(record)
    for name in sorted(tensors):
        checksum.add(name, tensors[name])
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(final) as temporary:
            save_file(tensors, temporary, {**record, "sha256": checksum.hexdigest()})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{final} could not be written ({error}): free some space; earlier snapshots are as they were"
        ) from error
    return final


def cosines(gammas_a: Array, steps_a: Array, gammas_b: Array | float, steps_b: Array | float) -> Array:
    """Compute the inner products of profiles, each divided by its norm.

    With t_a <= t_b, <p_a, p_b> is the integral over [0, t_a]

        (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) * t_a^gamma_b / t_b^(gamma_b + 1)

    and so |p|^2 = (gamma + 1)^2 / ((2 gamma + 1) t). In the quotient only t_a / t_b is left, which cannot overflow.

    Args:
        gammas_a, steps_a, gammas_b, steps_b: exponents of the profiles and the ends t of their ranges; broadcast.

    Returns:
        As broadcast; at most 1, which is reached by a profile and itself.
    """
    of_the_longer = np.where(steps_a >= steps_b, gammas_a, gammas_b)
    ratio = np.minimum(steps_a, steps_b) / np.maximum(steps_a, steps_b)
    root = np.sqrt((2 * gammas_a + 1) * (2 * gammas_b + 1))
    result: Array = root / (gammas_a + gammas_b + 1) * ratio ** (of_the_longer + 0.5)
    return result


@dataclass(frozen=True)
class Fit:
    """A profile p* as a combination of n stored ones p_i."""

    weights: Array
    """(n,) x, the share of each stored one; their sum is 1."""
    residual: float
    """|p* - sum of x_i p_i| / |p*|.

    Were the weights of the network independent noise from step to step, this would be the error's standard deviation
    over that of the wanted average. They change slowly instead, so that the error is smaller.
    """


def fit_profile(gammas: Array, steps: Array, gamma: float, step: float) -> Fit:
    """Fit a profile by stored ones, by least squares (section 3.2 and appendix C).

    Unlike those of the paper the x are held to a sum of 1, so that what does not change in training comes out as it is.
    Unconstrained, the sum differs from 1 by some of the residual, and every weight of the network by as much.

    Args:
        gammas, steps: (n,) of the stored profiles, n >= 1.
        gamma, step: of the wanted profile.

    Returns:
        The fit: exact, with a single x other than 0, where the wanted profile is a stored one.
    """
    same = np.flatnonzero((gammas == gamma) & (steps == step))
    if len(same):
        return Fit(np.eye(len(gammas))[same[-1]], 0.0)
    # Profiles of norm 1 keep the matrix well scaled: y_i = x_i |p_i| / |p*|.
    scale = (gamma + 1) / (gammas + 1) * np.sqrt((2 * gammas + 1) / (2 * gamma + 1) * steps / step)
    matrix = cosines(gammas[:, None], steps[:, None], gammas, steps)
    target = cosines(gammas, steps, gamma, step)
    # Snapshots in quick succession are nearly equal, so directions below the precision of the matrix are left out.
    y, correction = np.linalg.lstsq(matrix, np.stack([target, scale], axis=1), rcond=1e-12)[0].T
    y = y + correction * (1 - scale @ y) / (scale @ correction)
    squared = 1 - 2 * (y @ target) + y @ matrix @ y
    return Fit(y * scale, math.sqrt(max(0.0, float(squared))))


def reconstruct(run: Path, sigma_rel: float, images: int | None = None) -> dict[str, Tensor]:
    """Compute the average of any length from a run's snapshots, as it was at the newest one or at a given one.

    All snapshots up to there are read, one tensor at a time.

    Args:
        run: the run folder.
        sigma_rel: the relative length wanted.
        images: of a snapshot; None is the newest.

    Returns:
        Float32 weights on the CPU, named as the module's parameters. Of a stored length, they are those stored.

    Raises:
        CheckpointError: there is no such snapshot; one is damaged or of another network, and is named; sigma_rel is out
            of range, or what is stored is too little for it, since the fit has a relative residual above
            `MAX_RESIDUAL`, see `Fit`, or amplifies the rounding of what is stored to more than `MAX_ROUNDING`.
    """
    try:
        gamma = gamma_of(sigma_rel)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    snapshots = [_read_snapshot(path) for path in _paths_up_to(run, images)]
    last = snapshots[-1]
    for snapshot in snapshots:
        if snapshot.shapes != last.shapes:
            raise CheckpointError(f"{snapshot.path} and {last.path} are of different networks: move one of them away")
    stored = [(snapshot, length) for snapshot in snapshots for length in snapshot.sigma_rels]
    gammas = np.array([gamma_of(length) for _, length in stored])
    steps = np.array([snapshot.step for snapshot, _ in stored], dtype=np.float64)
    fit = fit_profile(gammas, steps, gamma, last.step)
    rounding = float(np.linalg.norm(fit.weights * [snapshot.rounding for snapshot, _ in stored]))
    if fit.residual > MAX_RESIDUAL or rounding > MAX_ROUNDING:
        fault = (
            f"a relative residual of {fit.residual:.3g}, more than {MAX_RESIDUAL}"
            if fit.residual > MAX_RESIDUAL
            else f"an error of {rounding:.3g} from rounding, more than {MAX_ROUNDING:.3g}"
        )
        lengths = ", ".join(f"{length:.3f}" for length in sorted({length for _, length in stored}))
        raise CheckpointError(
            f"sigma_rel {sigma_rel} at {last.images} images would have {fault}, from too few snapshots in {run}, "
            f"{len(snapshots)}: choose one nearer to {lengths}, or a later snapshot"
        )
    total = {name: torch.zeros(shape) for name, shape in last.shapes.items()}
    shares = iter(fit.weights.tolist())
    for snapshot in snapshots:
        own = {length: next(shares) for length in snapshot.sigma_rels}
        if any(own.values()):
            _add(total, snapshot, own)
    return total


def average(config: AverageConfig) -> None:
    """Run the command `lamamba average`: write the weights of a length to a folder that `lamamba sample` takes.

    Raises:
        CheckpointError: the run has no checkpoint, too few snapshots for this length, or a damaged one.
        ConfigError: the folder to write is there already.
    """
    if config.out.exists():
        raise ConfigError(f"out {config.out} is there already: give another, or move it away")
    checkpoint = find_checkpoint(config.run)
    weights = reconstruct(config.run, config.sigma_rel, config.images)
    images = config.images if config.images is not None else int(snapshots_in(config.run)[-1].stem)
    with torch.device("meta"):
        network = LaMambaDiff(**vars(read_network_config(checkpoint / "ema")))
    fill(network, weights, f"the snapshots in {config.run / 'averages'}")
    write_weights(config.out, network, replace(read_info(checkpoint), images=images))
    say(f"average of length {config.sigma_rel} after {images:,} images")
    say(f"wrote {config.out}, to be sampled with: lamamba sample {shlex.quote(str(config.out))}")


@dataclass(frozen=True)
class _Snapshot:
    """What the header of a snapshot says; only reading all its weights shows whether it is damaged."""

    path: Path
    step: int
    images: int
    sigma_rels: tuple[float, ...]
    record: Mapping[str, str]
    sha256: str
    shapes: Mapping[str, tuple[int, ...]]
    rounding: float
    """The largest error of a stored weight from rounding, relative to it."""


def _paths_up_to(run: Path, images: int | None) -> list[Path]:
    paths = snapshots_in(run)
    if not paths:
        raise CheckpointError(f"{run / 'averages'} holds no snapshot: give a run folder that was trained with averages")
    if images is None:
        return paths
    numbers = [int(path.stem) for path in paths]
    if images not in numbers:
        nearest = min(numbers, key=lambda number: abs(number - images))
        raise CheckpointError(f"{run / 'averages'} holds no snapshot of {images} images: the nearest has {nearest}")
    return paths[: numbers.index(images) + 1]


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged or no snapshot of lamamba ({type(error).__name__}: {first_line(error)}): move it away"
        ) from error


def _read_snapshot(path: Path) -> _Snapshot:
    with _damage_named(path), safe_open(utf8_path(path), "pt") as file:
        record = dict(file.metadata() or {})
        sha256 = record.pop("sha256")
        if int(record["format"]) > FORMAT:
            raise CheckpointError(f"{path} has format {record['format']}, this version reads {FORMAT}: update lamamba")
        step, images = int(record["step"]), int(record["images"])
        sigma_rels = tuple(parse_record(record["sigma_rels"], f"{path}: sigma_rels", list[float], CheckpointError))
        for length in sigma_rels:
            gamma_of(length)
        names = sorted(file.keys())
        slices = {name: file.get_slice(name) for name in names}
        first = _prefix(sigma_rels[0]) if sigma_rels else ""
        shapes = {
            name.removeprefix(first): tuple(part.get_shape()) for name, part in slices.items() if name.startswith(first)
        }
        if names != sorted(f"{_prefix(length)}{name}" for length in sigma_rels for name in shapes):
            raise ValueError("the names of its tensors are not those of averages")
        if images != int(path.stem) or step < 1:
            raise ValueError(f"it says to be of {images} images and {step} steps")
        is_half = any(part.get_dtype() == "F16" for part in slices.values())
    rounding = torch.finfo(torch.float16 if is_half else torch.float32).eps / 2
    return _Snapshot(path, step, images, sigma_rels, record, sha256, shapes, rounding)


def _add(total: Mapping[str, Tensor], snapshot: _Snapshot, shares: Mapping[float, float]) -> None:
    """Add a snapshot's averages, each times its share, and compare the checksum on the way."""
    checksum = _Checksum(snapshot.record)
    with _damage_named(snapshot.path), safe_open(utf8_path(snapshot.path), "pt") as file:
        for length in sorted(shares):
            for parameter in sorted(total):
                name = f"{_prefix(length)}{parameter}"
                tensor = file.get_tensor(name)
                checksum.add(name, tensor)
                if shares[length]:
                    total[parameter].add_(tensor.float(), alpha=shares[length])
        if checksum.hexdigest() != snapshot.sha256:
            raise ValueError("its checksum is another")


class _Checksum:
    """SHA-256 of a snapshot's record and its tensors, which are added in the order of their names."""

    def __init__(self, record: Mapping[str, str]) -> None:
        self._digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())

    def add(self, name: str, tensor: Tensor) -> None:
        self._digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        self._digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _prefix(sigma_rel: float) -> str:
    return f"{sigma_rel:.3f}."


def _sigma_rel_of(name: str) -> float:
    return float(name[: len(_prefix(0)) - 1])
