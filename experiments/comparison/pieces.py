"""All pieces, in lists. A piece takes a few minutes on one H100.

Each piece writes one record, named after it, to the folder of results. Lists run in order: `run.py LIST`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

NUM_IMAGES = 1_228_800  # four times 30 intervals of the log
LENGTHS = (0.02, 0.05, 0.1, 0.2)  # of EMAs; the trainer's own, 0.9999 with warm-up, has length 0.09 in so few steps


@dataclass(frozen=True)
class Training:
    """Train a network, score it at intervals, and draw a grid at the end."""

    name: str
    network: str
    seed: int = 0
    data: Literal["fashion-mnist", "cifar-10", "emoji"] = "fashion-mnist"
    objective: Literal["diffusion", "flow", "flow-x"] = "diffusion"
    num_images: int = NUM_IMAGES
    learning_rate: float = 5e-4
    warmup: float = 0.0
    """Part of the training in which the learning rate rises."""
    num_scores: int = 4
    """Number of scores without guidance, at equal intervals; the last one at the end."""
    sweep: bool = False
    """Score other guidance scales at the end."""
    averages: tuple[float, ...] = ()
    """Relative lengths of further EMAs to score at the end."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Further options of the training, by their names in `TrainConfig`."""
    compile: bool = False
    """Compile the blocks of DiT or U-Net for training and scoring; this package's network has its own kernels."""


@dataclass(frozen=True)
class Steps:
    """Score every sampler with 5 to 250 steps on a trained network."""

    name: str
    of: Training


@dataclass(frozen=True)
class Clipping:
    """Score a trained network with and without clipping; all other scores are without."""

    name: str
    of: Training


@dataclass(frozen=True)
class Memorisation:
    """Find the training images nearest to samples of a trained network."""

    name: str
    of: Training


@dataclass(frozen=True)
class Distilling:
    """Distill a trained network to a few steps, and score teacher and student at several numbers of steps."""

    name: str
    of: Training
    """The teacher."""
    guidance: float = 1.0
    num_images: int = 1_152_000
    learning_rate: float = 1e-4
    ema_decay: float = 0.9995
    steps: Literal[1, 2, 4, 8] = 4


@dataclass(frozen=True)
class Speed:
    """Time the training step of networks, with and without CUDA graph and compilation."""

    name: str = "speed"
    networks: tuple[str, ...] = ("s", "dit-s-2", "b", "dit-b-2")


Study = Steps | Clipping | Memorisation | Distilling
Piece = Training | Study | Speed


@dataclass(frozen=True)
class Scale:
    """Sizes of the experiments, or of a quick test that everything runs."""

    quick: bool = False
    num_images: int | None = None
    """Replaces the piece's own value."""
    batch_size: int = 256
    log_every: int = 10_240
    num_samples: int = 10_000
    """Samples for a reported score."""
    num_sweep_samples: int = 2_500
    """Samples for each scale of the sweep; the best scale is scored again with `num_samples`."""
    num_steps_samples: int = 5_000
    num_nearest: int = 1_000
    """Samples whose nearest training images are searched."""
    num_training_images: int | None = None
    """Use only the first images of the data; None uses all."""
    num_test_images: int | None = None
    num_loss_images: int = 5_000
    """Training images and as many test images whose losses are compared at `loss_timesteps` with each score."""
    loss_timesteps: tuple[int, ...] = (25, 100, 250, 500, 750, 900, 975)
    num_timed_steps: int = 100
    steps: int = 50
    """Sampler steps for scores."""
    sweep: tuple[float, ...] = (1.25, 1.5, 2.0, 3.0)
    step_counts: tuple[int, ...] = (5, 10, 20, 50, 250)
    few_steps: tuple[int, ...] = (1, 2, 4, 8, 25)
    """Numbers of steps at which teachers and students are compared."""
    sample_batch_size: int = 1000
    checkpoint_every_s: float = 120.0
    num_grid: int = 10
    """Samples per class in the grid."""


FULL = Scale()
QUICK = Scale(
    quick=True,
    num_images=64,
    batch_size=8,
    log_every=16,
    num_samples=16,
    num_sweep_samples=8,
    num_steps_samples=8,
    num_nearest=8,
    num_training_images=48,
    num_test_images=24,
    num_loss_images=8,
    loss_timesteps=(100, 900),
    num_timed_steps=2,
    steps=2,
    sweep=(1.5, 3.0),
    step_counts=(2, 4),
    few_steps=(1, 3),
    sample_batch_size=8,
    checkpoint_every_s=0.0,
    num_grid=1,
)


def _train(name: str, network: str, **options: object) -> Training:
    # The fastest configuration of a DiT; the piece `speed` confirms this. `speed-unet` does it for the U-Net.
    return replace(Training(name, network, compile=network.startswith(("dit", "unet"))), **options)


