"""Read a model's weights in every format that diffusers' `save_pretrained` writes, and check that they are complete.

The formats: safetensors or pickles (`.bin`), in one file or several with an index, each also as a variant (fp16, bf16).
Pickles are read with PyTorch's restricted reader, which creates tensors and runs no code.
"""

import json
import pickletools
import re
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typing_extensions import TypedDict

from lamamba.errors import CheckpointError, first_line, reading
from lamamba.files import utf8_path
from lamamba.files.records import read_record

# Name of a complete file or an index. A variant may have any name; numbered parts are listed in an index.
_NAME = re.compile(
    r"(?!.*-\d+-of-\d+\.)"
    r"diffusion_pytorch_model(?:\.(?P<file_variant>.+?))?\.(?P<kind>safetensors|bin)"
    r"(?P<index>\.index\.(?:(?P<variant>.+)\.)?json|\.(?P<old_variant>.+)\.index\.json)?"
)
CONFIG, PIPELINE_INDEX = "config.json", "model_index.json"  # of a model's folder, and of a pipeline's
_VARIANTS = ("", "fp16", "bf16")  # the one with the most bits first
_NUM_LISTED = 5
_DAMAGED = "copy or download the whole folder again"
# No global of a pickle is ever called, but a file that refers to one of these was made to do harm.
_CODE = re.compile(
    r"(os|posix|nt|sys|subprocess|pty|shutil|socket|runpy|importlib|ctypes|code|pdb|webbrowser|multiprocessing|timeit"
    r"|pip)\..+|builtins\.(eval|exec|compile|open|__import__|getattr|setattr|globals|breakpoint)"
)


@dataclass(frozen=True)
class WeightFiles:
    """The files with one set of a model's weights, and the options with which diffusers finds them."""

    files: tuple[Path, ...]
    variant: str | None
    use_safetensors: bool


class _Index(TypedDict):
    weight_map: dict[str, str]


class _ClassRecord(TypedDict, total=False):
    _class_name: str
    architectures: list[str] | None


def class_of(folder: Path) -> str | None:
    """Read the class name of the pipeline or model that diffusers or transformers saved to a folder.

    Raises:
        CheckpointError: the JSON file is damaged.
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
    """Find the weights of a variant in a model's folder; by default of the variant with the most bits.

    Raises:
        CheckpointError: there are none, or a file listed in the index is missing.
    """
    found = [
        (match, path)
        for path in folder.glob("diffusion_pytorch_model*")
        if (match := _NAME.fullmatch(path.name)) and variant in (None, _variant_of(match) or None)
    ]
    if not found:
        raise CheckpointError(
            f"{folder} has no weights: there is no diffusion_pytorch_model.safetensors (or .bin), with or without a "
            "variant or an index"
        )

    def preference(candidate: tuple[re.Match[str], Path]) -> tuple[int, str, bool, bool]:
        match, variant = candidate[0], _variant_of(candidate[0])
        rank = _VARIANTS.index(variant) if variant in _VARIANTS else len(_VARIANTS)
        return rank, variant, match["kind"] == "bin", match["index"] is None  # like diffusers, prefer an index

    match, path = min(found, key=preference)
    files = [path]
    if match["index"] is not None:
        names = sorted(set(read_record(path, _Index)["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name or name in ("", "..")]
        if outside or not names:
            fault = f"{outside[0]!r}, which is not a file beside it" if outside else "no files: its weight_map is empty"
            raise CheckpointError(f"{path} names {fault}")
        files = [folder / name for name in names]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{missing[0]} is missing, but {path} lists it: {_DAMAGED}")
    return WeightFiles(tuple(files), _variant_of(match) or None, match["kind"] == "safetensors")


def _variant_of(match: re.Match[str]) -> str:
    return match["file_variant"] or match["variant"] or match["old_variant"] or ""


def read_weights(found: WeightFiles) -> dict[str, Tensor]:
    """Read weights to the CPU. Files are memory-mapped, except pickles of the format before PyTorch 1.6.

    Raises:
        CheckpointError: a file is damaged or contains something else.
    """
    weights: dict[str, Tensor] = {}
    for path in found.files:
        if found.use_safetensors:
            with reading(f"{path} cannot be read as safetensors", _DAMAGED, CheckpointError):
                weights |= load_file(utf8_path(path))
            continue
        content = read_pickle(path)
        if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
            raise CheckpointError(f"{path} does not contain weights: expected tensors by name")
        weights |= {str(name): value for name, value in content.items()}
    return weights


def describe_weights(found: WeightFiles) -> dict[str, Tensor]:
    """Like `read_weights`, but return tensors on the meta device: names, shapes and dtypes."""
    return {name: value.to("meta") for name, value in read_weights(found).items()}


class _Inert(dict[Any, Any]):
    """An inert replacement for any object in a pickle that is not a tensor."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


