"""Two-dimensional toy distributions; every sample is a function of (seed, index), so a stream never
ends or repeats."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from rfkernels.data.dataset import Dataset, Rows
from rfkernels.ops.random import derive_seed, rand, randn

__all__ = ["TOYS", "ToyStream", "toy"]

# Each takes u (B, 4) uniform in [0, 1) and z (B, 2) standard normal, and returns points (B, 2) with
# labels (B,).
_Maker = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _ring(u: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight Gaussians of standard deviation 0.5 on a circle of radius 4; the label says which."""
    label = (u[:, 0] * 8).long().clamp(max=7)
    angle = label * (math.pi / 4)
    return 4 * torch.stack((angle.cos(), angle.sin()), dim=1) + 0.5 * z, label


def _moons(u: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two interleaved half circles, centred and with a spread near one; noise 0.1."""
    label = (u[:, 0] >= 0.5).long()
    angle = math.pi * u[:, 1]
    x = torch.where(label == 0, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(label == 0, angle.sin(), 0.5 - angle.sin()) - 0.25
    return 2 * torch.stack((x, y), dim=1) + 0.1 * z, label


def _checkerboard(u: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The eight dark squares of a 4 x 4 board over [-4, 4]^2; the label is the column."""
    column = (u[:, 0] * 4).long().clamp(max=3)
    row = 2 * (u[:, 1] >= 0.5).long() + column % 2
    return torch.stack((2 * (column + u[:, 2]) - 4, 2 * (row + u[:, 3]) - 4), dim=1), column


def _spirals(u: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two arms of an Archimedean spiral, one and a half turns; noise 0.1."""
    label = (u[:, 0] >= 0.5).long()
    turn = u[:, 1].sqrt()  # sqrt: even density along the arm
    angle = 3 * math.pi * turn + math.pi * label
    return 4 * turn[:, None] * torch.stack((angle.cos(), angle.sin()), dim=1) + 0.1 * z, label


# Name -> (maker, number of labels).
TOYS: dict[str, tuple[_Maker, int]] = {
    "moons": (_moons, 2),
    "ring": (_ring, 8),
    "checkerboard": (_checkerboard, 4),
    "spirals": (_spirals, 2),
}


class ToyStream:
    """An endless toy distribution; `rows(index)` gives sample `index` of it, the same one every
    time."""

    size = None
    sample_shape = (2,)
    has_labels = True

    def __init__(self, name: str, seed: int = 0) -> None:
        if name not in TOYS:
            raise ValueError(f"name: must be one of {', '.join(TOYS)}; got {name!r}")
        self.name, self.seed = name, seed
        self._maker, self.num_classes = TOYS[name]

    def rows(self, index: torch.Tensor) -> Rows:
        u = rand(len(index), 4, seed=derive_seed(self.seed, f"{self.name} uniform"), offset=index)
        z = randn(len(index), 2, seed=derive_seed(self.seed, f"{self.name} normal"), offset=index)
        return Rows(*self._maker(u, z))


def toy(name: str, size: int | None = None, seed: int = 0) -> Dataset | ToyStream:
    """A toy distribution: `size` samples (size, 2) in memory, or an endless stream for None.

    Args:
        name: "moons", "ring", "checkerboard" or "spirals".
        size: at least 1, or None.
        seed: in [0, 2^63); other seeds give other points of the same distribution.

    Raises:
        ValueError: another name, size or seed.
    """
    stream = ToyStream(name, seed)
    if size is None:
        return stream
    if size < 1:
        raise ValueError(f"size: must be at least 1; got {size}")
    return Dataset(*stream.rows(torch.arange(size, device="cpu")), name)
