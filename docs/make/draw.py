"""Draw the figures and write the tables of docs/network.md and docs/imagenet.md, from the package's own results.

    python docs/make/draw.py

The text of pages is written by hand. Tables are between <!-- NAME --> and <!-- end NAME -->.
"""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lamamba.checkpoints.checkpoint import load_checkpoint
from lamamba.commands.plan import predict
from lamamba.config import PRESETS, DemoLimits, NetworkConfig, PlanConfig
from lamamba.demo.figures import draw_paths, draw_windows
from lamamba.demo.receptive_field import draw_receptive_field, receptive_fields
from lamamba.model import LaMambaDiff
from lamamba.sampling import make_grid
from lamamba.training.cost import count, count_as_papers_on_mamba

DOCS = Path(__file__).parents[1]
FIELD = "network/receptive_field.png"


def figures() -> dict[str, str]:
    """Draw the figures that need only arithmetic: SVG by file name, below docs/."""
    return {
        "network/unet.svg": for_a_file(draw_unet(PRESETS["xl-256"])),
        "network/paths.svg": for_a_file(draw_paths(8, 8, "continuous")),
        "network/raster.svg": for_a_file(draw_paths(8, 8, "raster")),
        "network/windows.svg": for_a_file(draw_windows(16, 16, 8)),
    }


def for_a_file(svg: str) -> str:
    """Give a figure its size as an image, and a line color that is visible on white and on black."""
    size = re.search(r'viewBox="0 0 (\S+) (\S+)"', svg)
    assert size is not None
    return re.sub(r'style="[^"]*"', f'width="{size[1]}" height="{size[2]}" color="#808080"', svg, count=1) + "\n"


