"""Scores against closed forms, scipy's matrix square root, brute force, and torchmetrics."""

import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from lamamba.errors import DataError
from lamamba.evaluation import metrics
from lamamba.evaluation.metrics import (
    Gaussian,
    Moments,
    compare_neighbours,
    frechet_distance,
    inception_score,
    kernel_distance,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(features: Tensor) -> Gaussian:
    moments = Moments()
    moments.add(features)
    return moments.gaussian()


def turned(diagonal: Tensor, seed: int) -> Tensor:
    """A covariance with these eigenvalues, whose axes are turned at random."""
    turn = torch.linalg.qr(draw(len(diagonal), len(diagonal), seed=seed)).Q
    return (turn * diagonal) @ turn.T


def test_moments_in_parts_are_those_of_the_whole() -> None:
    features = draw(101, 7) @ draw(7, 7, seed=1) + 3
    moments = Moments()
    for part in features.split([1, 40, 60]):
        moments.add(part)
    found = moments.gaussian()
    assert moments.num_images == 101
    torch.testing.assert_close(found.mean, features.mean(dim=0), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.covariance, torch.cov(features.T), rtol=1e-12, atol=1e-12)


def test_moments_keep_their_digits_far_from_zero() -> None:
    features = draw(200, 5)
    shifted = gaussian(features + 1e7).covariance
    assert (shifted - gaussian(features).covariance).abs().max() < 1e-8


def test_the_distance_of_gaussians_with_common_axes() -> None:
    """|m - n|^2 + sum (sqrt a - sqrt b)^2, for covariances with eigenvalues a and b on the same axes."""
    a, b = draw(40).square() + 0.1, draw(40, seed=1).square() + 0.1
    mean, other_mean = draw(40, seed=2), draw(40, seed=3)
    expected = float((mean - other_mean).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    found = frechet_distance(Gaussian(mean, turned(a, 4)), Gaussian(other_mean, turned(b, 4)))
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_distance_of_one_dimension_by_hand() -> None:
    one, other = (Gaussian(torch.tensor([m]).double(), torch.tensor([[s * s]]).double()) for m, s in ((1, 2), (4, 7)))
    assert frechet_distance(one, other) == pytest.approx((1 - 4) ** 2 + (2 - 7) ** 2, rel=1e-14)


def test_the_distance_with_the_matrix_square_root_of_scipy() -> None:
    one = Gaussian(draw(30), turned(draw(30, seed=1).square() + 0.01, 2))
    other = Gaussian(draw(30, seed=3), turned(draw(30, seed=4).square() + 0.01, 5))
    root = scipy.linalg.sqrtm((one.covariance @ other.covariance).numpy()).real
    means = (one.mean - other.mean).square().sum()
    expected = float(means + one.covariance.trace() + other.covariance.trace() - 2 * np.trace(root))
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-10)


def test_the_distance_of_singular_covariances_keeps_its_digits() -> None:
    """Fewer images than features: eigenvalues that are 0 must not become 1e-8 by the root of their rounding."""
    features = draw(20, 300)
    assert frechet_distance(gaussian(features), gaussian(features.flip(0))) < 1e-10
    a, b = (draw(60, seed=seed).square() * (torch.arange(60) < rank) for seed, rank in ((1, 20), (2, 35)))
    expected = float((a.sqrt() - b.sqrt()).square().sum())
    zero = torch.zeros(60, dtype=torch.float64)
    assert frechet_distance(Gaussian(zero, turned(a, 3)), Gaussian(zero, turned(b, 3))) == pytest.approx(
        expected, rel=1e-11
    )


def test_what_is_no_covariance_is_refused() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    one = Gaussian(zero, torch.eye(3, dtype=torch.float64))
    for diagonal in ([1.0, 1.0, -0.5], [1.0, 1.0, math.inf]):
        with pytest.raises((DataError, RuntimeError)):
            frechet_distance(one, Gaussian(zero, torch.diag(torch.tensor(diagonal, dtype=torch.float64))))


def distance_by_torchmetrics(generated: Tensor, reference: Tensor) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Same(nn.Module):
        num_features = generated.shape[1]

        def forward(self, features: Tensor) -> Tensor:
            return features

    metric = FrechetInceptionDistance(feature=Same())
    metric.update(reference, real=True)
    metric.update(generated, real=False)
    return float(metric.compute())


def test_torchmetrics_has_the_same_distance_and_fewer_digits() -> None:
    generated, reference = draw(300, 20) * 1.2, draw(400, 20, seed=1) + 0.3
    ours = frechet_distance(gaussian(generated), gaussian(reference))
    assert distance_by_torchmetrics(generated, reference) == pytest.approx(ours, rel=1e-10)
    # The same features, all moved by as much: the distance is the same.
    moved = [features + 1e6 for features in (generated, reference)]
    assert frechet_distance(*(gaussian(features) for features in moved)) == pytest.approx(ours, rel=1e-8)
    assert distance_by_torchmetrics(*moved) != pytest.approx(ours, rel=1e-4)
    # Fewer images than features, and a set against itself in another order: the distance is 0.
    few = draw(30, 300)
    assert (
        frechet_distance(gaussian(few), gaussian(few.flip(0))) < 1e-10 < abs(distance_by_torchmetrics(few, few.flip(0)))
    )


def kernel_distance_by_loops(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    among_x = np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])
    among_y = np.mean([kernel(y[i], y[j]) for i in range(len(y)) for j in range(len(y)) if i != j])
    return float(among_x + among_y - 2 * np.mean([kernel(a, b) for a in x for b in y]))


