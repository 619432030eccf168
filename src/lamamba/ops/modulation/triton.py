"""Many linear layers of the same few images in one launch, for inference with small batches.

Every block applies two linear layers to the condition. With one image, launching each layer takes longer than reading
its weights. Here a table holds the addresses of all weights, and each program looks up its layer there.
"""

from collections.abc import Iterable

import torch
import triton
from torch import Tensor

from lamamba.ops.launch import launch
from lamamba.ops.modulation.kernels import linears_kernel

COLUMNS, DEPTH = 32, 64  # outputs of a program, and inputs that it multiplies at once


def make_table(layers: Iterable[tuple[Tensor, Tensor, int | None]], device: torch.device) -> tuple[Tensor, bool]:
    """Return the table of `linears`, one row per program, and whether all rows of weights are aligned.

    The weights must stay where they are.

    Args:
        layers: weight (o, i), bias (o,), and the number of values in `hidden` before the layer's input, for one image.
            None means that the layer's input is `shared`.
        device: the device of the weights.
    """
    rows: list[tuple[int, ...]] = []
    before, is_aligned = 0, True
    for weight, bias, start in layers:
        columns, depth = weight.shape
        place = -1 if start is None else start
        rows += [
            (weight.data_ptr(), bias.data_ptr(), place, first, before, columns, depth)
            for first in range(0, columns, COLUMNS)
        ]
        before += columns
        is_aligned &= weight.data_ptr() % 16 == 0 and depth % 8 == 0 and (start or 0) % 8 == 0
    return torch.tensor(rows, dtype=torch.int64, device=device), is_aligned


@torch.library.custom_op("lamamba::linears", mutates_args=())
def linears(shared: Tensor, hidden: Tensor, table: Tensor, is_aligned: bool, num_outputs: int, silu: bool) -> Tensor:
    """Compute x weight^T + bias for the layers of a table, then SiLU if `silu`.

    Args:
        shared: (b, i), contiguous, in the dtype of the weights.
        hidden: the inputs (b, i) of the other layers, flat, one after the other.
        table: the table of the layers, from `make_table`.
        is_aligned: whether all rows of weights are aligned, from `make_table`.
        num_outputs: number of outputs of all layers together.
        silu: whether to apply SiLU to the results.

    Returns:
        The results (b, o), flat, one after the other.
    """
    out = shared.new_empty(len(shared) * num_outputs)
    launch(
        linears_kernel, (len(table),), shared, hidden, table, out, len(shared), SILU=silu, ALIGNED=is_aligned,
        ROWS=max(16, triton.next_power_of_2(len(shared))), COLUMNS=COLUMNS, DEPTH=DEPTH, num_warps=4, num_stages=4,
    )
    return out


@linears.register_fake
def _(shared: Tensor, hidden: Tensor, table: Tensor, is_aligned: bool, num_outputs: int, silu: bool) -> Tensor:
    return shared.new_empty(len(shared) * num_outputs)
