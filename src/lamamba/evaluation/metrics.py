"""Scores as functions of features, in float64: (n, d) generated and (m, d) reference features to numbers.

torchmetrics has the kernel distance and the inception score. Its Fréchet distance is not used: it takes no published
statistics, and it loses digits where means are large, because it adds up squares, and where covariances are singular,
because it takes roots of eigenvalues that are 0 but for rounding.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from lamamba.errors import DataError

HAS_TORCHMETRICS = find_spec("torchmetrics") is not None

KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 100, 1000
IMAGES_PER_SPLIT = 5000
MANIFOLD_K, DENSITY_K = 3, 5

_BLOCK_BYTES = 1 << 28  # size of a block of distances


@dataclass(frozen=True)
class Gaussian:
    """A mean (d,) and covariance (d, d), float64."""

    mean: Tensor
    covariance: Tensor


class Moments:
    """Accumulates the mean and covariance of features that arrive in batches, without storing the features."""

    def __init__(self) -> None:
        self.num_images = 0
        self.mean = torch.zeros(())
        self.scatter = torch.zeros(())

    def add(self, features: Tensor) -> None:
        """Add features (b, d); the sums stay on their device, in float64."""
        features = features.to(torch.float64)
        num, mean = len(features), features.mean(dim=0)
        centred = features - mean
        scatter = centred.T @ centred
        # Sum around the means so far (Chan et al. 1979): plain sums of squares lose precision if means are large.
        if self.num_images:
            total, shift = self.num_images + num, mean - self.mean
            scatter += self.scatter + torch.outer(shift, shift) * (self.num_images * num / total)
            mean = self.mean + shift * (num / total)
        self.mean, self.scatter = mean, scatter
        self.num_images += num

    def gaussian(self) -> Gaussian:
        """Return the mean and the unbiased covariance of all features, on the CPU; needs at least two features."""
        return Gaussian(self.mean.cpu(), (self.scatter / (self.num_images - 1)).cpu())


def frechet_distance(generated: Gaussian, reference: Gaussian) -> float:
    """Fréchet distance of two Gaussians: FID, with the features of Inception (Heusel et al. 2017, arXiv 1706.08500).

        |m_g - m_r|^2 + tr S_g + tr S_r - 2 tr (S_g S_r)^(1/2)

    The trace of the root is computed as the sum of singular values of S_g^(1/2) S_r^(1/2), which is the same number,
    and accurate where covariances are singular.

    Raises:
        DataError: a covariance has clearly negative eigenvalues, so it is invalid.
    """
    means = (generated.mean - reference.mean).square().sum()
    traces = generated.covariance.trace() + reference.covariance.trace()
    roots = torch.linalg.svdvals(_root(generated.covariance) @ _root(reference.covariance)).sum()
    return max(0.0, float(means + traces - 2 * roots))  # rounding could make the distance of equal sets negative


def _root(covariance: Tensor) -> Tensor:
    """Compute the symmetric square root."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    largest = eigenvalues[-1].clamp_min(0)
    if eigenvalues[0] < -1e-3 * largest or not largest.isfinite():
        raise DataError(
            f"a covariance has eigenvalues from {float(eigenvalues[0]):.3g} to {float(largest):.3g}, and covariances "
            "have none below 0: compute these statistics again, in float64"
        )
    # Remove rounding errors near 0: the root would turn 1e-16 into 1e-8.
    rounding = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * largest
    return (vectors * eigenvalues.where(eigenvalues > rounding, 0).sqrt()) @ vectors.T


@dataclass(frozen=True)
class Neighbours:
    """Precision, recall, density and coverage; see `compare_neighbours`."""

    precision: float
    recall: float
    density: float
    coverage: float


