"""The command line: what it understands, how it says no, and that it answers at once."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from forked import run_python
from lamamba import __version__
from lamamba.checkpoints.checkpoint import checkpoints_in
from lamamba.cli import COMMANDS, main
from lamamba.config import PRESETS, OptionReader, TrainConfig
from lamamba.config.options import read_docstrings
from lamamba.config.training import RECIPES, WatchConfig
from lamamba.files.records import read_train_config
from refusals import refusal
from small_network import TINY_NETWORK

TINY = [
    *TINY_NETWORK,
    *("--sample-steps", "1"),
]


def start_run(out: Path) -> Path:
    options = ["--num-images", "8", "--batch-size", "4", "--seed", "7", "--device", "cpu"]
    main(["train", "--preset", "nano", "--data", "builtin", "--out", str(out), *options, *TINY])
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start_run(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        Image.fromarray(np.full((20, 20, 3), index, np.uint8)).save(folder / f"{index}.png")
    return folder


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    line = refusal(capsys, lambda: main(arguments))
    assert re.search("[─│╭╰]", line) is None
    return line


def test_the_readme_spelling_trains(run: Path) -> None:
    config = read_train_config(run / "config.json")
    assert (config.preset, config.data, config.num_images, config.batch_size) == ("nano", "builtin", 8, 4)
    assert (config.seed, config.device, config.out) == (7, "cpu", run)
    assert (config.network.embed_dim, config.network.depths) == (8, (1, 1, 1, 1))
    assert [int(path.name) for path in checkpoints_in(run)] == [4, 8]


def test_a_preset_sets_the_network_and_options_refine_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--data", "builtin", "--out", str(tmp_path / "run"), "--device", "cpu", "--dry-run"]
    main([*arguments, "--preset", "b-256", "--ssm-state-size", "16", "--embed-dim=64"])
    network = json.loads(capsys.readouterr().out)["network"]
    assert (network["embed_dim"], network["ssm_state_size"]) == (64, 16)
    assert network["num_heads"] == PRESETS["b-256"].num_heads
    for repeated in ([], ["--preset", "b-256"]):  # the last one counts
        main([*arguments, *repeated, "--preset=nano"])
        assert json.loads(capsys.readouterr().out)["network"]["embed_dim"] == PRESETS["nano"].embed_dim


def test_a_recipe_sets_the_options_that_are_not_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--recipe=best", "--data", "builtin", "--out", str(tmp_path / "run"), "--device", "cpu"]
    main([*arguments, "--num-images", "2000", "--learning-rate", "0.0001", "--no-horizontal-flip", "--dry-run"])
    config = json.loads(capsys.readouterr().out)
    assert (config["recipe"], config["objective"], config["decay"]) == ("best", "flow", "cosine")
    assert (config["warmup_images"], config["learning_rate"], config["horizontal_flip"]) == (100, 1e-4, False)
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help", "--recipe", "best"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Learning rate of the optimizer. (default: 0.003)" in shown
    assert "mirror makes wrong. (default: on)" in shown


def test_a_run_keeps_its_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--out", str(tmp_path / "run"), "--device", "cpu", "--batch-size", "4"]
    main([*arguments, "--recipe", "best", "--num-images", "8", "--checkpoint-every", "4", *TINY])
    assert "half of the images are mirrored" in capsys.readouterr().out
    shutil.rmtree(checkpoints_in(tmp_path / "run")[-1])
    main(["train", "--out", str(tmp_path / "run"), "--resume"])
    assert "mirrored" not in capsys.readouterr().out
    config = read_train_config(tmp_path / "run" / "config.json")
    assert (config.recipe, config.objective, config.horizontal_flip) == ("best", "flow", True)
    assert "recipe was best, now paper" in refused(
        capsys, ["train", "--out", str(tmp_path / "run"), "--resume", "--recipe", "paper"]
    )
    assert "no option is named --recipe" in refused(
        capsys, ["finetune", "nano", "--out", str(tmp_path / "other"), "--recipe", "best"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no command is named 'trian': did you mean train?"),
        (["train", "--preset", "nanoo", "--out", "OUT"], "no preset is named 'nanoo': did you mean nano?"),
        (["train", "--out", "OUT", "--embed-dim", "10"], "embed_dim is 10: it must be a multiple of 4"),
        (["train", "--out", "OUT", "--num-heads", "3"], "num_heads is 3: it must be a divisor of embed_dim 40"),
        (["train", "--out", "OUT", "--embed-dim", "wide"], "'wide'"),
        (["train", "--out", "OUT", "--depths", "1", "2"], "--depths"),
        (["train", "--out", "OUT", "--batch-size", "0"], "batch_size is 0: it must be 1 or more"),
        (["train", "--out", "OUT", "--accumulate", "65"], "accumulate is 65: it must be at most batch_size 64"),
        (["train", "--out", "OUT", "--learning-rate", "0"], "learning_rate is 0"),
        (["train", "--out", "OUT", "--scan", "spiral"], "--scan takes continuous or raster, not 'spiral'"),
        (["train", "--out", "OUT", "--num-image", "5"], "--num-image"),
        (["train", "--out", "OUT", "stray"], "stray"),
        (["train", "--out"], "--out"),
        (["train"], "--out"),
        (["sample"], "CHECKPOINT"),
        (["train", "--out", "OUT", "--data", "OUT/none"], "OUT/none' is neither a known name nor an existing folder"),
        (["train", "--out", "OUT", "--data", "bultin"], "did you mean 'builtin'?"),
        (["train", "--out", "OUT", "--image-size", "64"], "image_size 64 does not fit data 'builtin'"),
        (["train", "--out", "OUT", "--channels", "2"], "--channels"),
        (["train", "--out", "OUT", "--device", "gpu"], "device 'gpu' cannot be used here"),
        (["sample", "nano", "--size", "31"], "--size takes 2 values (see lamamba sample --help)"),
        (["sample", "nano", "--guidance", "x"], "--guidance takes a number, not 'x'"),
        (["sample", "nano", "--steps", "a"], "--steps takes a whole number, not 'a'"),
        (["train", "--out", "OUT", "--learning-rate", "b"], "--learning-rate takes a number, not 'b'"),
        (["sample", "nanno"], "'nanno' is neither a folder nor a preset: did you mean nano?"),
        (["sample", "xl-256"], "no weights are shipped for xl-256"),
        (["sample", "OUT/none"], "OUT/none does not exist"),
        (["info", "xl-265"], "'xl-265' is neither a folder nor a preset: did you mean xl-256?"),
        (["info", "OUT/none"], "OUT/none does not exist"),
        (["prepare"], "give what to prepare first, imagenet or emoji"),
        (["prepare", "imagnet"], "nothing to prepare is named 'imagnet': did you mean imagenet?"),
        (["prepare", "imagenet"], "--out"),
        (["prepare", "imagenet", "--out", "OUT"], "no ImageNet file is given"),
        (["train", "--data", "x/y", "--out", "OUT", "--splt", "a"], "no option is named --splt: did you mean --split"),
        (["demo", "--port", "65536"], "port is 65536: it must be 0 to 65535"),
        (["demo", "--max-steps", "0"], "max_steps is 0: it must be 1 or more"),
        (["demo", "nano", "nano", "--port", "0"], "must be one or more, named apart"),
        (["info", "nano", "--size", "1", "-1"], "size is (1, -1): it must be a height and a width from 1 to 4,096"),
        (["info", "nano", "--size", "33", "31"], "33 by 31 pixels: both must be even"),
        (["sample", "nano", "--guidance-interval", "5", "1"], "the lower first"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = str(tmp_path / "run")
    line = refused(capsys, [argument.replace("OUT", out) for argument in arguments])
    assert message.replace("OUT", out) in line
    assert not Path(out).exists()


@pytest.mark.parametrize("frame", ["", "PYTHONIOENCODING", "FORCE_COLOR"])
def test_however_the_parser_draws_it_is_one_line(frame: str) -> None:
    variables = {**os.environ, **({frame: "ascii" if "ENCODING" in frame else "1"} if frame else {})}
    command = [sys.executable, "-c", "from lamamba.cli import main; main()", "train", "--out", "x", "--num-image", "5"]
    result = subprocess.run(command, capture_output=True, text=True, env=variables)
    message = "lamamba: error: no option is named --num-image: did you mean --num-images? (see lamamba train --help)\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", message)


def test_a_folder_of_images_and_its_size(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--data", str(images), "--out", str(tmp_path / "run"), "--device", "cpu", "--dry-run"]
    assert "image_size is not set" in refused(capsys, arguments)
    assert "image size 15 is not an even number from 4 up: use 16" in refused(
        capsys, [*arguments, "--image-size", "15"]
    )
    main([*arguments, "--image-size", "16"])
    network = json.loads(capsys.readouterr().out)["network"]
    assert (network["in_channels"], network["sample_size"], network["num_classes"]) == (3, 16, 0)
    (images / "1.png").write_bytes(b"no image")
    arguments.remove("--dry-run")
    line = refused(capsys, [*arguments, "--image-size", "16", "--batch-size", "3", "--num-images", "3", *TINY])
    assert f"{images / '1.png'} cannot be read as an image" in line
    assert "--skip-bad-images" in line


def test_a_corrupt_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = start_run(tmp_path / "run")
    weights = checkpoints_in(run)[-1] / "ema" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    arguments = ["sample", str(run), "--steps", "1", "--out", str(tmp_path / "grid.png")]
    assert f"{weights} is damaged: its checksum does not match" in refused(capsys, arguments)
    assert str(weights) in refused(capsys, ["train", "--out", str(run), "--resume"])
    (run / "config.json").write_text("{")
    assert f"{run / 'config.json'} is not valid JSON" in refused(capsys, ["train", "--out", str(run), "--resume"])


def test_a_label_out_of_range_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sample", str(run), "--labels", "11", "--out", str(tmp_path / "grid.png")]
    assert "label 11 is out of range: use 0 to 9, or 10 for no label" in refused(capsys, arguments)


def test_a_resumed_run_takes_its_options_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options = ["--data", "builtin", "--num-images", "8", "--batch-size", "4", "--device", "cpu", "--horizontal-flip"]
    main(["train", "--out", str(out), *options, *TINY])
    main(["train", "--out", str(out), "--resume", "--horizontal-flip", "--num-images", "12"])
    for resume in ("--resume", "--resume_or_start"):
        changed = ["train", "--out", str(out), resume, "--no-horizontal-flip"]
        line = refused(capsys, changed)
        assert "horizontal_flip was True, now False" in line
        assert "batch_size was" not in line
    distill = ["distill", "--resume", "--out", str(out), "nano"]
    assert "give the checkpoint that" in refused(capsys, distill)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    script = f"{shlex.quote(sys.executable)} -c 'from lamamba.cli import main; main()' train --help | head -1"
    result = subprocess.run(script, shell=True, capture_output=True, text=True)
    assert result.stdout.startswith("usage: lamamba train")
    assert result.stderr == ""


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    run = start_run(tmp_path / "run")
    # A limit on the size of files makes the operating system refuse the write, as a full disk does.
    script = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))
from lamamba.cli import main
main(["train", "--out", {str(run)!r}, "--resume", "--num-images", "12"])
"""
    result = run_python("-c", script)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("lamamba: error: ")]
    assert len(errors) == 1
    assert "could not be written" in errors[0]
    assert "Traceback" not in result.stderr
    assert [int(path.name) for path in checkpoints_in(run)] == [4, 8]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_terminal_is_told_of_loading(monkeypatch: pytest.MonkeyPatch, rank: str) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("RANK", rank)  # of torchrun
    main(["info", "nano"])
    assert terminal.getvalue() == ("" if rank == "1" else "loading PyTorch ...\r\x1b[K")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    shown = capsys.readouterr().out
    assert "usage: lamamba COMMAND" in shown
    assert all(f"  {name} " in shown and command.summary in shown for name, command in COMMANDS.items())
    main(["prepare", "--help"])
    shown = capsys.readouterr().out
    assert "lamamba prepare emoji" in shown
    assert "finetune" not in shown
    main(["--version"])
    assert capsys.readouterr().out.strip() == __version__
    for command, option in (
        ("train", "--num-images"),
        ("sample", "--guidance-interval"),
        ("prepare imagenet", "--devkit"),
        ("encode", "--label-column"),
        ("evaluate", "--nearest-images"),
        ("plan", "--shard"),
        ("demo", "--max-pixels"),
        ("convert", "--preset"),
        ("info", "--size"),
        ("plot", "--frames"),
        ("grid", "--captions"),
        ("doctor", "--json"),
    ):
        with pytest.raises(SystemExit, match="0"):
            main([*command.split(), "--help"])
        shown = capsys.readouterr()
        assert option in shown.out
        assert shown.err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        "['--help']",
        "['--version']",
        "['train', '--help']",
        "['sample', '--help']",
        "['prepare', '--help']",
        "['encode', '--help']",
        "['evaluate', '--help']",
        "['plan', '--help']",
        "['demo', '--help']",
        "['convert', '--help']",
        "['info', '--help']",
        "['plot', '--help']",
        "['grid', '--help']",
        "['doctor', '--help']",
        "['completion', 'bash']",
    ],
)
def test_help_loads_nothing_heavy(arguments: str) -> None:
    script = f"""
import sys
from lamamba.cli import main
try:
    main({arguments})
except SystemExit as end:
    assert not end.code
print("heavy:", sorted({{"torch", "diffusers", "numpy", "matplotlib", "datasets"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("heavy: []\n")
    assert result.stderr == ""


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_is_well_set(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    command = COMMANDS[name]
    with pytest.raises(SystemExit, match="0"):
        OptionReader(command.config, name, command.example).read(["--help"])
    shown = capsys.readouterr().out
    assert f"example: {command.example}" in " ".join(shown.split())
    assert re.search(r"default: (True|False|None|\))|{None", shown) is None
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    for line, following in pairwise(lines):  # no line breaks where the next word would have fitted
        words = following.split()
        if line.startswith(" " * 26) and following.startswith(" " * 26):
            assert len(line) + 1 + len(words[0]) > 78, (line, following)


def test_a_default_is_shown_or_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Learning rate of the optimizer. (default: 0.0001)" in shown
    assert "images seen. (default: 100,000)" in shown
    assert "--cuda-graph, --no-cuda-graph On CUDA, launch the kernels of a step as one CUDA graph" in shown
    assert "(default: on)" in shown
    assert "log; the default is a 100th of the run. --sample-every" in shown
    for command in COMMANDS.values():
        texts, reader = read_docstrings(command.config), OptionReader(command.config, "")
        unset = [entry.name for entry in fields(command.config) if entry.default is None and entry.name in texts]
        if issubclass(command.config, TrainConfig):
            unset = [name for name in unset if name not in RECIPES["paper"] or name == "warmup_images"]
        silent = [name for name in unset if not re.search("default|[Ww]ithout", texts[name])]
        assert silent == []
        assert bool(reader.choices) == (command.config is not WatchConfig)  # which has no options


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["--num-images=2,000", "--batch_size", "5"], {"num_images": 2000, "batch_size": 5}),
        (["--no-cuda-graph", "--cuda-graph", "--shard"], {"cuda_graph": True, "shard": True}),
        (["--power-averages", "0.05", "0.1", "--channels", "3"], {"power_averages": (0.05, 0.1), "channels": 3}),
        (["--power-averages", "--vae", "None"], {"power_averages": (), "vae": None}),
    ],
)
def test_options_become_values(arguments: list[str], values: dict[str, object]) -> None:
    config = OptionReader(TrainConfig, "train", defaults={"vae": Path("v")}).read(["--out", "x", *arguments])
    assert config == TrainConfig(**{"out": Path("x"), "vae": Path("v"), **values})


def test_importing_the_package_loads_nothing_and_prints_nothing() -> None:
    script = "import lamamba, sys; print(sorted({'torch', 'diffusers', 'datasets'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")


@pytest.mark.parametrize("name", ["nano", "xl-256"])
def test_info_prints_stages_and_totals(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from lamamba.model import LaMambaDiff

    main(["info", name])
    shown = capsys.readouterr().out
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in LaMambaDiff.from_preset(name).parameters())
    rows = {line.split("│")[1].strip(): line.split("│")[2:4] for line in shown.splitlines() if line.count("│") == 4}
    assert {"embeddings", "bottleneck", "head", "all"} < rows.keys()
    stages = [int(row[0].replace(",", "")) for stage, row in rows.items() if stage != "all"]
    assert int(rows["all"][0].replace(",", "")) == parameters == sum(stages)
    assert float(rows["all"][1].replace(",", "")) > 0


def test_info_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", str(run), "--size", "16", "48"])
    assert "grid 16x48" in " ".join(capsys.readouterr().out.split())


def test_ctrl_c_while_pytorch_loads_cannot_be_swallowed() -> None:
    program = """
import signal
from contextlib import suppress
signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts tests in the background has it ignored
from lamamba.cli import _loading
with _loading(), suppress(BaseException):
    signal.raise_signal(signal.SIGINT)
print("went on")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "lamamba: interrupted\n")
