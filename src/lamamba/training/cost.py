"""Count the parameters and multiply-adds of a network, stage by stage, on the meta device."""

import re
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any, cast

import torch
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

import lamamba.ops.selective_scan  # noqa: F401 - registers the operation counted below
from lamamba.checkpoints.checkpoint import load_checkpoint
from lamamba.config import PRESETS, SIXTEEN_STATES, InfoConfig, NetworkConfig
from lamamba.errors import CheckpointError, ConfigError
from lamamba.model import Block, LaMambaDiff
from lamamba.terminal.output import make_console

WHAT_IS_COUNTED = (
    "Multiply-adds of linear layers, convolutions, attention (logits and sums, whole windows) and the scan (per step "
    "and channel: 4 for each state and 2 more); not norms, activations, modulation and residual sums. "
    '"GFLOPs" in papers on diffusion transformers are multiply-adds too; a FLOP count would be twice as high. '
    "Papers on Mamba count 9 for each state of the scan and nothing more."
)
WHOSE_STATES = (
    "The authors' released code configures XL only, with 1 state: xl-256 is that network. The savings that the paper "
    "reports for XL, 57.6 % of the operations of DiT-XL/2 at 256 px and 61.6 % at 512 px, are for 16 states, "
    "counted as in papers on Mamba: 50.3 G for xl-256-16-states instead of 118.64 G, and 201 G for xl-512-16-states "
    "instead of 524.6 G."
)


@register_flop_formula(torch.ops.lamamba.selective_scan)
def _scan_flops(u_shape: Any, delta_shape: Any, A_shape: Any, *arguments: Any, **options: Any) -> int:
    b, k, l, d = u_shape
    return int(2 * b * k * l * d * (4 * A_shape[2] + 2))


def _width(blocks: nn.ModuleList) -> int:
    return cast(Block, blocks[0]).mlp_norm.weight.numel()


