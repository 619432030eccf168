"""Measures the effective receptive field of an output pixel (Luo et al. 2016, arXiv 1701.04128)."""

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image

from lamamba.config import DemoLimits, nearest
from lamamba.demo.settings import check_pixels, read_whole
from lamamba.errors import ConfigError
from lamamba.model import Block, LaMambaDiff
from lamamba.ops.launch import LOCK

Branches = Literal["scan", "attention", "both"]
TIMESTEP = 500
NUM_DRAWS = 4


def receptive_fields(
    network: LaMambaDiff, height: int, width: int, pixel: tuple[int, int], branches: Branches, limits: DemoLimits
) -> Iterator[np.ndarray]:
    """Measure how much each pixel of x_t moves the prediction at one pixel.

        |d prediction[:, row, column] / d x_t|, summed over the channels, averaged over draws of x_t

    x_t is normal noise at timestep 500, without a label. The branch that is left out adds nothing in any block; the
    MLPs, the U-Net's downsampling and its skips stay. The network itself is left as it is.

    Height and width are even, at least 4. `limits` are for the pixels of all draws together.

    Yields:
        After each of NUM_DRAWS draws, the average so far: (height, width) float32, 0 where nothing can come from. The
        last is the result.

    Raises:
        ConfigError: the pixel is outside, there are no such branches, or the grid cannot be or is larger than allowed.
    """
    if branches not in get_args(Branches):
        raise ConfigError(f"branches {branches!r} are unknown: {nearest(str(branches), get_args(Branches))}")
    for name, side in (("height", height), ("width", width)):
        if read_whole(name, side, 4, limits.max_pixels) % 2:
            raise ConfigError(f"{name} is {side}: it must be even, as {side + 1}")
    check_pixels(NUM_DRAWS, height, width, limits)
    row = read_whole("row", pixel[0], 0, height - 1)
    column = read_whole("column", pixel[1], 0, width - 1)
    # A copy with the same weights: other visitors use the network at the same time.
    own = copy.deepcopy(network, {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())})
    for block in own.modules():
        left_out = {"scan": block.attention, "attention": block.ssm}.get(branches) if isinstance(block, Block) else None
        if left_out is not None:
            left_out.register_forward_hook(
                lambda branch, inputs, output: (output[0], torch.zeros_like(output[1]), None)
            )
    channels = int(own.config.in_channels)
    draws = torch.randn((NUM_DRAWS, channels, height, width), generator=torch.Generator().manual_seed(0))
    t = torch.full((1,), TIMESTEP, device=own.device)
    total = torch.zeros((height, width), device=own.device)
    # One by one, since a gradient keeps the activations of every layer in memory.
    for number, draw in enumerate(draws.to(own.device).split(1), start=1):
        x_t = draw.requires_grad_()
        with LOCK, torch.enable_grad():
            prediction = own(x_t, t, torch.full_like(t, own.null_label))[:, :channels, row, column]
            gradient = torch.autograd.grad(prediction.sum(), x_t)[0]
        total += gradient.abs().sum(dim=(0, 1)).float()
        yield (total / number).cpu().numpy()


def draw_receptive_field(field: np.ndarray, pixel: tuple[int, int]) -> Image.Image:
    """Draw a field (h, w) on a logarithmic scale of four decades, 0 light gray, and frame its pixel in red."""
    from matplotlib import colormaps

    decades = np.log10(np.maximum(field / max(float(field.max()), 1e-30), 1e-4)) / 4 + 1
    colours = np.asarray(colormaps["viridis"](decades))[:, :, :3]
    colours[field == 0] = 0.9
    scale = max(1, -(-320 // max(field.shape)))  # at least 320 pixels wide
    pixels = (255 * colours).round().astype(np.uint8).repeat(scale, axis=0).repeat(scale, axis=1)
    top, left = pixel[0] * scale, pixel[1] * scale
    frame = np.zeros(pixels.shape[:2], dtype=bool)
    frame[top : top + scale, left : left + scale] = True
    frame[top + 2 : top + scale - 2, left + 2 : left + scale - 2] = False
    pixels[frame] = (220, 38, 38)
    return Image.fromarray(pixels)
