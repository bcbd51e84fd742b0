"""The order of an epoch over data that lies in blocks: blocks are shuffled, and rows within a few of
them together."""

from __future__ import annotations

import torch

from rfkernels.data.dataset import epoch_order
from rfkernels.ops.random import derive_seed

__all__ = ["block_order", "locate"]


def locate(starts: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The block of each row, int64, where block b begins at row starts[b] (ascending; an empty block
    begins where the next one does)."""
    return torch.searchsorted(starts, rows, right=True) - 1


def block_order(
    rows: torch.Tensor, starts: torch.Tensor, *, mix: int, seed: int, epoch: int
) -> torch.Tensor:
    """`rows` in an order that is a function of (seed, epoch): the blocks (shards of a set) are
    permuted, `mix` neighbours of that order form a buffer, and the rows of a buffer are permuted
    together.

    So every row comes once, at any time rows of at most `mix` blocks are read (2 mix - 1 where a
    batch spans two buffers), and position p is known without reading what came before it. This is
    the shuffle of shards and a shuffle buffer, without the state of one.

    Args:
        rows: int64 (n,), distinct.
        starts: first row of each block, int64 (blocks,), ascending from 0.
        mix: blocks per buffer, at least 1. As many as there are blocks: a plain permutation.
        seed, epoch: what the order follows from.
    """
    place = torch.empty_like(starts)
    blocks = epoch_order(len(starts), seed=derive_seed(seed, "blocks"), epoch=epoch)
    place[blocks] = torch.arange(len(starts), device=starts.device)
    shuffled = rows[epoch_order(len(rows), seed=seed, epoch=epoch)]
    buffer = place[locate(starts, shuffled)] // mix
    return shuffled[torch.argsort(buffer, stable=True)]