def compare_neighbours(generated: Tensor, reference: Tensor) -> Neighbours:
    """Compare features (n, d) with (m, d) by balls around each that reach to its k-th nearest neighbour in its own set.

        precision  generated features in a ball of any reference feature, k = 3
        recall     reference features in a ball of any generated feature, k = 3
        density    balls of reference features that a generated one is in, over k, on average, k = 5
        coverage   reference features whose ball has a generated one in it, k = 5

    Precision and recall are those of Kynkäänniemi et al. 2019 (arXiv 1904.06991, eq. 1 and 2) with the k of ADM (arXiv
    2105.05233), with closed balls; density and coverage those of Naeem et al. 2020 (arXiv 2002.09797, eq. 5 and 6),
    with open balls as in their code, which only matters where images are repeated.
    All but density are from 0 to 1. Exact, over blocks of distances of 256 MiB.

    Raises:
        ValueError: a set has 5 features or fewer.
    """
    if min(len(generated), len(reference)) <= DENSITY_K:
        raise ValueError(f"{len(generated)} and {len(reference)} features: {DENSITY_K + 1} of each are the least")
    generated, reference = generated.to(torch.float64), reference.to(torch.float64)
    radii_g, _ = _radii(generated)
    radii_r, wide_radii_r = _radii(reference)
    num_precise = num_balls = 0
    covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    recalled = torch.zeros_like(covered)
    for rows, squares in _distances(generated, reference):
        num_precise += int((squares <= radii_r).any(dim=1).sum())
        recalled |= (squares <= radii_g[rows, None]).any(dim=0)
        inside = squares < wide_radii_r
        num_balls += int(inside.sum())
        covered |= inside.any(dim=0)
    return Neighbours(
        precision=num_precise / len(generated),
        recall=float(recalled.double().mean()),
        density=num_balls / (DENSITY_K * len(generated)),
        coverage=float(covered.double().mean()),
    )


def _radii(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return squared distances of each feature to its neighbours number MANIFOLD_K and DENSITY_K."""
    # The nearest is the feature itself.
    nearest = [squares.topk(1 + DENSITY_K, largest=False).values for _, squares in _distances(features, features)]
    return torch.cat(nearest)[:, MANIFOLD_K], torch.cat(nearest)[:, DENSITY_K]


def _distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield squared distances of some rows of (n, d) to all of (m, d), and which rows."""
    size = max(1, _BLOCK_BYTES // (8 * len(b)))
    squares_of_b = b.square().sum(dim=1)
    for start in range(0, len(a), size):
        rows = slice(start, start + size)
        block = a[rows] @ b.T
        block.mul_(-2).add_(squares_of_b).add_(a[rows].square().sum(dim=1, keepdim=True))
        yield rows, block.clamp_min_(0)


def kernel_distance(generated: Tensor, reference: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """Squared maximum mean discrepancy with the kernel (x.y / d + 1)^3, unbiased: KID (arXiv 1801.01401, section 4).

    Returns:
        Mean and standard deviation over 100 random subsets of 1000 features of each, or as many as there are.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(KERNEL_SUBSET_SIZE, len(generated), len(reference))
    with _quiet_and_seeded(seed):
        metric = KernelInceptionDistance(feature=nn.Identity(), subsets=KERNEL_SUBSETS, subset_size=size)
        metric.update(reference.to(torch.float64), real=True)
        metric.update(generated.to(torch.float64), real=False)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def inception_score(logits: Tensor, *, seed: int = 0) -> tuple[float, float | None]:
    """exp E KL(p(y|x) | p(y)) of logits (n, c): the inception score (Salimans et al. 2016, arXiv 1606.03498).

    Features are shuffled, because images often come sorted by class, and split into parts of about 5000, as ADM has.

    Returns:
        Mean and standard deviation over the parts; a single part has no deviation.
    """
    from torchmetrics.image.inception import InceptionScore

    splits = max(1, len(logits) // IMAGES_PER_SPLIT)
    with _quiet_and_seeded(seed):
        metric = InceptionScore(feature=nn.Identity(), splits=splits)
        metric.update(logits.to(torch.float64))
        mean, deviation = metric.compute()
    return float(mean), float(deviation) if splits > 1 else None


@contextmanager
def _quiet_and_seeded(seed: int) -> Iterator[Any]:
    """Draw the subsets of torchmetrics from a seed, and silence its advice on memory."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(seed)
        yield
