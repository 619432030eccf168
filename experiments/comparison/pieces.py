"""What there is to run: pieces of some minutes on one H100, in lists.

A piece leaves one record, by its name, in the folder of results. Lists are run in order: `run.py LIST`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

NUM_IMAGES = 1_228_800  # four times 30 intervals of the log
LENGTHS = (0.02, 0.05, 0.1, 0.2)  # of averages; the trainer's own, of 0.9999 with a warm-up, has 0.09 in so few steps


@dataclass(frozen=True)
class Training:
    """Train a network and score it on the way; at the end draw a grid."""

    name: str
    network: str
    seed: int = 0
    data: Literal["fashion-mnist", "emoji"] = "fashion-mnist"
    objective: Literal["diffusion", "flow"] = "diffusion"
    num_images: int = NUM_IMAGES
    learning_rate: float = 5e-4
    num_scores: int = 4
    """Scores without guidance on the way, at equal distances; the last at the end."""
    sweep: bool = False
    """Score other scales of guidance at the end."""
    averages: tuple[float, ...] = ()
    """Relative lengths of averages of the weights to score at the end, beside the usual one."""
    compile: bool = False
    """A DiT's blocks, for steps and scores, by torch.compile; this package's network has kernels of its own."""


@dataclass(frozen=True)
class Steps:
    """Score every sampler at 5 to 250 steps, of one that was trained."""

    name: str
    of: Training


@dataclass(frozen=True)
class Clipping:
    """Score one that was trained with and without clipping of what it predicts; all other scores are without."""

    name: str
    of: Training


@dataclass(frozen=True)
class Memorisation:
    """Look for the training images nearest to samples of one that was trained."""

    name: str
    of: Training


@dataclass(frozen=True)
class Speed:
    """Time the training step of networks, launched as a CUDA graph or not, compiled or not."""

    name: str = "speed"
    networks: tuple[str, ...] = ("s", "dit-s-2", "b", "dit-b-2")


Study = Steps | Clipping | Memorisation
Piece = Training | Study | Speed


@dataclass(frozen=True)
class Scale:
    """How much of everything: the numbers of the experiments, or of a quick look whether all of it runs."""

    quick: bool = False
    num_images: int | None = None
    """In place of a piece's own."""
    batch_size: int = 256
    log_every: int = 10_240
    num_samples: int = 10_000
    """For a score that is reported."""
    num_sweep_samples: int = 2_500
    """For each scale of the sweep; the best is scored again with `num_samples`."""
    num_steps_samples: int = 5_000
    num_nearest: int = 1_000
    """Samples whose nearest training images are looked for."""
    num_training_images: int | None = None
    """Of the data, the first; None is all."""
    num_test_images: int | None = None
    num_timed_steps: int = 100
    steps: int = 50
    """Of the sampler, for scores."""
    sweep: tuple[float, ...] = (1.25, 1.5, 2.0, 3.0)
    step_counts: tuple[int, ...] = (5, 10, 20, 50, 250)
    sample_batch_size: int = 1000
    checkpoint_every_s: float = 120.0
    num_grid: int = 10
    """Samples of each class in the grid."""


FULL = Scale()
QUICK = Scale(
    quick=True, num_images=64, batch_size=8, log_every=16, num_samples=16, num_sweep_samples=8, num_steps_samples=8,
    num_nearest=8, num_training_images=48, num_test_images=24, num_timed_steps=2, steps=2, sweep=(1.5, 3.0),
    step_counts=(2, 4), sample_batch_size=8, checkpoint_every_s=0.0, num_grid=1,
)  # fmt: skip


def _train(name: str, network: str, **options: object) -> Training:
    # The fastest way of a DiT, which the piece `speed` is there to confirm.
    return replace(Training(name, network, compile=network.startswith("dit")), **options)


