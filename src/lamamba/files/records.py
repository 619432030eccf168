"""Read JSON files that others may have written: limit their size, and check every value against a schema.

A schema is a dataclass (the configurations of `lamamba.config`) or a TypedDict. Unknown keys are ignored, so that files
of later versions and of diffusers can be read.
"""

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_origin, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import from_json
from typing_extensions import TypedDict

from lamamba.config import TrainConfig
from lamamba.errors import CheckpointError, ConfigError, LamambaError

MAX_BYTES = 64 << 20  # enough for a million shards or class names; also limits the memory for parsing
_MAX_SHOWN = 60

Schema = TypeVar("Schema")


def read_record(path: Path, schema: type[Schema], error: type[LamambaError] = CheckpointError) -> Schema:
    """Read a JSON file and check it against a schema.

    The schema is a dataclass or TypedDict. Types are strict: "8" and true are not integers.

    Raises:
        LamambaError: of kind `error`. The file is missing, too large, not UTF-8 or JSON, nested more than 200 levels,
            or a value does not match the schema. The message names the file and the key.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise error(
                f"{path} has {size:,} bytes, more than the limit of {MAX_BYTES:,}: it is not a file of this kind"
            )
        raw = path.read_bytes()
    except OSError as fault:
        raise error(f"{path} cannot be read: {fault.strerror or fault}") from fault
    return parse_record(raw, str(path), schema, error)


class _Format(TypedDict):
    format: Annotated[int, Field(ge=1)]


def read_versioned(
    path: Path, schema: type[Schema], newest: int, error: type[LamambaError] = CheckpointError
) -> Schema:
    """Read a record as `read_record` does, unless its `format` is later than the newest that this version reads."""
    number = read_record(path, _Format, error)["format"]
    if number > newest:
        raise error(f"{path} has format {number}, this version reads {newest}: update lamamba")
    return read_record(path, schema, error)


def parse_record(raw: bytes | str, name: str, schema: type[Schema], error: type[LamambaError]) -> Schema:
    """Check JSON text as `read_record` does. `name` is its source, for errors."""
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
        hidden = _ESCAPES.sub(_hide, text)
        # pydantic accepts NaN and infinity, which JSON does not allow. diffusers writes them, but only for keys that
        # are in no schema, such as lambda_min_clipped of schedulers.
        parsed = from_json(hidden)
        read = parsed
        if isinstance(parsed, dict) and get_origin(schema) is None:
            read = {key: parsed[key] for key in get_type_hints(schema) if key in parsed}
        json.dumps(read, allow_nan=False)
    except ValueError as fault:
        raise error(f"{name} is not valid JSON: {fault}") from fault
    try:
        checked: Schema = TypeAdapter(schema).validate_json(hidden, strict=True)
    except ValidationError as fault:
        raise error(f"{name}: {_first_fault(fault)}") from fault
    except ConfigError as fault:  # configurations check the ranges of their options themselves
        raise error(f"{name}: {fault}") from fault
    return checked if hidden == text else _show(checked)


# File names need not be UTF-8. Python represents such bytes as lone surrogates (U+DC80 and up) and writes them to JSON,
# but pydantic refuses them. So they are replaced by private-use characters during the check.
_ESCAPES = re.compile(r"(?i)\\ud[89ab]..\\ud[c-f]..|\\u(?P<alone>dc[89a-f].)|\\.")
_BYTES = {0x10DC00 + byte: 0xDC00 + byte for byte in range(0x80, 0x100)}


def _hide(escape: re.Match[str]) -> str:
    alone = escape["alone"]
    return chr(0x100000 + int(alone, 16)) if alone else escape[0]


def _show(value: Any) -> Any:
    """Restore the surrogates that `_hide` replaced."""
    if isinstance(value, str):
        return value.translate(_BYTES)
    if isinstance(value, Path):
        return Path(str(value).translate(_BYTES))
    if isinstance(value, list | tuple):
        return type(value)(map(_show, value))
    if isinstance(value, dict):
        return {_show(key): _show(part) for key, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _show(getattr(value, field.name)) for field in fields(value)})
    return value


class _RunRecord(TypedDict, total=False):
    network: dict[str, Any]
    num_images: int


class _Data(TypedDict):
    images: int
    class_names: list[str]
    digest: str


class _Identity(TypedDict):
    data: _Data
    vae: str | None


class OriginRecord(TypedDict, total=False):
    """What a run's config.json records about data and autoencoder beside the options; early versions lack it."""

    identity: _Identity
    paths: dict[Literal["data", "data_folder", "vae", "start_from"], str]


