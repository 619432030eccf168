"""Runs and trainers of a tiny network on a CPU, and what they leave."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lamamba.checkpoints.checkpoint import checkpoints_in
from lamamba.cli import main
from lamamba.config import PRESETS, TrainConfig
from lamamba.training import run as training
from small_network import TINY_CONFIG, TINY_NETWORK

TINY = [
    *TINY_NETWORK,
    *("--data", "builtin", "--batch-size", "4", "--device", "cpu", "--seed", "3", "--sample-steps", "1"),
    *("--sample-every", "100000"),  # drawing takes longer than a step
]


def train(out: Path, *options: str) -> None:
    main(["train", "--out", str(out), *TINY, *options])


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoints_in(run)[-1]
    return {f"{path.parent.name}/{k}": v for path in newest.rglob("*.safetensors") for k, v in load_file(path).items()}


def losses(run: Path) -> list[tuple[int, float]]:
    return [(r["images"], r["loss"]) for r in map(json.loads, (run / "log.jsonl").read_text().splitlines())]


def make_trainer(out: Path, network: dict[str, Any] | None = None, **options: Any) -> training.Trainer:
    """Build a trainer of a tiny network without the run around it."""
    tiny = replace(PRESETS["nano"], **{**TINY_CONFIG, **(network or {})})
    config = TrainConfig(**{"out": out, "batch_size": 4, "device": "cpu", "network": tiny, **options})
    return training.Trainer(*training.resolve(config))


def take_steps(trainer: training.Trainer, number: int) -> dict[str, torch.Tensor]:
    """Train for some steps; return the network's and the averaged weights."""
    for (images, labels), _ in zip(trainer.batches(), range(number), strict=False):
        trainer.take_step(images, labels)
    pairs = (("network", trainer.network), ("average", trainer.average))
    return {f"{kind}.{name}": value.clone() for kind, network in pairs for name, value in network.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[name]) for name, value in first.items())
