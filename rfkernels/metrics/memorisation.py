"""Whether samples are copies of training data: their distance to it against that of unseen data."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rfkernels.metrics.neighbours import nearest_distance

__all__ = ["Memorisation", "memorisation"]

_CLOSE = 0.05


class Memorisation(NamedTuple):
    """What `memorisation` finds.

    Attributes:
        distance: median distance of the samples to their nearest training sample.
        held_out_distance: that of the held-out data, what new samples have.
        ratio: the first over the second. 1: as new as unseen data. Far below: copies. Far above:
            samples unlike the data.
        close: share of samples nearer to a training sample than the nearest 5 % of the held-out
            data are: 0.05 for new samples, and it shows a few copies that the median does not.
    """

    distance: float
    held_out_distance: float
    ratio: float
    close: float


@torch.no_grad()
def memorisation(samples: Tensor, train: Tensor, held_out: Tensor) -> Memorisation:
    """Compares nearest distances to the training data, of samples and of held-out data.

    Distances are Euclidean in the numbers given, so take features for large images. The ratio is
    NaN or infinite where the held-out data repeats the training data.

    Args:
        samples, train, held_out: (n, ...), (m, ...), (k, ...) tensors with the same numbers per
            sample.

    Raises:
        ValueError: for empty sets or sizes that differ per sample.
    """
    return compare_nearest(nearest_distance(samples, train), nearest_distance(held_out, train))


def compare_nearest(nearest: Tensor, held_out: Tensor) -> Memorisation:
    """`memorisation` from the (n,) and (k,) nearest distances themselves."""
    ours, theirs = nearest.median(), held_out.median()
    threshold = torch.quantile(held_out, _CLOSE)
    close = (nearest < threshold).double().mean().item()
    return Memorisation(ours.item(), theirs.item(), (ours / theirs).item(), close)
