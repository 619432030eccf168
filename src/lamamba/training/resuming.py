"""Recognize the data and the autoencoder of a run by their contents, not by their paths."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lamamba.config import TrainConfig
from lamamba.data import NAMED_SOURCES, Source
from lamamba.data.latents import identify_autoencoder
from lamamba.errors import CheckpointError

PATH_OPTIONS = ("data", "data_folder", "vae", "start_from")
_MOST_NAMED = 3  # differing classes listed in a message


def describe_origin(config: TrainConfig, source: Source) -> dict[str, Any]:
    """Describe data and autoencoder for a run's config.json, to recognize them when the run is resumed.

    Returns:
        "identity", with "data" (images, class names, digest) and "vae" (digest, or None), and "paths", the absolute
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
    """Compare the data and autoencoder of a run with those of the command that resumes it.

    Args:
        started: content of the run's config.json; early versions did not describe data and autoencoder.
        now: the same for the current command.
        class_names: class names in the run's checkpoint.
        allowed: which of "data" and "vae" may differ.

    Returns:
        Messages about what has moved, and about allowed differences.

    Raises:
        CheckpointError: something differs that may not; the message describes the difference.
    """
    notes, faults = [], []
    fits = len(now["identity"]["data"]["class_names"]) == len(class_names)  # the network has one embedding per class
    for name in ("data", "vae"):
        fault = _compare(name, started, now, class_names)
        was, given = _place(name, started), _place(name, now)
        if fault and name in allowed and (fits or name != "data"):
            notes.append(f"{name} differs from the start of the run, which is allowed: {fault}")
        elif fault:
            faults.append((name, fault))
        elif was != given and "paths" in started:
            notes.append(f"{name} has moved from {was} to {given}; its contents are the same")
    if faults:
        names = " ".join(name for name, _ in faults)
        advice = f"continue anyway with --allow-changed {names}"
        if not fits:
            advice = f"start a run with other classes by lamamba finetune {now['out']}"
        raise CheckpointError(
            f"{now['out']} was trained on something else: {'; '.join(fault for _, fault in faults)}: give the original "
            f"(--{faults[0][0]}), or {advice}"
        )
    return notes


def same_places(started: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """Return the path options that lead to the same place as at the start of the run, however they are written."""
    return {name for name in PATH_OPTIONS if _place(name, started) == _place(name, now)}


def _place(name: str, content: Mapping[str, Any]) -> Any:
    return (content.get("paths") or {}).get(name, content.get(name))


def _compare(name: str, started: Mapping[str, Any], now: Mapping[str, Any], class_names: tuple[str, ...]) -> str | None:
    """Describe how data or autoencoder differ; None if they are the same."""
    given = now["identity"][name]
    if "identity" not in started:  # a run of an early version, which recorded only the path and the class names
        if name == "data" and list(class_names) != given["class_names"]:
            return f"data {now['data']} has {_differ(list(class_names), given['class_names'])}"
        places = {value and os.path.abspath(Path(value).expanduser()) for value in (started.get(name), now[name])}
        return None if len(places) == 1 else f"{name} was {started.get(name)}, now {now[name]}"
    was = started["identity"][name]
    if was == given:
        return None
    if name == "vae":
        return f"vae {now['vae']} differs from {started['vae']} in weights or configuration"
    if was["class_names"] != given["class_names"]:
        return f"data {now['data']} has {_differ(was['class_names'], given['class_names'])}"
    if was["images"] != given["images"]:
        return f"data {now['data']} has {given['images']:,} images, not {was['images']:,}"
    return f"data {now['data']} has as many images, but their file names or sizes differ"


def _differ(was: list[str], given: list[str]) -> str:
    """Describe how two lists of class names differ."""
    gone = [name for name in was if name not in given]
    new = [name for name in given if name not in was]
    parts = [
        f"{what} {', '.join(map(repr, names[:_MOST_NAMED]))}{', ...' * (len(names) > _MOST_NAMED)}"
        for what, names in (("no class", gone), ("a new class", new))
        if names
    ]
    return " and ".join(parts) or "its classes in another order"
