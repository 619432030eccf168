"""The command line: read a configuration, call one function. Heavy modules load with the command that needs them."""

import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import replace
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any, cast

import tyro

from lamamba import __version__
from lamamba.completion import read_help, write_completion
from lamamba.config import (
    AverageConfig,
    ConvertConfig,
    DemoConfig,
    DoctorConfig,
    EncodeConfig,
    EvaluateConfig,
    GenerateConfig,
    GridConfig,
    InfoConfig,
    Objective,
    PlanConfig,
    PlotConfig,
    PrepareDatasetConfig,
    PrepareEmojiConfig,
    PrepareImagenetConfig,
    PushConfig,
    SampleConfig,
    TrainConfig,
    WatchConfig,
    closest,
    nearest,
    preset,
)
from lamamba.errors import CheckpointError, ConfigError, LamambaError, OtherProcessError, SignalError
from lamamba.streams import StandardStream, standard_streams, visible

_HELP = """\
usage: lamamba COMMAND [OPTIONS]

Linear-time image diffusion: LaMamba-Diff (arXiv 2408.02615), to train, sample and measure.

commands:
  train    train a network on images       lamamba train --preset nano --data builtin --out runs/first
  finetune train on from a checkpoint      lamamba finetune nano --data photos --image-size 32 --out runs/photos
  encode   images to latents, to train on  lamamba encode --data photos --vae vae --image-size 256 --out latents
  prepare  ImageNet's files to folders     lamamba prepare imagenet --train ILSVRC2012_img_train.tar --out imagenet
           or a Hugging Face dataset       lamamba prepare dataset ylecun/mnist --split train --out mnist
           or the Noto emoji               lamamba prepare emoji --out emoji
  average  weights averaged over any span  lamamba average runs/first --sigma-rel 0.07 --out averaged
  watch    follow a run                    lamamba watch runs/first
  convert  released checkpoints, and back  lamamba convert released.pt lamamba-xl
  sample   sample images                   lamamba sample nano --labels 0,1,2 --out grid.png
  generate any number of images, to files  lamamba generate nano --num-images 10000 --out images
  demo     a page to sample in             lamamba demo nano runs/photos
  evaluate score images: FID and others    lamamba evaluate samples fashion-mnist --features clothes
  push     a pipeline to Hugging Face      lamamba push runs/first user/first
  info     count parameters and multiply-adds, stage by stage      lamamba info xl-256
  plan     what a training will take on a cluster                  lamamba plan xl-512 --gpus 64
  plot     curves and samples of runs      lamamba plot runs/first runs/second
  grid     images in a grid                lamamba grid samples --rows 4 --columns 8
  doctor   what works on this machine      lamamba doctor
  completion of the shell's Tab key        eval "$(lamamba completion bash)"

lamamba COMMAND --help explains a command's options.
"""

# Commands that go on, and succeed, when nobody can read what they print.
_WRITE_FILES = {
    "train", "finetune", "encode", "prepare", "average", "convert", "sample", "generate", "evaluate", "push", "plot",
    "grid", "demo",
}  # fmt: skip

_PREPARE_HELP = """\
usage: lamamba prepare imagenet|dataset|emoji [OPTIONS]

Write images to folders that can be trained on; run again, it goes on. A folder of images needs no preparing.

  imagenet  the official files             lamamba prepare imagenet --train ILSVRC2012_img_train.tar --out imagenet
  dataset   of Hugging Face's hub or disk  lamamba prepare dataset ylecun/mnist --split train --out mnist
  emoji     3,786 of Noto, 64 x 64 pixels  lamamba prepare emoji --out emoji

lamamba prepare imagenet --help and the like explain their options.
"""

