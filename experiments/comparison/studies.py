"""Studies of trained networks: samples against steps, clipping, memorization; and the speed of training."""

import json
import statistics
import time
import traceback
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from contestants import COMPILED
from lamamba.data import ArraySource
from lamamba.diffusion import OBJECTIVES
from lamamba.files import atomic_write
from lamamba.sampling import make_grid
from pieces import Clipping, Memorisation, Speed, Steps, Training
from scoring import extract
from setting import Record, Setting, rounded
from training import ComparisonTrainer, forget, load_trained, synchronize

PERCENTILES = (1, 5, 25, 50, 75)
_COLUMNS = 10
_BLOCK = 500  # rows of a block of distances


def score_steps(setting: Setting, piece: Steps) -> None:
    """Score each sampler with each number of steps; existing points are not computed again."""
    denoiser, _ = load_trained(setting, piece.of)
    record = Record(setting, piece, {})
    points = record.rows("points")
    there = {(point["sampler"], point["steps"]) for point in points}
    for steps in setting.scale.step_counts:
        for sampler in OBJECTIVES[denoiser.objective].samplers:
            if (sampler, steps) not in there:
                scores = denoiser.score(setting, setting.scale.num_steps_samples, sampler=sampler, steps=steps)
                evaluations = 2 * steps - 1 if sampler == "heun" else steps
                points.append({**scores, "evaluations": evaluations})
                print(json.dumps(points[-1]), flush=True)
                record.write()
    record.finish()


def score_clipping(setting: Setting, piece: Clipping) -> None:
    """Score the same seeds with and without clipping predicted images to -1 to 1."""
    denoiser, _ = load_trained(setting, piece.of)
    record = Record(setting, piece, {})
    points = record.rows("points")
    for clip_sample in (False, True)[len(points) :]:
        points.append(denoiser.score(setting, setting.scale.num_samples, clip_sample=clip_sample))
        print(json.dumps(points[-1]), flush=True)
        record.write()
    record.finish()


def look_for_copies(setting: Setting, piece: Memorisation) -> None:
    """Compare the distances of samples to their nearest training images with the distances of unseen images.

    For Fashion-MNIST, unseen images are the test images. There are none for emoji, so each training image is compared
    with the others. Distances are root mean square differences of pixels, in levels of 0 to 255, and of features.
    """
    denoiser, source = load_trained(setting, piece.of)
    record = Record(setting, piece, {})
    training = torch.from_numpy(source.images).to(setting.device)
    is_clothes = piece.of.data == "fashion-mnist"
    others = torch.from_numpy(setting.open_test_images(piece.of.data).images).to(setting.device) if is_clothes else None
    spaces: dict[str, Any] = {"pixels": _pixels}
    if is_clothes:
        spaces["features"] = lambda images: extract(setting, "clothes", images)[0]
    samples = {guidance: denoiser.draw(setting, setting.scale.num_nearest, guidance) for guidance in (1.0, 2.0)}
    found = {}
    for space, embed in spaces.items():
        known = embed(training)
        usual, _ = find_nearest(known if others is None else embed(others), known, is_same=others is None)
        threshold = usual.quantile(0.01)
        rows = record.content.setdefault("distances", {}).setdefault(space, {})
        rows["training images to others" if others is None else "test images"] = _summary(usual)
        for guidance, images in samples.items():
            distances, indices = find_nearest(embed(images), known)
            nearer = float((distances < threshold).double().mean())
            rows[f"samples at guidance {guidance:g}"] = {
                **_summary(distances),
                "share_nearer_than_percentile_1": rounded(nearer),
            }
            found[space, guidance] = distances, indices
    distances, _ = found["pixels", 2.0]
    neighbours = [found[space, 2.0][1] for space in spaces]
    for name, chosen in (("nearest", distances.argsort()[:_COLUMNS]), ("first", torch.arange(_COLUMNS))):
        _draw(record, name, samples[2.0], training, chosen[: len(distances)], neighbours)
    record.finish()


