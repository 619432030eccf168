"""Read a model's weights in every form that `save_pretrained` of diffusers writes, and check that they are complete.

The forms: safetensors or pickles (`.bin`), in one file or several with an index, each also as a variant (fp16, bf16).
Pickles are read by PyTorch's restricted reader, which makes tensors and runs nothing.
"""

import io
import json
import pickletools
import re
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from typing_extensions import TypedDict

from lamamba.errors import CheckpointError
from lamamba.files import utf8_path
from lamamba.records import read_record

_NAME = re.compile(  # of a whole file or an index; a variant can have any name, but numbered parts are only in an index
    r"(?!.*-\d+-of-\d+\.)"
    r"diffusion_pytorch_model(?:\.(?P<file_variant>.+?))?\.(?P<kind>safetensors|bin)"
    r"(?P<index>\.index\.(?:(?P<variant>.+)\.)?json|\.(?P<old_variant>.+)\.index\.json)?"
)
CONFIG, PIPELINE_INDEX = "config.json", "model_index.json"  # of a model's folder, and of a pipeline's
_VARIANTS = ("", "fp16", "bf16")  # the one with the most bits first
_NUM_LISTED = 5
# What a pickle may name beside tensors is never called, but a file that names these was made to do harm.
_CODE_MODULES = {
    "os", "posix", "nt", "sys", "subprocess", "pty", "shutil", "socket", "runpy", "importlib", "ctypes", "code", "pdb",
    "webbrowser", "multiprocessing", "timeit", "pip",
}  # fmt: skip
_CODE_BUILTINS = {"eval", "exec", "compile", "open", "__import__", "getattr", "setattr", "globals", "breakpoint"}


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold one set of a model's weights, and how diffusers is asked for them."""

    files: tuple[Path, ...]
    variant: str | None
    use_safetensors: bool


class _Index(TypedDict):
    weight_map: dict[str, str]


class _ClassRecord(TypedDict, total=False):
    _class_name: str
    architectures: list[str] | None


def class_of(folder: Path) -> str | None:
    """Read the class of the pipeline or model that diffusers, or transformers, saved to a folder.

    Raises:
        CheckpointError: a file that says it is damaged.
    """
    for name in (PIPELINE_INDEX, CONFIG):
        if (folder / name).is_file():
            record = read_record(folder / name, _ClassRecord)
            return record.get("_class_name") or next(iter(record.get("architectures") or ()), None)
    return None


def check_class(folder: Path, names: Sequence[str]) -> None:
    """Raise CheckpointError unless a folder holds a model of one of these classes."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no {names[0]}: it has no {CONFIG}")
    found = class_of(folder)
    if found not in names:
        raise CheckpointError(f"{folder} holds {f'a {found}' if found else 'no model of diffusers'}, and no {names[0]}")


def find_weights(folder: Path, variant: str | None = None) -> WeightFiles:
    """Find a model's weights in a folder.

    Args:
        folder: of the model.
        variant: the one wanted; by default the one with the most bits.

    Raises:
        CheckpointError: there are none, or a file that the index names is missing.
    """
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.glob("diffusion_pytorch_model*")]
    found = [
        (match, path) for match, path in matches if match is not None and variant in (None, _variant_of(match) or None)
    ]
    if not found:
        raise CheckpointError(
            f"{folder} has no weights: there is no diffusion_pytorch_model.safetensors (or .bin), with or without a "
            "variant or an index"
        )

    def preference(candidate: tuple[re.Match[str], Path]) -> tuple[int, str, bool, bool]:
        match, variant = candidate[0], _variant_of(candidate[0])
        rank = _VARIANTS.index(variant) if variant in _VARIANTS else len(_VARIANTS)
        return rank, variant, match["kind"] == "bin", match["index"] is None  # as diffusers, which looks for an index

    match, path = min(found, key=preference)
    files = [path]
    if match["index"] is not None:
        names = sorted(set(read_record(path, _Index)["weight_map"].values()))
        outside = [name for name in names if not _is_plain(name)]
        if outside or not names:
            raise CheckpointError(f"{path} names {outside[0]!r}, which is no file beside it" if outside else
                                  f"{path} names no files: its weight_map is empty")  # fmt: skip
        files = [folder / name for name in names]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{missing[0]} is missing, and {path} names it: copy or download the whole folder again")
    return WeightFiles(tuple(files), _variant_of(match) or None, match["kind"] == "safetensors")


def _variant_of(match: re.Match[str]) -> str:
    return match["file_variant"] or match["variant"] or match["old_variant"] or ""


def _is_plain(name: str) -> bool:
    return Path(name).name == name and name not in ("", ".", "..")


def read_weights(found: WeightFiles) -> dict[str, Tensor]:
    """Read weights to the CPU; those of pickles stay on the disk until they are used, where the format allows.

    Raises:
        CheckpointError: a file is damaged or holds something else.
    """
    return _join(found, partial(_of_safetensors, load=lambda path: load_file(utf8_path(path))))


def describe_weights(found: WeightFiles) -> dict[str, Tensor]:
    """Do what `read_weights` does, but give tensors on the meta device: names, shapes and dtypes."""
    return {name: value.to("meta") for name, value in _join(found, partial(_of_safetensors, load=_read_header)).items()}


def _join(found: WeightFiles, of_safetensors: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in found.files:
        weights |= of_safetensors(path) if found.use_safetensors else _of_pickle(path)
    return weights


def _of_safetensors(path: Path, load: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    try:
        return load(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {first_line(error)}") from error


def _read_header(path: Path) -> dict[str, Tensor]:
    described = {}
    with safe_open(utf8_path(path), "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dict
            part = file.get_slice(name)
            shape = part.get_shape()
            dtype = (part[:0] if shape else file.get_tensor(name)).dtype  # reads no values
            described[name] = torch.empty(shape, dtype=dtype, device="meta")
    return described


def _of_pickle(path: Path) -> dict[str, Tensor]:
    content = read_pickle(path)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no weights: expected tensors by name")
    return {str(name): value for name, value in content.items()}


class _Inert(dict[Any, Any]):
    """Stands in for any object a pickle names beside tensors, and does nothing."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


