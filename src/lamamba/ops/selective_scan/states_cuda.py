"""The kernels in CUDA C++ for the scan with several states: where they run, and their sizes."""

from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lamamba.ops.cuda import CudaKernel, has_compiler

_HERE = Path(__file__).parent
forward_kernel = CudaKernel([_HERE / "states.cuh", _HERE / "states_forward.cu"], "states_forward")
backward_kernel = CudaKernel([_HERE / "states.cuh", _HERE / "states_backward.cu"], "states_backward")

TILE = 16
# Channels of a warp, and the least and the most warps that run at once on a multiprocessor. Registers limit the most.
# If the least does not fit, the Triton kernels run.
FORWARD_CHANNELS, BACKWARD_CHANNELS = 16, 32
FORWARD_WARPS, BACKWARD_WARPS = (16, 16), (8, 12)
MOST_STATES = 63  # of the forward kernel, whose states are in registers
MOST_WARPS, MOST_IDLE = 4, 1.25  # warps of a block; warps divided by those that have channels
RESERVED = 1024  # bytes of shared memory that CUDA takes per block


class Limits(NamedTuple):
    """Limits of a GPU."""

    shared_of_block: int
    """Maximum bytes of shared memory of a block."""
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
    """Return the limits of a GPU; None if the kernels cannot run there."""
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
    """Choose how a call is launched; return None if the Triton kernels run instead.

    These kernels take bfloat16 from compute capability 8.0 on. They copy 4 bytes at a time or more, and offsets within
    an image and between paths have 32 bits.
    """
    _, height, width, channels = x.shape
    low_row = low.shape[3]
    if {x.dtype, low.dtype, weight.dtype} != {torch.bfloat16} or channels % 8 or low_row // 4 % 2:
        return None
    if not backward and (rank % 2 or num_states > MOST_STATES):
        return None
    limits = limits_of(x.device)
    if limits is None or max(x.numel(), height * width * low_row) >= 2**31:
        return None
    least, most = BACKWARD_WARPS if backward else FORWARD_WARPS
    of_warp = BACKWARD_CHANNELS if backward else FORWARD_CHANNELS
    with_channels, choices = triton.cdiv(channels, of_warp), []
    for warps in range(1, min(MOST_WARPS, with_channels) + 1):
        shared = (backward_bytes if backward else forward_bytes)(warps, num_states, rank)
        of_multiprocessor = min(most // warps, limits.shared_of_multiprocessor // (shared + RESERVED))
        is_idle = triton.cdiv(with_channels, warps) * warps > MOST_IDLE * with_channels
        if shared <= limits.shared_of_block and not is_idle:
            choices.append((of_multiprocessor * warps, warps, of_multiprocessor, shared))
    at_once, warps, of_multiprocessor, shared = max(choices, default=(0, 0, 0, 0))
    if at_once < least:
        return None
    constants = {
        "HEIGHT": height, "WIDTH": width, "CONTINUOUS": continuous, "CHANNELS": channels, "LOW": low_row, "RANK": rank,
        "STATES": num_states, "WARPS": warps, "BLOCKS": of_multiprocessor, "SHARED": shared,
        "threads": 32 * warps, "shared": shared,
    }  # fmt: skip
    return Plan(triton.cdiv(channels, of_warp * warps), at_once * limits.multiprocessors, constants)


def forward_bytes(warps: int, num_states: int, rank: int) -> int:
    """Return the size of `Shared` in states_forward.cu."""
    path_row = (rank + 2 * num_states + 7) // 16 * 16 + 8
    expansion = 16 * triton.cdiv(rank, 16) + 8
    return 4 * TILE * (16 * warps + 8 + path_row) + 32 * warps * expansion + 16 * TILE + 640 * warps


def backward_bytes(warps: int, num_states: int, rank: int) -> int:
    """Return the size of `Shared` in states_backward.cu."""
    threads, weights, depths = 32 * warps, 2 * num_states * TILE, triton.cdiv(rank, 16)
    size = 48 + 8 * weights + 4 * TILE * threads + 4 * TILE * (16 * depths + 8) + 16 * TILE
    return size + 4 * warps * max(weights, TILE * 36) + (4 * TILE + 16 * num_states + 16) * threads


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if its address is not a multiple of 16 bytes."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
