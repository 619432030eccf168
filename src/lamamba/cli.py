"""The command line: a table of commands, each of which reads a configuration and calls one function with it."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

from lamamba import __version__
from lamamba import config as configs
from lamamba.commands.completion import write_completion
from lamamba.config import OptionReader, nearest, preset
from lamamba.config.options import with_dashes
from lamamba.config.training import RECIPES
from lamamba.errors import ConfigError, LamambaError, OtherProcessError, SignalError
from lamamba.terminal.streams import StandardStream, standard_streams, visible


class Command(NamedTuple):
    """A command: the configuration that it reads, and the function that it calls with it."""

    config: type[Any]
    function: str
    """As "module:function"; the module is loaded once the command is known. False means that something is broken."""
    summary: str
    example: str


COMMANDS = {
    "train": Command(
        configs.TrainConfig, "lamamba.training.run:train", "train a network on images",
        "lamamba train --preset nano --data builtin --out runs/first",
    ),
    "finetune": Command(
        configs.FinetuneConfig, "lamamba.training.run:train", "train from a checkpoint's weights",
        "lamamba finetune nano --data photos --image-size 32 --out runs/photos",
    ),
    "distill": Command(
        configs.DistillConfig, "lamamba.commands.distill:distill", "train a student that samples in a few steps",
        "lamamba distill runs/first --steps 4 --out runs/fast",
    ),
    "encode": Command(
        configs.EncodeConfig, "lamamba.commands.encode:encode", "encode images to latents",
        "lamamba encode --data photos --vae vae --image-size 256 --out latents",
    ),
    "prepare imagenet": Command(
        configs.PrepareImagenetConfig, "lamamba.data.imagenet:prepare", "extract the ImageNet files",
        "lamamba prepare imagenet --train ILSVRC2012_img_train.tar --out imagenet",
    ),
    "prepare emoji": Command(
        configs.PrepareEmojiConfig, "lamamba.data.emoji:prepare", "download the Noto emoji",
        "lamamba prepare emoji --out emoji",
    ),
    "average": Command(
        configs.AverageConfig, "lamamba.training.averages:average", "make an EMA of any length",
        "lamamba average runs/first --sigma-rel 0.07 --out averaged",
    ),
    "watch": Command(configs.WatchConfig, "lamamba.commands.watch:watch", "follow a run", "lamamba watch runs/first"),
    "convert": Command(
        configs.ConvertConfig, "lamamba.commands.convert:convert", "convert released checkpoints",
        "lamamba convert released.pt lamamba-xl",
    ),
    "export": Command(
        configs.ExportConfig, "lamamba.commands.export:export", "export to ONNX and C++",
        "lamamba export nano --guidance --out exported",
    ),
    "sample": Command(
        configs.SampleConfig, "lamamba.sampling.generate:sample_grid", "sample a grid of images",
        "lamamba sample nano --labels 0,1,2 --out grid.png",
    ),
    "generate": Command(
        configs.GenerateConfig, "lamamba.sampling.generate:generate", "sample any number of images",
        "lamamba generate nano --num-images 10000 --out images",
    ),
    "demo": Command(
        configs.DemoConfig, "lamamba.demo.serving:serve", "sample in a browser", "lamamba demo nano runs/photos",
    ),
    "evaluate": Command(
        configs.EvaluateConfig, "lamamba.evaluation.evaluate:evaluate", "compute FID and other scores",
        "lamamba evaluate samples fashion-mnist --features clothes",
    ),
    "push": Command(
        configs.PushConfig, "lamamba.commands.push:push", "upload to the Hugging Face hub",
        "lamamba push runs/first user/first",
    ),
    "info": Command(
        configs.InfoConfig, "lamamba.training.cost:print_info", "count parameters and multiply-adds",
        "lamamba info xl-256",
    ),
    "plan": Command(
        configs.PlanConfig, "lamamba.commands.plan:print_plan", "predict training on a cluster",
        "lamamba plan xl-512 --gpus 64",
    ),
    "plot": Command(
        configs.PlotConfig, "lamamba.commands.plot:plot", "plot curves and samples of runs",
        "lamamba plot runs/first runs/second",
    ),
    "grid": Command(
        configs.GridConfig, "lamamba.commands.plot:grid", "arrange images in a grid",
        "lamamba grid samples --rows 4 --columns 8",
    ),
    "doctor": Command(configs.DoctorConfig, "lamamba.commands.doctor:doctor", "check this machine", "lamamba doctor"),
}  # fmt: skip

# Their output is their only result. The others go on when nobody can read what they print, and succeed.
_PRINT_ONLY = ("watch", "info", "plan", "doctor", "completion")

_COMPLETION_HELP = """\
usage: lamamba completion bash|zsh

