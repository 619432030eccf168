"""What every option is held to, and how a mistake is answered."""

import difflib
from collections.abc import Iterable

from lamamba.errors import ConfigError


def is_whole(value: object) -> bool:
    """Say whether a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)  # to Python, True is 1


def is_number(value: object) -> bool:
    """Say whether a value is a whole number or a float."""
    return isinstance(value, float) or is_whole(value)


def check(holds: bool, name: str, value: object, wanted: str) -> None:
    """Raise ConfigError unless an option is as it must be."""
    if not holds:
        raise ConfigError(f"{name} is {value!r}: it must be {wanted}")


def nearest(name: str, names: Iterable[str]) -> str:
    """Phrase a hint for a name that does not exist: three that begin so, or the likeliest, or all there are."""
    names = list(names)
    close = closest(name, names)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names)}"


def closest(name: str, names: Iterable[str]) -> list[str]:
    """Find three names that begin as one that does not exist, or the likeliest, or none."""
    names, name = list(names), name.lower()
    begun = [longer for longer in names if name and longer.startswith(name)][:3]
    return begun or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
