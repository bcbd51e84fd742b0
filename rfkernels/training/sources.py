"""Where a step's samples come from: a data set with a coupling, or a store of pairs.

Position p of a run is sample p % batch of step p // batch. Which row that is, and which noise, is a
function of the seed and p alone, so a resumed run needs no state of a random generator.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch

from rfkernels.data import Data, Dataset, Rows, Subset, epoch_order, part_order, split_rows
from rfkernels.flow.couplings import MinibatchOT
from rfkernels.ops.random import derive_seed, randn

__all__ = ["DataSource", "Draw", "PairSource", "Source"]


class Draw(NamedTuple):
    """Samples of a coupling: x1; and x0, as a tensor or as the (seed, offset) it is drawn from.

    `condition` holds keyword arguments of the network.
    """

    x1: torch.Tensor
    x0: torch.Tensor | None
    seed: int | None
    offset: torch.Tensor | None
    condition: dict[str, torch.Tensor]


ALL = slice(None)


class Source(Protocol):
    """What an objective draws from."""

    sample_shape: tuple[int, ...]
    device: torch.device

    def draw(self, start: int, count: int, part: slice = ALL) -> Draw:
        """The samples of positions start .. start + count - 1, a step's batch, or a part of them."""

    def held_out(self) -> Draw | None:
        """The held-out samples, always the same; None without any."""


class _Order:
    """Maps positions to rows.

    Of a sized set every epoch is a permutation of its own, and batches run across epochs; of an
    endless stream, position p is row first + p. A data set may have an order of its own.
    """

    def __init__(
        self, size: int | None, seed: int, first: int = 0, data: Data | None = None
    ) -> None:
        self.size, self.seed, self.first, self._data = size, seed, first, data
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64, device="cpu")

    def rows(self, start: int, count: int) -> torch.Tensor:
        if self.size is None:
            return torch.arange(start, start + count, device="cpu") + self.first
        pieces = []
        while count > 0:
            epoch, row = divmod(start, self.size)
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = self._permuted(epoch)
            piece = self._order[row : row + count]
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _permuted(self, epoch: int) -> torch.Tensor:
        if self._data is None:
            return epoch_order(self.size, seed=self.seed, epoch=epoch)
        return part_order(
            self._data, torch.arange(self.size, device="cpu"), seed=self.seed, epoch=epoch
        )


class DataSource:
    """Samples x1 of a data set, coupled with noise or with the samples of a second data set.

    Args:
        data: the target x1.
        x0: the source data set; None for standard normal noise.
        coupling: TrainConfig.coupling.
        seed: the run's seed.
        holdout: fraction held out; of an endless stream, any fraction above 0 holds out samples of
            its own.
        conditional: whether labels are drawn along, as the condition `y`.
        device: where samples are wanted.
    """

    def __init__(
        self,
        data: Data,
        *,
        x0: Data | None,
        coupling: str,
        seed: int,
        holdout: float,
        conditional: bool,
        device: torch.device,
    ) -> None:
        self.sample_shape, self.device, self.conditional = data.sample_shape, device, conditional
        self._noise = derive_seed(seed, "noise")
        self._held_noise = derive_seed(seed, "holdout noise")
        self._train, self._held = _parts(data, holdout, seed, device)
        self._order = _Order(self._train.size, derive_seed(seed, "shuffle"), data=self._train)
        self._from: Data | None = None
        self._held_from: Data | None = None
        if x0 is not None:
            self._from, self._held_from = _parts(x0, holdout, seed, device)
            # "given": both sides take the same rows. Else two streams must not meet at equal rows,
            # which would couple a stream to itself.
            self._from_order = (
                self._order
                if coupling == "given"
                else _Order(
                    self._from.size,
                    derive_seed(seed, "shuffle source"),
                    first=_APART,
                    data=self._from,
                )
            )
        self._transport = MinibatchOT() if coupling.startswith("ot") else None
        self._whole, self._given = coupling == "ot-global", coupling == "given"

    def draw(self, start: int, count: int, part: slice = ALL) -> Draw:
        if self._whole:  # every process assigns the whole batch, and keeps its part
            return _cut(self._draw(start, count), part)
        positions = range(start, start + count)[part]
        return self._draw(positions.start, len(positions))

    def _draw(self, start: int, count: int) -> Draw:
        x1, labels = self._rows(self._train, self._order.rows(start, count))
        offset = torch.arange(start, start + count, device=self.device)
        condition = {} if labels is None or not self.conditional else {"y": labels}
        if self._from is not None:
            x0, _ = self._rows(self._from, self._from_order.rows(start, count))
        elif self._transport is not None:
            x0 = randn(
                count, *self.sample_shape, seed=self._noise, offset=offset, device=self.device
            )
        else:
            return Draw(x1, None, self._noise, offset, condition)
        if self._transport is not None:
            x0, _, _ = self._transport(x0, x1)  # x0 moves; x1 and its labels stay
        return Draw(x1, x0, None, None, condition)

    def held_out(self) -> Draw | None:
        if self._held is None:
            return None
        sizes = [part.size for part in (self._held, self._held_from) if part and part.size]
        count = min([held_out_count(self.sample_shape), *sizes])
        index = torch.arange(count, device="cpu")
        x1, labels = self._rows(self._held, index if self._held.size else index + _FAR)
        condition = {} if labels is None or not self.conditional else {"y": labels}
        if self._held_from is None:
            return Draw(x1, None, self._held_noise, index.to(self.device), condition)
        x0, _ = self._rows(self._held_from, self._held_source_rows(index))
        return Draw(x1, x0, None, None, condition)

    def _held_source_rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the held-out source, which correspond to the target's only where that is given."""
        size = self._held_from.size
        if self._given:
            return index if size else index + _FAR
        if size is None:
            return index + _FAR + _APART
        return epoch_order(size, seed=self._held_noise, epoch=0)[: len(index)]

    def _rows(self, data: Data, index: torch.Tensor) -> Rows:
        x, labels = data.rows(index)
        labels = None if labels is None else labels.to(self.device)
        return Rows(x.to(self.device, torch.float32), labels)


