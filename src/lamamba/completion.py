"""The command `lamamba completion`: a script by which a shell completes commands, options and values.

It is taken from what --help prints, so that it knows what the command line does.
"""

import io
import re
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout, suppress
from typing import NamedTuple

from lamamba.errors import ConfigError

Command = Callable[[list[str]], None]

# A line of help that begins with an option: its name, and its values in braces if it has few.
_OPTION = re.compile(r"^[│|\s]*(?:-h, )?(--[a-z][a-z0-9-]*)(?: \{([^{} ]+)\})?", re.MULTILINE)
_HEADS = {"bash": "", "zsh": "autoload -U +X compinit bashcompinit\ncompinit\nbashcompinit\n"}
# Whatever is neither a command nor an option, nor one of an option's few values, is a file.
_SCRIPT = """\
{head}_lamamba() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}} words=
    case "$COMP_CWORD $command" in
{commands}
    esac
    if [[ $command == prepare ]]; then command="prepare ${{COMP_WORDS[2]}}"; fi
    if [[ $current == -* ]]; then
        case "$command" in
{options}
        esac
    else
        case "$command $previous" in
{values}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _lamamba lamamba
"""


class Help(NamedTuple):
    """What a command's help says that it takes."""

    options: list[str]
    values: dict[str, list[str]]
    """Of each option that has few."""


def write_completion(shell: str, commands: Mapping[str, Command], preparations: Mapping[str, Command]) -> str:
    """Write the script for a shell.

    Args:
        shell: "bash" or "zsh".
        commands: by name, and what runs them.
        preparations: those of `lamamba prepare`, likewise.

    Raises:
        ConfigError: there is none for that shell.
    """
    if shell not in _HEADS:
        raise ConfigError(f"there is no completion for the shell {shell!r}: it is there for {' and '.join(_HEADS)}")
    everything = {**commands, **{f"prepare {kind}": run for kind, run in preparations.items()}}
    helps = {name: read_help(run) for name, run in everything.items() if name not in ("prepare", "completion")}
    first = [("1 *", list(commands)), ("2 prepare", list(preparations)), ("2 completion", list(_HEADS))]
    options = [(f'"{name}"', said.options) for name, said in helps.items()]
    values = [(f'"{name} {option}"', few) for name, said in helps.items() for option, few in said.values.items()]
    cases = [(pattern.replace(" ", "\\ "), words) for pattern, words in first]
    return _SCRIPT.format(
        head=_HEADS[shell], commands=_write_cases(cases), options=_write_cases(options), values=_write_cases(values)
    )


def read_help(run: Command) -> Help:
    """Read what a command takes from what it prints with --help."""
    shown = io.StringIO()
    with redirect_stdout(shown), suppress(SystemExit):
        run(["--help"])
    found = _OPTION.findall(re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue()))
    return Help([name for name, _ in found], {name: values.split(",") for name, values in found if "," in values})


def _write_cases(cases: list[tuple[str, list[str]]]) -> str:
    return "\n".join(f'            {pattern}) words="{" ".join(words)}" ;;' for pattern, words in cases)
