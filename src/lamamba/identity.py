"""What a run trains on, recognized wherever it lies: by its contents, not by its path."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lamamba.config import TrainConfig
from lamamba.data import NAMED_SOURCES, Source
from lamamba.errors import CheckpointError
from lamamba.latents import identify_autoencoder

PATH_OPTIONS = ("data", "data_folder", "vae", "start_from")
_MOST_NAMED = 3  # classes that differ, in a message


def describe_origin(config: TrainConfig, source: Source) -> dict[str, Any]:
    """Describe data and autoencoder for a run's config.json, so that they are recognized when it is resumed.

    Returns:
        "identity" of "data" (images, class names, digest) and of "vae" (digest, or None); and "paths", the absolute
        paths of the options that name existing files or folders.
    """
    data = {"images": len(source), "class_names": list(source.class_names), "digest": source.identify()}
    vae = identify_autoencoder(config.vae) if config.vae else None
    paths = {}
    for name in PATH_OPTIONS:
        value = getattr(config, name)
        if value is not None and not (name == "data" and value in NAMED_SOURCES):
            path = Path(value).expanduser()
            if path.exists():
                paths[name] = os.path.abspath(path)
    return {"identity": {"data": data, "vae": vae}, "paths": paths}


def compare_origin(
    started: Mapping[str, Any], now: Mapping[str, Any], class_names: tuple[str, ...], allowed: tuple[str, ...]
) -> list[str]:
    """Compare what a run was started with and what it is to go on with.

    Args:
        started: content of its config.json, maybe of a version that described no origin.
        now: the same of the present command.
        class_names: of its checkpoint.
        allowed: which may differ, "data" and "vae".

    Returns:
        Lines on what has moved, or differs and is allowed to.

    Raises:
        CheckpointError: something else is given; the message says what differs.
    """
    notes, faults = [], []
    fits = len(now["identity"]["data"]["class_names"]) == len(class_names)  # the network has a row for each class
    for name in ("data", "vae"):
        fault = _compare(name, started, now, class_names)
        was, given = _place(name, started), _place(name, now)
        if fault and name in allowed and (fits or name != "data"):
            notes.append(f"{name} differs from the start of the run, which is allowed: {fault}")
        elif fault:
            faults.append((name, fault))
        elif was != given and "paths" in started:
            notes.append(f"{name} has moved from {was} to {given}, and is the same")
    if faults:
        names = " ".join(name for name, _ in faults)
        advice = f"go on with this by --allow-changed {names}"
        if not fits:
            advice = f"begin a run for other classes with lamamba finetune {now['out']}"
        raise CheckpointError(
            f"{now['out']} was trained on something else: {'; '.join(fault for _, fault in faults)}: give what it was "
            f"trained on (--{faults[0][0]}), or {advice}"
        )
    return notes


def is_same_place(name: str, started: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Say whether a path option names the same place as at the start of the run, maybe spelled otherwise."""
    return name in PATH_OPTIONS and _place(name, started) == _place(name, now)


def _place(name: str, content: Mapping[str, Any]) -> Any:
    return (content.get("paths") or {}).get(name, content.get(name))


def _compare(name: str, started: Mapping[str, Any], now: Mapping[str, Any], class_names: tuple[str, ...]) -> str | None:
    """Say how data or autoencoder differ; None if they are the same."""
    given = now["identity"][name]
    if "identity" not in started:  # an earlier version's run: there are only the path and the names of the classes
        if name == "data" and list(class_names) != given["class_names"]:
            return f"data {now['data']} has {_differ(list(class_names), given['class_names'])}"
        places = {value and os.path.abspath(Path(value).expanduser()) for value in (started.get(name), now[name])}
        return None if len(places) == 1 else f"{name} was {started.get(name)}, now {now[name]}"
    was = started["identity"][name]
    if was == given:
        return None
    if name == "vae":
        return f"vae {now['vae']} has other weights or another configuration than {started['vae']}"
    if was["class_names"] != given["class_names"]:
        return f"data {now['data']} has {_differ(was['class_names'], given['class_names'])}"
    if was["images"] != given["images"]:
        return f"data {now['data']} has {given['images']:,} images, not {was['images']:,}"
    return f"data {now['data']} has as many images, but other names or sizes of files"


def _differ(was: list[str], given: list[str]) -> str:
    """Say how two lists of class names differ."""
    gone = [name for name in was if name not in given]
    new = [name for name in given if name not in was]
    parts = [
        f"{what} {', '.join(map(repr, names[:_MOST_NAMED]))}{', ...' * (len(names) > _MOST_NAMED)}"
        for what, names in (("no class", gone), ("a new class", new))
        if names
    ]
    return " and ".join(parts) or "its classes in another order"
