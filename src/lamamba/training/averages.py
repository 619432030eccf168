"""EMAs whose length is chosen after training (Karras et al. 2024, arXiv 2312.02696, section 3).

With theta(tau) the weights after step ceil(tau), the power-function EMA over the first t steps is

    average(t) = integral of p(tau) theta(tau) dtau,   p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t].

p is its profile. Its length is sigma_rel, the standard deviation of p divided by t. Training tracks two or three EMAs
and saves snapshots of them from time to time. Any other profile is close to a linear combination of the profiles of the
snapshots, so its EMA is close to the same combination of the snapshots.

A run folder keeps them in `averages/`, one safetensors file each, named by the images seen. The header describes the
content, with a SHA-256 of the description and of all weights.
"""

import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lamamba.checkpoints.checkpoint import build_empty, find_checkpoint, read_info, write_weights
from lamamba.config import AverageConfig
from lamamba.errors import CheckpointError, ConfigError, reading
from lamamba.files import atomic_write, utf8_path
from lamamba.files.records import parse_record
from lamamba.files.weights import fill
from lamamba.terminal.output import say

FORMAT = 1
MAX_SIGMA_REL = 12**-0.5
"""Length of the plain mean of all steps, gamma = 0."""
MAX_RESIDUAL = 0.1
"""The largest relative residual that `reconstruct` accepts: a profile that is too long or short by about an eighth."""
MAX_ROUNDING = 2**-8
"""The largest rounding error that `reconstruct` accepts, relative to a weight: the precision of bfloat16."""

Array = NDArray[np.float64]


def gamma_of(sigma_rel: float) -> float:
    """Compute the exponent of a power-function EMA from its relative length (section 3.1).

    It is the largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2.

    Args:
        sigma_rel: in (0, 12^-1/2], about 0.289; 0.05 gives 16.97 and 0.10 gives 6.94.

    Raises:
        ValueError: sigma_rel is out of range.
    """
    if not 0 < sigma_rel <= MAX_SIGMA_REL:
        raise ValueError(f"sigma_rel {sigma_rel} is out of range: use a value above 0 and up to 0.288")
    slope = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - slope, 12 - slope]).real.max()))