def draw_unet(config: NetworkConfig) -> str:
    """Draw the stages of a network as boxes, lower for smaller grids, and the skips."""
    widths = [config.embed_dim * factor for factor in (1, 2, 4, 4)]
    grids = [config.sample_size // factor for factor in (1, 2, 4, 4)]
    depths = [*config.depths, config.bottleneck_depth, *(n + config.decoder_extra_depth for n in config.depths[::-1])]
    places = [0, 1, 2, 3, 3, 3, 2, 1, 0]
    names = [*(f"encoder {i}" for i in range(4)), "bottleneck", *(f"decoder {i}" for i in range(4))]
    step, wide, high, top = 104, 88, 58, 66
    drops = [0, 84, 168, 168]

    def left(index: int) -> int:
        return 2 + index * step

    def upper(index: int) -> int:
        return top + drops[places[index]]

    parts = []
    for index, (place, name, depth) in enumerate(zip(places, names, depths, strict=True)):
        x, y = left(index), upper(index)
        colour = "#d97706" if index == 4 else "#2563eb" if index < 4 else "#059669"
        lines = (name, f"{depth} block{'s' * (depth > 1)}", f"{grids[place]} x {grids[place]} x {widths[place]}")
        words = "".join(
            f'<tspan x="{x + wide // 2}" y="{y + 17 + 16 * row}">{line}</tspan>' for row, line in enumerate(lines)
        )
        parts.append(
            f'<rect x="{x}" y="{y}" width="{wide}" height="{high}" rx="4" fill="{colour}" fill-opacity="0.2" '
            f'stroke="{colour}"/><text font-size="11" text-anchor="middle" fill="currentColor">{words}</text>'
        )
    for index in range(8):  # from a stage to the next one: to the side, or down and up
        (x, y), (next_x, next_y) = ((left(i), upper(i)) for i in (index, index + 1))
        ways = {
            0: f"M{x + wide} {y + high // 2}H{next_x - 1}",
            1: f"M{x + wide // 2} {y + high}V{next_y + high // 2}H{next_x - 1}",
            -1: f"M{x + wide} {y + high // 2}H{next_x + wide // 2}V{next_y + high + 1}",
        }
        parts.append(_arrow(ways[(next_y > y) - (next_y < y)]))
    for index in range(4):  # skips, each at the height of its stage
        begin, end = left(index) + wide // 2, left(8 - index) + wide // 2
        y = upper(index)
        over = y - (12 if index == 3 else 24)
        way = f"M{left(index) + wide} {y + 14}H{left(8 - index) - 1}"
        if index >= 2:
            way = f"M{begin} {y}V{over}H{end}V{y - 1}"
        parts.append(_arrow(way, ' stroke-dasharray="4 3"'))
    x_t, out = left(0) + wide // 2, left(8) + wide // 2
    parts.append(_arrow(f"M{x_t} 24V{top - 1}") + _arrow(f"M{out} {top}V29"))
    parts.append(
        f'<g font-size="12" text-anchor="middle" fill="currentColor"><text x="{x_t}" y="16">x_t</text>'
        f'<text x="{out}" y="16">out</text><text x="{(x_t + out) // 2}" y="34">'
        f"t, y to every block: shift, scale and gate of each branch; dashed: skips, added</text></g>"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" font-family="sans-serif" '
        f'viewBox="0 0 {8 * step + wide + 4} {top + drops[-1] + high + 4}" style="">{"".join(parts)}</svg>'
    )


def _arrow(way: str, more: str = "") -> str:
    """Draw a line with an arrowhead in the direction of its last piece."""
    points = [(0.0, 0.0)]
    for letter, numbers in re.findall(r"([MHV])([\d. ]+)", way):
        values = [float(number) for number in numbers.split()]
        x, y = points[-1]
        points.append({"M": (values[0], values[-1]), "H": (values[0], y), "V": (x, values[0])}[letter])
    (old_x, old_y), (x, y) = points[-2:]
    turn = ((x > old_x) - (x < old_x), (y > old_y) - (y < old_y))
    corners = [(x, y)] + [(x - 6 * turn[0] + s * turn[1], y - 6 * turn[1] + s * turn[0]) for s in (3, -3)]
    head = " ".join(f"{a:g},{b:g}" for a, b in corners)
    return f'<path d="{way}" fill="none" stroke="currentColor"{more}/><polygon points="{head}" fill="currentColor"/>'


def sizes() -> str:
    """Lay out the table of all presets and their counts."""
    header = "| preset | states | grid | widths | blocks | parameters | multiply-adds, G | as Mamba papers count, G |"
    rows = [header, "| --- " + "| ---: " * 7 + "|"]
    for name, config in PRESETS.items():
        with torch.device("meta"):
            network = LaMambaDiff(**vars(config))
        side = config.sample_size
        parameters, macs = count(network, side, side)["all"]
        as_papers = count_as_papers_on_mamba(network, side, side)
        blocks = sum(config.depths) * 2 + 4 * config.decoder_extra_depth + config.bottleneck_depth
        widths = f"{config.embed_dim} to {4 * config.embed_dim}"
        grid = f"{side}x{side}x{config.in_channels}"
        geometry = f"{name} | {config.ssm_state_size} | {grid} | {widths} | {blocks}"
        rows.append(f"| {geometry} | {parameters:,} | {macs / 1e9:.2f} | {as_papers / 1e9:.2f} |")
    return "\n".join(rows)


def plans() -> str:
    """Lay out the table of predicted trainings of 400 million images."""
    rows = ["| network | GPUs | batch | images/s | GiB per GPU | GPU-hours | days |", "| --- " + "| ---: " * 6 + "|"]
    for name, gpus, batch in (("s-256", 1, 256), ("b-256", 8, 1024), ("xl-256", 8, 256), ("xl-512", 8, 256)):
        config = PlanConfig(name, gpus=gpus, batch_size=batch)
        predicted = predict(config)
        speed = predicted.images_per_s(gpus)
        hours = config.num_images / speed / 3600
        memory = f"{predicted.memory_gib:.1f}"
        rows.append(
            f"| {name} | {gpus} | {batch:,} | {speed:,.0f} | {memory} | {hours * gpus:,.0f} | {hours / 24:.1f} |"
        )
    return "\n".join(rows)


def filled(name: str, lay_out: Callable[[], str]) -> str:
    """Read a page and insert its table."""
    page, table = (DOCS / f"{name}.md").read_text(), lay_out.__name__
    begin, end = f"<!-- {table} -->\n", f"<!-- end {table} -->"
    return f"{page[: page.index(begin)]}{begin}\n{lay_out()}\n\n{page[page.index(end) :]}"


TABLES = {"network": sizes, "imagenet": plans}


def draw_fields() -> None:
    """Draw what a pixel in the middle depends on through the scan, attention and both, in the shipped weights."""
    network = load_checkpoint("nano").network
    pictures = [
        draw_receptive_field(list(receptive_fields(network, 32, 32, (14, 14), branches, DemoLimits()))[-1], (14, 14))
        for branches in ("scan", "attention", "both")
    ]
    pixels = np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in pictures])
    make_grid(pixels, columns=3, padding=8, scale=1).save(DOCS / FIELD, optimize=True)


if __name__ == "__main__":
    for name, svg in figures().items():
        (DOCS / name).parent.mkdir(exist_ok=True)
        (DOCS / name).write_text(svg)
    for name, lay_out in TABLES.items():
        (DOCS / f"{name}.md").write_text(filled(name, lay_out))
    draw_fields()
