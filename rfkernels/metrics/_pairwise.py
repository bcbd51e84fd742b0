"""Samples as matrices, and all distances between two sets a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Numbers in one block of distances: 32 MiB in float64, so that 20 000 x 20 000 pairs fit anywhere.
_BLOCK = 2**22
# Up to this many multiplications, under a second, distances are summed coordinate by coordinate.
# Beyond it by a matrix product, many times faster in high dimension, whose cancellation leaves
# about 1e-8 of the data's scale where points coincide.
_EXACT_WORK = 2**28


def as_matrix(owner: str, name: str, x: Tensor, minimum: int = 1) -> Tensor:
    """(n, ...) samples as (n, d) without gradient in float64, on the CPU if the device has none."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner}: {name} must be a tensor; got {type(x).__name__}")
    if x.is_complex():
        raise TypeError(f"{owner}: {name} must be real; got {x.dtype}")
    if x.ndim == 0 or len(x) < minimum or x.numel() == 0:
        raise ValueError(
            f"{owner}: {name} must be (n, ...) with n at least {minimum}; got {tuple(x.shape)}"
        )
    x = x.detach().reshape(len(x), math.prod(x.shape[1:]))
    return (x.cpu() if x.device.type == "mps" else x).double()


def as_matrices(
    owner: str, names: tuple[str, str], x: Tensor, y: Tensor, minimum: int = 1
) -> tuple[Tensor, Tensor]:
    """Two sets of samples with the same number of coordinates, both on x's device."""
    first = as_matrix(owner, names[0], x, minimum)
    second = as_matrix(owner, names[1], y, minimum).to(first.device)
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"{owner}: {names[1]} must have {first.shape[1]} numbers per sample like {names[0]}; "
            f"got {second.shape[1]}"
        )
    return first, second


def distance_blocks(x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows of x (n, d): the first row's index and (rows, m) distances to y (m, d)."""
    # Distances do not change when both sets move, and near the origin fewer digits cancel.
    centre = y.mean(0)
    x, y = x - centre, y - centre
    exact = len(x) * len(y) * x.shape[1] <= _EXACT_WORK
    mode = "donot_use_mm_for_euclid_dist" if exact else "use_mm_for_euclid_dist"
    rows = max(1, _BLOCK // len(y))
    for start in range(0, len(x), rows):
        yield start, torch.cdist(x[start : start + rows], y, compute_mode=mode)
