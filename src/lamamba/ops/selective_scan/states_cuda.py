"""Choose where the CUDA C++ kernels for the scan with several states run, and how they are launched."""

from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lamamba.ops.cuda import CudaKernel, has_compiler

_SOURCE = Path(__file__).with_name("states_kernels.cu")
forward_kernel, backward_kernel = CudaKernel(_SOURCE, "states_forward"), CudaKernel(_SOURCE, "states_backward")

# Warps that run at once on a multiprocessor. They limit a thread to 96 registers forward and 168 backward.
FORWARD_WARPS, BACKWARD_WARPS = 20, 12
BACKWARD_AT_ONCE = 132 * BACKWARD_WARPS  # with 132 multiprocessors, as on an H200
_TILE = 16


class Plan(NamedTuple):
    """How a call is launched."""

    num_blocks: int
    """Blocks of channels."""
    constants: dict[str, int]


def plan(
    x: Tensor, low: Tensor, weight: Tensor, rank: int, num_states: int, continuous: bool, backward: bool
) -> Plan | None:  # fmt: skip
    """Choose how a call is launched; return None if only the Triton kernels can run it.

    The CUDA C++ kernels need bfloat16 and compute capability 8.0. They copy 4 or 16 bytes at a time, so rows must be
    multiples of these. Some offsets are 32-bit, so inputs must not be too large.
    """
    limit = shared_limit(x.device)
    if not limit or {x.dtype, low.dtype, weight.dtype} != {torch.bfloat16}:
        return None
    _, height, width, channels = x.shape
    low_row = low.shape[3]
    if channels % 8 or low_row // 4 % 2 or max(x.numel(), height * width * low_row) >= 2**31:
        return None
    for warps in range(min(4, triton.cdiv(channels, 32)), 0, -1):
        shared = shared_bytes(warps, num_states, rank, backward)
        if shared <= limit:
            break
    else:
        return None
    of_multiprocessor = (BACKWARD_WARPS if backward else FORWARD_WARPS) // warps
    constants = {
        "HEIGHT": height, "WIDTH": width, "CONTINUOUS": continuous, "CHANNELS": channels, "LOW": low_row, "RANK": rank,
        "STATES": num_states, "BACKWARD": backward, "WARPS": warps, "BLOCKS": of_multiprocessor, "SHARED": shared,
    }  # fmt: skip
    return Plan(triton.cdiv(channels, 32 * warps), {**constants, "threads": 32 * warps, "shared": shared})


def shared_limit(device: torch.device) -> int:
    """Return how many bytes of shared memory a block can have; 0 where the kernels cannot run."""
    if device.type != "cuda" or not has_compiler():
        return 0
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin if properties.major >= 8 else 0  # type: ignore[attr-defined]


def shared_bytes(warps: int, num_states: int, rank: int, backward: bool) -> int:
    """Return the size of `Shared` in states_kernels.cu."""
    threads, weights, depths = 32 * warps, 2 * num_states * _TILE, triton.cdiv(rank, 16)
    own = max(weights, _TILE * 36) if backward else _TILE * 36
    size = 48 + 8 * weights + 4 * _TILE * threads + 4 * _TILE * (16 * depths + 8) + 16 * _TILE + 4 * warps * own
    size += (8 * num_states + 4) * threads
    return size + ((4 * _TILE + 8 * num_states + 12) * threads if backward else 0)


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, copied unless it begins at a multiple of 16 bytes."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
