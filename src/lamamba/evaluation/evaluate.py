"""The command `lamamba evaluate`: generated images and a reference -> a table of scores, and JSON with all settings.

For a score that cannot be computed the result says why, and it warns about everything that hinders a comparison.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from rich.table import Column, Table
from torch import Tensor

from lamamba import __version__
from lamamba.config import EvaluateConfig
from lamamba.errors import ConfigError, DataError
from lamamba.evaluation import metrics
from lamamba.evaluation.features import FeatureNetwork, open_features
from lamamba.evaluation.image_sets import ImageSet, Reference, open_images, open_reference, read_settings, show_size
from lamamba.evaluation.metrics import Gaussian, Moments
from lamamba.files import atomic_write, write_text
from lamamba.sampling import choose_device
from lamamba.terminal.output import make_console, progress_bars, say

PUBLISHED_IMAGES = 50_000  # in published FIDs
IMAGES_PER_FEATURE = 10  # with fewer, even two samples of the same set are far apart

NEIGHBORS = ("precision", "recall", "density", "coverage")
# Key in the JSON, with the features of Inception and with others; in the table; and what is better.
NAMES = {
    "distance": ("fid", "fd", "FID", "Fréchet distance", "lower"),
    "spatial": ("sfid", "sfd", "sFID", "spatial Fréchet distance", "lower"),
    "classes": ("inception_score", "class_score", "Inception score", "class score", "higher"),
    "kernel": ("kid", "kd", "KID", "kernel distance", "lower"),
    **{name: (name, name, name, name, "higher") for name in NEIGHBORS},
}


@dataclass(frozen=True)
class Measured:
    """Statistics of a set; features (n, d) and logits (n, c) of its images, float32 on the CPU, if it has images."""

    gaussian: Gaussian
    spatial: Gaussian | None
    features: Tensor | None = None
    logits: Tensor | None = None


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score images, print a table, write the JSON file, and return its content.

    Raises:
        LamambaError: images, reference or network are missing or do not fit each other, or a feature is not finite.
    """
    device = choose_device(config.device)
    exact = device if device.type == "cuda" else torch.device("cpu")  # Apple's GPUs lack float64
    network = open_features(config.features, device, config.pixels)
    generated = open_images(config.generated, config.image_size, config.data_folder)
    reference = open_reference(config.reference, config.image_size, config.data_folder)
    sets = {"generated": generated} | ({"reference": reference.images} if reference.images else {})
    _check(list(sets.values()), reference, network, device)
    if config.out.is_dir():
        raise ConfigError(f"out {config.out} is a folder: give the name of a file in it")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    settings, warned = read_settings(generated)

    with progress_bars("{task.percentage:3.0f} %") as bar:
        measured = {
            name: _measure(images, network, device, exact, config.batch_size, bar(name, images.num_images))
            for name, images in sets.items()
        }
        if reference.features is None:
            theirs = measured["reference"]
        else:  # published statistics and images come from different sets, so do not replace one by the other
            own = measured.get("reference")
            theirs = Measured(reference.features, reference.spatial, own.features if own else None)
        bar("scores", None)
        scores, left_out = _score(measured["generated"], theirs, reference.name, network, config, exact)
    warned += _warn(measured, reference, network)
    wrong = [name for name, value in scores.items() if not math.isfinite(value)]
    if wrong:
        raise DataError(f"{', '.join(wrong)} of {generated.name} and {reference.name} are not finite: check the images")

    result = {
        "scores": scores,
        "left_out": left_out,
        "warnings": warned,
        "features": {
            "name": network.name,
            "file": config.features,
            "sha256": network.sha256,
            "dimension": len(measured["generated"].gaussian.mean),
            "pixels": config.pixels,
        },
        "generated": _describe(generated),
        "reference": {**_describe(reference.images, reference.name), "statistics_sha256": reference.sha256},
        "generation": settings,
        "definitions": {
            "kernel_subsets": metrics.KERNEL_SUBSETS,
            "kernel_subset_size": min(metrics.KERNEL_SUBSET_SIZE, *(images.num_images for images in sets.values())),
            "images_per_split": metrics.IMAGES_PER_SPLIT,
            "manifold_k": metrics.MANIFOLD_K,
            "density_k": metrics.DENSITY_K,
            **{name: getattr(config, name) for name in ("nearest_images", "image_size", "seed")},
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "lamamba": __version__,
        "torch": torch.__version__,
        "torchmetrics": version("torchmetrics") if metrics.HAS_TORCHMETRICS else None,
    }
    with atomic_write(config.out) as temporary:
        write_text(temporary, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    _print(result, network)
    say(f"scores {config.out}")
    return result


def _check(sets: list[ImageSet], reference: Reference, network: FeatureNetwork, device: torch.device) -> None:
    """Check before hours of work that sets, statistics and network fit each other, by the first image of each set."""
    for images in sets:
        if images.num_images < 2:
            raise DataError(f"{images.name} has {images.num_images} image: statistics need 2, and good ones thousands")
    named = {images.name: show_size(images.first_size()) for images in sets}
    taken = [show_size(size) for size in network.sizes]
    for name, size in named.items():
        if taken and size not in taken:
            raise DataError(
                f"{name} has images of {size}, and features {network.name} are of {' or '.join(taken)}: give others "
                "(--features), or image_size (--image-size) to crop a folder's to"
            )
    if len(set(named.values())) > 1 and not taken:
        different = " and ".join(f"{name} has images of {size}" for name, size in named.items())
        raise DataError(
            f"{different}, which scores would compare too: give both in one size, or image_size (--image-size) to "
            "crop the files of folders to"
        )
    _, image = next(sets[0].batches(1, network.channels))
    found = network(image.to(device))
    pooled = ("mu and sigma", reference.features, found.features)
    spatial = ("mu_s and sigma_s", reference.spatial, found.spatial)
    for names, gaussian, features in (pooled, spatial):
        if gaussian is not None and features is not None and len(gaussian.mean) != features.shape[1]:
            raise DataError(
                f"{names} of {reference.name} are of {len(gaussian.mean)} features and {network.name} has "
                f"{features.shape[1]}: give the features they were made with (--features)"
            )


def _measure(
    images: ImageSet,
    network: FeatureNetwork,
    device: torch.device,
    exact: torch.device,
    batch_size: int,
    advance: Callable[[int], None],
) -> Measured:
    """Compute the features of a set in one pass, and their statistics on the device `exact`."""
    moments, spatial_moments = Moments(), Moments()
    features, logits = [], []
    for names, batch in images.batches(batch_size, network.channels):
        found = network(batch.to(device))
        parts = [part for part in (found.features, found.spatial, found.logits) if part is not None]
        bad = torch.stack([~part.isfinite().all(dim=1) for part in parts]).any(dim=0)
        if bad.any():
            raise DataError(
                f"features {network.name} of {names[int(bad.nonzero()[0])]} are not finite: look at that image, or try "
                "device (--device) cpu"
            )
        moments.add(found.features.to(exact))
        features.append(found.features.cpu())
        if found.logits is not None:
            logits.append(found.logits.cpu())
        if found.spatial is not None:
            spatial_moments.add(found.spatial.to(exact))
        advance(len(names))
    spatial = spatial_moments.gaussian() if spatial_moments.num_images else None
    return Measured(moments.gaussian(), spatial, torch.cat(features), torch.cat(logits) if logits else None)


def _score(
    ours: Measured,
    theirs: Measured,
    reference: str,
    network: FeatureNetwork,
    config: EvaluateConfig,
    exact: torch.device,
) -> tuple[dict[str, float], dict[str, str]]:
    """Compute the scores that are possible; return them, and the reasons why others are missing."""
    key = {name: names[0 if network.is_standard else 1] for name, names in NAMES.items()}
    no_torchmetrics = (
        "" if metrics.HAS_TORCHMETRICS else "torchmetrics is not installed: pip install 'lamamba[evaluate]'"
    )
    sets = [part.features.to(exact) for part in (ours, theirs) if part.features is not None]
    no_images = "" if len(sets) == 2 else f"{reference} has statistics and no images"
    scores = {key["distance"]: metrics.frechet_distance(ours.gaussian, theirs.gaussian)}
    left_out: dict[str, str] = {}

    if ours.spatial is None:
        left_out[key["spatial"]] = f"features {network.name} have no spatial part"
    elif theirs.spatial is None:
        left_out[key["spatial"]] = f"{reference} has no mu_s and sigma_s"
    else:
        scores[key["spatial"]] = metrics.frechet_distance(ours.spatial, theirs.spatial)

    if ours.logits is None:
        left_out[key["classes"]] = f"features {network.name} have no classes"
    elif no_torchmetrics:
        left_out[key["classes"]] = no_torchmetrics
    else:
        scores[key["classes"]], deviation = metrics.inception_score(ours.logits, seed=config.seed)
        if deviation is not None:
            scores[f"{key['classes']}_deviation"] = deviation

    if why := no_images or no_torchmetrics:
        left_out[key["kernel"]] = why
    else:
        name = key["kernel"]
        scores[name], scores[f"{name}_deviation"] = metrics.kernel_distance(*sets, seed=config.seed)

    too_few = min(map(len, sets)) <= metrics.DENSITY_K
    if why := no_images or too_few * f"they need {metrics.DENSITY_K + 1} images of each set":
        left_out.update(dict.fromkeys(NEIGHBORS, why))
    else:
        # A random choice of images, the same for each seed.
        draws = (torch.randperm(len(part), generator=torch.Generator().manual_seed(config.seed)) for part in sets)
        most = config.nearest_images
        some = (part if len(part) <= most else part[draw[:most]] for part, draw in zip(sets, draws, strict=True))
        scores.update(vars(metrics.compare_neighbours(*some)))
    return scores, left_out


def _warn(measured: dict[str, Measured], reference: Reference, network: FeatureNetwork) -> list[str]:
    """Warn about everything that makes these scores hard to compare."""
    warned = []
    distance = NAMES["distance"][2 if network.is_standard else 3]
    numbers = {name: len(part.features) for name, part in measured.items() if part.features is not None}
    dimension = len(measured["generated"].gaussian.mean)
    for name, number in numbers.items():
        enough = IMAGES_PER_FEATURE * dimension
        if number < enough and not (name == "reference" and reference.features):
            few, higher = ("too few", "far too high") if number <= dimension else ("few", "higher than of more images")
            warned.append(
                f"{number:,} {name} images are {few} for {dimension:,} features: {distance} is {higher}, and "
                f"comparable only between sets of as many; take {enough:,} or more"
            )
    if network.is_standard and numbers["generated"] < PUBLISHED_IMAGES:
        warned.append(f"published FIDs are of {PUBLISHED_IMAGES:,} images; {numbers['generated']:,} give a higher one")
    if reference.features is not None and not network.is_standard:
        warned.append(
            f"{reference.name} does not say which features its statistics are of; they should be {network.name}"
        )
    return warned


def _describe(images: ImageSet | None, name: str | None = None) -> dict[str, Any]:
    if images is None:
        return {"name": name, "images": None}
    height, width = images.size or (None, None)
    described = {"name": images.name, "images": images.num_images, "height": height, "width": width}
    return {**described, "pixels_sha256": images.pixels_sha256, "left_out_files": images.left_out}


def _print(result: dict[str, Any], network: FeatureNetwork) -> None:
    generated, reference, features = result["generated"], result["reference"], result["features"]
    statistics = "statistics" if reference["statistics_sha256"] else ""
    images = f"{reference['images']:,} images" if reference["images"] else ""
    against = " and ".join(part for part in (statistics, images) if part)
    say(
        f"{generated['images']:,} images of {generated['name']} against {against} of {reference['name']}",
        f"features {features['name']}, {features['dimension']:,} numbers, sha256 {features['sha256'][:12]}",
    )
    for described in (generated, reference):
        if described.get("left_out_files"):
            say(f"left out of {described['name']}: {described['left_out_files']}")
    table = Table("score", Column("value", justify="right"), "better")
    for standard, other, label, other_label, better in NAMES.values():
        name, shown = (standard, label) if network.is_standard else (other, other_label)
        if name in result["scores"]:
            deviation = result["scores"].get(f"{name}_deviation")
            spread = "" if deviation is None else f" ± {deviation:.3g}"
            table.add_row(shown, f"{result['scores'][name]:.5g}{spread}", better)
    make_console().print(table)
    for reason in dict.fromkeys(result["left_out"].values()):
        say(f"left out: {', '.join(name for name, why in result['left_out'].items() if why == reason)}: {reason}")
    for warning in result["warnings"]:
        say(f"warning: {warning}")