def count(network: LaMambaDiff, height: int, width: int) -> dict[str, tuple[int, int]]:
    """Count the parameters, and the multiply-adds of one image's forward pass.

    Args:
        network: on the meta device, where every operation is one that is counted.
        height, width: size of the network's input grid.

    Returns:
        Parameters and multiply-adds of each stage, in the order in which they run, and of "all".

    Raises:
        ValueError: the network is on another device, where some operations would not be counted.
    """
    if network.device.type != "meta":
        raise ValueError(f"count: the network is on {network.device}: build it on the meta device")
    stages: dict[str, list[nn.Module]] = {
        "embeddings": [
            *(network.patch_projection, network.patch_norm),
            *(network.timestep_embedding, network.label_embedding),
        ]
    }
    for index, blocks in enumerate(cast(Iterable[nn.ModuleList], network.encoder)):
        stages[f"encoder {index} ({_width(blocks)} wide)"] = [*blocks, *network.downsamples[index : index + 1]]
    stages["bottleneck"] = [*network.bottleneck]
    for index, blocks in enumerate(cast(Iterable[nn.ModuleList], network.decoder)):
        upsample = [network.upsamples[index - 2]] if index >= 2 else []
        stages[f"decoder {index} ({_width(blocks)} wide)"] = [*blocks, *upsample]
    stages["head"] = [network.head]
    names = {module: name for name, module in network.named_modules()}
    root = type(network).__name__
    flops = {
        name.removeprefix(root).removeprefix("."): sum(by_operation.values())
        for name, by_operation in _flops_by_module(network, height, width).items()
    }
    result = {}
    for stage, modules in stages.items():
        parameters = sum(p.numel() for module in modules for p in module.parameters())
        result[stage] = (parameters, sum(flops.get(names[module], 0) for module in modules) // 2)
    parameters, macs = result["embeddings"]
    result["embeddings"] = (parameters + network.position_embedding.numel(), macs)
    result["all"] = (network.num_parameters(), flops[""] // 2)
    return result


def count_as_papers_on_mamba(network: LaMambaDiff, height: int, width: int) -> int:
    """Count the multiply-adds of one image with 9 for each step, channel and state of the scan, and nothing more."""
    states = network.config.ssm_state_size
    by_operation = _flops_by_module(network, height, width)[type(network).__name__]
    scan = by_operation[torch.ops.lamamba.selective_scan]
    return (sum(by_operation.values()) - scan + scan // (4 * states + 2) * 9 * states) // 2


@cache  # for several runs in one process, as in tests
def count_all(config: NetworkConfig) -> tuple[int, int]:
    """Count the parameters of a network and its multiply-adds of one image, without allocating it."""
    with torch.device("meta"):
        network = LaMambaDiff(**vars(config))
    return count(network, config.sample_size, config.sample_size)["all"]


def training_flops(config: NetworkConfig) -> float:
    """Count the FLOPs of a training step per image: three forward passes, and two FLOPs per multiply-add."""
    return 3.0 * 2 * count_all(config)[1]


# Dense bfloat16 TFLOP/s from NVIDIA's data sheets, by words in the GPU's name; the first match counts.
PEAK_TFLOPS = {
    "B200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "GH200": 989.0, "A100": 312.0,
    "L40S": 362.0, "A10G": 70.0, "A10": 125.0, "L4": 121.0, "RTX 4090": 165.0, "RTX 3090": 71.0,
}  # fmt: skip


def peak_tflops(device_name: str) -> float | None:
    """Look up a GPU's peak bfloat16 TFLOP/s; None if unknown."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


@lru_cache(maxsize=1)  # two kinds of counts are made of it, one after the other
def _flops_by_module(network: LaMambaDiff, height: int, width: int) -> dict[str, dict[Any, int]]:
    """Count the FLOPs of one image by module and operation. Module names start with the network's class name."""
    with torch.device("meta"):
        x_t = torch.empty(1, network.config.in_channels, height, width)
        t, y = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x_t, t, y)
    return counter.get_flop_counts()


def print_info(config: InfoConfig) -> None:
    """Print the table of `count`, and how a distilled network is sampled.

    Raises:
        LamambaError: the name or the size is invalid.
    """
    distilled = None
    if config.network in PRESETS:
        options = {} if config.ssm_state_size is None else {"ssm_state_size": config.ssm_state_size}
        with torch.device("meta"):
            network = LaMambaDiff.from_preset(config.network, **options)
        title = config.network
    else:
        loaded = load_checkpoint(config.network)
        network, title, distilled = loaded.network.to("meta"), str(loaded.path), loaded.info.distilled
        if not isinstance(network, LaMambaDiff):
            raise CheckpointError(f"{config.network} holds a {type(network).__name__}: only a LaMambaDiff is counted")
    size = config.size or (network.config.sample_size, network.config.sample_size)
    table = Table(
        title=f"{title}, grid {size[0]}x{size[1]}, state size {network.config.ssm_state_size}", title_justify="left"
    )
    table.add_column("stage")
    table.add_column("parameters", justify="right")
    table.add_column("multiply-adds (G)", justify="right")
    try:
        rows = count(network, *size)
    except ValueError as error:
        raise ConfigError(f"size {size[0]} {size[1]} cannot be counted: {error}") from error
    for stage, (parameters, macs) in rows.items():
        if stage == "all":
            table.add_section()
        table.add_row(stage, f"{parameters:,}", f"{macs / 1e9:,.3f}")
    console = make_console()
    console.print(table)
    if distilled:
        console.print(f"This network was {distilled}.")
    console.print(WHAT_IS_COUNTED)
    pair = [config.network.removesuffix(SIXTEEN_STATES) + ending for ending in ("", SIXTEEN_STATES)]
    if all(name in PRESETS for name in pair):
        console.print(_states_table(pair, *size))
        console.print(WHOSE_STATES)


def _states_table(names: Iterable[str], height: int, width: int) -> Table:
    """Compare presets that differ in their number of states."""
    table = Table()
    for column in ("preset", "states", "parameters", "multiply-adds (G)", "as papers on Mamba count (G)"):
        table.add_column(column, justify="left" if column == "preset" else "right")
    for name in names:
        with torch.device("meta"):
            network = LaMambaDiff.from_preset(name)
        parameters, macs = count(network, height, width)["all"]
        as_papers = count_as_papers_on_mamba(network, height, width)
        states = str(network.config.ssm_state_size)
        table.add_row(name, states, f"{parameters:,}", f"{macs / 1e9:,.2f}", f"{as_papers / 1e9:,.2f}")
    return table
