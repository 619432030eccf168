"""Check the values of options, and suggest corrections."""

import difflib
import operator
from collections.abc import Iterable
from typing import Any

from lamamba.errors import ConfigError


def is_whole(value: object) -> bool:
    """Return whether a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)  # in Python, True is an int


def as_whole(value: Any) -> int | None:
    """Return a whole number of any kind, NumPy's and tensors of one too, as an int; None where it is none."""
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    try:
        return None if is_bool else operator.index(value)
    except (TypeError, RuntimeError):  # a tensor without a value, on the meta device
        return None


def is_number(value: object) -> bool:
    """Return whether a value is a whole number or a float."""
    return isinstance(value, float) or is_whole(value)


def check(holds: bool, name: str, value: object, wanted: str) -> None:
    """Raise ConfigError unless a condition on an option holds."""
    if not holds:
        raise ConfigError(f"{name} is {value!r}: it must be {wanted}")


def check_option(config: object, name: str, holds: bool, wanted: str) -> None:
    """Raise ConfigError with the value of an option unless a condition on it holds."""
    check(holds, name, getattr(config, name), wanted)


MAX_SEED = 2**64 - 1  # the largest seed that torch's generators accept
MAX_IMAGES = 10**12  # in one run or set
MAX_SIDE = 1 << 14  # in pixels
MAX_GRID_PIXELS = 1 << 28  # in one picture; Pillow refuses to open larger ones


def check_range(config: object, least: float, most: float, *names: str) -> None:
    """Raise ConfigError unless options are within limits. None, an option that is not set, is accepted."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            check(value >= least, name, value, f"{least:,} or more")
            check(value <= most, name, value, f"at most {most:,}")


def check_unset(config: Any, *names: str, why: str) -> None:
    """Raise ConfigError if an option differs from its default, because it has no effect here."""
    for name in names:
        if getattr(config, name) != type(config).__dataclass_fields__[name].default:
            raise ConfigError(f"{name} has no effect, because {why}: leave it out")


def check_seed(seed: Any, num_images: int = 1, name: str = "seed") -> int:
    """Return a seed as an int; raise ConfigError unless it is a whole number of 64 bits.

    The seeds of all images, which are counted up from this one, must be in range too.
    """
    whole, most = as_whole(seed), MAX_SEED - num_images + 1
    if whole is None or not 0 <= whole <= most:
        images = f", for {num_images:,} images" if num_images > 1 else ""
        raise ConfigError(f"{name} is {seed!r}: it must be a whole number from 0 to {most:,}{images}")
    return whole


def check_size(name: str, size: tuple[int, int] | None, most: int = MAX_SIDE) -> None:
    """Raise ConfigError unless height and width, if given, are from 1 to `most`."""
    fits = size is None or all(1 <= side <= most for side in size)
    check(fits, name, size, f"a height and a width from 1 to {most:,}")


def nearest(name: str, names: Iterable[str]) -> str:
    """Suggest names for one that does not exist: up to three with this prefix, or the closest, or all names."""
    names = list(names)
    close = closest(name, names)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names)}"


def closest(name: str, names: Iterable[str]) -> list[str]:
    """Find up to three names with this prefix, or the closest name, or none."""
    names, name = list(names), name.lower()
    begun = [longer for longer in names if name and longer.startswith(name)][:3]
    return begun or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
