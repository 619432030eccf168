"""Steps of training that several ranks take together: `torchrun steps.py FOLDER`.

On a CPU, or on two GPUs. For each way to cut a batch, FOLDER/steps.json has the largest relative distance
of the gradients, losses and weights from those of one process that computes the batch at once, and how many times all
gradients were sent.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lamamba.config import PRESETS, DistillationOptions, TrainConfig
from lamamba.distributed.processes import GradientSums, Processes, joined
from lamamba.training import gradients
from lamamba.training.distillation import student_objective
from lamamba.training.run import resolve
from lamamba.training.trainer import Trainer
from small_network import TINY_CONFIG

# Batch and parts, for two ranks: more parts than a share has images; uneven shares and parts; a share of one image.
CUTS = ((4, 4), (7, 2), (3, 3))
TEACHERS = ("flow", "diffusion")
WAYS = ("copies", "graphs", "shards and graphs")
# Each cut with AdamW in every way; and, cut in the second way, Muon and distillations in the last way.
CASES = [
    *((*cut, way, "adamw") for cut in CUTS for way in WAYS), *((*CUTS[1], WAYS[-1], of) for of in ("muon", *TEACHERS))
]  # fmt: skip
ON_GPU = torch.cuda.device_count() >= 2


class Replayed:
    """What a CUDA graph does, on a CPU: from the second call on, nothing is done but writing to the same tensors."""

    parameters: ClassVar[list[nn.Parameter]] = []

    def __init__(self, function: Callable[..., dict[str, Tensor]], shares_memory_with: Any = None) -> None:
        self.function = function
        self.written: list[Tensor] = []

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        attached = [parameter.grad for parameter in self.parameters]
        results = self.function(*inputs)
        gradients = [parameter.grad for parameter in self.parameters]
        tensors = [*results.values(), *gradients]
        if not self.written:
            self.names, self.written = list(results), tensors
            return results
        for parameter, gradient in zip(self.parameters, attached, strict=True):
            parameter.grad = gradient
        torch._foreach_copy_(self.written, tensors)
        return dict(zip(self.names, self.written, strict=False))

    def forget(self) -> None:
        """There is nothing to free."""


def take_two_steps(
    out: Path, device: str, processes: Processes, batch: int, accumulate: int, way: str = "copies", of: str = "adamw"
) -> dict[str, Tensor]:
    """Return the gradients, losses and weights of the second step of a training or distillation, see `CASES`."""
    teacher, optimizer = (of, "adamw") if of in TEACHERS else ("", of)
    width = 32 if ON_GPU else 8  # for the kernels
    network = replace(PRESETS["nano"], **{**TINY_CONFIG, "embed_dim": width})
    config = TrainConfig(
        out=out, batch_size=batch, accumulate=accumulate, shard="shards" in way, cuda_graph="graphs" in way,
        device=device, network=network, horizontal_flip=True, precision="float32", optimizer=optimizer,
        objective=student_objective(teacher) or None, num_images=4 * batch,  # if there is regression, for one step
        distillation=DistillationOptions(4, 2.0, teacher) if teacher else None,
    )  # fmt: skip
    trainer = Trainer(*resolve(config), processes)
    if "graphs" in way and not ON_GPU:
        trainer.captures = True
        Replayed.parameters = list(trainer.trained.parameters())
    reader = trainer.batches()
    for _ in range(2):
        terms = trainer.take_step(*next(reader))
    trainer.close()
    named = dict(trainer.trained.named_parameters())
    gradients = {f"gradient of {name}": value.grad for name, value in named.items() if value.grad is not None}
    return {**terms, **gradients, **{name: value.detach() for name, value in named.items()}}


def distance(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert ours.keys() == wanted.keys()
    return max(float((ours[name] - value).norm() / value.norm().clamp(min=1e-3)) for name, value in wanted.items())


if __name__ == "__main__":
    torch.set_num_threads(1)
    if not ON_GPU:
        gradients.Captured = Replayed
    launch, sent = GradientSums._launch, 0

    def count(sums: GradientSums) -> None:
        global sent
        sent += sum(gradient.numel() for gradient in sums.left)
        launch(sums)

    GradientSums._launch = count
    results: dict[str, Any] = {}
    with joined("cuda" if ON_GPU else "cpu") as (processes, device):
        expected: dict[tuple[int, str], dict[str, Tensor]] = {}
        for batch, accumulate, way, of in CASES:
            if processes.is_first and (batch, of) not in expected:
                expected[batch, of] = take_two_steps(Path(sys.argv[1]), device, Processes(), batch, 1, of=of)
            sent = 0
            ours = take_two_steps(Path(sys.argv[1]), device, processes, batch, accumulate, way, of)
            number = sum(value.numel() for name, value in ours.items() if name.startswith("gradient"))
            if processes.is_first:
                case = f"{batch} images, {accumulate} parts, {way}, {of}"
                results[case] = distance(ours, expected[batch, of]), sent / number
        if processes.is_first:
            (Path(sys.argv[1]) / "steps.json").write_text(json.dumps(results))