def read_pickle(path: Path) -> Any:
    """Read what `torch.save` wrote, in its present format or the one before 1.6, and run nothing.

    Tensors stay on the disk until they are used, where the format allows. Any other object becomes an inert one.

    Raises:
        CheckpointError: the file is damaged, names code, or holds tensors that claim more values than it has.
    """
    try:
        names = _globals_in(path)
        dangerous = sorted(name for name in names if _is_code(name))
        if dangerous:
            name = re.sub(r"^(posix|nt)\.", "os.", dangerous[0])
            raise CheckpointError(
                f"{path} names {name}, which is code and has no place among weights: nothing of it was run, but do not "
                "trust this file or where it came from"
            )
        with torch.serialization.safe_globals([(_Inert, name) for name in names]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # if it cannot be read, we say so
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in the unpickler
        # PyTorch's own message advises to load the file without restrictions, which would run what is in it.
        detail = re.search(r"WeightsUnpickler error: (.*?)(?= Please use|, but got|$)", str(error), re.MULTILINE)
        said = detail[1] if detail and detail[1] else first_line(error)
        said = type(error).__name__ if "weights_only" in said else said
        raise CheckpointError(
            f"{path} cannot be read as a PyTorch checkpoint ({said}): it is damaged, or was not written by torch.save "
            "with its default pickle protocol"
        ) from error
    _check_storage(content, path)
    return content


def _globals_in(path: Path) -> set[str]:
    """List what a file's pickles name, running nothing."""
    names: set[str] = set()
    with _opened_pickles(path) as (file, number), suppress(ValueError):  # what cannot be read fails again on loading
        for _ in range(number):
            strings: list[str] = []
            for operation, argument, _place in pickletools.genops(file):
                if operation.name == "GLOBAL":
                    module, _, name = str(argument).partition(" ")
                    # As the reader does: protocol 2 writes the names of Python 2.
                    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
                    names.add(f"{module}.{name}")
                elif operation.name == "STACK_GLOBAL":
                    names.add(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    return names


@contextmanager
def _opened_pickles(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """Open a file where its pickles begin, and say how many there are one after the other."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            yield file, 4  # magic number, protocol, machine, content; the bytes of tensors follow
        return
    with zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        with archive.open(members[0]) if members else io.BytesIO() as file:
            yield file, len(members[:1])


def _is_code(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    builtin = module == "builtins" and attribute in _CODE_BUILTINS
    return builtin or module.partition(".")[0] in _CODE_MODULES


def _check_storage(content: Any, path: Path) -> None:
    """A pickle can give a tensor of any size a storage of one value, which only a copy would notice."""
    waiting, known = [content], set[int]()  # a pickle can nest any number of dicts, and a dict in itself
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise CheckpointError(f"{path} holds a tensor of {tuple(value.shape)} with fewer values than that")
        elif isinstance(value, Mapping) and id(value) not in known:
            known.add(id(value))
            waiting += value.values()


def check_weights(source: str | Path, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Compare the weights that were found with those that a model has; any device will do.

    Args:
        source: where they were found, for the error.
        wanted: the model's state dict.
        found: tensors by name.

    Raises:
        CheckpointError: weights are missing, unexpected, of another shape or no floating point numbers, or, off the
            meta device, not finite. The message has the first few of each and how many there are.
    """
    both = [name for name in wanted if name in found]
    shapes = [name for name in both if wanted[name].shape != found[name].shape]
    faults = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "of another shape": [
            f"{name} {tuple(found[name].shape)} instead of {tuple(wanted[name].shape)}" for name in shapes
        ],
        "not of floating point numbers": [
            name for name in both if wanted[name].is_floating_point() != found[name].is_floating_point()
        ],
    }
    if not any(faults.values()):
        faults["not finite"] = _not_finite(found)
    _raise(source, faults)


def check_loaded(source: str | Path, model: nn.Module, info: Mapping[str, Sequence[str]]) -> None:
    """Do what `check_weights` does, with what diffusers says of a model that it loaded (`output_loading_info`)."""
    faults = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"]}
    _raise(source, faults if any(faults.values()) else {"not finite": _not_finite(model.state_dict())})


def _not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    return [
        name
        for name, value in weights.items()
        if not value.is_meta and value.is_floating_point() and not bool(value.isfinite().all())
    ]


def _raise(source: str | Path, faults: Mapping[str, Sequence[str]]) -> None:
    said = [f"{len(names)} {fault} ({_listed(names)})" for fault, names in faults.items() if names]
    if said:
        raise CheckpointError(f"{source} does not hold the weights that its configuration needs: {'; '.join(said)}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NUM_LISTED]) + (", ..." if len(names) > _NUM_LISTED else "")


def first_line(error: BaseException) -> str:
    """Take the first line of an error's text, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def fill(network: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Give a network on the meta device its weights, converted to its dtypes; raises CheckpointError."""
    wanted = network.state_dict()
    check_weights(source, wanted, weights)
    own = {name: weights[name].to(value.dtype).contiguous() for name, value in wanted.items()}
    network.load_state_dict(own, assign=True)


def check_model(kind: Any, folder: Path, schema: type[Any], variant: str | None = None) -> WeightFiles:
    """Check that a folder holds a model of diffusers whole, before it is built: its configuration and its weights.

    Args:
        kind: the class, such as AutoencoderKL.
        folder: where `save_pretrained` wrote it.
        schema: of its config.json, with limits.
        variant: of the weights, see `find_weights`.

    Returns:
        The files with its weights.

    Raises:
        CheckpointError: a value of the configuration is wrong, or weights are missing, unexpected or misshaped.
    """
    config = folder / CONFIG
    read_record(config, schema)
    found = find_weights(folder, variant)
    weights = describe_weights(found)
    try:
        with torch.device("meta"):
            model = kind.from_config(json.loads(config.read_text(encoding="utf-8")))
    except Exception as error:  # diffusers raises many kinds for options that do not fit each other
        raise CheckpointError(f"{config} describes no {kind.__name__} ({first_line(error)})") from error
    model._fix_state_dict_keys_on_load(weights)  # names of attention layers in autoencoders of 2022
    check_weights(folder, model.state_dict(), weights)
    return found


def load_model(kind: Any, folder: Path, schema: type[Any]) -> Any:
    """Load a model of diffusers to the CPU in float32, checked as `check_model` does; raises CheckpointError."""
    found = check_model(kind, folder, schema)
    try:
        model = kind.from_pretrained(
            utf8_path(folder), local_files_only=True, low_cpu_mem_usage=False, torch_dtype=torch.float32,
            variant=found.variant, use_safetensors=found.use_safetensors,
        )  # fmt: skip
    except Exception as error:  # diffusers raises many kinds for a damaged folder
        raise CheckpointError(f"{folder} cannot be read as a {kind.__name__}: {first_line(error)}") from error
    _raise(folder, {"not finite": _not_finite(model.state_dict())})
    return model