class PowerAverages:
    """Power-function EMAs of a module's parameters, in float32 on their device. Buffers are not averaged.

    Args:
        module: the module whose parameters are averaged.
        sigma_rels: relative lengths, with at most three decimals, which become part of names.
        are_own: for each parameter, whether to average it; None averages all.

    Raises:
        ValueError: a length is out of range, has more decimals or occurs twice, or there are no lengths.
    """

    def __init__(
        self, module: nn.Module, sigma_rels: Sequence[float] = (0.05, 0.10), are_own: Sequence[bool] | None = None
    ) -> None:
        if not sigma_rels or len(set(sigma_rels)) < len(sigma_rels):
            raise ValueError(f"sigma_rels {tuple(sigma_rels)}: give one or more different lengths")
        for sigma_rel in sigma_rels:
            if round(sigma_rel, 3) != sigma_rel:
                raise ValueError(f"sigma_rel {sigma_rel} has more than three decimals: use {sigma_rel:.3f}")
        self.sigma_rels = tuple(sigma_rels)
        self._gammas = [gamma_of(sigma_rel) for sigma_rel in sigma_rels]
        named = dict(module.named_parameters())
        self._are_own = [True] * len(named) if are_own is None else are_own
        self._averages = [
            {name: named[name].detach().float().clone() for name in compress(named, self._are_own)} for _ in sigma_rels
        ]

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Update the EMAs with the weights after an optimizer step (section 3.1). Call this after each step.

            average(t) = beta average(t - 1) + (1 - beta) theta(t),   beta = (1 - 1 / t)^(gamma + 1)

        Args:
            module: the module given to the constructor.
            step: t, counted from 1. At step 1 the EMA equals the weights.

        Raises:
            ValueError: step is less than 1.
        """
        if step < 1:
            raise ValueError(f"step {step} is less than 1: count steps from 1")
        parameters = [parameter.float() for parameter in compress(module.parameters(), self._are_own)]
        for gamma, average in zip(self._gammas, self._averages, strict=True):
            share = -math.expm1((gamma + 1) * math.log1p(-1 / step)) if step > 1 else 1.0
            torch._foreach_lerp_(list(average.values()), parameters, share)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the EMAs as "0.050.<parameter>". The tensors are not copied, so `update` keeps changing them."""
        averages = zip(self.sigma_rels, self._averages, strict=True)
        return {power_name(length, name): value for length, average in averages for name, value in average.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy the tensors that `state_dict` returned.

        Raises:
            CheckpointError: names or shapes differ.
        """
        own = self.state_dict()
        shapes, given = ({name: value.shape for name, value in part.items()} for part in (own, state))
        different = sorted(name for name, _ in shapes.items() ^ given.items())
        if different:
            raise CheckpointError(
                f"the saved EMAs do not match, first in {different[0]}: use the network and sigma_rels of the run"
            )
        for name, value in own.items():
            value.copy_(state[name])


def snapshots_in(run: Path) -> list[Path]:
    """List a run's snapshots of EMAs, oldest first."""
    paths = (run / "averages").glob("*.safetensors")
    return sorted((path for path in paths if path.stem.isdigit()), key=lambda path: int(path.stem))


def save_snapshot(
    run: Path, averages: Mapping[str, Tensor], step: int, images: int, dtype: torch.dtype = torch.float16
) -> Path:
    """Write a snapshot of EMAs atomically. A snapshot of the same number of images is replaced.

    Args:
        run: the run folder.
        averages: complete tensors after `step`, named as in `PowerAverages.state_dict`.
        step: number of optimizer steps so far, the t of the profiles.
        images: number of images seen so far, the name of the file.
        dtype: dtype of the weights in the file, float16 or float32.

    Raises:
        CheckpointError: it could not be written, or a weight is not finite in dtype. Earlier snapshots are untouched.
        ValueError: another dtype, or step is less than 1.
    """
    if dtype not in (torch.float16, torch.float32):
        raise ValueError(f"EMAs cannot be saved as {dtype}: use torch.float16 or torch.float32")
    if step < 1:
        raise ValueError(f"there are no EMAs at step {step}: save them after the first step")
    final = run / "averages" / f"{images:012d}.safetensors"
    tensors = {name: value.to("cpu", dtype).contiguous() for name, value in averages.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{final} was not written, because {name} is not finite in {dtype}: use float32, or lower the "
                "learning rate"
            )
    record = {
        "format": str(FORMAT),
        "step": str(step),
        "images": str(images),
        "sigma_rels": json.dumps(sorted({float(name[: len(power_name(0)) - 1]) for name in averages})),
    }
    checksum = _Checksum(record)
    for name in sorted(tensors):
        checksum.add(name, tensors[name])
    with atomic_write(final) as temporary:
        save_file(tensors, temporary, {**record, "sha256": checksum.hexdigest()})
    return final


def cosines(gammas_a: Array, steps_a: Array, gammas_b: Array | float, steps_b: Array | float) -> Array:
    """Compute the inner products of normalized profiles.

    With t_a <= t_b, <p_a, p_b> is the integral over [0, t_a]

        (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) * t_a^gamma_b / t_b^(gamma_b + 1)

    so |p|^2 = (gamma + 1)^2 / ((2 gamma + 1) t). The quotient depends only on t_a / t_b, so it cannot overflow.

    Args:
        gammas_a, steps_a, gammas_b, steps_b: exponents of the profiles and the ends t of their ranges; broadcast.

    Returns:
        Values of at most 1, broadcast. Equal profiles give 1.
    """
    of_the_longer = np.where(steps_a >= steps_b, gammas_a, gammas_b)
    ratio = np.minimum(steps_a, steps_b) / np.maximum(steps_a, steps_b)
    root = np.sqrt((2 * gammas_a + 1) * (2 * gammas_b + 1))
    return root / (gammas_a + gammas_b + 1) * ratio ** (of_the_longer + 0.5)


@dataclass(frozen=True)
class Fit:
    """A profile p* as a combination of n stored profiles p_i."""

    weights: Array
    """(n,) the coefficients x; their sum is 1."""
    residual: float
    """|p* - sum of x_i p_i| / |p*|.

    If the weights of the network were independent noise at each step, this would be the standard deviation of the error
    divided by that of the wanted EMA. In fact they change slowly, so the error is smaller.
    """


def fit_profile(gammas: Array, steps: Array, gamma: float, step: float) -> Fit:
    """Fit a profile with stored profiles by least squares (section 3.2 and appendix C).

    Unlike in the paper, the sum of the coefficients is constrained to 1, so that weights which do not change in
    training are reproduced exactly. Otherwise the sum, and with it every weight, would be off by a part of the
    residual.

    Args:
        gammas, steps: (n,) exponents and ends of the stored profiles, n >= 1.
        gamma, step: exponent and end of the wanted profile.

    Returns:
        The fit. If the wanted profile is a stored one, it is exact, with a single nonzero coefficient.
    """
    same = np.flatnonzero((gammas == gamma) & (steps == step))
    if len(same):
        return Fit(np.eye(len(gammas))[same[-1]], 0.0)
    # Normalized profiles keep the matrix well scaled: y_i = x_i |p_i| / |p*|.
    scale = (gamma + 1) / (gammas + 1) * np.sqrt((2 * gammas + 1) / (2 * gamma + 1) * steps / step)
    matrix = cosines(gammas[:, None], steps[:, None], gammas, steps)
    target = cosines(gammas, steps, gamma, step)
    # Close snapshots are nearly equal, so directions below the precision of the matrix are dropped.
    y, correction = np.linalg.lstsq(matrix, np.stack([target, scale], axis=1), rcond=1e-12)[0].T
    y = y + correction * (1 - scale @ y) / (scale @ correction)
    squared = 1 - 2 * (y @ target) + y @ matrix @ y
    return Fit(y * scale, math.sqrt(max(0.0, float(squared))))


def reconstruct(run: Path, sigma_rel: float, images: int | None = None) -> dict[str, Tensor]:
    """Compute the EMA of any length from a run's snapshots, ending at the newest snapshot or at one of `images`.

    Reads all snapshots up to that one, one tensor at a time.

    Returns:
        Float32 weights on the CPU, named like the module's parameters. For a stored length, these are the stored ones.

    Raises:
        CheckpointError: there is no such snapshot; one is damaged or of another network; sigma_rel is out of range; or
            there are too few snapshots for it: the fit has a relative residual above `MAX_RESIDUAL` (see `Fit`), or
            amplifies the rounding of the snapshots to more than `MAX_ROUNDING`.
    """
    try:
        gamma = gamma_of(sigma_rel)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    snapshots = [_read_snapshot(path) for path in _paths_up_to(run, images)]
    last = snapshots[-1]
    for snapshot in snapshots:
        if snapshot.shapes != last.shapes:
            raise CheckpointError(
                f"{snapshot.path} and {last.path} belong to different networks: move one of them away"
            )
    stored = [(snapshot, length) for snapshot in snapshots for length in snapshot.sigma_rels]
    gammas = np.array([gamma_of(length) for _, length in stored])
    steps = np.array([snapshot.step for snapshot, _ in stored], dtype=np.float64)
    fit = fit_profile(gammas, steps, gamma, last.step)
    rounding = float(np.linalg.norm(fit.weights * [snapshot.rounding for snapshot, _ in stored]))
    if fit.residual > MAX_RESIDUAL or rounding > MAX_ROUNDING:
        fault = (
            f"a relative residual of {fit.residual:.3g}, more than {MAX_RESIDUAL}"
            if fit.residual > MAX_RESIDUAL
            else f"a rounding error of {rounding:.3g}, more than {MAX_ROUNDING:.3g}"
        )
        lengths = ", ".join(f"{length:.3f}" for length in sorted({length for _, length in stored}))
        raise CheckpointError(
            f"sigma_rel {sigma_rel} at {last.images} images would have {fault}, because {run} has too few snapshots "
            f"({len(snapshots)}): choose a length closer to {lengths}, or a later snapshot"
        )
    total = {name: torch.zeros(shape) for name, shape in last.shapes.items()}
    shares = iter(fit.weights.tolist())
    for snapshot in snapshots:
        own = {length: next(shares) for length in snapshot.sigma_rels}
        if any(own.values()):
            _add(total, snapshot, own)
    return total


def average(config: AverageConfig) -> None:
    """Run the command `lamamba average`: write the EMA weights of a length to a folder for `lamamba sample`.

    Raises:
        CheckpointError: the run has no checkpoint, too few snapshots for this length, or a damaged one.
        ConfigError: the output folder exists already.
    """
    if config.out.exists():
        raise ConfigError(f"out {config.out} exists already: choose another path, or move it away")
    checkpoint = find_checkpoint(config.run)
    images = int(_paths_up_to(config.run, config.images)[-1].stem)  # once, since a run in training saves more
    weights = reconstruct(config.run, config.sigma_rel, images)
    network = build_empty(checkpoint / "ema")
    fill(network, weights, f"the snapshots in {config.run / 'averages'}")
    write_weights(config.out, network, replace(read_info(checkpoint), images=images))
    say(f"EMA of length {config.sigma_rel} after {images:,} images")
    say(f"wrote {config.out}; sample it with: lamamba sample {shlex.quote(str(config.out))}")


@dataclass(frozen=True)
class _Snapshot:
    """The header of a snapshot. Damage to the weights is detected only when all of them are read."""

    path: Path
    step: int
    images: int
    sigma_rels: tuple[float, ...]
    record: Mapping[str, str]
    sha256: str
    shapes: Mapping[str, tuple[int, ...]]
    rounding: float
    """The largest relative rounding error of a stored weight."""


def _paths_up_to(run: Path, images: int | None) -> list[Path]:
    paths = snapshots_in(run)
    if not paths:
        raise CheckpointError(f"{run / 'averages'} has no snapshots: give a run that was trained with --power-averages")
    if images is None:
        return paths
    numbers = [int(path.stem) for path in paths]
    if images not in numbers:
        nearest = min(numbers, key=lambda number: abs(number - images))
        raise CheckpointError(f"{run / 'averages'} has no snapshot of {images} images: the nearest has {nearest}")
    return paths[: numbers.index(images) + 1]


def _reading_snapshot(path: Path) -> AbstractContextManager[None]:
    return reading(f"{path} is damaged, or not a snapshot of lamamba", "move it away", CheckpointError)


def _read_snapshot(path: Path) -> _Snapshot:
    with _reading_snapshot(path), safe_open(utf8_path(path), "pt") as file:
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
        first = power_name(sigma_rels[0]) if sigma_rels else ""
        shapes = {
            name.removeprefix(first): tuple(part.get_shape()) for name, part in slices.items() if name.startswith(first)
        }
        if names != sorted(power_name(length, name) for length in sigma_rels for name in shapes):
            raise ValueError("its tensors do not have the names of EMAs")
        if images != int(path.stem) or step < 1:
            raise ValueError(f"its header states {images} images and {step} steps")
        is_half = any(part.get_dtype() == "F16" for part in slices.values())
    rounding = torch.finfo(torch.float16 if is_half else torch.float32).eps / 2
    return _Snapshot(path, step, images, sigma_rels, record, sha256, shapes, rounding)


def _add(total: Mapping[str, Tensor], snapshot: _Snapshot, shares: Mapping[float, float]) -> None:
    """Add a snapshot's EMAs, each multiplied by its coefficient, and verify the checksum meanwhile."""
    checksum = _Checksum(snapshot.record)
    with _reading_snapshot(snapshot.path), safe_open(utf8_path(snapshot.path), "pt") as file:
        for length in sorted(shares):
            for parameter in sorted(total):
                name = power_name(length, parameter)
                tensor = file.get_tensor(name)
                checksum.add(name, tensor)
                if shares[length]:
                    total[parameter].add_(tensor.float(), alpha=shares[length])
        if checksum.hexdigest() != snapshot.sha256:
            raise ValueError("its checksum does not match")


class _Checksum:
    """SHA-256 of a snapshot's header and its tensors, added in the order of their names."""

    def __init__(self, record: Mapping[str, str]) -> None:
        self._digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())

    def add(self, name: str, tensor: Tensor) -> None:
        self._digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        self._digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def power_name(sigma_rel: float, parameter: str = "") -> str:
    """Name the EMA of a parameter in state dicts and snapshots."""
    return f"{sigma_rel:.3f}.{parameter}"