_COMPLETION_HELP = """\
usage: lamamba completion bash|zsh

Print what makes a shell complete commands, options and their values; say, in ~/.bashrc or ~/.zshrc:

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
    commands = _commands()
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            sys.stdout.write(_HELP)
        elif arguments[0] == "--version":
            sys.stdout.write(f"{__version__}\n")
        elif arguments[0] in commands:
            commands[arguments[0]](arguments[1:])
        else:
            raise LamambaError(f"no command is named {arguments[0]!r}: {nearest(arguments[0], commands)}")
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


def _complain(text: object) -> None:
    sys.stderr.write(f"lamamba: {visible(text)}\n")


def _check_output(output: StandardStream, arguments: list[str]) -> None:
    """Exit with 1 if the output could not be written, for commands whose output is their only result."""
    output.flush()
    if output.failure is None:
        return
    if not isinstance(output.failure, BrokenPipeError):  # else the reader has seen enough, such as `head`
        _complain(f"standard output could not be written: {output.failure.strerror}")
    if not arguments or arguments[0] not in _WRITE_FILES or {"-h", "--help", "--dry-run"} & {*arguments}:
        sys.exit(1)


def _commands() -> dict[str, Callable[[list[str]], None]]:
    return {
        "train": _train,
        "finetune": _finetune,
        "encode": _encode,
        "sample": _sample,
        "generate": _generate,
        "demo": _demo,
        "evaluate": _evaluate,
        "push": _push,
        "prepare": _prepare,
        "average": _average,
        "convert": _convert,
        "watch": _watch,
        "info": _info,
        "plan": _plan,
        "plot": _plot,
        "grid": _grid,
        "doctor": _doctor,
        "completion": _completion,
    }


def _parse(kind: type[Any], command: str, arguments: list[str], default: Any = None) -> Any:
    options = {} if default is None else {"default": default}
    # An option that is already on can be given again where a run is continued, or turned off.
    flags = () if "--resume" in arguments else (tyro.conf.FlagCreatePairsOff,)
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(kind, prog=f"lamamba {command}", args=arguments, config=flags, **options)
    except SystemExit as end:
        if not end.code:
            raise
        fault = _plainly(_unframe(said.getvalue()))
        if unknown := re.match(r"Unrecognized options?: (--[^ ,=]+)", fault):
            known = read_help(lambda rest: _parse(kind, command, rest, default)).options
            if closest(unknown[1], known):
                fault = f"no option is named {unknown[1]}: {nearest(unknown[1], known)}"
        raise LamambaError(f"{fault} (see lamamba {command} --help)") from None


def _unframe(box: str) -> str:
    """Take the text out of the frame that the option parser draws: up to the first rule, below which hints follow."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)  # colours, on a terminal
    lines = [line.strip("│| ") for line in plain.splitlines()[1:]]
    body = dropwhile(_is_rule, lines)  # the title is underlined where a terminal knows no frames
    return " ".join(" ".join(takewhile(lambda line: not _is_rule(line), body)).split()).rstrip(".")


def _plainly(fault: str) -> str:
    """Say what an option takes in place of how the parser failed."""
    for said, meant in (
        (
            r"Error parsing (\S+): no type matching \S+\|{?(.+?)}? could be instantiated from (.*)",
            r"\1 takes \2, not \3",
        ),
        (r"Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)", r"\1 takes a whole number, not \2"),
        (r"Error parsing (\S+): could not convert string to float: (.*)", r"\1 takes a number, not \2"),
    ):
        fault = re.sub(f"^{said}$", meant, fault)
    return fault


def _is_rule(line: str) -> bool:
    return not line.strip("─- ")


@contextmanager
def _loading() -> Iterator[None]:
    """Say on a terminal what takes seconds, from a slow disk a quarter of a minute; what is said is gone after it.

    Ctrl-C ends the process there and then: PyTorch, whose C++ imports numpy, was seen to swallow the exception, and to
    go on without a part of numpy.
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


def _train(arguments: list[str]) -> None:
    config = _parse(TrainConfig, "train", arguments, _train_defaults(arguments))
    with _loading():
        from lamamba.train import train

    train(config)


def _finetune(arguments: list[str]) -> None:
    """Train from a checkpoint, which comes first and decides the network's options."""
    if not arguments or arguments[0].startswith("-"):
        if arguments[:1] not in (["-h"], ["--help"]):
            raise LamambaError(
                "give a checkpoint first: lamamba finetune nano --data photos --image-size 32 --out runs/photos"
            )
        sys.stdout.write(
            "Train on from CHECKPOINT: a run, a checkpoint, shipped weights (nano, emoji-64), a pipeline's folder, or "
            "user/name\non the hub; the options are those of lamamba train.\n\n"
        )
        _parse(TrainConfig, "finetune CHECKPOINT", arguments)
    name, *others = arguments
    out = _peek(others, "--out")
    if "--resume" in others and out is not None and (Path(out) / "config.json").is_file():
        began_with = read_train_config(Path(out) / "config.json").start_from
        if began_with is None or os.path.abspath(began_with) != os.path.abspath(name):
            raise ConfigError(
                f"{out} began with {began_with or 'fresh weights'}, not with {name}: resume it with lamamba train, or "
                "choose another --out"
            )
        _train(others)
        return
    config = _parse(TrainConfig, "finetune CHECKPOINT", others, _finetune_defaults(name))
    with _loading():
        from lamamba.train import train

    train(config)


