"""The kernels in CUDA C++ for the scan with several states: where they run, and their sizes."""

from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lamamba.ops.cuda import CudaKernel, has_compiler

_SOURCE = Path(__file__).with_name("states_kernels.cu")
forward_kernel, backward_kernel = CudaKernel(_SOURCE, "states_forward"), CudaKernel(_SOURCE, "states_backward")

TILE = 16
# The least and the most warps that run at once on a multiprocessor. Registers limit the most. The least is what the
# Triton kernels have; where it does not fit, they run.
FORWARD_WARPS, BACKWARD_WARPS = (16, 20), (8, 12)
MOST_WARPS, MOST_IDLE = 4, 1.25  # of a block; warps over those that have channels
RESERVED = 1024  # bytes of shared memory that CUDA takes per block


class Limits(NamedTuple):
    """What a GPU has."""

    shared_of_block: int
    """Most bytes of shared memory of a block."""
    shared_of_multiprocessor: int
    multiprocessors: int


class Plan(NamedTuple):
    """How a call is launched."""

    num_blocks: int
    """Blocks of channels."""
    at_once: int
    """Warps that run at once on the GPU."""
    constants: dict[str, int]


def limits_of(device: torch.device) -> Limits | None:
    """Return the limits of a GPU; None where the kernels cannot run."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    gpu = torch.cuda.get_device_properties(device)
    if gpu.major < 8 or not has_compiler(f"{gpu.major}{gpu.minor}"):
        return None
    of_block: int = gpu.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Limits(of_block, gpu.shared_memory_per_multiprocessor, gpu.multi_processor_count)


def plan(
    x: Tensor, low: Tensor, weight: Tensor, rank: int, num_states: int, continuous: bool, backward: bool
) -> Plan | None:  # fmt: skip
    """Choose how a call is launched; None where the Triton kernels run.

    These kernels take bfloat16 from compute capability 8.0 on. They copy 4 or 16 bytes at a time, and offsets within an
    image and between paths have 32 bits.
    """
    _, height, width, channels = x.shape
    low_row = low.shape[3]
    if {x.dtype, low.dtype, weight.dtype} != {torch.bfloat16} or channels % 8 or low_row // 4 % 2:
        return None
    limits = limits_of(x.device)
    if limits is None or max(x.numel(), height * width * low_row) >= 2**31:
        return None
    least, most = BACKWARD_WARPS if backward else FORWARD_WARPS
    with_channels, choices = triton.cdiv(channels, 32), []
    for warps in range(1, min(MOST_WARPS, with_channels) + 1):
        shared = shared_bytes(warps, num_states, rank, backward)
        of_multiprocessor = min(most // warps, limits.shared_of_multiprocessor // (shared + RESERVED))
        is_idle = triton.cdiv(with_channels, warps) * warps > MOST_IDLE * with_channels
        if shared <= limits.shared_of_block and not is_idle:
            choices.append((of_multiprocessor * warps, warps, of_multiprocessor, shared))
    at_once, warps, of_multiprocessor, shared = max(choices, default=(0, 0, 0, 0))
    if at_once < least:
        return None
    constants = {
        "HEIGHT": height, "WIDTH": width, "CONTINUOUS": continuous, "CHANNELS": channels, "LOW": low_row, "RANK": rank,
        "STATES": num_states, "BACKWARD": backward, "WARPS": warps, "BLOCKS": of_multiprocessor, "SHARED": shared,
        "threads": 32 * warps, "shared": shared,
    }  # fmt: skip
    return Plan(triton.cdiv(channels, 32 * warps), at_once * limits.multiprocessors, constants)


def shared_bytes(warps: int, num_states: int, rank: int, backward: bool) -> int:
    """Return the size of `Shared` in states_kernels.cu."""
    threads, weights, depths = 32 * warps, 2 * num_states * TILE, triton.cdiv(rank, 16)
    own = max(weights, TILE * 36) if backward else TILE * 36
    size = 48 + 8 * weights + 4 * TILE * threads + 4 * TILE * (16 * depths + 8) + 16 * TILE + 4 * warps * own
    size += (8 * num_states + 4) * threads
    return size + ((4 * TILE + 8 * num_states + 12) * threads if backward else 0)


def aligned(tensor: Tensor) -> Tensor:
    """Return a tensor that begins at a multiple of 16 bytes."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