_S, _DIT_S = _train("s-seed-0", "s", sweep=True), _train("dit-s-2-seed-0", "dit-s-2", sweep=True)
_S_1 = _train("s-seed-1", "s", seed=1)
_B, _DIT_B = _train("b", "b", sweep=True), _train("dit-b-2", "dit-b-2", sweep=True)
_FLOW = _train("s-flow", "s", objective="flow", sweep=True)
# Small enough to ship: version 0.1.0 ships the first, which predicts noise, and later versions the second.
_NANO = _train("nano", "nano", num_images=4_915_200, learning_rate=6e-4, sweep=True)
_NANO_FLOW = _train(
    "nano-flow", "nano", objective="flow", num_images=3_686_400, learning_rate=1e-3, warmup=0.05,
    recipe={"decay": "cosine"}, num_scores=1,
)  # fmt: skip
_EMOJI = _train("emoji-64", "emoji-64", data="emoji", num_images=2_457_600, learning_rate=6e-4)

_DECAY = {"decay": "cosine"}
# Are both better with `--recipe best`, without mirrored images?
_AS_BEST = {"objective": "flow", "learning_rate": 3e-3, "warmup": 0.05, "num_scores": 1}
_NANO_MUON, _EMOJI_MUON = (
    replace(piece, name=f"{piece.network}-muon", recipe={**_DECAY, "optimizer": "muon"}, **_AS_BEST)
    for piece in (_NANO_FLOW, _EMOJI)
)
_MIRRORED = {**_DECAY, "horizontal_flip": True}
_MUON = {**_MIRRORED, "optimizer": "muon"}


def _natural(name: str, network: str, **options: object) -> Training:
    """A training on CIFAR-10 with the recipe `best`."""
    best = {"data": "cifar-10", "objective": "flow", "learning_rate": 1e-3, "warmup": 0.05, "recipe": _MIRRORED}
    return _train(name, network, **{**best, **options})


