"""The plots of the pages: curves of training, and distances over steps."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

Content = dict[str, Any]


def number_by_decades(*several: Axis) -> None:
    """Number a logarithmic axis plainly, at 1, 2 and 5 of each decade."""
    for axis in several:
        axis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")


def draw_curves(figure: Figure, named: Mapping[str, Sequence[Content]]) -> None:
    """Plot loss and distance against images and against seconds of training, a colour a network, a line a seed."""
    axes = figure.subplots(2, 2, sharey="row")
    for column, (key, scale, label) in enumerate(
        (("images", 1e6, "million images seen"), ("seconds", 1.0, "seconds of training"))
    ):
        for colour, (name, several) in enumerate(named.items()):
            for index, record in enumerate(several):
                for row, curve, value in ((0, "curve", "loss"), (1, "evaluations", "distance")):
                    axes[row][column].plot(
                        [point[key] / scale for point in record[curve]], [point[value] for point in record[curve]],
                        color=f"C{colour}", label=None if index else name, marker="o" if row else None,
                        linewidth=1, alpha=0.8,
                    )  # fmt: skip
        for row in (0, 1):
            axes[row][column].set(xlabel=label, yscale="log")
            number_by_decades(axes[row][column].yaxis)
            axes[row][column].grid(alpha=0.3)
    axes[0][0].set_ylabel("loss")
    axes[1][0].set_ylabel("Fréchet distance, no guidance")
    axes[0][0].legend()


def draw_steps(figure: Figure, points: Sequence[Content]) -> None:
    """Plot the distance over the evaluations of the network."""
    axes = figure.subplots()
    for sampler in dict.fromkeys(point["sampler"] for point in points):
        own = [point for point in points if point["sampler"] == sampler]
        axes.plot([p["evaluations"] for p in own], [p["distance"] for p in own], marker="o", label=sampler, linewidth=1)
    axes.set(xlabel="evaluations of the network", ylabel="Fréchet distance", xscale="log", yscale="log")
    number_by_decades(axes.xaxis, axes.yaxis)
    axes.grid(alpha=0.3)
    axes.legend()


def draw_losses(figure: Figure, several: Sequence[Content]) -> None:
    """Plot loss against images."""
    axes = figure.subplots()
    for record in several:
        curve = record["curve"]
        axes.plot(
            [row["images"] / 1e6 for row in curve], [row["loss"] for row in curve], label=record["piece"], linewidth=1
        )
    axes.set(xlabel="million images seen", ylabel="loss", yscale="log")
    number_by_decades(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.legend()
