"""Divide optimizer state and EMAs among the ranks (ZeRO, stage 1: Rajbhandari et al. 2020, arXiv 1910.02054).

Each parameter belongs to one rank. Only that rank holds its optimizer state and its EMAs, updates it, and sends the
result to the others. All ranks hold all weights, so the rest of a step is the same as without sharding.
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lamamba.distributed.processes import Processes

ALIGNMENT = 64
"""Each parameter starts at a multiple of this many values."""


class Division:
    """Which rank each parameter of a network belongs to. All ranks have about the same number of values.

    All ranks call each method together. With a single rank, everything belongs to it, and nothing is sent or moved.

    Args:
        network: a complete network. The division can also be used for other networks of the same shapes.
        processes: the ranks.
    """

    def __init__(self, network: nn.Module, processes: Processes) -> None:
        self.shapes = [parameter.shape for parameter in network.parameters()]
        self.rank, self.number = processes.rank, processes.world_size
        lengths = [-(-shape.numel() // ALIGNMENT) * ALIGNMENT for shape in self.shapes]
        filled = [0] * self.number
        self.places = [(0, 0)] * len(lengths)  # the rank of each parameter, and where it begins in the rank's share
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            rank = filled.index(min(filled))
            self.places[index] = rank, filled[rank]
            filled[rank] += lengths[index]
        self.share = max(filled)
        self.are_own = [rank == self.rank for rank, _ in self.places]
        self._flat: list[Tensor] = []

    def select(self, network: nn.Module) -> dict[str, Tensor]:
        """Return this rank's parameters of a network, by name."""
        named = zip(network.named_parameters(), self.are_own, strict=True)
        return {name: parameter for (name, parameter), is_own in named if is_own}

    def synchronize_from_now_on(self, network: nn.Module) -> None:
        """Register a network for `synchronize`. Its parameters move into one buffer; do not replace them afterwards."""
        if self.number > 1:
            flat, views = self._allocate(next(network.parameters()).detach())
            _set(network, [view.copy_(value.detach()) for view, value in zip(views, network.parameters(), strict=True)])
            self._flat.append(flat)

    def synchronize(self) -> None:
        """All-gather the parameters of all registered networks, after each rank has updated its own."""
        for flat in self._flat:
            self._gather(flat)

    def complete(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """All-gather tensors that are shaped like the parameters, each from the rank to which it belongs."""
        if self.number == 1:
            return list(tensors)
        flat, views = self._allocate(tensors[0])
        for view, tensor, is_own in zip(views, tensors, self.are_own, strict=True):
            if is_own:
                view.copy_(tensor)
        self._gather(flat)
        return views

    def forget_others(self, network: nn.Module) -> None:
        """Free the parameters of a network that belong to other ranks; they become empty."""
        for parameter, is_own in zip(network.parameters(), self.are_own, strict=True):
            if not is_own:
                parameter.data = parameter.new_empty(0)

    @contextmanager
    def completed(self, network: nn.Module) -> Iterator[None]:
        """Within this context, give a network back the parameters that `forget_others` has freed."""
        parts = [parameter.detach() for parameter in network.parameters()]
        _set(network, self.complete(parts))
        try:
            yield
        finally:
            _set(network, parts)

    def _allocate(self, like: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Allocate one buffer with a row for each rank. Return it, and for each parameter the view of its place."""
        shares = like.new_empty(self.number, self.share)
        places = zip(self.places, self.shapes, strict=True)
        return shares, [shares[rank, start : start + shape.numel()].view(shape) for (rank, start), shape in places]

    def _gather(self, shares: Tensor) -> None:
        dist.all_gather_into_tensor(shares.view(-1), shares[self.rank])


def _set(network: nn.Module, values: Iterable[Tensor]) -> None:
    for parameter, value in zip(network.parameters(), values, strict=True):
        parameter.data = value


@torch.no_grad()
def copy_to_cpu(tensors: Mapping[str, Tensor], memory: MutableMapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Copy tensors to the CPU.

    Args:
        tensors: tensors by name.
        memory: earlier copies to overwrite; empty at first. For CUDA tensors they are pinned, which takes a while once
            and then makes copying as fast as the bus.
    """
    if memory is None:
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if name not in memory:
            memory[name] = _memory_for(tensor)
        memory[name].copy_(tensor, non_blocking=tensor.is_cuda)
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return {name: memory[name] for name in tensors}


def _memory_for(tensor: Tensor) -> Tensor:
    """Allocate CPU memory for a tensor; pinned for CUDA tensors, if enough memory can be pinned."""
    if tensor.is_cuda:
        with suppress(RuntimeError):
            return torch.empty_like(tensor, device="cpu", pin_memory=True)
    return torch.empty_like(tensor, device="cpu")


@torch.no_grad()
def load(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Set the parameters of a network from complete weights; parameters of other ranks stay empty."""
    for name, parameter in network.named_parameters():
        if parameter.numel():
            parameter.copy_(weights[name])