def order_names(names: Mapping[str, str], where: str) -> list[str]:
    """Order class names by label, from a record in which each is under its label; raises CheckpointError."""
    missing = [label for label in map(str, range(len(names))) if label not in names]
    if missing:
        raise CheckpointError(f"{where} names {len(names)} classes, but not {missing[0]}")
    return [names[str(label)] for label in range(len(names))]


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run, with or without checkpoints. Network folders have a config.json too."""
    path = folder / "config.json"
    return path.is_file() and _RunRecord.__optional_keys__ <= read_record(path, _RunRecord).keys()


def plain(config: TrainConfig) -> dict[str, Any]:
    """Convert a configuration to the values that JSON has."""
    return json.loads(json.dumps(asdict(config), default=str))


def changes(before: Mapping[str, Any], now: Mapping[str, Any], ignored: Collection[str] = ()) -> list[str]:
    """Describe each value that differs from the recorded one: "steps was 4, now 2"."""
    return [
        f"{name} was {before.get(name)}, now {value}"
        for name, value in now.items()
        if name not in ignored and before.get(name) != value
    ]


def read_train_config(path: Path) -> TrainConfig:
    """Read the resolved configuration of a run; raises CheckpointError."""
    if not is_run(path.parent):
        raise CheckpointError(f"{path} is not the configuration of a run: it lacks network or num_images")
    config = read_record(path, TrainConfig)
    moved = _find_paths(config, read_record(path, OriginRecord).get("paths", {}))
    # The other options belong to the command that started the run, not to the run.
    return replace(
        config, **moved, resume=False, resume_or_start=False, fall_back=False, allow_changed=(), dry_run=False
    )


def _find_paths(config: TrainConfig, recorded: Mapping[Any, str]) -> dict[str, Any]:
    """Find the paths in a run's configuration that no longer lead to the recorded places.

    A relative path is relative to the folder in which the run was started; its absolute path is recorded.
    """
    found = {}
    for name, place in recorded.items():
        value = getattr(config, name)
        here = None if value is None else Path(value).expanduser()
        if here and os.path.abspath(here) != place and (Path(place).exists() or not here.exists()):
            found[name] = type(value)(place)
    return found


def _first_fault(fault: ValidationError) -> str:
    first, *others = fault.errors(include_url=False)
    key = _key(first["loc"])
    if first["type"] == "missing":
        said = f"{key} is missing"
    else:
        said = f"{key} is {_shown(first['input'])}: {first['msg'].replace('Input should', 'it should')}"
    return said + (f" ({len(others)} more values are wrong)" if others else "")


def _key(places: tuple[str | int, ...]) -> str:
    """Write the location of a value as in Python: class_names[3], network.depths."""
    text = "".join(f"[{place}]" if isinstance(place, int) else f".{place}" for place in places)
    return text.removeprefix(".") or "the content"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


# Limits for what diffusers builds from its files, far beyond any trained model. diffusers itself has no limits.
_Channels = Annotated[int, Field(ge=1, le=8192)]
_Names = Annotated[list[str], Field(min_length=1, max_length=16)]
_Widths = Annotated[list[_Channels], Field(min_length=1, max_length=16)]
_Layers = Annotated[int, Field(ge=1, le=256)]


class AutoencoderRecord(TypedDict, total=False):
    """config.json of an AutoencoderKL."""

    in_channels: _Channels
    out_channels: _Channels
    latent_channels: _Channels
    block_out_channels: _Widths
    down_block_types: _Names
    up_block_types: _Names
    layers_per_block: Annotated[int, Field(ge=1, le=32)]
    act_fn: str
    norm_num_groups: _Channels
    sample_size: Annotated[int, Field(ge=1, le=65536)]
    scaling_factor: Annotated[float, Field(gt=0)]
    shift_factor: float | None
    latents_mean: list[float] | None
    latents_std: list[float] | None
    force_upcast: bool
    use_quant_conv: bool
    use_post_quant_conv: bool
    mid_block_add_attention: bool


class DiTRecord(TypedDict, total=False):
    """config.json of a DiTTransformer2DModel."""

    num_attention_heads: Annotated[int, Field(ge=1, le=1024)]
    attention_head_dim: Annotated[int, Field(ge=1, le=1024)]
    in_channels: _Channels
    out_channels: _Channels | None
    num_layers: _Layers
    dropout: Annotated[float, Field(ge=0, lt=1)]
    norm_num_groups: _Channels
    attention_bias: bool
    sample_size: Annotated[int, Field(ge=1, le=512)]  # size of a table that is computed, not read
    patch_size: Annotated[int, Field(ge=1, le=64)]
    activation_fn: str
    num_embeds_ada_norm: Annotated[int, Field(ge=1, le=1_000_000)]
    upcast_attention: bool
    norm_type: str
    norm_elementwise_affine: bool
    norm_eps: Annotated[float, Field(gt=0)]


class SchedulerRecord(TypedDict, total=False):
    """scheduler_config.json: what determines the noise levels and their number."""

    num_train_timesteps: Annotated[int, Field(ge=1, le=100_000)]
    beta_start: Annotated[float, Field(ge=0, le=1)]
    beta_end: Annotated[float, Field(ge=0, le=1)]
    beta_schedule: str
    trained_betas: Annotated[list[float], Field(max_length=100_000)] | None
    prediction_type: str
    variance_type: str | None
    timestep_spacing: str
    steps_offset: Annotated[int, Field(ge=0, le=100_000)]
    clip_sample: bool | None
    clip_sample_range: float
    thresholding: bool | None
    dynamic_thresholding_ratio: float
    sample_max_value: float
    solver_order: Annotated[int, Field(ge=1, le=16)]
    algorithm_type: str
    solver_type: str
    lower_order_final: bool
    rescale_betas_zero_snr: bool
    set_alpha_to_one: bool
    use_karras_sigmas: bool | None
    use_exponential_sigmas: bool | None
    use_beta_sigmas: bool | None
    use_flow_sigmas: bool | None
    flow_shift: float | None
    shift: float
    use_dynamic_shifting: bool
    final_sigmas_type: str | None
