"""Try a kernel that the package does not use yet: residual, norm, linear layer and GELU in one launch, for inference.

    python benchmarks/fused_linear.py --out fused.jsonl    # S and B on one GPU: error and time of many tilings

Each line compares the kernel with what a block launches today. A block would need 11 launches instead of 15, and 62
units of memory traffic instead of 76 (src/lamamba/ops/README.md). `tests/test_benchmarks.py` checks the kernel in
Triton's interpreter.
"""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lamamba.ops.linear_gelu import linear_gelu
from lamamba.ops.linear_gelu.kernels import _normal
from lamamba.ops.residual_norm import Residual, residual_norm
from measure import commit, device_name


class Tile(NamedTuple):
    """Rows and columns of the result per program, channels per product, warps, and stages of the loads."""

    rows: int
    columns: int
    channels: int
    warps: int
    stages: int


class Case(NamedTuple):
    """A linear layer (channels -> columns) of the network on grids of side x side pixels."""

    name: str
    channels: int
    columns: int
    side: int
    has_gelu: bool = False


CASES = [
    Case(f"{size} {channels} {layer}", channels, factor * channels, side, layer == "linear_1")
    for size, width in (("S", 64), ("B", 128))
    for channels, side in ((width, 32), (2 * width, 16), (4 * width, 8))
    for layer, factor in (("in_proj", 4), ("qkv", 3), ("linear_1", 4))
]
TILES = [
    Tile(rows, columns, channels, warps, stages)
    for rows, columns, warps in ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8), (128, 256, 8), (32, 64, 4))
    for channels in (32, 64)
    for stages in (2, 3)
]