def _finetune_defaults(name: str) -> TrainConfig:
    with _loading():
        from lamamba.checkpoint import check_network, find_checkpoint, locate

    folder, info = locate(find_checkpoint(name))
    return TrainConfig(
        out=tyro.MISSING,
        start_from=name,
        preset=f"of {name}",
        network=check_network(folder),
        objective=cast(Objective, info.objective),
        vae=Path(info.vae) if info.vae else None,
    )


def _train_defaults(arguments: list[str]) -> Any:
    """Defaults that depend on what is asked: the network's on --preset; with --resume, everything on the run's own."""
    out, name = _peek(arguments, "--out"), _peek(arguments, "--preset")
    if "--resume" in arguments and out is not None and (Path(out) / "config.json").is_file():
        started = read_train_config(Path(out) / "config.json")
        return started if name in (None, started.preset) else replace(started, preset=name, network=preset(name))
    if "--resume" in arguments and out is not None and not {*arguments} - {"--resume", "--out", f"--out={out}", out}:
        raise ConfigError(f"{out} holds no run to resume: correct --out, or say what to train, such as --data photos")
    defaults = TrainConfig(out=tyro.MISSING)
    return defaults if name is None else replace(defaults, preset=name, network=preset(name))


def _peek(arguments: list[str], option: str) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == option and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(option + "="):
            return argument.removeprefix(option + "=")
    return None


def read_train_config(path: Path) -> TrainConfig:
    """Read the resolved configuration that a run wrote; raises CheckpointError."""
    from lamamba.records import OriginRecord, is_run, read_record

    if not is_run(path.parent):
        raise CheckpointError(f"{path} is not a run's configuration: it has no network, or no num_images")
    config = read_record(path, TrainConfig)
    moved = _find_paths(config, read_record(path, OriginRecord).get("paths", {}))
    # What this command asks for, and not the run.
    return replace(config, **moved, resume=False, fall_back=False, allow_changed=(), dry_run=False)


def _find_paths(config: TrainConfig, recorded: Mapping[Any, str]) -> dict[str, Any]:
    """Find the paths in a run's configuration that do not lead from this folder to where they did.

    A relative path starts in the folder that the run was started in, whose place is recorded.
    """
    found = {}
    for name, place in recorded.items():
        value = getattr(config, name)
        here = None if value is None else Path(value).expanduser()
        if here and os.path.abspath(here) != place and (Path(place).exists() or not here.exists()):
            found[name] = type(value)(place)
    return found


def _encode(arguments: list[str]) -> None:
    config = _parse(EncodeConfig, "encode", arguments)
    with _loading():
        from lamamba.encode import encode

    encode(config)


def _preparations() -> dict[str, Callable[[list[str]], None]]:
    return {"imagenet": _prepare_imagenet, "dataset": _prepare_dataset, "emoji": _prepare_emoji}


def _prepare(arguments: list[str]) -> None:
    kinds = _preparations()
    if not arguments:
        raise LamambaError(f"give what to prepare first, {' or '.join(kinds)} (see lamamba prepare --help)")
    if arguments[0] in ("-h", "--help"):
        sys.stdout.write(_PREPARE_HELP)
    elif arguments[0] in kinds:
        kinds[arguments[0]](arguments[1:])
    else:
        hint = nearest(arguments[0], kinds)
        raise LamambaError(f"nothing to prepare is named {arguments[0]!r}: {hint} (see lamamba prepare --help)")


def _prepare_imagenet(arguments: list[str]) -> None:
    config = _parse(PrepareImagenetConfig, "prepare imagenet", arguments)
    with _loading():
        from lamamba.data.imagenet import prepare_imagenet
        from lamamba.output import say

    counts = prepare_imagenet(config.out, train=config.train, validation=config.validation, devkit=config.devkit)
    for split, count in counts.items():
        present = f", {count.num_present:,} were there" if count.num_present else ""
        say(f"{config.out / split}: {count.num_classes:,} classes, {count.num_extracted:,} images extracted{present}")


