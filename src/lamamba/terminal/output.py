"""Output of commands: lines, tables and progress bars that show text literally.

Paths and class names come from users and file systems. Nothing in them is markup, an emoji code, or a terminal command.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from lamamba.terminal.streams import unfailing, visible


def say(*lines: object, console: Console | None = None) -> None:
    """Print each argument literally on one line, without wrapping. A console shows it above its progress bars."""
    for line in lines:
        (console or make_console()).print(Text(visible(line)), soft_wrap=True)


def make_console() -> Console:
    """Make a console that prints strings literally on standard output."""
    return _PlainConsole(markup=False, highlight=False, emoji=False, file=cast(TextIO, unfailing("stdout")))


class _PlainConsole(Console):
    def render_str(self, text: str, **options: Any) -> Text:
        """Escape text in tables and titles too."""
        return super().render_str("\n".join(map(visible, text.split("\n"))), **options)


def make_progress(
    console: Console, *columns: ProgressColumn | str, shows: bool = True, transient: bool = True
) -> Progress:
    """Make progress bars, for a terminal only: a task's description, its bar, these columns, and the time left.

    A column may be a string, which is formatted with the `task`. `transient` bars are removed at the end.
    """
    return Progress(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(),
        *(TextColumn(column, markup=False) if isinstance(column, str) else column for column in columns),
        TimeRemainingColumn(elapsed_when_finished=not transient),
        console=console,
        disable=not (console.is_terminal and shows),
        transient=transient,
    )


@contextmanager
def progress_bars(
    *columns: ProgressColumn | str, shows: bool = True, transient: bool = True
) -> Iterator[Callable[[str, float | None], Callable[[float], None]]]:
    """Show progress bars on standard output; options as for `make_progress`.

    Yields:
        A function `(name, total)` that adds a bar, and returns a function that advances it. A total of None is unknown.
    """
    with make_progress(make_console(), *columns, shows=shows, transient=transient) as progress:

        def add(name: str, total: float | None) -> Callable[[float], None]:
            return partial(progress.advance, progress.add_task(name, total=total))

        yield add


def describe_duration(seconds: float) -> str:
    """Write a duration in the unit that suits it, such as 3 minutes."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if days >= 2:
        return f"{days:.1f} days"
    if hours >= 2:
        return f"{hours:.1f} hours"
    return f"{minutes:.0f} minutes" if minutes >= 2 else f"{seconds:.0f} seconds"
