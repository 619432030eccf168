"""Reads a configuration from the command line: its fields are the options, its docstrings their help."""

import argparse
import ast
import inspect
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from lamamba.config.checks import closest, nearest
from lamamba.errors import LamambaError

Config = TypeVar("Config")


@dataclass(frozen=True)
class Option:
    """How a field looks on the command line, where its name and type do not decide that; stands in `Annotated`."""

    name: str = ""
    """Name of the option; the default is the field's, with dashes."""
    metavar: str = ""
    """What stands for the value in the help; the default names the type."""
    choices: tuple[str, ...] = ()
    """The values that the command line accepts, where the type allows more."""
    positional: bool = False
    """The value is given without an option."""
    hidden: bool = False
    """There is no such option: other values decide the field. A class names such fields of its base in `HIDDEN`."""


@dataclass
class OptionReader:
    """The options of one configuration.

    Args:
        kind: the configuration, a dataclass; a field that is a dataclass too becomes a group of options.
        command: as it is typed, for the help and for errors.
        example: for the help.
        defaults: values of fields that replace the defaults of the class.
    """

    kind: type[Any]
    command: str
    example: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    choices: dict[str, tuple[str, ...]] = field(default_factory=dict, init=False)
    """The few values that an option takes, or (), by each option in the help."""

    def __post_init__(self) -> None:
        width = min(100, shutil.get_terminal_size().columns)
        self._parser = _Parser(
            prog=f"lamamba {self.command}",
            description=" ".join((inspect.getdoc(self.kind) or "").split()).replace("%", "%%"),
            epilog=self.example and f"example: {self.example}",
            allow_abbrev=False,
            exit_on_error=False,
            formatter_class=lambda prog: _Formatter(prog, max_help_position=26, width=width),
        )
        usage = sorted(self._add_fields(self._parser, self.kind, self.defaults), key=lambda word: word.startswith("-"))
        self._parser.usage = " ".join([f"lamamba {self.command}", *usage, "[OPTIONS]"])

    def read(self, arguments: Sequence[str]) -> Any:
        """Make the configuration of arguments.

        Raises:
            LamambaError: an argument is not understood.
            ConfigError: a value is out of its range.
            SystemExit: the help was asked for, and printed.
        """
        try:
            given, unknown = self._parser.parse_known_intermixed_args(with_dashes(arguments))
        except argparse.ArgumentError as error:
            fault = re.sub(r"^expected (.+) argument", r"takes \1 value", error.message)
            self._fail(f"{error.argument_name} {fault}")
        if unknown:
            name = unknown[0].partition("=")[0]
            hint = f": {nearest(name, self.choices)}" if closest(name, self.choices) else ""
            self._fail(f"no option is named {name}{hint}" if name.startswith("-") else f"{name!r} is one word too many")
        return _build(self.kind, vars(given), self.defaults)

    def _fail(self, message: str) -> NoReturn:
        raise LamambaError(f"{message} (see lamamba {self.command} --help)")

    def _add_fields(self, group: Any, kind: type[Any], defaults: Mapping[str, Any]) -> Iterator[str]:
        """Add an argument for each field; yields what has to be given, for the usage."""
        helps = read_docstrings(kind)
        for entry, type_, option in _list_fields(kind):
            default = defaults.get(entry.name, entry.default)
            if option.hidden or entry.name in getattr(kind, "HIDDEN", ()):
                continue
            if isinstance(type_, type) and is_dataclass(type_):
                title = helps[entry.name].rstrip(".")
                yield from self._add_fields(self._parser.add_argument_group(title), type_, vars(default))
                continue
            yield from self._add_field(group, entry.name, type_, option, default, helps[entry.name])

    def _add_field(self, group: Any, name: str, type_: Any, option: Option, default: Any, text: str) -> Iterator[str]:
        value = _Value.one_of(option.choices) if option.choices else _Value.of(type_)
        metavar = option.metavar or (name.upper() if option.positional else value.metavar)
        needed = default is MISSING and value.number != "*"
        text = (text + _describe_default(default, option)).replace("%", "%%")
        common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        takes = {"type": value.parse, "nargs": value.number, "metavar": metavar}
        if option.positional:
            if not needed and value.number is None:
                takes["nargs"] = "?"
            group.add_argument(name, **takes, **common)
            yield metavar
            return
        flag = "--" + (option.name or name).replace("_", "-")
        shown = [flag]
        if type_ is bool and default is True:
            group.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, **common)
            shown.append(flag.replace("--", "--no-", 1))
        elif type_ is bool:
            group.add_argument(flag, dest=name, action="store_true", **common)
            off = {"dest": name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            group.add_argument(flag.replace("--", "--no-", 1), action="store_false", **off)
        else:
            group.add_argument(flag, dest=name, required=needed, **takes, **common)
        self.choices |= dict.fromkeys(shown, value.choices)
        if needed:
            yield f"{flag} {metavar}"


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """Spell the names of options with dashes, as --batch-size; underscores are accepted too."""
    return [re.sub(r"^--[\w-]+", lambda option: option[0].replace("_", "-"), text) for text in arguments]


class _Formatter(argparse.HelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)  # names of options stay whole


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise LamambaError(f"{message} (see {self.prog} --help)")


@dataclass(frozen=True)
class _Value:
    """What an option takes: how a word becomes a value, how many words there are, and how the help shows them."""

    parse: Callable[[str], Any]
    metavar: Any
    number: int | Literal["*"] | None = None
    choices: tuple[str, ...] = ()

    @classmethod
    def of(cls, type_: Any) -> "_Value":
        origin, inner = get_origin(type_), get_args(type_)
        if origin in (Union, UnionType):
            (present,) = (one for one in inner if one is not NoneType)
            value = cls.of(present)
            return replace(value, parse=lambda text: None if text == "None" else value.parse(text))
        if origin is Literal:
            return cls.one_of(inner)
        if origin is tuple:
            return replace(cls.of(inner[0]), number="*" if inner[1] is Ellipsis else len(inner))
        return cls(*_SCALARS[type_])

    @classmethod
    def one_of(cls, choices: Sequence[Any]) -> "_Value":
        names = {str(choice): choice for choice in choices}

        def parse(text: str) -> Any:
            if text not in names:
                raise argparse.ArgumentTypeError(f"takes {' or '.join(names)}, not {text!r}")
            return names[text]

        return cls(parse, "{" + ",".join(names) + "}", None, tuple(names))


def _read_whole(text: str) -> int:
    plain = text.replace(",", "") if re.fullmatch(r"\d{1,3}(,\d{3})+", text) else text  # as the help shows defaults
    try:
        return int(plain)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes a whole number, not {text!r}") from None


def _read_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes a number, not {text!r}") from None


_SCALARS: dict[Any, tuple[Callable[[str], Any], str]] = {
    str: (str, "TEXT"),
    Path: (Path, "PATH"),
    int: (_read_whole, "INT"),
    float: (_read_number, "FLOAT"),
    bool: (bool, ""),
}


def _list_fields(kind: type[Any]) -> Iterator[tuple[Field[Any], Any, Option]]:
    """List a dataclass's fields with the type of each, and how it looks on the command line."""
    hints = get_type_hints(kind, include_extras=True)
    for entry in fields(kind):
        type_, option = hints[entry.name], Option()
        if get_origin(type_) is Annotated:
            type_, option = get_args(type_)
        yield entry, type_, option


def _describe_default(default: Any, option: Option) -> str:
    """Describe a default unless there is nothing to show: where it is None, the option's text says what happens."""
    if default is MISSING:
        return "" if option.positional else " (required)"
    if default is None or default is False or default == () or default == "":
        return ""
    values = default if isinstance(default, tuple | list) else [default]
    return f" (default: {' '.join(map(_show, values))})"


def _show(value: Any) -> str:
    if value is True:
        return "on"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def _build(kind: type[Config], given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Config:
    """Make a configuration of the options that were given, and defaults for all others."""
    values = dict(defaults)
    for entry, type_, _ in _list_fields(kind):
        if isinstance(type_, type) and is_dataclass(type_):
            default = defaults.get(entry.name, entry.default)
            changes = {inner.name for inner in fields(type_)} & given.keys()
            values[entry.name] = _build(type_, given, vars(default)) if changes else default
        elif entry.name in given:
            value = given[entry.name]
            values[entry.name] = tuple(value) if isinstance(value, list) else value
        elif entry.name not in values and entry.default is MISSING:  # an empty list of words
            values[entry.name] = ()
    return kind(**values)


def read_docstrings(kind: type[Any]) -> dict[str, str]:
    """Read the string that stands below each field in the source of a dataclass, on one line."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not is_dataclass(base):
            continue
        (tree,) = ast.parse(inspect.getsource(base)).body
        lines = tree.body if isinstance(tree, ast.ClassDef) else []
        for pair in pairwise(lines):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found