def _prepare_dataset(arguments: list[str]) -> None:
    config = _parse(PrepareDatasetConfig, "prepare dataset", arguments)
    with _loading():
        from lamamba.data.hugging_face import RECORD, prepare_dataset
        from lamamba.output import say

    counts = prepare_dataset(**vars(config))
    folder = config.out / config.split
    classes = {0: "no classes", 1: "1 class"}.get(counts.num_classes, f"{counts.num_classes:,} classes")
    present = f", {counts.num_present:,} were there" if counts.num_present else ""
    left_out = f", {len(counts.left_out):,} left out ({RECORD} says why)" if counts.left_out else ""
    say(f"{folder}: {classes}, {counts.num_extracted:,} images extracted{present}{left_out}")
    if counts.renumbered:
        say(f"training numbers classes in the order of their folders, unlike the dataset: {folder / RECORD} has both")


def _prepare_emoji(arguments: list[str]) -> None:
    config = _parse(PrepareEmojiConfig, "prepare emoji", arguments)
    with _loading():
        from lamamba.data.emoji import prepare_emoji
        from lamamba.output import say

    counts = prepare_emoji(config.out, source=config.source)
    present = f", {counts.num_present:,} were there" if counts.num_present else ""
    say(f"{config.out}: {counts.num_classes} classes, {counts.num_extracted:,} images extracted{present}")
    say(", ".join(f"{name} {number:,}" for name, number in counts.images_of_class.items()))


def _average(arguments: list[str]) -> None:
    config = _parse(AverageConfig, "average", arguments)
    with _loading():
        from lamamba.averages import average

    average(config)


def _convert(arguments: list[str]) -> None:
    name = _peek(arguments, "--preset")
    default = None
    if name is not None:
        default = ConvertConfig(tyro.MISSING, tyro.MISSING, preset=name, network=preset(name))
    config = _parse(ConvertConfig, "convert", arguments, default)
    with _loading():
        from lamamba.convert import convert

    convert(config)


def _watch(arguments: list[str]) -> None:
    config = _parse(WatchConfig, "watch", arguments)
    with _loading():
        from lamamba.watch import watch

    watch(config)


def _sample(arguments: list[str]) -> None:
    config = _parse(SampleConfig, "sample", arguments)
    with _loading():
        from lamamba.generate import sample_grid

    sample_grid(config)


def _generate(arguments: list[str]) -> None:
    config = _parse(GenerateConfig, "generate", arguments)
    with _loading():
        from lamamba.generate import generate

    generate(config)


def _demo(arguments: list[str]) -> None:
    config = _parse(DemoConfig, "demo", arguments)
    with _loading():
        from lamamba.demo.serving import serve

    serve(config)


def _evaluate(arguments: list[str]) -> None:
    config = _parse(EvaluateConfig, "evaluate", arguments)
    with _loading():
        from lamamba.evaluation.evaluate import evaluate

    evaluate(config)


def _push(arguments: list[str]) -> None:
    config = _parse(PushConfig, "push", arguments)
    with _loading():
        from lamamba.publish import push

    push(config)


def _info(arguments: list[str]) -> None:
    config = _parse(InfoConfig, "info", arguments)
    with _loading():
        from lamamba.cost import print_info

    print_info(config)


def _plan(arguments: list[str]) -> None:
    config = _parse(PlanConfig, "plan", arguments)
    with _loading():
        from lamamba.plan import print_plan

    print_plan(config)


def _plot(arguments: list[str]) -> None:
    config = _parse(PlotConfig, "plot", arguments)
    with _loading():
        from lamamba.plot import plot

    plot(config)


def _grid(arguments: list[str]) -> None:
    config = _parse(GridConfig, "grid", arguments)
    with _loading():
        from lamamba.plot import grid

    grid(config)


def _doctor(arguments: list[str]) -> None:
    config = _parse(DoctorConfig, "doctor", arguments)
    from lamamba.doctor import doctor

    if not doctor(config):
        sys.exit(1)


def _completion(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_COMPLETION_HELP)
    else:
        os.environ["COLUMNS"] = "100"  # wide enough for the help, which is read, to break no option's values
        sys.stdout.write(write_completion(arguments[0], _commands(), _preparations()))
