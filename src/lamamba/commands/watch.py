"""The command `lamamba watch`: follow a run by reading its folder, on this machine or on a mounted file system."""

import time
from pathlib import Path

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lamamba.checkpoints.checkpoint import checkpoints_in
from lamamba.config import WatchConfig
from lamamba.terminal.output import describe_duration, make_console
from lamamba.terminal.streams import visible
from lamamba.training.log import read_log

BARS = "▁▂▃▄▅▆▇█"
UPDATE_S = 2.0
# Values to show, if the log has them: name, unit, format.
SHOWN = (
    *(("loss", "", ".4f"), ("mse", "", ".4f"), ("vb", "", ".4f"), ("gap", "", ".4f")),
    *(("loss_q1", "timesteps 0 to 250", ".4f"), ("loss_q2", "250 to 500", ".4f")),
    *(("loss_q3", "500 to 750", ".4f"), ("loss_q4", "750 to 1000", ".4f")),
    *(("grad_norm", "", ".3f"), ("learning_rate", "", ".2e"), ("images_per_s", "images/s", ",.1f")),
    *(("data_wait", "of the time, waiting for data", ".1%"), ("mfu", "of the GPU's peak", ".1%")),
    *(("peak_gib", "GiB", ".1f"), ("skipped_steps", "", ".0f")),
)


def watch(config: WatchConfig) -> None:
    """Show a run's log until the run ends or Ctrl-C. Without a terminal, show it once.

    Raises:
        CheckpointError: the folder does not contain a run.
    """
    console = make_console()
    if not console.is_terminal:
        console.print(_picture(config.run, console.width)[0])
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            picture, ended = _picture(config.run, console.width)
            live.update(picture, refresh=True)
            if ended:
                return
            time.sleep(UPDATE_S)


def _picture(run: Path, width: int) -> tuple[Group, bool]:
    """Draw the current state of the run; also return whether the run has ended."""
    records, total = read_log(run)
    if not records:
        return Group(Text(f"{visible(run)}: nothing logged yet")), False
    last = records[-1]
    share, speed = last["images"] / max(1, total), last.get("images_per_s", 0)
    ended = last["images"] >= total
    until = "done" if ended else "no speed in the log"
    if speed > 0 and not ended:
        until = f"{describe_duration((total - last['images']) / speed)} left at this speed"
    table = Table(box=None, show_header=False)
    for name, unit, style in SHOWN:
        if name in last:
            table.add_row(name, format(last[name], style), Text(unit, style="dim"))
    saved = checkpoints_in(run)
    age = describe_duration(time.time() - (saved[-1] / "checkpoint.json").stat().st_mtime) if saved else ""
    checkpoint = f"checkpoint of {int(saved[-1].name):,} images, {age} ago" if saved else "no checkpoint yet"
    return Group(
        Text(f"{visible(run)}: {last['images']:,} of {total:,} images, {share:.0%}, {until}", style="bold"),
        Text(f"loss {_line([record['loss'] for record in records if 'loss' in record], width - 5)}"),
        table,
        Text(checkpoint, style="dim"),
    ), ended


def _line(values: list[float], width: int) -> str:
    """Draw values as a line of bars. Each bar is the mean of several consecutive values."""
    if not values:
        return ""
    width = max(1, min(width, len(values)))
    parts = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    return "".join(BARS[round((mean - low) / (high - low or 1) * (len(BARS) - 1))] for mean in means)
