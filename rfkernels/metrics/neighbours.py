"""Nearest-neighbour measures: a two-sample test that a fitted Gaussian fails, and memorisation."""

from __future__ import annotations

import torch
from torch import Tensor

from rfkernels.metrics._pairwise import as_matrices, distance_blocks


@torch.no_grad()
def nearest_neighbour_test(samples: Tensor, reference: Tensor) -> float:
    """Leave-one-out accuracy of a 1-nearest-neighbour classifier told samples from reference.

    Every point of the pooled sets is classified by its nearest other point (Lopez-Paz, Oquab 2017);
    a tie counts one half. 0.5: the sets cannot be told apart. Toward 1: they can. Below 0.5:
    samples sit on top of reference points, copies of them.

    Args:
        samples, reference: (n, ...) tensors of equal size, n at least 2; take held-out reference.

    Returns:
        The accuracy in [0, 1], or NaN if the input has one.

    Raises:
        ValueError: for sets of different sizes or shapes, or fewer than 2 samples.
    """
    owner = "nearest_neighbour_test"
    x, y = as_matrices(owner, ("samples", "reference"), samples, reference, minimum=2)
    if len(x) != len(y):
        raise ValueError(
            f"{owner}: reference must have as many rows as samples, {len(x)}; got {len(y)}"
        )
    correct = 0.0
    for own, other in ((x, y), (y, x)):
        same, across = _nearest(own, own), _nearest(own, other)
        if bool(same.isnan().any() | across.isnan().any()):
            return float("nan")
        correct += (same < across).double().sum().item() + 0.5 * (same == across).sum().item()
    return correct / (2 * len(x))


@torch.no_grad()
def nearest_distance(samples: Tensor, reference: Tensor) -> Tensor:
    """(n,) Euclidean distance of each sample to the nearest reference point, float64.

    Its ``median()`` against training data, next to that of held-out data, tells new samples from
    remembered ones.

    Args:
        samples, reference: (n, ...) and (m, ...) tensors with the same numbers per sample.

    Raises:
        ValueError: for empty sets or sizes that differ per sample.
    """
    x, y = as_matrices("nearest_distance", ("samples", "reference"), samples, reference)
    return _nearest(x, y)


def _nearest(x: Tensor, y: Tensor) -> Tensor:
    """(n,) least distance of each row of x to y; to the other rows where y is x itself."""
    least = []
    for start, distances in distance_blocks(x, y):
        if x is y:
            distances.diagonal(start).fill_(float("inf"))
        least.append(distances.amin(1))
    return torch.cat(least)
