"""The compiled loops of `loops.py` as one differentiable operation; threads share the images."""

import numpy as np
import torch
from torch import Tensor

from lamamba.ops.gradients import register_gradients
from lamamba.ops.grid import NUM_PATHS, scan_paths
from lamamba.ops.threads import array, share_images

# Steps per tile. The states before each tile are saved; the backward pass recomputes the states within a tile in cache.
TILE = 64


@torch.library.custom_op("lamamba::scan_grid_cpu", mutates_args=())
def scan_grid_cpu(
    x: Tensor, low: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, continuous: bool
) -> tuple[Tensor, Tensor]:
    """Scan a grid; arguments and result as in `lamamba.ops.selective_scan.scan_grid`, all float32.

    The second result holds the states before every `TILE` steps, (b, 4, l / TILE rounded up, n, e), for the backward
    pass.
    """
    from lamamba.ops.selective_scan.loops import scan_forward

    y, starts = x.new_empty(x.shape), x.new_empty(_shape_of_starts(x, A))
    per_image, shared = _arrays(x, low, dt_weight, dt_bias, A, D, continuous)
    share_images(scan_forward, per_image, shared, (y.flatten(1, 2).numpy(), starts.numpy()))
    return y, starts


scan_grid_cpu.register_fake(
    lambda x, low, dt_weight, dt_bias, A, *others: (x.new_empty(x.shape), x.new_empty(_shape_of_starts(x, A)))
)


def _shape_of_starts(x: Tensor, A: Tensor) -> tuple[int, ...]:
    batch, height, width, channels = x.shape
    return batch, NUM_PATHS, -(-height * width // TILE), A.shape[2], channels


@torch.library.custom_op("lamamba::scan_grid_cpu_backward", mutates_args=())
def _backward(
    grad_y: Tensor, starts: Tensor,
    x: Tensor, low: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, continuous: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from lamamba.ops.selective_scan.loops import scan_backward

    b, e = x.shape[0], x.shape[3]
    grad_x, grad_low = x.new_empty(x.shape), x.new_empty(low.shape)
    grad_weight, grad_bias = x.new_empty(b, *dt_weight.mT.shape), x.new_empty(b, *dt_bias.shape)
    grad_A, grad_skip = x.new_empty(b, *A.mT.shape), x.new_empty(b, e)
    (x_array, low_array), shared = _arrays(x, low, dt_weight, dt_bias, A, D, continuous)
    outputs = (
        grad_x.flatten(1, 2), grad_low.view(low_array.shape), grad_weight, grad_bias, grad_A, grad_skip,
    )
    inputs = (x_array, low_array, starts.numpy(), array(grad_y.flatten(1, 2)))
    share_images(scan_backward, inputs, shared, tuple(output.numpy() for output in outputs))
    sums = (grad_weight.sum(dim=0).mT, grad_bias.sum(dim=0), grad_A.sum(dim=0).mT)
    # Flattening gives dimensions of length 1 the strides that they have in parameters.
    grad_weight, grad_bias, grad_A = (gradient.flatten().view(gradient.shape) for gradient in sums)
    return grad_x, grad_low, grad_weight, grad_bias, grad_A, grad_skip.sum(dim=0).repeat(NUM_PATHS, 1)


_backward.register_fake(lambda grad_y, starts, *inputs: tuple(tensor.new_empty(tensor.shape) for tensor in inputs[:-1]))


register_gradients(scan_grid_cpu, _backward, num_tensors=6, saved_output=1)


def _arrays(
    x: Tensor, low: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, continuous: bool
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Prepare the arguments of the loops: arrays with one part per image, and arrays that all images share."""
    _, height, width, _ = x.shape
    pixels = scan_paths(height, width, "continuous" if continuous else "raster", x.device).pixels
    per_image = (x.flatten(1, 2), low.flatten(1, 2).unflatten(2, (NUM_PATHS, -1)))
    # D weighs the input of the pixel itself, whichever path reads it.
    shared = (dt_weight.mT, dt_bias, A.mT, D.sum(dim=0), pixels.view(NUM_PATHS, -1))
    return tuple(map(array, per_image)), tuple(map(array, shared))
