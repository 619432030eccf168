"""Networks of which every process holds a part only: PyTorch's FSDP2, and what has to know of it.

What belongs to the parameters is cut as they are: gradients, the optimizer's moments, averages of the weights.
"""

from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lamamba.model import Block, LaMambaDiff
from lamamba.ops.residual_norm import Residual


def shard(network: LaMambaDiff, number: int, compile: bool = False) -> None:
    """Leave this process its part of every parameter; those of a block are put together while it runs.

    Args:
        network: on this process's device, the same in all of them.
        number: of the processes, each of which does this.
        compile: each block by itself, between which parameters are put together.
    """
    mesh = init_device_mesh(network.device.type, (number,))
    for block in network.modules():
        if isinstance(block, Block):
            if compile:
                block.compile()
            block.register_forward_hook(_copy_bias)
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def _copy_bias(block: nn.Module, inputs: Any, outputs: tuple[Tensor, Residual]) -> tuple[Tensor, Residual]:
    """Copy the parameter that a block leaves to the next one, which runs when its own parameters are gone."""
    x, residual = outputs
    return x, residual._replace(bias=residual.bias if residual.bias is None else residual.bias.clone())


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Give what this process holds of tensors."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """Put a tensor together; all processes do so at the same time."""
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full


@torch.no_grad()
def gather(
    tensors: Mapping[str, Tensor], keep: bool = True, memory: MutableMapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Copy whole tensors to the CPU, one after the other; all processes do so, also those that keep none.

    Args:
        tensors: by name; of CUDA's, those that are in parts are put together there.
        keep: whether this process wants the copies.
        memory: copies of an earlier time, which are written over; empty at first. Of what is on CUDA they are pinned,
            which takes a while once, and from then on copying is as fast as the bus.
    """
    copies = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if not keep:
            continue
        if memory is None:
            copies[name] = full.to("cpu", copy=True)
            continue
        if name not in memory:
            memory[name] = _memory_for(full)
        copies[name] = memory[name].copy_(full, non_blocking=full.is_cuda)
    if memory and full.is_cuda:
        torch.cuda.current_stream(full.device).synchronize()
    return copies


def _memory_for(tensor: Tensor) -> Tensor:
    """Take memory on the CPU; for what is on CUDA pinned, where there is enough that can be."""
    if tensor.is_cuda:
        with suppress(RuntimeError):
            return torch.empty_like(tensor, device="cpu", pin_memory=True)
    return torch.empty_like(tensor, device="cpu")


@torch.no_grad()
def load(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Set a network's parameters to those of whole weights, which every process has."""
    for name, parameter in network.named_parameters():
        value = weights[name].to(parameter.device)
        if isinstance(parameter, DTensor):  # each cuts out its own, nothing is sent
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)
