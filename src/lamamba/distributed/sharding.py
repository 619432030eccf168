"""Sharded networks (PyTorch's FSDP2): each rank holds only a part of every parameter.

Gradients, optimizer moments and EMAs are sharded like the parameters they belong to.
"""

from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lamamba.model import Block
from lamamba.ops.residual_norm import Residual


def shard(network: Any, number: int, compile: bool = False) -> None:
    """Shard the parameters of a network over all ranks. The parameters of a block are gathered while it runs.

    Args:
        network: the complete network on this rank's device, equal on all ranks.
        number: the number of ranks; all of them call this.
        compile: compile each block by itself; parameters are gathered between blocks.
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
    """Copy the bias that a block passes on, because the block's parameters are freed before the next block runs."""
    x, residual = outputs
    return x, residual._replace(bias=residual.bias if residual.bias is None else residual.bias.clone())


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's parts of tensors."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def unshard(tensor: Tensor) -> Tensor:
    """Gather a complete tensor. All ranks must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gather(
    tensors: Mapping[str, Tensor], keep: bool = True, memory: MutableMapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Copy complete tensors to the CPU, one after the other. All ranks must call this, even those that keep no copies.

    Args:
        tensors: tensors by name; sharded ones are gathered on their device.
        keep: whether this rank keeps the copies.
        memory: earlier copies to overwrite; empty at first. For CUDA tensors they are pinned, which takes a while once
            and then makes copying as fast as the bus.
    """
    copies = {}
    for name, tensor in tensors.items():
        full = unshard(tensor.detach())
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
    """Allocate CPU memory for a tensor; pinned for CUDA tensors, if enough memory can be pinned."""
    if tensor.is_cuda:
        with suppress(RuntimeError):
            return torch.empty_like(tensor, device="cpu", pin_memory=True)
    return torch.empty_like(tensor, device="cpu")


@torch.no_grad()
def load(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Set the parameters of a network from complete weights, which every rank has."""
    for name, parameter in network.named_parameters():
        value = weights[name].to(parameter.device)
        if isinstance(parameter, DTensor):  # each rank takes its own part; nothing is sent
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)