LISTS: Mapping[str, tuple[Piece, ...]] = {
    "speed": (Speed(),),
    "speed-unet": (Speed("speed-unet", ("unet",)),),
    # Which learning rate is best for each network? In short runs it is 1e-3, but at full length (`high-rate`) DiT-S had
    # a spike from which it did not recover. So all others use 5e-4.
    "rates": tuple(
        _train(f"rate-{network}-{rate:g}", network, learning_rate=rate, num_images=307_200, num_scores=1)
        for rate in (1e-4, 3e-4, 1e-3)
        for network in ("s", "dit-s-2")
    ),
    "high-rate": tuple(_train(f"{network}-at-0.001", network, learning_rate=1e-3) for network in ("s", "dit-s-2")),
    # The studies run right after the training, while its weights exist: seed 0's were lost before the steps were
    # scored.
    "seed-0": (
        _S, _DIT_S, Memorisation("memorisation-s", _S), Memorisation("memorisation-dit-s-2", _DIT_S)
    ),
    "more-seeds": (
        _S_1, Steps("steps-s", _S_1), _train("dit-s-2-seed-1", "dit-s-2", seed=1),
        *(_train(f"{network}-seed-2", network, seed=2) for network in ("s", "dit-s-2")),
    ),
    # Both networks with the other objective, which is also an ablation.
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
    # Compared only at the end.
    "ablations": tuple(
        _train(network, network, num_scores=1)
        for network in ("s-scan-only", "s-attention-only", "s-raster", "s-state-16", "s-window-4")
    ),
    # Are small differences larger than those between seeds, and what does a network that is twice as fast reach in the
    # same time?
    "more-ablations": (
        _train("s-attention-only-longer", "s-attention-only", num_images=2 * NUM_IMAGES, num_scores=1),
        *(
            _train(f"{network}-seed-{seed}", network, seed=seed, num_scores=1)
            for seed in (1, 2)
            for network in ("s-raster", "s-window-4", "s-state-16")
        ),
    ),
    # Does the result hold in longer training? DiT-S/2 was still improving. The second seed also scores EMAs.
    "longer": (
        *(_train(f"{network}-longer", network, num_images=3 * NUM_IMAGES) for network in ("s", "dit-s-2")),
        *(
            _train(f"{network}-longer-seed-1", network, seed=1, num_images=3 * NUM_IMAGES, averages=LENGTHS)
            for network in ("s", "dit-s-2")
        ),
    ),
    # Flow matching with a learning rate that rises to twice the usual one and falls to 0.
    "decay": tuple(
        _train(f"{network}-flow-decay", network, objective="flow", learning_rate=1e-3, warmup=0.05, recipe=_DECAY,
               num_scores=2)
        for network in ("s", "dit-s-2")
    ),
    "cifar": tuple(
        _natural(f"cifar-{network}-seed-{seed}", network, seed=seed, num_scores=2)
        for seed in (0, 1, 2)
        for network in ("s", "dit-s-2", "unet")
    ),
    # The same at three times the length: does the distance still rise towards the end?
    "decay-longer": tuple(
        _train(f"{network}-flow-decay-longer{suffix}", network, seed=seed, objective="flow", num_images=3 * NUM_IMAGES,
               learning_rate=1e-3, warmup=0.05, recipe=_DECAY)
        for seed, suffix in enumerate(("", "-seed-1", "-seed-2"))
        for network in ("s", "dit-s-2")
    ),
    "cifar-longer": tuple(
        _natural(f"cifar-{network}-longer-seed-{seed}", network, seed=seed, num_images=3 * NUM_IMAGES)
        for seed in (0, 1, 2)
        for network in ("s", "dit-s-2", "unet")
    ),
    # Larger networks, 16 states, and a length at which S has begun to overfit.
    "cifar-b": tuple(
        _natural(f"cifar-{network}-longer", network, num_images=3 * NUM_IMAGES) for network in ("b", "dit-b-2")
    ),
    "cifar-16-states": (_natural("cifar-s-state-16-longer", "s-state-16", num_images=3 * NUM_IMAGES),),
    "cifar-longest": tuple(
        _natural(f"cifar-{network}-longest", network, num_images=8 * NUM_IMAGES) for network in ("s", "dit-s-2")
    ),
    # Does dropout keep the distance of S from rising at the end?
    "cifar-dropout": (
        _natural("cifar-s-dropout-longer", "s", num_images=3 * NUM_IMAGES, recipe={**_MIRRORED, "dropout": 0.1}),
        _natural("cifar-s-muon-dropout-longer", "s", num_images=3 * NUM_IMAGES, num_scores=2, learning_rate=3e-3,
                 recipe={**_MUON, "dropout": 0.1}),
    ),
    # What each part of the network contributes on natural images.
    "cifar-ablations": tuple(
        _natural(f"cifar-{network}-seed-{seed}", network, seed=seed, num_scores=1)
        for seed in (0, 1)
        for network in ("s-scan-only", "s-attention-only", "s-raster", "s-state-16", "s-window-4")
    ),
    # Is it better to be wide than deep, and to compute more on fine grids, where the U-Net computes most?
    "cifar-shapes": tuple(
        _natural(f"cifar-{network}-seed-0", network, num_scores=1) for network in ("b-fine", "s-fine", "b-shallow")
    ),
    # Each further option of a recipe on its own.
    "cifar-options": (
        _natural("cifar-s-x-prediction", "s", num_scores=1, objective="flow-x"),
        *(
            _natural(f"cifar-s-{name}", "s", num_scores=1, recipe={**_MIRRORED, **options})
            for name, options in {
                "logit-normal": {"timesteps": "logit-normal"},
                "dropout": {"dropout": 0.1},
                "contrast": {"contrast": 0.05},
                "muon": {"optimizer": "muon"},
                "no-flip": {"horizontal_flip": False},
            }.items()
        ),
    ),
    # Is Muon better, or was the learning rate of AdamW too low?
    "cifar-rates": tuple(
        _natural(f"cifar-s-{optimizer}-{rate}", "s", num_scores=1, learning_rate=rate,
                 recipe={**_MIRRORED, "optimizer": optimizer})
        for optimizer, rate in (("adamw", 0.003), ("muon", 0.003), ("muon", 0.006), ("muon", 0.012))
    ),
    # Is LaMamba still ahead of DiT, and the U-Net ahead of LaMamba, if all are trained as `--recipe best` does?
    "cifar-muon": tuple(
        _natural(f"cifar-{network}-muon", network, num_scores=1, learning_rate=3e-3, recipe=_MUON)
        for network in ("unet", "dit-s-2", "b-shallow")
    ),
    "cifar-muon-longer": tuple(
        _natural(f"cifar-{network}-muon-longer", network, num_images=3 * NUM_IMAGES, num_scores=2, learning_rate=3e-3,
                 recipe=_MUON)
        for network in ("s", "unet", "dit-s-2", "b-shallow")
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
    "release-muon": (_EMOJI_MUON, Memorisation("memorisation-emoji-64-muon", _EMOJI_MUON), _NANO_MUON),
    # Are four steps as good as twenty-five? Of the shipped nano, without and with guidance, and of the one that
    # predicts noise, which the list `release` trains.
    "distill": (
        _NANO_FLOW, Distilling("distill-nano-flow", _NANO_FLOW),
        Distilling("distill-nano-flow-guided", _NANO_FLOW, guidance=2.0), Distilling("distill-nano", _NANO),
    ),
}  # fmt: skip

PIECES: Mapping[str, Piece] = {piece.name: piece for pieces in LISTS.values() for piece in pieces}