def read_pickle(path: Path) -> Any:
    """Read a file that `torch.save` wrote, in the current format or that before PyTorch 1.6, without running code.

    Tensors are memory-mapped if the format allows that. Any other object becomes an inert placeholder.

    Raises:
        CheckpointError: the file is damaged, refers to code, or has tensors that claim more values than it contains.
    """
    try:
        names = _globals_in(path)
        dangerous = sorted(filter(_CODE.fullmatch, names))
        if dangerous:
            name = re.sub(r"^(posix|nt)\.", "os.", dangerous[0])
            raise CheckpointError(
                f"{path} refers to {name}, which is code and does not belong in weights: it was not run, but do not "
                "trust this file or its source"
            )
        with torch.serialization.safe_globals([(_Inert, name) for name in names]), warnings.catch_warnings():
            # We report unreadable files ourselves.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in the unpickler
        # PyTorch's own message advises loading without restrictions, which would run code in the file.
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
    """List the globals that a file's pickles refer to, without running anything."""
    names: set[str] = set()
    with ExitStack() as stack, suppress(ValueError):  # unreadable files fail again on loading
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            members = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            files: list[IO[bytes]] = [stack.enter_context(archive.open(name)) for name in members[:1]]
        else:  # four pickles in a row, then the tensor data: magic number, protocol, machine, content
            files = [stack.enter_context(path.open("rb"))] * 4
        for file in files:
            strings: list[str] = []
            for operation, argument, _place in pickletools.genops(file):
                if operation.name == "GLOBAL":
                    module, _, name = str(argument).partition(" ")
                    # As the reader does: protocol 2 writes Python 2 names.
                    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
                    names.add(f"{module}.{name}")
                elif operation.name == "STACK_GLOBAL":
                    names.add(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    return names


def _check_storage(content: Any, path: Path) -> None:
    """Refuse tensors that are larger than their storage. A pickle can contain these, and only a copy would fail."""
    waiting, known = [content], set[int]()  # a pickle can nest dicts to any depth, and a dict inside itself
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise CheckpointError(
                    f"{path} contains a tensor of shape {tuple(value.shape)} with fewer values than that"
                )
        elif isinstance(value, Mapping) and id(value) not in known:
            known.add(id(value))
            waiting += value.values()


def check_weights(source: str | Path, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Compare the weights found in `source` with the state dict that a model needs, on any device.

    Raises:
        CheckpointError: weights are missing, unexpected, of the wrong shape, not floating point numbers, or not finite
            (unless on the meta device). The message lists the first few of each kind, and how many there are.
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
    """Like `check_weights`, for a model that diffusers loaded, with its `output_loading_info`."""
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


def fill(network: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Load weights into a network on the meta device, converted to its dtypes; raises CheckpointError."""
    wanted = network.state_dict()
    check_weights(source, wanted, weights)
    own = {name: weights[name].to(value.dtype).contiguous() for name, value in wanted.items()}
    network.load_state_dict(own, assign=True)


def check_model(kind: Any, folder: Path, schema: type[Any], variant: str | None = None) -> WeightFiles:
    """Check a folder that `save_pretrained` of a diffusers model wrote, and return the files with its weights.

    Args:
        kind: the class, such as AutoencoderKL.
        folder: the model's folder.
        schema: the schema of its config.json, with limits.
        variant: variant of the weights; see `find_weights`.

    Raises:
        CheckpointError: a value of the configuration is wrong, or weights are missing, unexpected or of the wrong
            shape.
    """
    config = folder / CONFIG
    read_record(config, schema)
    found = find_weights(folder, variant)
    weights = describe_weights(found)
    with (
        reading(f"{config} is not a valid {kind.__name__} configuration", _DAMAGED, CheckpointError),
        torch.device("meta"),
    ):
        model = kind.from_config(json.loads(config.read_text(encoding="utf-8")))
    model._fix_state_dict_keys_on_load(weights)  # autoencoders of 2022 have other names for attention layers
    check_weights(folder, model.state_dict(), weights)
    return found


def load_model(kind: Any, folder: Path, schema: type[Any]) -> Any:
    """Load a diffusers model to the CPU in float32, with the checks of `check_model`; raises CheckpointError."""
    found = check_model(kind, folder, schema)
    with reading(f"{folder} cannot be read as a {kind.__name__}", _DAMAGED, CheckpointError):
        options = {"variant": found.variant, "use_safetensors": found.use_safetensors, "torch_dtype": torch.float32}
        model = kind.from_pretrained(utf8_path(folder), local_files_only=True, low_cpu_mem_usage=False, **options)
    _raise(folder, {"not finite": _not_finite(model.state_dict())})
    return model
