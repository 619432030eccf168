"""The kernels in CUDA C++ for the scan in bfloat16: where they run, and their sizes."""

from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lamamba.ops.cuda import CudaKernel, has_compiler

_HERE = Path(__file__).parent
forward_kernel = CudaKernel([_HERE / "states.cuh", _HERE / "states_forward.cu"], "states_forward")
backward_kernel = CudaKernel([_HERE / "states.cuh", _HERE / "states_backward.cu"], "states_backward")
one_state_kernel = CudaKernel([_HERE / "states.cuh", _HERE / "one_state_backward.cu"], "one_state_backward")

TILE = 16
MOST_STATES = 63  # of the forward kernel, whose states are in registers
MOST_RANK = 32  # for which `one_state_backward` has enough registers to compute the products of the gradient of z, too
RESERVED = 1024  # bytes of shared memory that CUDA takes per block


class Limits(NamedTuple):
    """Limits of a GPU."""

    shared_of_block: int
    """Maximum bytes of shared memory of a block."""
    shared_of_multiprocessor: int
    multiprocessors: int


class _Kind(NamedTuple):
    """A kernel's channels of a warp, and the least and the most warps that run at once on a multiprocessor.

    Registers limit the most. If the least does not fit, the Triton kernels run.
    """

    of_warp: int
    least: int
    most: int
    of_block: tuple[int, ...]
    """Possible numbers of warps of a block."""
    most_idle: float
    """Warps of all blocks, divided by the warps that have channels."""


FORWARD = _Kind(16, 16, 16, (1, 2, 3, 4), 1.25)
BACKWARD = _Kind(32, 8, 12, (1, 2, 3, 4), 1.25)
ONE_STATE = _Kind(64, 8, 8, (1, 2, 4), 1.0)


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
) -> Plan | None:
    """Choose how a call is launched; return None if the Triton kernels run instead.

    These kernels take bfloat16 from compute capability 8.0 on. They copy 4 bytes at a time or more, and offsets within
    an image and between paths have 32 bits. For one state, there is only a backward kernel.
    """
    _, height, width, channels = x.shape
    low_row = low.shape[3]
    if {x.dtype, low.dtype, weight.dtype} != {torch.bfloat16} or channels % 8 or low_row // 4 % 2:
        return None
    if not backward and (rank % 2 or not 1 < num_states <= MOST_STATES):
        return None
    limits = limits_of(x.device)
    if limits is None or max(x.numel(), height * width * low_row) >= 2**31:
        return None
    fused = num_states == 1 and is_fused(rank, height * width)
    kind, choices = ONE_STATE if num_states == 1 else BACKWARD if backward else FORWARD, []
    with_channels = triton.cdiv(channels, kind.of_warp)
    for warps in kind.of_block:
        if num_states == 1:
            shared = one_state_bytes(warps, rank, fused)
        else:
            shared = (backward_bytes if backward else forward_bytes)(warps, num_states, rank)
        of_multiprocessor = min(kind.most // warps, limits.shared_of_multiprocessor // (shared + RESERVED))
        is_idle = triton.cdiv(with_channels, warps) * warps > kind.most_idle * with_channels
        if shared <= limits.shared_of_block and not is_idle:
            choices.append((of_multiprocessor * warps, warps, of_multiprocessor, shared))
    at_once, warps, of_multiprocessor, shared = max(choices, default=(0, 0, 0, 0))
    if at_once < kind.least:
        return None
    constants = {
        "HEIGHT": height, "WIDTH": width, "CONTINUOUS": continuous, "CHANNELS": channels, "LOW": low_row, "RANK": rank,
        "STATES": num_states, "FUSED": fused,
        "WARPS": warps, "BLOCKS": of_multiprocessor, "SHARED": shared, "threads": 32 * warps, "shared": shared,
    }
    return Plan(triton.cdiv(channels, kind.of_warp * warps), at_once * limits.multiprocessors, constants)


def is_fused(rank: int, length: int) -> bool:
    """Return whether `one_state_backward` computes the products of the gradient of z, too.

    It writes a gradient of the expansion for each image and segment. For a short path and a large rank, this would take
    as much memory as the gradient of z.
    """
    return rank % 2 == 0 and rank <= MOST_RANK and 4 * rank <= length


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


def one_state_bytes(warps: int, rank: int, fused: bool) -> int:
    """Return the size of `Shared` in one_state_backward.cu."""
    channels, low_row, sums = 64 * warps, 16 * triton.cdiv(rank, 16) + 8, rank + 2 if fused else 2
    return channels * (8 * TILE + 8 + 2 * low_row) + 4 * TILE * (low_row + 4) + warps * (128 + 5120 + 8 * TILE * sums)


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if its address is not a multiple of 16 bytes."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
