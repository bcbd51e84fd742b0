"""Distances between sets of samples that see more than moments: energy, sliced Wasserstein."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rfkernels.metrics._pairwise import as_matrices, distance_blocks
from rfkernels.ops.random import derive_seed, randn

# Numbers in one block of projected samples: 32 MiB in float64.
_BLOCK = 2**22


@torch.no_grad()
def energy_distance(
    samples: Tensor,
    reference: Tensor,
    *,
    estimator: Literal["unbiased", "biased"] = "unbiased",
) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, zero only for equal distributions (Szekely, Rizzo 2013).

    ``unbiased`` leaves a sample's distance to itself out of the two inner means: its expectation is
    the true distance at every n, so for equal distributions it scatters around 0 and is often
    negative. ``biased`` keeps those zeros: never negative, and too large by
    E|X - X'| / n + E|Y - Y'| / m; scipy's ``energy_distance`` is its root. Distances are taken
    block by block, so memory grows with n + m only.

    Args:
        samples, reference: (n, ...) and (m, ...) tensors with the same numbers per sample.
        estimator: "unbiased" (n, m >= 2) or "biased".

    Raises:
        ValueError: for an unknown estimator, too few samples, or sizes that differ per sample.
    """
    if estimator not in ("unbiased", "biased"):
        raise ValueError(
            f"energy_distance: estimator must be unbiased or biased; got {estimator!r}"
        )
    unbiased = estimator == "unbiased"
    x, y = as_matrices(
        "energy_distance", ("samples", "reference"), samples, reference, minimum=1 + unbiased
    )
    across = _distance_sum(x, y) / (len(x) * len(y))
    within = sum(_distance_sum(s, s) / (len(s) * (len(s) - unbiased)) for s in (x, y))
    return 2 * across - within


def _distance_sum(x: Tensor, y: Tensor) -> float:
    total = 0.0
    for start, distances in distance_blocks(x, y):
        if x is y:
            # Exactly 0, which a matrix product does not give.
            distances.diagonal(start).zero_()
        total += distances.sum().item()
    return total


@torch.no_grad()
def sliced_wasserstein(
    samples: Tensor,
    reference: Tensor,
    *,
    order: Literal[1, 2] = 2,
    projections: int = 128,
    seed: int = 0,
) -> float:
    """The Wasserstein distance of one-dimensional projections, averaged over random directions.

    (mean over directions of W_p(projected samples, projected reference)^p)^(1/p) with p = order
    (Bonneel et al. 2015). Each W_p is exact, for unequal sizes too. Directions are uniform on the
    sphere and a function of seed alone.

    Args:
        samples, reference: (n, ...) and (m, ...) tensors with the same numbers per sample.
        order: 1 or 2.
        projections: number of directions, at least 1.
        seed: which directions.

    Raises:
        ValueError: for an argument out of range or sizes that differ per sample.
    """
    if order not in (1, 2):
        raise ValueError(f"sliced_wasserstein: order must be 1 or 2; got {order!r}")
    if projections < 1:
        raise ValueError(f"sliced_wasserstein: projections must be at least 1; got {projections}")
    x, y = as_matrices("sliced_wasserstein", ("samples", "reference"), samples, reference)
    key = derive_seed(seed, "projections")
    directions = randn(projections, x.shape[1], seed=key, dtype=torch.float64)
    directions = (directions / directions.norm(dim=1, keepdim=True)).to(x)
    rows_x, rows_y, widths = _quantile_pairs(len(x), len(y), x.device)
    total = 0.0
    for block in directions.split(max(1, _BLOCK // max(len(x), len(y)))):
        left, right = (torch.sort(block @ s.T, dim=1).values for s in (x, y))
        difference = (left[:, rows_x] - right[:, rows_y]).abs().pow(order)
        total += (difference @ widths.to(difference)).sum().item()
    return (total / projections) ** (1 / order)


def _quantile_pairs(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted positions i, j and weights that couple n equal masses with m equal masses monotonely.

    Both sets' levels are counted in units of 1 / (n m), integers, so that no level is split by
    rounding.
    """
    levels = torch.cat(
        [torch.arange(1, n + 1, device=device) * m, torch.arange(1, m + 1, device=device) * n]
    ).unique()
    widths = torch.diff(levels, prepend=levels.new_zeros(1)).double() / (n * m)
    return (levels - 1) // m, (levels - 1) // n, widths
