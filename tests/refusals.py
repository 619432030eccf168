"""Commands that must fail, and the line that they print."""

from collections.abc import Callable

import pytest


def refusal(capsys: pytest.CaptureFixture[str], command: Callable[[], object]) -> str:
    """Run a command that must fail with one line on standard error and exit code 2; return that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        command()
    shown = capsys.readouterr()
    assert end.value.code == 2
    assert shown.err.startswith("lamamba: error: ")
    assert shown.err.endswith("\n")
    assert shown.err.count("\n") == 1, shown.err
    assert "Traceback" not in shown.out + shown.err
    return shown.err