_S, _DIT_S = _train("s-seed-0", "s", sweep=True), _train("dit-s-2-seed-0", "dit-s-2", sweep=True)
_S_1 = _train("s-seed-1", "s", seed=1)
_B, _DIT_B = _train("b", "b", sweep=True), _train("dit-b-2", "dit-b-2", sweep=True)
_FLOW = _train("s-flow", "s", objective="flow", sweep=True)
# Small enough to ship; at the learning rate of the weights that were shipped before.
_NANO = _train("nano", "nano", num_images=4_915_200, learning_rate=6e-4, sweep=True)
_EMOJI = _train("emoji-64", "emoji-64", data="emoji", num_images=2_457_600, learning_rate=6e-4)

LISTS: Mapping[str, tuple[Piece, ...]] = {
    "speed": (Speed(),),
    # Which learning rate is each network's best? 1e-3 gains most so far, but over the whole length (`high-rate`) DiT-S
    # had a spike at it, from which it had not recovered at the end; all others take 5e-4.
    "rates": tuple(
        _train(f"rate-{network}-{rate:g}", network, learning_rate=rate, num_images=307_200, num_scores=1)
        for rate in (1e-4, 3e-4, 1e-3)
        for network in ("s", "dit-s-2")
    ),
    "high-rate": tuple(_train(f"{network}-at-0.001", network, learning_rate=1e-3) for network in ("s", "dit-s-2")),
    # What is asked of their weights comes right after them, while these are there: those of seed 0 were gone when
    # steps were to be scored.
    "seed-0": (
        _S, _DIT_S, Memorisation("memorisation-s", _S), Memorisation("memorisation-dit-s-2", _DIT_S)
    ),
    "more-seeds": (
        _S_1, Steps("steps-s", _S_1), _train("dit-s-2-seed-1", "dit-s-2", seed=1),
        *(_train(f"{network}-seed-2", network, seed=2) for network in ("s", "dit-s-2")),
    ),
    # Both networks by the other objective, which is an ablation too.
    "flow": (
        _FLOW, Steps("steps-s-flow", _FLOW), _train("dit-s-2-flow", "dit-s-2", objective="flow", sweep=True),
        *(
            _train(f"{network}-flow-seed-{seed}", network, objective="flow", seed=seed)
            for seed in (1, 2)
            for network in ("s", "dit-s-2")
        ),
    ),
    "flow-longer": tuple(
        _train(f"{network}-flow-longer", network, objective="flow", num_images=3 * NUM_IMAGES)
        for network in ("s", "dit-s-2")
    ),
    # Compared at the end alone.
    "ablations": tuple(
        _train(network, network, num_scores=1)
        for network in ("s-scan-only", "s-attention-only", "s-raster", "s-state-16", "s-window-4")
    ),
    # Whether small differences are more than seeds', and what twice as fast a network makes of the same time.
    "more-ablations": (
        _train("s-attention-only-longer", "s-attention-only", num_images=2 * NUM_IMAGES, num_scores=1),
        *(
            _train(f"{network}-seed-{seed}", network, seed=seed, num_scores=1)
            for seed in (1, 2)
            for network in ("s-raster", "s-window-4", "s-state-16")
        ),
    ),
    # Does it last? DiT-S/2 was still getting better. The second seed is there for averages too.
    "longer": (
        *(_train(f"{network}-longer", network, num_images=3 * NUM_IMAGES) for network in ("s", "dit-s-2")),
        *(
            _train(f"{network}-longer-seed-1", network, seed=1, num_images=3 * NUM_IMAGES, averages=LENGTHS)
            for network in ("s", "dit-s-2")
        ),
    ),
    "b": (_B, _DIT_B, Clipping("clipping-b", _B), Clipping("clipping-dit-b-2", _DIT_B)),
    "emoji": (
        *(_train(f"emoji-{network}", network, data="emoji", num_images=307_200) for network in ("s", "dit-s-2")),
        _train("emoji-nano", "nano", data="emoji", num_images=819_200, learning_rate=6e-4),
    ),
    "release": (
        _NANO, Memorisation("memorisation-nano", _NANO), Clipping("clipping-nano", _NANO),
        _EMOJI, Memorisation("memorisation-emoji-64", _EMOJI),
    ),
}  # fmt: skip

PIECES: Mapping[str, Piece] = {piece.name: piece for pieces in LISTS.values() for piece in pieces}
