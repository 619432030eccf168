"""Compute the gradients of a batch in parts: by calls, or by CUDA graphs that are recorded once and replayed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lamamba.ops.launch import precompile
from lamamba.sampling.captured import Captured

if TYPE_CHECKING:
    from lamamba.training.trainer import Trainer


class Gradients:
    """Computes the gradients of a batch by calling the network for each of its parts.

    Called with what `Trainer._draw` returns, it leaves the gradients of the whole batch in the parameters, summed over
    the ranks, and returns what this rank's images add to the means of the loss terms.

    Args:
        trainer: whose network, optimizer and ranks these are.
        inputs: of the first step. On CUDA, the kernels for parts of every size are compiled now, all at once.
    """

    keeps_tensors = False  # gradients are zeroed, instead of freed, before a step

    def __init__(self, trainer: "Trainer", inputs: Sequence[Tensor]) -> None:
        self.trainer = trainer
        self.graphs: dict[int, Captured] = {}  # by the images in a part
        if trainer.device.type == "cuda":
            for part in self.largest_and_smallest(inputs):
                precompile(trainer.add_gradients, *part)
        self.zero()

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        self.zero()
        *first, last = self.cut(inputs)
        terms = _sum(self.trainer.add_gradients(*part) for part in first)
        return _sum([terms, self.trainer.add_gradients(*last, reduces=True)])

    def zero(self) -> None:
        self.trainer.trained.zero_grad(set_to_none=not self.keeps_tensors)

    def cut(self, inputs: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        return list(zip(*(tensor.split(self.trainer.parts) for tensor in inputs), strict=True))

    def largest_and_smallest(self, inputs: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Cut a part of the largest and one of the smallest size from a batch; just one where there is one part."""
        sizes = (self.trainer.parts[-1], self.trainer.parts[0])[: len(self.trainer.parts)]
        return [tuple(tensor[:size] for tensor in inputs) for size in sizes]


class RecordedGradients(Gradients):
    """The same for a batch in one part, as one CUDA graph: zero, forward, backward, and the sum over the ranks."""

    def __init__(self, trainer: "Trainer", inputs: Sequence[Tensor]) -> None:
        super().__init__(trainer, inputs)
        self.graphs[len(inputs[0])] = Captured(super().__call__)

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        return _sum([self.graphs[len(inputs[0])](*inputs)])  # copies, as the next step writes to the same tensors


class RecordedPartGradients(Gradients):
    """The same for a batch in several parts: each is a CUDA graph that adds to the same gradients."""

    keeps_tensors = True

    def __init__(self, trainer: "Trainer", inputs: Sequence[Tensor]) -> None:
        super().__init__(trainer, inputs)
        for part in self.largest_and_smallest(inputs):
            another = next(iter(self.graphs.values()), None)
            self.graphs.setdefault(len(part[0]), Captured(trainer.add_gradients, shares_memory_with=another))(*part)

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        self.zero()
        terms = _sum(self.graphs[len(part[0])](*part) for part in self.cut(inputs))
        if sums := self.trainer.gradient_sums:
            sums.all_reduce(value.grad for value in self.trainer.trained.parameters() if value.grad is not None)
        return terms


def choose_gradients(trainer: "Trainer", inputs: Sequence[Tensor]) -> Gradients:
    """Choose how gradients are computed, and prepare it for the inputs of the first step."""
    if not trainer.captures:
        return Gradients(trainer, inputs)
    return (RecordedGradients if len(trainer.parts) == 1 else RecordedPartGradients)(trainer, inputs)


def _sum(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sum terms of the same names, each before the next is computed: graphs write to the same tensors again."""
    terms: dict[str, Tensor] = {}
    for part in parts:
        terms = {name: terms.get(name, 0) + value for name, value in part.items()}
    return terms
