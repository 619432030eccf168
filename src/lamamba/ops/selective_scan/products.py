"""Matrix products in the backward pass of the scan. They read large gradients once; PyTorch would read them twice.

Each path has two large gradients, (b h w, e): of its input, and of its step sizes before softplus.
"""

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from lamamba.ops.launch import launch
from lamamba.ops.linear import weight_gradients
from lamamba.ops.selective_scan.product_kernels import steps_backward_kernel, sum_and_project_kernel
from lamamba.ops.sum_kernels import sum_parts

# Block sizes of `sum_and_project_kernel`. Projections wider than MAX_LOW are faster as a separate product.
ROWS, CHANNELS, LOW, MAX_LOW = 64, 64, 64, 192
# Block sizes of `steps_backward_kernel`, and the largest gradient of the weight that a program can hold.
STEP_ROWS, STEP_CHANNELS, MAX_RANK, MAX_PIECES = 64, 128, 32, 5
# Two per multiprocessor of a large GPU. Each writes its part of the gradient of the weight.
WANTED_PROGRAMS = 264


@torch.library.custom_op("lamamba::sum_and_project", mutates_args=())
def sum_and_project(planes: Tensor, grad_low: Tensor, weight: Tensor) -> Tensor:
    """Add up the gradients of x from the four paths and from its projection.

    Args:
        planes: (4, b, h, w, e) gradients of x, one per path.
        grad_low: (b, h, w, low) gradient of x weight^T.
        weight: (low, e), in the dtype of both.

    Returns:
        (b, h, w, e).
    """
    planes, grad_low, weight = planes.contiguous(), grad_low.contiguous(), weight.contiguous()
    low, width = weight.shape
    grad_x = planes.new_empty(planes.shape[1:])
    num_rows = grad_x.numel() // width
    launch(
        sum_and_project_kernel, (triton.cdiv(num_rows, ROWS) * triton.cdiv(width, CHANNELS),),
        planes, grad_low, weight, grad_x, num_rows,
        PROJECTED=low if low <= MAX_LOW else 0, WIDTH=width, ROWS=ROWS, BLOCK=CHANNELS, LOW=LOW,
        num_warps=4, num_stages=1,
    )
    if low > MAX_LOW:
        with torch.autocast(planes.device.type, enabled=False):
            grad_x.view(-1, width).addmm_(grad_low.view(-1, low), weight)
    return grad_x


sum_and_project.register_fake(lambda planes, grad_low, weight: planes.new_empty(planes.shape[1:]))


def steps_backward(grad_z: Tensor, low: Tensor, weight: Tensor, rank: int, grad_low: Tensor) -> Tensor:
    """Compute the gradients of z = weight low, the step sizes before bias and softplus.

    Args:
        grad_z: (4, rows, e) gradient of z for each path.
        low: (rows, 4, r + 2 n or more); the first r values are the low-rank step sizes.
        weight: (4, e, r'), rows padded with zeros to a multiple of 8.
        rank: r.
        grad_low: shaped like low; the first r values of the last dimension are written.

    Returns:
        The gradient of weight, in float32.
    """
    _, num_rows, width = grad_z.shape
    pieces = triton.cdiv(width, STEP_CHANNELS)
    if rank > MAX_RANK or pieces > MAX_PIECES:
        steps, grad_steps = (tensor[..., :rank].transpose(0, 1) for tensor in (low, grad_low))
        fill = weight.shape[2] - rank
        with torch.autocast(grad_z.device.type, enabled=False):  # autocast would round float32 products to bfloat16
            torch.bmm(grad_z, weight[..., :rank], out=grad_steps)
            grad_weight = weight_gradients(grad_z, steps, torch.float32)
        return F.pad(grad_weight, (0, fill)) if fill else grad_weight
    num_chunks = min(WANTED_PROGRAMS // 4, triton.cdiv(num_rows, STEP_ROWS))
    rows_per_program = STEP_ROWS * triton.cdiv(triton.cdiv(num_rows, STEP_ROWS), num_chunks)
    num_chunks = triton.cdiv(num_rows, rows_per_program)
    parts = grad_z.new_empty(num_chunks, *weight.shape, dtype=torch.float32)
    launch(
        steps_backward_kernel, (4, num_chunks),
        grad_z, low, weight, grad_low, parts, num_rows, rows_per_program,
        RANK=rank, LOW=4 * low.shape[2], WIDTH=width, ROWS=STEP_ROWS, PIECE=STEP_CHANNELS, PIECES=pieces,
        RANK_BLOCK=max(16, triton.next_power_of_2(rank)), num_warps=4, num_stages=1,
    )
    return sum_parts(parts)
