"""The command `lamamba completion`: write a script that completes commands, options and values in a shell."""

from collections.abc import Mapping, Sequence

from lamamba.errors import ConfigError

_HEADS = {"bash": "", "zsh": "autoload -U +X compinit bashcompinit\ncompinit\nbashcompinit\n"}
# Everything else is completed as a file name.
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


def write_completion(shell: str, commands: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
    """Write the script for a shell.

    Args:
        shell: "bash" or "zsh".
        commands: the options of each command, with the values of options that have only a few. A command such as
            "prepare emoji" is completed word by word.

    Raises:
        ConfigError: the shell is not supported.
    """
    if shell not in _HEADS:
        raise ConfigError(f"there is no completion for the shell {shell!r}: use {' or '.join(_HEADS)}")
    second: dict[str, list[str]] = {"completion": list(_HEADS)}
    for name in commands:
        first, _, kind = name.partition(" ")
        second.setdefault(first, []).extend([kind] if kind else [])
    words = [("1 *", list(second)), *((f"2 {name}", kinds) for name, kinds in second.items() if kinds)]
    cases = [(pattern.replace(" ", "\\ "), names) for pattern, names in words]
    options = [(f'"{name}"', ["--help", *found]) for name, found in commands.items()]
    values = [(f'"{name} {option}"', few) for name, found in commands.items() for option, few in found.items() if few]
    return _SCRIPT.format(
        head=_HEADS[shell], commands=_write_cases(cases), options=_write_cases(options), values=_write_cases(values)
    )


def _write_cases(cases: Sequence[tuple[str, Sequence[str]]]) -> str:
    return "\n".join(f'            {pattern}) words="{" ".join(words)}" ;;' for pattern, words in cases)