@triton.jit
def _stream(p_x, p_branch, p_gate, p_branch_bias, o_row, o_c, m_c, CHANNELS: tl.constexpr):
    """Compute some channels of the stream with the branch added, (rows, channels), rounded as it is stored."""
    b_x = tl.load(p_x + o_row * CHANNELS + o_c[None, :], mask=m_c[None, :], other=0.0).to(tl.float32)
    b_branch = tl.load(p_branch + o_row * CHANNELS + o_c[None, :], mask=m_c[None, :], other=0.0).to(tl.float32)
    if p_branch_bias is not None:
        b_branch += tl.load(p_branch_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_gate = tl.load(p_gate + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    return (b_x + b_gate * b_branch).to(p_x.dtype.element_ty)


@triton.jit
def fused_linear_kernel(
    p_x, p_branch, p_gate, p_branch_bias, p_norm_weight, p_norm_bias, p_shift, p_scale, p_weight, p_bias,
    p_x_new, p_out, stride, eps,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, GELU: tl.constexpr,
    ROWS_OF_TILE: tl.constexpr, COLUMNS_OF_TILE: tl.constexpr, CHANNELS_OF_TILE: tl.constexpr,
):  # fmt: skip
    """Compute a tile of the linear layer's result; the first column of programs also stores the stream.

    The rows of a tile belong to one image. They are read twice: for mean and variance, then for the product.
    """
    column = tl.program_id(0) * COLUMNS_OF_TILE
    o_row = (tl.program_id(1) * ROWS_OF_TILE + tl.arange(0, ROWS_OF_TILE)).to(tl.int64)[:, None]
    image = (tl.program_id(1) * ROWS_OF_TILE // PIXELS).to(tl.int64)
    p_gate += image * stride
    p_shift += image * stride
    p_scale += image * stride
    o_tile = tl.arange(0, CHANNELS_OF_TILE)
    b_sum = tl.zeros([ROWS_OF_TILE], tl.float32)
    b_squares = tl.zeros([ROWS_OF_TILE], tl.float32)
    for first in tl.range(0, CHANNELS, CHANNELS_OF_TILE):
        o_c = first + o_tile
        m_c = o_c < CHANNELS
        b_stream = _stream(p_x, p_branch, p_gate, p_branch_bias, o_row, o_c, m_c, CHANNELS)
        if column == 0:
            tl.store(p_x_new + o_row * CHANNELS + o_c[None, :], b_stream, mask=m_c[None, :])
        b_values = b_stream.to(tl.float32)
        b_sum += tl.sum(b_values, axis=1)
        b_squares += tl.sum(b_values * b_values, axis=1)
    b_mean = b_sum / CHANNELS
    b_slope = tl.rsqrt(tl.maximum(b_squares / CHANNELS - b_mean * b_mean, 0.0) + eps)

    o_column = column + tl.arange(0, COLUMNS_OF_TILE)
    m_column = o_column < COLUMNS
    b_out = tl.zeros([ROWS_OF_TILE, COLUMNS_OF_TILE], tl.float32)
    for first in tl.range(0, CHANNELS, CHANNELS_OF_TILE):
        o_c = first + o_tile
        m_c = o_c < CHANNELS
        b_values = _stream(p_x, p_branch, p_gate, p_branch_bias, o_row, o_c, m_c, CHANNELS).to(tl.float32)
        b_scale = 1 + tl.load(p_scale + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_factor = tl.load(p_norm_weight + o_c, mask=m_c, other=0.0).to(tl.float32) * b_scale
        b_offset = tl.load(p_norm_bias + o_c, mask=m_c, other=0.0).to(tl.float32) * b_scale
        b_offset += tl.load(p_shift + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_normed = (b_values - b_mean[:, None]) * b_slope[:, None] * b_factor[None, :] + b_offset[None, :]
        o_weight = o_column[None, :] * CHANNELS + o_c[:, None]
        b_weight = tl.load(p_weight + o_weight, mask=m_column[None, :] & m_c[:, None], other=0.0)
        b_out = tl.dot(b_normed.to(b_weight.dtype), b_weight, b_out)
    if p_bias is not None:
        b_out += tl.load(p_bias + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    if GELU:
        b_below, _ = _normal(b_out, False)
        b_out *= b_below
    tl.store(p_out + o_row * COLUMNS + o_column[None, :], b_out.to(p_out.dtype.element_ty), mask=m_column[None, :])


class Inputs(NamedTuple):
    """A stream (b, h, w, c), the branch to add, norm, modulation (b, 3c) as shift, scale and gate, and linear layer."""

    x: Tensor
    branch: Tensor
    branch_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    modulation: Tensor
    weight: Tensor
    bias: Tensor


def draw_inputs(case: Case, batch: int, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, generator=generator, device=device)).to(dtype)

    c, n = case.channels, case.columns
    grid = batch, case.side, case.side, c
    return Inputs(
        draw(*grid),
        draw(*grid),
        draw(c),
        draw(c),
        draw(c),
        draw(batch, 3 * c, std=0.5),
        draw(n, c, std=c**-0.5),
        draw(n),
    )


def run_present(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Compute the stream and the layer's result as a block does today."""
    shift, scale, gate = inputs.modulation.chunk(3, dim=1)
    residual = Residual(inputs.branch, gate, inputs.branch_bias)
    x, normed = residual_norm(inputs.x, residual, inputs.norm_weight, inputs.norm_bias, (shift, scale))
    layer = linear_gelu if case.has_gelu else F.linear
    return x, layer(normed, inputs.weight, inputs.bias)


def run_fused(case: Case, inputs: Inputs, tile: Tile) -> tuple[Tensor, Tensor]:
    """Compute the same with the kernel; a tile has to divide the pixels of an image."""
    x = inputs.x
    shift, scale, gate = inputs.modulation.chunk(3, dim=1)
    pixels, num_rows = case.side**2, x.numel() // case.channels
    assert pixels % tile.rows == 0, "the rows of a tile belong to one image"
    x_new, out = torch.empty_like(x), x.new_empty(*x.shape[:3], case.columns)
    grid = triton.cdiv(case.columns, tile.columns), num_rows // tile.rows
    fused_linear_kernel[grid](
        x, inputs.branch, gate, inputs.branch_bias, inputs.norm_weight, inputs.norm_bias, shift, scale,
        inputs.weight, inputs.bias, x_new, out, inputs.modulation.stride(0), 1e-5,
        PIXELS=pixels, CHANNELS=case.channels, COLUMNS=case.columns, GELU=case.has_gelu,
        ROWS_OF_TILE=tile.rows, COLUMNS_OF_TILE=tile.columns, CHANNELS_OF_TILE=tile.channels,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return x_new, out


def error(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> float:
    """Return the larger relative error of stream and result."""
    pairs = zip(found, wanted, strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


@torch.no_grad()
def measure(case: Case, batch: int) -> Iterator[dict[str, Any]]:
    """Time the present launches and every tiling of the kernel, as CUDA graphs."""
    inputs = draw_inputs(case, batch, torch.bfloat16, "cuda")
    exact = run_present(case, Inputs(*(value.double() for value in inputs)))

    def row(provider: str, result: tuple[Tensor, Tensor], ms: float) -> dict[str, Any]:
        return {
            "case": case.name, "provider": provider, "batch": batch, "ms": ms, "error": error(result, exact),
            "gpu": device_name(), "torch": torch.__version__, "triton": triton.__version__, "commit": commit(),
        }  # fmt: skip

    bench = triton.testing.do_bench_cudagraph
    yield row("present", run_present(case, inputs), bench(partial(run_present, case, inputs)))
    for tile in TILES:
        if case.side**2 % tile.rows:
            continue
        name = "fused " + " ".join(map(str, tile))
        try:
            yield row(name, run_fused(case, inputs, tile), bench(partial(run_fused, case, inputs, tile)))
        except triton.runtime.errors.OutOfResources as problem:
            print(f"{case.name} {name}: {problem}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"all or some of: {', '.join(case.name for case in CASES)}")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1])
    parser.add_argument("--out", type=Path, required=True, help="file for the records, one JSON object per line")
    arguments = parser.parse_args()
    for case in CASES:
        if arguments.cases and case.name not in arguments.cases:
            continue
        for batch in arguments.batches:
            for record in measure(case, batch):
                print(
                    f"{record['case']:16}{record['batch']:5} {record['provider']:28}{record['ms']:9.4f} ms", flush=True
                )
                with arguments.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
