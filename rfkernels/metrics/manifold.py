"""How much of the samples lies within the data and how much of the data the samples reach.

Both sets are widened to balls around their points, each as large as the way to the point's k-th
nearest neighbour in its own set. Precision is quality, recall variety; density and coverage are
their counterparts that a few outliers disturb less.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rfkernels.metrics._pairwise import as_matrices, distance_blocks

__all__ = ["DensityCoverage", "PrecisionRecall", "density_coverage", "precision_recall"]


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """density >= 0, around 1 for equal distributions; coverage in [0, 1]."""

    density: float
    coverage: float


@torch.no_grad()
def precision_recall(samples: Tensor, reference: Tensor, *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019).

    Precision: the share of samples that lie in the ball of some reference point. Recall: the share
    of reference points that lie in the ball of some sample. For equal distributions both depend on
    n and on the dimension and are below 1: compare at equal numbers, and with the values of real
    data.

    Args:
        samples, reference: (n, ...) and (m, ...) tensors with the same numbers per sample, of
            features as a rule; n, m > k.
        k: the neighbour whose distance is a ball's radius, the point itself not counted.

    Returns:
        A `PrecisionRecall`, of NaN if the input has one.

    Raises:
        ValueError: for k below 1, too few samples, or sizes that differ per sample.
    """
    x, y = _matrices("precision_recall", samples, reference, k)
    if not _finite(x, y):
        return PrecisionRecall(float("nan"), float("nan"))
    within_data = (_counts(x, y, _radii(y, k)) > 0).double().mean().item()
    within_samples = (_counts(y, x, _radii(x, k)) > 0).double().mean().item()
    return PrecisionRecall(within_data, within_samples)


@torch.no_grad()
def density_coverage(samples: Tensor, reference: Tensor, *, k: int = 5) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020).

    Density: in how many reference balls a sample lies, on average, divided by k. Coverage: the
    share of reference points whose ball holds a sample; for equal distributions and equal numbers
    1 - (n - 1) ... (n - k) / ((2 n - 1) ... (2 n - k)), about 1 - 2^-k.

    Args:
        samples, reference: as `precision_recall`; n at least 1, m > k.
        k: as there.

    Returns:
        A `DensityCoverage`, of NaN if the input has one.

    Raises:
        ValueError: as `precision_recall`.
    """
    x, y = _matrices("density_coverage", samples, reference, k)
    if not _finite(x, y):
        return DensityCoverage(float("nan"), float("nan"))
    radii = _radii(y, k)
    density = _counts(x, y, radii).double().mean().item() / k
    nearest = torch.cat([d.amin(1) for _, d in distance_blocks(y, x)])
    return DensityCoverage(density, (nearest <= radii).double().mean().item())


def _matrices(owner: str, samples: Tensor, reference: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if k < 1:
        raise ValueError(f"{owner}: k must be at least 1; got {k}")
    names = ("samples", "reference")
    minimum = k + 1 if owner == "precision_recall" else 1
    x, y = as_matrices(owner, names, samples, reference, minimum)
    if len(y) <= k:
        raise ValueError(f"{owner}: reference must have more than k = {k} samples; got {len(y)}")
    return x, y


def _finite(*sets: Tensor) -> bool:
    return all(bool(s.isfinite().all()) for s in sets)


def _radii(x: Tensor, k: int) -> Tensor:
    """(n,) distance of each row to its k-th nearest other row."""
    found = []
    for start, distances in distance_blocks(x, x):
        distances.diagonal(start).fill_(float("inf"))
        found.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(found)


def _counts(x: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """(n,) in how many of the balls around the centres each row of x lies."""
    return torch.cat([(d <= radii).sum(1) for _, d in distance_blocks(x, centres)])