def _cut(draw: Draw, part: slice) -> Draw:
    condition = {name: value[part] for name, value in draw.condition.items()}
    return draw._replace(x1=draw.x1[part], x0=draw.x0[part], condition=condition)


# Held-out samples of an endless stream: indices that no run reaches.
_FAR = 2**62
_APART = 2**61  # between two endless streams that are not given row by row
_RESIDENT = 2 << 30  # bytes of a data set that is kept on an accelerator whole


def held_out_count(sample_shape: tuple[int, ...]) -> int:
    """How many samples the held-out loss is measured on, at most: 1024, fewer of large ones."""
    return min(1024, max(16, 2**26 // math.prod(sample_shape)))


def _parts(data: Data, holdout: float, seed: int, device: torch.device) -> tuple[Any, Any]:
    """The training and held-out part; a small set moves to the accelerator once."""
    if data.size is None:
        return data, data if holdout else None
    train, held = split_rows(data.size, holdout, seed)
    if isinstance(data, Dataset) and data.x.numel() * 4 <= _RESIDENT:
        labels = None if data.labels is None else data.labels.to(device)
        data = Dataset(data.x.to(device, torch.float32), labels, data.name)
        # Their numbers too, else every step would wait for the copy of its own.
        train, held = train.to(device), held.to(device)
    return Subset(data, train), Subset(data, held) if len(held) else None


class PairSource:
    """Pairs (x0, x1) of a PairStore, the last of them held out: all are independent draws."""

    def __init__(self, pairs: Any, *, seed: int, holdout: float, device: torch.device) -> None:
        self.sample_shape, self.device, self._pairs = pairs.sample_shape, device, pairs
        held = max(1, round(len(pairs) * holdout)) if holdout else 0
        if held >= len(pairs):
            raise ValueError(f"holdout: {holdout} of {len(pairs)} pairs leaves none to train on")
        self._train, self._held = len(pairs) - held, held
        self._order = _Order(self._train, derive_seed(seed, "shuffle"))

    def _pick(self, rows: torch.Tensor) -> Draw:
        pairs = self._pairs.stored(rows)
        condition = {name: value.to(self.device) for name, value in pairs.condition.items()}
        x1 = pairs.x1.to(self.device)
        if pairs.x0 is not None:
            return Draw(x1, pairs.x0.to(self.device), None, None, condition)
        return Draw(x1, None, self._pairs.seed, pairs.index.to(self.device), condition)

    def draw(self, start: int, count: int, part: slice = ALL) -> Draw:
        positions = range(start, start + count)[part]
        return self._pick(self._order.rows(positions.start, len(positions)))

    def held_out(self) -> Draw | None:
        if not self._held:
            return None
        return self._pick(
            self._train
            + torch.arange(min(self._held, held_out_count(self.sample_shape)), device="cpu")
        )
