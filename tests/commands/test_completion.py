"""What a shell completes of the command line."""

import subprocess
import sys
from pathlib import Path

import pytest

from lamamba.cli import COMMANDS, main
from lamamba.config import OptionReader
from lamamba.config.training import OBJECTIVES


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    command = [sys.executable, "-m", "lamamba", "completion", "bash"]
    path = tmp_path_factory.mktemp("completion") / "completion.bash"
    path.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return path


def complete(script: Path, *words: str) -> set[str]:
    """Complete the last of the words that follow `lamamba`."""
    array = " ".join(f"'{word}'" for word in ("lamamba", *words))
    line = f'source {script}; COMP_WORDS=({array}); COMP_CWORD={len(words)}; _lamamba; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, cwd=script.parent)
    assert done.stderr == ""
    return set(done.stdout.split())


def test_commands_options_and_values_are_completed(script: Path) -> None:
    assert complete(script, "") == {*(name.split()[0] for name in COMMANDS), "completion"}
    assert complete(script, "pl") == {"plan", "plot"}
    assert complete(script, "prepare", "") == {"imagenet", "emoji"}
    assert complete(script, "completion", "z") == {"zsh"}
    assert complete(script, "train", "--num-i") == {"--num-images"}
    assert complete(script, "sample", "nano", "--guidance-") == {
        "--guidance-checkpoint", "--guidance-interval", "--guidance-cosine-power", "--guidance-rescale",
    }  # fmt: skip
    assert complete(script, "prepare", "imagenet", "--dev") == {"--devkit"}
    assert complete(script, "finetune", "nano", "--objective", "") == {*OBJECTIVES}
    assert complete(script, "train", "--no-c") == {"--no-cuda-graph"}


def test_what_is_nothing_of_these_is_left_to_be_a_file(script: Path) -> None:
    for words in (["watch", ""], ["train", "--out", "ru"], ["nothing", "--x"], ["sample", "nano", "--steps", "2"]):
        assert complete(script, *words) == set()
    done = subprocess.run(["bash", "-c", f"source {script}; complete -p lamamba"], capture_output=True, text=True)
    assert done.stdout == "complete -o default -F _lamamba lamamba\n"


@pytest.mark.parametrize(
    "name", ["a b", "$(touch ran)", "`touch ran`", "*", "[red]", "x;touch ran", 'a"b', "-$(touch ran)"]
)
def test_what_is_typed_is_not_run(script: Path, name: str) -> None:
    for words in ([name], ["train", "--data", name], ["prepare", name], ["train", name, ""]):
        assert complete(script, *words) == set()
    assert not (script.parent / "ran").exists()


@pytest.mark.parametrize("columns", ["40", "300"])
def test_the_width_of_the_terminal_changes_nothing(
    script: Path, columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    main(["completion", "bash"])
    assert capsys.readouterr().out == script.read_text()


def test_every_command_has_its_options() -> None:
    for name, command in COMMANDS.items():
        assert OptionReader(command.config, name).choices or name == "watch", name
    assert {"--out", "--embed-dim", "--no-use-ssm"} < set(OptionReader(COMMANDS["train"].config, "train").choices)


def test_other_shells_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["completion", "fish"])
    assert "no completion for the shell 'fish'" in capsys.readouterr().err
    main(["completion", "--help"])
    assert "completion bash|zsh" in capsys.readouterr().out