Print a script that makes the shell complete commands, options and values. Put this line into ~/.bashrc or ~/.zshrc:

  eval "$(lamamba completion bash)"
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; any LamambaError is one line on standard error and exit code 2, or 128 + the signal it was."""
    # GNU's OpenMP lets threads that wait spin for milliseconds; where other programs want the cores too, that makes all
    # wait for each other, at every one of a step's thousand operations. A short while serves an idle machine as well;
    # none would cost it a fifth (benchmarks/results/2026-11-27_development.txt). It is read when torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with standard_streams() as output:
        try:
            _run(arguments)
        except SystemExit as end:
            if end.code:
                raise
            _check_output(output, arguments)  # of --help
            raise
        _check_output(output, arguments)


def _run(arguments: list[str]) -> None:
    try:
        _dispatch(arguments)
    except SignalError as stop:
        if not stop.silent:
            _complain(stop)
        sys.exit(128 + stop.signal)
    except OtherProcessError:
        sys.exit(2)
    except (LamambaError, OSError) as error:  # OSError: a disk that is full or read-only
        _complain(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        _complain("interrupted")
        sys.exit(130)


def _dispatch(arguments: list[str]) -> None:
    """Run the command that the first word names, or the first two."""
    first, second = [*arguments, "", ""][:2]
    kinds = [name.split()[1] for name in COMMANDS if name.startswith(f"{first} ")]
    if first in ("", "-h", "--help"):
        sys.stdout.write(_list_commands(COMMANDS, ("train", "finetune", "sample", "evaluate", "demo")))
    elif first == "--version":
        sys.stdout.write(f"{__version__}\n")
    elif first == "completion":
        _completion(second)
    elif first in COMMANDS:
        _call(first, arguments[1:])
    elif second in kinds:
        _call(f"{first} {second}", arguments[2:])
    elif kinds and second in ("-h", "--help"):
        rows = {f"{first} {kind}": COMMANDS[f"{first} {kind}"] for kind in kinds}
        sys.stdout.write(_list_commands(rows, list(rows)))
    elif (first, second) == ("prepare", "dataset"):
        raise LamambaError("a dataset needs no preparing any more: lamamba train --data NAME reads it as it is")
    elif kinds:
        fault = f"nothing to {first} is named {second!r}: {nearest(second, kinds)}"
        missing = f"give what to {first} first, {' or '.join(kinds)}"
        raise LamambaError(f"{fault if second else missing} (see lamamba {first} --help)")
    else:
        names = dict.fromkeys([*(name.split()[0] for name in COMMANDS), "completion"])
        raise LamambaError(f"no command is named {first!r}: {nearest(first, names)}")


def _call(name: str, arguments: list[str]) -> None:
    command = COMMANDS[name]
    defaults = _DEFAULTS[name](with_dashes(arguments)) if name in _DEFAULTS else {}
    config = OptionReader(command.config, name, command.example, defaults).read(arguments)
    with _loading():
        function = resolve_name(command.function)
    if function(config) is False:
        sys.exit(1)


def _list_commands(commands: Mapping[str, Command], examples: Sequence[str]) -> str:
    """Write the help that lists commands."""
    lines = [f"  {name:<16}  {row.summary}" for name, row in commands.items()]
    if commands == COMMANDS:
        lines.append(f"  {'completion':<16}  make the Tab key complete commands and options")
    listed = "\n".join(lines)
    shown = "\n".join(f"  {commands[name].example}" for name in examples)
    return f"""\
usage: lamamba COMMAND [OPTIONS]

Linear-time image diffusion with LaMamba-Diff (arXiv 2408.02615): train, sample, evaluate.

commands:
{listed}

examples:
{shown}

