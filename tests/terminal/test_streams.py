"""Text is shown as it is, on any terminal, or on none; and files are UTF-8 whatever the locale."""

import ast
import io
import os
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import cast

import pytest
from rich.table import Table

import lamamba
from lamamba.cli import main
from lamamba.files import write_text
from lamamba.terminal.output import make_console, make_progress, say
from lamamba.terminal.streams import StandardStream, standard_streams, visible

HOSTILE = "r[flow]x[/b] :smile: $x_$ https://a.b 12 'q' <b>"  # markup of several kinds, which is text all the same


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HOSTILE, HOSTILE),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("two\nlines\r\t", "two\\nlines\\r\\t"),
        ("\x9b2J\u202egnp.exe\u2066", "\\x9b2J\\u202egnp.exe\\u2066"),
        (os.fsdecode(b"caf\xe9"), "caf\\xe9"),
        ("犬 é 👩\u200d🚀 a\\b", "犬 é 👩\u200d🚀 a\\b"),
        ("\ud800", "\\ud800"),
        ("\udcc3\udca9", "é"),  # UTF-8 that was read as ASCII
        ("\udcc2\udc9b2J", "\\x9b2J"),  # and a control character behind that
    ],
)
def test_text_cannot_command_a_terminal(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_what_is_printed_is_not_interpreted(capsys: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE, "a\nb", "long " * 60)
    assert capsys.readouterr().out == f"{HOSTILE}\na\\nb\n{'long ' * 60}\n"
    table = Table(HOSTILE, title="[red]\x1b", title_justify="left")
    table.add_row("[b]:smile:[/b]")
    make_console().print(table)
    shown = capsys.readouterr().out
    for part in ("[red]\\x1b", HOSTILE, "[b]:smile:[/b]"):
        assert part in shown


def test_a_progress_bar_shows_names_as_they_are() -> None:
    terminal = io.StringIO()
    console = make_console()
    console.file, console._force_terminal = terminal, True  # type: ignore[assignment]
    with make_progress(console, "{task.fields[name]}", transient=False) as progress:
        progress.add_task("[red]a", total=1, name="[b]c")
        say("[d]\x1b", console=console)
    assert "[red]a" in terminal.getvalue()
    assert "[b]c" in terminal.getvalue()
    assert "[d]\\x1b" in terminal.getvalue()


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", "- +-1 ...: \\u72ac _#"),
        ("cp437", "- +-1 ...: \\u72ac _#"),
        ("cp932", "- +-1 ...: 犬 _#"),
        ("latin-1", "- +-1 ...: \\u72ac _#"),
        ("utf-16", "· ±1 …: 犬 ▁█"),
        ("utf-8", "· ±1 …: 犬 ▁█"),
    ],
)
def test_characters_that_a_terminal_lacks_are_replaced(
    monkeypatch: pytest.MonkeyPatch, encoding: str, shown: str
) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", output)
    say("· ±1 …: 犬 ▁█")
    output.seek(0)
    assert output.read() == shown + "\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "cp932"])
@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "s-256", "--gpus", "8"], ["train", "--help"], ["info", "nano"]], ids=" ".join
)
def test_commands_print_in_any_encoding(monkeypatch: pytest.MonkeyPatch, arguments: list[str], encoding: str) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with suppress(SystemExit) if "--help" in arguments else nullcontext():
        main(arguments)
    output.seek(0)
    assert len(output.read().splitlines()) > 10


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_full_disk_stops_no_print(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    full = open("/dev/full", "w")  # noqa: SIM115 - closed below
    monkeypatch.setattr(sys, name, full)
    with standard_streams():
        stream = cast(StandardStream, getattr(sys, name))
        for _ in range(3):
            stream.write("x" * 10_000)
            stream.flush()
        assert isinstance(stream.failure, OSError)
    full.close()  # what was left to write has been dropped: otherwise this fails


def test_a_reader_that_is_gone_stops_no_print(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        with standard_streams() as output:
            say("one", "two")
        assert isinstance(output.failure, BrokenPipeError)


@pytest.mark.parametrize("missing", [None, "closed"])
def test_a_process_without_streams_runs_commands(monkeypatch: pytest.MonkeyPatch, missing: str | None) -> None:
    for name in ("stdin", "stdout", "stderr"):
        stream = io.StringIO()
        stream.close()
        monkeypatch.setattr(sys, name, stream if missing else None)
    main(["info", "nano"])
    say("to nobody")
    with pytest.raises(SystemExit, match="2"):
        main(["info", "nothing"])


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    ("redirections", "arguments", "code", "errors"),
    [
        ("<&- >&- 2>&-", "--version", 0, ""),
        ("2>&-", "--version", 0, ""),
        ("2>&-", "nothing", 2, ""),
        (">/dev/full", "--version", 1, "lamamba: standard output could not be written: No space left on device\n"),
        (">/dev/full", "train --help", 1, "lamamba: standard output could not be written: No space left on device\n"),
        ("2>/dev/full", "nothing", 2, ""),
    ],
)
def test_exit_codes_are_those_of_the_work(
    tmp_path: Path, redirections: str, arguments: str, code: int, errors: str
) -> None:
    """Files that are opened later do not get the number of a closed stream, which libraries print to."""
    if "full" in redirections and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    program = f"""
import sys
from lamamba.cli import main
try:
    main({arguments.split()})
finally:
    with open({str(tmp_path / "number")!r}, "w") as file:
        file.write(str(file.fileno()))
"""
    script = f'exec "$0" -c "$1" {redirections}'
    done = subprocess.run(["/bin/sh", "-c", script, sys.executable, program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, errors)
    assert int((tmp_path / "number").read_text()) > 2


def test_text_is_written_as_utf_8(tmp_path: Path) -> None:
    write_text(tmp_path / "text", f"é {os.fsdecode(bytes([255]))}\n")
    assert (tmp_path / "text").read_bytes() == "é \\udcff\n".encode()


def test_no_file_is_in_the_locale_s_encoding() -> None:
    """A machine whose locale is not UTF-8 would read and write other files than all others."""
    for path in Path(lamamba.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            of_path = isinstance(call.func, ast.Attribute)  # else of the built-in `open`
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            mode = next((getattr(argument, "value", "") for argument in call.args[0 if of_path else 1 :]), "")
            if (name in ("read_text", "write_text") and of_path) or (name == "open" and mode in ("r", "w", "a", "x")):
                assert "encoding" in {keyword.arg for keyword in call.keywords}, f"{path}:{call.lineno}"