def test_the_kernel_distance_by_loops() -> None:
    x, y = draw(25, 6), draw(25, 6, seed=1) + 0.5
    mean, deviation = kernel_distance(x, y)  # every subset is the whole set
    assert mean == pytest.approx(kernel_distance_by_loops(x.numpy(), y.numpy()), rel=1e-12)
    assert deviation < 1e-12


def test_the_kernel_distance_draws_subsets_by_seed_and_leaves_other_draws_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "KERNEL_SUBSET_SIZE", 20)
    x, y = draw(50, 6), draw(60, 6, seed=1)
    state = torch.get_rng_state()
    first = kernel_distance(x, y, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert kernel_distance(x, y, seed=3) == first
    assert kernel_distance(x, y, seed=4) != first
    assert first[1] > 0
    # Unbiased: two halves of one set are at 0, on average.
    assert abs(first[0]) < 2 * first[1]


def test_the_inception_score_of_known_logits() -> None:
    certain = torch.eye(5, dtype=torch.float64).repeat(8, 1) * 1e3
    assert inception_score(certain)[0] == pytest.approx(5, rel=1e-12), "each of five classes, with certainty"
    assert inception_score(torch.zeros(40, 5))[0] == pytest.approx(1, rel=1e-12), "nothing is known"
    logits = draw(30, 4)
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(axis=1, keepdims=True)
    expected = math.exp(np.mean(np.sum(p * np.log(p / p.mean(axis=0)), axis=1)))
    assert inception_score(logits) == (pytest.approx(expected, rel=1e-12), None)


def test_the_inception_score_of_sorted_images_is_that_of_shuffled_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "IMAGES_PER_SPLIT", 100)
    certain = torch.eye(5, dtype=torch.float64).repeat_interleave(100, dim=0) * 1e3
    mean, deviation = inception_score(certain)
    assert 4.5 < mean < 5, "in parts in order, each would know a single class, and score 1"
    assert deviation is not None
    assert 0 < deviation < 0.5


def test_torchmetrics_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel_distance(draw(5, 2), draw(5, 2))
        inception_score(draw(5, 2))


def neighbours_by_loops(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float, float]:
    """Generated x, reference y."""

    def radius(points: np.ndarray, i: int, k: int) -> float:
        return sorted(math.dist(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]

    r3_x = [radius(x, i, 3) for i in range(len(x))]
    r3_y = [radius(y, i, 3) for i in range(len(y))]
    r5_y = [radius(y, i, 5) for i in range(len(y))]
    precision = np.mean([any(math.dist(a, b) <= r for b, r in zip(y, r3_y, strict=True)) for a in x])
    recall = np.mean([any(math.dist(a, b) <= r for a, r in zip(x, r3_x, strict=True)) for b in y])
    density = np.mean([sum(math.dist(a, b) < r for b, r in zip(y, r5_y, strict=True)) / 5 for a in x])
    coverage = np.mean([any(math.dist(a, b) < r for a in x) for b, r in zip(y, r5_y, strict=True)])
    return float(precision), float(recall), float(density), float(coverage)


@pytest.mark.parametrize("block_bytes", [1, 8 * 70 * 16, 1 << 28], ids=["a row", "16 rows", "all at once"])
def test_neighbours_by_loops(monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr(metrics, "_BLOCK_BYTES", block_bytes)
    x, y = draw(70, 3) * 0.8 + 0.7, draw(50, 3, seed=1)
    found = compare_neighbours(x, y)
    expected = neighbours_by_loops(x.numpy(), y.numpy())
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(expected, abs=1e-12)
    assert all(0 < value < 1 for value in expected), "a case that tells them apart"


def test_neighbours_of_known_sets() -> None:
    """Reference: ten points a unit apart. Balls to the fifth neighbour reach 5, 4, 3, 3, ... from the ends."""
    reference = torch.arange(10.0)[:, None]
    same = compare_neighbours(reference, reference)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    far = compare_neighbours(reference + 1000, reference)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    # Twenty times the first point: it is precise and recalls itself alone; it is in the balls of 0, 1 and 2, while that
    # of 3 ends there.
    collapsed = compare_neighbours(torch.zeros(20, 1), reference)
    assert (collapsed.precision, collapsed.recall) == (1, 0.1)
    assert (collapsed.density, collapsed.coverage) == (3 / 5, 3 / 10)


def test_too_few_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="6 of each"):
        compare_neighbours(draw(5, 2), draw(9, 2))