lamamba COMMAND --help lists the options of a command.
"""


def _completion(shell: str) -> None:
    if shell in ("", "-h", "--help"):
        sys.stdout.write(_COMPLETION_HELP)
    else:
        options = {name: OptionReader(command.config, name).choices for name, command in COMMANDS.items()}
        sys.stdout.write(write_completion(shell, options))


def _complain(text: object) -> None:
    sys.stderr.write(f"lamamba: {visible(text)}\n")


def _check_output(output: StandardStream, arguments: list[str]) -> None:
    """Exit with 1 if the output could not be written, for commands whose output is their only result."""
    output.flush()
    if output.failure is None:
        return
    if not isinstance(output.failure, BrokenPipeError):  # else the reader has seen enough, such as `head`
        _complain(f"standard output could not be written: {output.failure.strerror}")
    if {*arguments[:1]} <= {*_PRINT_ONLY, "--version"} or {"-h", "--help", "--dry-run"} & {*arguments}:
        sys.exit(1)


@contextmanager
def _loading() -> Iterator[None]:
    """Show on a terminal that PyTorch is being loaded, which takes seconds, until it is.

    Ctrl-C ends the process at once: PyTorch was seen to swallow the exception in C++ that imports numpy, and to go on
    with a part of numpy missing.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    shows = sys.stderr.isatty() and is_first

    def end(number: int, frame: object) -> None:
        if is_first:
            with suppress(OSError):
                os.write(2, b"\r\x1b[Klamamba: interrupted\n" if shows else b"lamamba: interrupted\n")
        os._exit(128 + number)

    as_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    catches = as_usual and threading.current_thread() is threading.main_thread()
    if catches:
        signal.signal(signal.SIGINT, end)
    if shows:
        sys.stderr.write("loading PyTorch ...")
        sys.stderr.flush()
    try:
        yield
    finally:
        if catches:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if shows:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _train_defaults(arguments: list[str]) -> dict[str, Any]:
    """Make the defaults of `lamamba train`: of the recipe and the preset; with --resume, all are the run's own."""
    name = _peek(arguments, "--preset")
    started = _run_defaults(arguments)
    if started:
        return started if name == started["preset"] else started | _network_defaults(name)
    return _recipe_defaults(_peek(arguments, "--recipe")) | _network_defaults(name or configs.TrainConfig.preset)


def _recipe_defaults(name: str | None) -> dict[str, Any]:
    # The configuration computes the warm-up from --num-images.
    values = RECIPES.get(name or configs.TrainConfig.recipe, {})
    return {option: value for option, value in values.items() if option != "warmup_images"}


def _network_defaults(name: str | None) -> dict[str, Any]:
    return {} if name is None else {"preset": name, "network": preset(name)}


def _run_defaults(arguments: list[str]) -> dict[str, Any]:
    """Read the options of the run that is to be resumed; none if there is none."""
    out = _peek(arguments, "--out")
    if out is None or not {"--resume", "--resume-or-start"} & {*arguments}:
        return {}
    if not (Path(out) / "config.json").is_file():
        return {}
    from lamamba.files.records import read_train_config

    return vars(read_train_config(Path(out) / "config.json"))


def _finetune_defaults(arguments: list[str]) -> dict[str, Any]:
    """Make the defaults of `lamamba finetune`: the checkpoint's network and objective; with --resume, the run's own."""
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        return _recipe_defaults(None)
    if not name or name.startswith("-"):
        raise LamambaError(f"give a checkpoint first: {COMMANDS['finetune'].example}")
    if started := _run_defaults(arguments):
        _check_start(arguments, started)
        return started
    with _loading():
        from lamamba.checkpoints.checkpoint import check_network, find_checkpoint, locate

    folder, info = locate(find_checkpoint(name))
    return _recipe_defaults(None) | {
        "preset": f"of {name}",
        "network": check_network(folder),
        "objective": info.objective,
        "vae": Path(info.vae) if info.vae else None,
    }


def _distill_defaults(arguments: list[str]) -> dict[str, Any]:
    """Make the defaults of `lamamba distill`: with --resume, the run's own; others are read once the teacher is."""
    started = _run_defaults(arguments)
    if started:
        _check_start(arguments, started)
        if started["distillation"] is None:
            raise ConfigError(f"{_peek(arguments, '--out')} is no distillation: resume it with lamamba train")
    return started


def _check_start(arguments: list[str], started: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the run that is to be resumed started from the checkpoint that is given."""
    out, name, began_with = _peek(arguments, "--out"), arguments[0], started["start_from"]
    if name.startswith("-"):
        raise ConfigError(f"give the checkpoint that {out} started from first, before {name}")
    if began_with is None or os.path.abspath(began_with) != os.path.abspath(name):
        raise ConfigError(
            f"{out} started from {began_with or 'fresh weights'}, not from {name}: resume it with lamamba train, "
            "or choose another --out"
        )


_DEFAULTS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "train": _train_defaults,
    "finetune": _finetune_defaults,
    "distill": _distill_defaults,
    "convert": lambda arguments: _network_defaults(_peek(arguments, "--preset")),
}


def _peek(arguments: list[str], option: str) -> str | None:
    """Return the value of an option before all are parsed. Of a repeated option the last counts, as for the parser."""
    value = None
    for argument, following in pairwise([*arguments, ""]):
        if argument == option:
            value = following or None
        elif argument.startswith(f"{option}="):
            value = argument.removeprefix(f"{option}=")
    return value
