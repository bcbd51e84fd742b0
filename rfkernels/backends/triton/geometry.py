"""How a call's tensors are cut into programs: host arithmetic over shapes and strides only, no data is touched.

Every kernel walks a table of ``rows`` x ``cols`` elements in tiles of R x C. A row is a sample when scalars or seeds differ
between samples, else the outermost dimension that does not merge with the others (or there is one row). The columns are the
remaining dimensions, merged where every tensor allows it; what is left has sizes ``sizes``, and a tensor's element is at
``row * strides[0] + sum of coordinate * strides[1:]``. Without drawn noise the dimensions are first put into the memory
order of the output, so dense tensors of equal strides (channels_last too) are one contiguous run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

NONE, GLOBAL, PER_SAMPLE = (
    0,
    1,
    2,
)  # noise: not drawn; one element index for the call; restarting in every sample
# Offsets up to here, and the overshoot of a row's last tiles, fit 32 bits.
_INT32 = 2**31 - 2**24

Dim = tuple[int, tuple[int, ...]]  # size, and each tensor's stride


class Geometry(NamedTuple):
    """A table of elements and its tiling; ``arguments`` and ``constants`` are what every kernel takes of it."""

    rows: int
    cols: int
    width: int  # columns to cover: cols, and up to 3 more where noise quads straddle rows
    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]  # of every tensor, or once where all are equal
    tile_rows: int
    tile_cols: int
    vector: int  # elements that neighbouring addresses are promised for, 1 for none
    shift: bool

    @property
    def tiles(self) -> int:
        """Tiles in a row."""
        return max(-(-self.width // self.tile_cols), 1)

    @property
    def programs(self) -> int:
        """Programs that cover the table, one tile each."""
        return -(-self.rows // self.tile_rows) * self.tiles

    @property
    def arguments(self) -> tuple:
        """rows, cols, tiles, sizes, strides."""
        return self.rows, self.cols, self.tiles, self.sizes, self.strides

    @property
    def constants(self) -> dict[str, int | bool]:
        """The compile-time part: tile shape, vector width, index width, noise shift, and whether full tiles go unmasked."""
        extent = max(
            sum((n - 1) * s for n, s in zip(self.sizes, strides[1:], strict=True))
            for strides in self.strides
        )
        wide = max(extent, self.width) >= _INT32
        # A length that is no multiple of 16 hides the alignment of the mask, so the full tiles of one long row drop it.
        ragged = self.rows == 1 and self.cols % 16 != 0 and self.cols > self.tile_cols
        return {
            "R": self.tile_rows, "C": self.tile_cols, "V": self.vector,
            "WIDE": wide, "SHIFT": self.shift, "RAGGED": ragged,
        }  # fmt: skip


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _merge(dims: Sequence[Dim]) -> list[Dim]:
    """Dimensions of size 1 dropped and neighbours joined where one stride steps through both in every tensor."""
    merged: list[Dim] = []
    for size, strides in dims:
        if size == 1:
            continue
        if merged and all(
            outer == inner * size for outer, inner in zip(merged[-1][1], strides, strict=True)
        ):
            merged[-1] = merged[-1][0] * size, strides
        else:
            merged.append((size, strides))
    return merged


def plan(
    tensors: Sequence[torch.Tensor],
    output: int,
    *,
    by_sample: bool,
    noise: int = NONE,
    block: int = 1024,
    widest: int = 1024,
) -> Geometry:
    """The geometry of tensors of one shape.

    Args:
        tensors: all of the kernel's, inputs first.
        output: position of the first output in ``tensors``.
        by_sample: the rows must be the samples (dimension 0).
        noise: ``NONE``, ``GLOBAL`` or ``PER_SAMPLE``; drawn noise fixes the order of the elements.
        block: elements of a tile.
        widest: the most columns of a tile.
    """
    shape = tensors[0].shape
    count = len(tensors)
    if all(t.is_contiguous() for t in tensors):
        rows = shape[0] if by_sample else 1
        cols = math.prod(shape[1:]) if by_sample else math.prod(shape)
        sizes, unit = (cols,), True
        per_tensor = (
            (cols if rows > 1 else 0, 1),
        )  # a stride of 0 keeps the alignment of the only row known
    else:
        dims = [(size, tuple(t.stride(d) for t in tensors)) for d, size in enumerate(shape)]
        head, inner = (dims[0], dims[1:]) if by_sample else ((1, (0,) * count), dims)
        if noise == NONE:
            inner.sort(key=lambda dim: dim[1][output], reverse=True)
        cols = math.prod(size for size, _ in inner)
        inner = _merge(inner) or [(1, (1,) * count)]
        if not by_sample and len(inner) > 1:
            head, inner = inner[0], inner[1:]
            cols //= head[0]
        rows = head[0]
        sizes = tuple(size for size, _ in inner)
        per_tensor = tuple(
            (head[1][k], *(strides[k] for _, strides in inner)) for k in range(count)
        )
        unit = len(inner) == 1 and all(strides[1] == 1 for strides in per_tensor)
        if len(set(per_tensor)) == 1:
            per_tensor = per_tensor[:1]
    shift = noise == GLOBAL and rows > 1 and cols % 4 != 0
    width = cols + 3 if shift else cols
    tile_cols = min(max(_power_of_two(width), 4), widest)
    tile_rows = min(max(block // tile_cols, 1), _power_of_two(rows))
    itemsize = max(t.element_size() for t in tensors)
    # One layout for all tensors of the call: 16 bytes of the widest type, and whole quads of noise.
    vector = (4 if noise else 16 // itemsize) if unit else 1
    return Geometry(rows, cols, width, sizes, per_tensor, tile_rows, tile_cols, vector, shift)
