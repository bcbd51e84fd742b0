"""Frechet distance between Gaussians fitted to two sets of samples, or of features of them.

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1^(1/2) C2 C1^(1/2))^(1/2)

On Inception features this is FID (Heusel et al. 2017). It sees the first two moments only: a single
Gaussian fitted to the reference scores almost 0, so put a second measure beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rfkernels.metrics._pairwise import as_matrix

Features = Callable[[Tensor], Tensor]


class GaussianStatistics(NamedTuple):
    """Mean (d,) and unbiased covariance (d, d), what a reference set is reduced to once."""

    mean: Tensor
    covariance: Tensor


def gaussian_statistics(samples: Tensor, *, features: Features | None = None) -> GaussianStatistics:
    """Mean and covariance (divided by n - 1) of (n, ...) samples, or of features(samples), float64.

    Raises:
        TypeError: for something that is no real tensor.
        ValueError: for fewer than two samples.
    """
    return _statistics("gaussian_statistics", "samples", samples, features)


@torch.no_grad()
def frechet_distance(
    samples: Tensor | GaussianStatistics,
    reference: Tensor | GaussianStatistics,
    *,
    features: Features | None = None,
) -> float:
    """The squared Frechet (2-Wasserstein) distance between two fitted Gaussians.

    Arithmetic is float64. The last trace is the sum of the singular values of C1^(1/2) C2^(1/2),
    the roots taken by symmetric eigendecomposition with rounding below 0 cut off: never complex,
    and accurate for covariances without full rank (fewer samples than features). The estimate from
    finite sets is biased upward, the more the fewer samples: compare at equal n only.

    Args:
        samples, reference: (n, ...) tensors, or their statistics.
        features: called on a tensor (n, ...), gives (n, ...) features; None compares the numbers
            themselves. Not applied to statistics.

    Returns:
        A float >= 0, or NaN if the input has one.

    Raises:
        TypeError: for something that is neither a real tensor nor statistics.
        ValueError: for fewer than two samples or dimensions that differ.
    """
    first = _statistics("frechet_distance", "samples", samples, features)
    second = _statistics("frechet_distance", "reference", reference, features)
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"frechet_distance: reference must have {len(first.mean)} features like samples; "
            f"got {len(second.mean)}"
        )
    mean, covariance = second.mean.to(first.mean), second.covariance.to(first.mean)
    if not all(bool(torch.isfinite(s).all()) for s in (*first, mean, covariance)):
        return float("nan")
    shared = torch.linalg.svdvals(_root(first.covariance) @ _root(covariance)).sum()
    spread = first.covariance.trace() + covariance.trace() - 2 * shared
    return max(0.0, ((first.mean - mean).square().sum() + spread).item())


def _statistics(
    owner: str, name: str, samples: Tensor | GaussianStatistics, features: Features | None
) -> GaussianStatistics:
    if isinstance(samples, GaussianStatistics):
        mean, covariance = samples
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"{owner}: {name} must have mean (d,) and covariance (d, d); "
                f"got {tuple(mean.shape)} and {tuple(covariance.shape)}"
            )
        return GaussianStatistics(mean.double(), covariance.double())
    if features is not None and isinstance(samples, Tensor):
        with torch.no_grad():
            samples = features(samples)
    matrix = as_matrix(owner, name, samples, minimum=2)
    mean = matrix.mean(0)
    centred = matrix - mean
    return GaussianStatistics(mean, centred.T @ centred / (len(matrix) - 1))


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
