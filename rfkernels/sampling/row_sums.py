"""Sums over the elements of each sample whose bits do not depend on the batch."""

from __future__ import annotations

from torch import Tensor


def row_sums(values: Tensor) -> Tensor:
    """(B,) sums over (B, D) by halving.

    torch.sum may add in another order for another B, and one differing bit changes an adaptive step
    size, or what a sample becomes beside others; elementwise additions cannot.
    """
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        odd = values[:, 2 * half :]
        values = values[:, :half] + values[:, half : 2 * half]
        if odd.shape[1]:
            values[:, :1] += odd
    return values[:, 0]