def find_nearest(queries: Tensor, known: Tensor, is_same: bool = False) -> tuple[Tensor, Tensor]:
    """Find the nearest row of (m, d) for each row of (n, d).

    Args:
        queries: (n, d).
        known: (m, d).
        is_same: the two are equal, and no row is its own neighbor.

    Returns:
        Root mean square differences (n,), and indices (n,).
    """
    distances, indices = [], []
    squares = known.square().sum(dim=1)
    for start in range(0, len(queries), _BLOCK):
        block = queries[start : start + _BLOCK]
        apart = squares - 2 * block @ known.T  # without the block's own squares, which do not affect the order
        if is_same:
            rows = torch.arange(len(block), device=block.device)
            apart[rows, start + rows] = torch.inf
        nearest = apart.argmin(dim=1)
        indices.append(nearest)
        distances.append((block - known[nearest]).square().mean(dim=1).sqrt())
    return torch.cat(distances), torch.cat(indices)


def _pixels(images: Tensor) -> Tensor:
    return images.flatten(1).double()


def _summary(distances: Tensor) -> dict[str, float]:
    least = {"number": len(distances), "least": rounded(float(distances.min()))}
    return {**least, **{f"percentile_{n}": rounded(float(distances.quantile(n / 100))) for n in PERCENTILES}}


def _draw(
    record: Record, name: str, samples: Tensor, training: Tensor, chosen: Tensor, neighbours: Sequence[Tensor]
) -> None:
    """Draw a row of samples, and a row of neighbors for each kind of distance."""
    chosen = chosen.to(samples.device)
    rows = [samples[chosen], *(training[indices[chosen]] for indices in neighbours)]
    with atomic_write(record.folder / f"{name}.png") as temporary:
        make_grid(torch.cat(rows).cpu().numpy(), len(chosen), scale=1).save(temporary, "PNG")


def time_steps(setting: Setting, piece: Speed) -> None:
    """Time the training step of each network, with and without compilation and CUDA graph. Failures are recorded."""
    record = Record(setting, piece, {})
    cases = record.rows("cases")
    there = {(case["network"], case["compile"], case["cuda_graph"]) for case in cases}
    source: ArraySource = setting.open_training_images("fashion-mnist")
    for network in piece.networks:
        # The package's own network has its own kernels; compiling it was measured before.
        ways = ((True, True), (True, False), (False, True)) if network in COMPILED else ((False, True), (False, False))
        for compile, cuda_graph in ways:
            case: dict[str, Any] = {"network": network, "compile": compile, "cuda_graph": cuda_graph}
            if tuple(case.values()) in there:
                continue
            setting.clock.check_to_begin()
            trained = Training(f"{piece.name}-{network}", network, compile=compile)
            try:
                case |= _time(setting, trained, source, cuda_graph)
            except Exception as error:  # from the compiler, a graph, or lack of memory; the others can still be timed
                traceback.print_exc()
                case["failed"] = f"{type(error).__name__}: {error}"[:500]
            cases.append(case)
            print(json.dumps(case), flush=True)
            record.write()
            forget(setting.device)
    record.finish()


def _time(setting: Setting, piece: Training, source: ArraySource, cuda_graph: bool) -> dict[str, Any]:
    """Time a complete step: reading, noise, gradients, optimizer, EMA."""
    trainer = ComparisonTrainer(setting, piece, source, cuda_graph)
    on_cuda = setting.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(setting.device)
    reader = trainer.batches()
    try:
        start = time.perf_counter()
        for batch in islice(reader, 3):
            trainer.take_step(*batch)
        synchronize(setting.device)
        first_s = time.perf_counter() - start
        speeds = []
        for _ in range(5):
            start = time.perf_counter()
            for batch in islice(reader, max(1, setting.scale.num_timed_steps // 5)):
                trainer.take_step(*batch)
            synchronize(setting.device)
            passed = time.perf_counter() - start
            speeds.append(setting.scale.batch_size * max(1, setting.scale.num_timed_steps // 5) / passed)
    finally:
        trainer.close()
    return {
        "images_per_s": rounded(statistics.median(speeds), 4), "slowest": rounded(min(speeds), 4),
        "fastest": rounded(max(speeds), 4), "first_steps_s": rounded(first_s, 3),
        "peak_gib": rounded(torch.cuda.max_memory_allocated(setting.device) / 2**30, 4) if on_cuda else None,
    }  # fmt: skip
