"""Kernel distance between sets of samples, or of features of them: on Inception features, KID.

The squared maximum mean discrepancy with a polynomial kernel (Binkowski et al. 2018),

    k(x, y) = (x . y / d + 1)^3,    mean k(X, X') + mean k(Y, Y') - 2 mean k(X, Y).

Unlike the Frechet distance its estimate is unbiased at every number of samples, so a small set can
be compared with a large one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rfkernels.data.dataset import epoch_order
from rfkernels.metrics._pairwise import as_matrices
from rfkernels.ops.random import derive_seed

__all__ = ["KernelDistance", "kernel_distance"]

Features = Callable[[Tensor], Tensor]


class KernelDistance(NamedTuple):
    """The estimate and its standard error, NaN for a single block."""

    value: float
    standard_error: float


@torch.no_grad()
def kernel_distance(
    samples: Tensor,
    reference: Tensor,
    *,
    features: Features | None = None,
    blocks: int = 10,
    degree: int = 3,
    scale: float | None = None,
    offset: float = 1.0,
    seed: int = 0,
) -> KernelDistance:
    """The unbiased squared MMD, the mean over blocks of both sets, and its standard error.

    Both sets are shuffled by the seed and cut into ``blocks`` parts of nearly equal size. Each pair
    of parts gives an unbiased estimate, these are independent, and their standard deviation over
    the root of their number is the standard error. Around 0 for equal distributions, often below.
    Arithmetic is float64.

    Args:
        samples, reference: (n, ...) and (m, ...) tensors with the same numbers per sample.
        features: called on a tensor (n, ...), gives (n, ...) features; None compares the numbers.
        blocks: parts, at least 1, each of at least two samples of both sets. 1 uses every pair of
            samples and knows no error.
        degree, scale, offset: of the kernel (scale x . y + offset)^degree; scale None is 1 / d.
        seed: of the shuffle.

    Raises:
        ValueError: for too few samples, an argument out of range, or sizes that differ per sample.
    """
    owner = "kernel_distance"
    if blocks < 1 or degree < 1:
        name, value = ("blocks", blocks) if blocks < 1 else ("degree", degree)
        raise ValueError(f"{owner}: {name} must be at least 1; got {value}")
    if features is not None:
        samples, reference = features(samples), features(reference)
    names = ("samples", "reference")
    x, y = as_matrices(owner, names, samples, reference, minimum=2 * blocks)
    scale = 1 / x.shape[1] if scale is None else scale
    parts = [
        s[epoch_order(len(s), seed=derive_seed(seed, "kernel blocks"), epoch=i).to(s.device)]
        for i, s in enumerate((x, y))
    ]
    values = torch.stack(
        [
            _discrepancy(a, b, lambda u, v: (scale * (u @ v.T) + offset).pow(degree))
            for a, b in zip(*(s.tensor_split(blocks) for s in parts), strict=True)
        ]
    )
    error = values.std().item() / blocks**0.5 if blocks > 1 else float("nan")
    return KernelDistance(values.mean().item(), error)


def _discrepancy(x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The unbiased estimate: no sample is compared with itself."""
    within = []
    for s in (x, y):
        matrix = kernel(s, s)
        within.append((matrix.sum() - matrix.trace()) / (len(s) * (len(s) - 1)))
    return within[0] + within[1] - 2 * kernel(x, y).mean()
