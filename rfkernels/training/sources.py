"""Where a step's samples come from: a data set with a coupling, or a store of pairs.

Position p of a run is sample p % batch of step p // batch. Which row that is, and which noise, is a
function of the seed and p alone, so a resumed run needs no state of a random generator.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

from rfkernels.data import Data, Dataset, epoch_order, split
from rfkernels.ops.random import derive_seed, randn

__all__ = ["DataSource", "Draw", "PairSource", "Source"]

HELD_OUT = 1024  # samples that the held-out loss is measured on, at most


class Draw(NamedTuple):
    """Samples of a coupling: x1, and x0 either as a tensor or as the (seed, offset) it is drawn
    from."""

    x1: torch.Tensor
    x0: torch.Tensor | None
    seed: int | None
    offset: torch.Tensor | None
    condition: dict[str, torch.Tensor]


class Source(Protocol):
    """What an objective draws from."""

    sample_shape: tuple[int, ...]
    device: torch.device

    def draw(self, start: int, count: int) -> Draw:
        """The samples of positions start .. start + count - 1."""

    def held_out(self) -> Draw | None:
        """The held-out samples, always the same; None without any."""


class _Order:
    """Maps positions to rows: every epoch is a permutation of its own, and batches run across
    epochs."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def rows(self, start: int, count: int) -> torch.Tensor:
        pieces = []
        while count > 0:
            epoch, first = divmod(start, self.size)
            if epoch != self._epoch:
                self._epoch, self._order = (
                    epoch,
                    epoch_order(self.size, seed=self.seed, epoch=epoch),
                )
            piece = self._order[first : first + count]
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class DataSource:
    """Samples x1 of a data set, coupled with noise or with the samples of a second data set.

    Args:
        data: the target x1.
        x0: the source data set; None for standard normal noise.
        coupling: "independent", "ot" or "given" (TrainConfig.coupling).
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
        self._data, self._held = _parts(data, holdout, seed, device)
        self._source, self._held_source = (
            (None, None) if x0 is None else _parts(x0, holdout, seed, device)
        )
        self._order = _order(self._data, derive_seed(seed, "shuffle"))
        # "given": both sides take the same rows.
        self._source_order = (
            self._order
            if coupling == "given"
            else _order(self._source, derive_seed(seed, "shuffle source"))
        )
        self._transport = None
        if coupling == "ot":
            from rfkernels.flow import MinibatchOT

            self._transport = MinibatchOT()

    def draw(self, start: int, count: int) -> Draw:
        x1, condition = self._take(self._data, self._rows(self._order, start, count))
        offset = torch.arange(start, start + count, device=self.device)
        if self._source is not None:
            x0, _ = self._take(self._source, self._rows(self._source_order, start, count))
        elif self._transport is not None:
            x0 = randn(
                count, *self.sample_shape, seed=self._noise, offset=offset, device=self.device
            )
        else:
            return Draw(x1, None, self._noise, offset, condition)
        if self._transport is not None:
            x0, x1, _ = self._transport(x0, x1)
        return Draw(x1, x0, None, None, condition)

    def held_out(self) -> Draw | None:
        if self._held is None:
            return None
        count = HELD_OUT if self._held.size is None else min(self._held.size, HELD_OUT)
        if self._held_source is not None and self._held_source.size is not None:
            count = min(count, self._held_source.size)
        rows = torch.arange(count) + _held_start(self._held)
        x1, condition = self._take(self._held, rows)
        if self._source is None:
            return Draw(
                x1, None, self._held_noise, torch.arange(count, device=self.device), condition
            )
        if self._held_source is None:
            return None
        x0, _ = self._take(self._held_source, torch.arange(count) + _held_start(self._held_source))
        return Draw(x1, x0, None, None, condition)

    @staticmethod
    def _rows(order: _Order | None, start: int, count: int) -> torch.Tensor:
        return torch.arange(start, start + count) if order is None else order.rows(start, count)

    def _take(self, data: Data, rows: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if isinstance(data, Dataset) and data.x.device != torch.device("cpu"):
            rows = rows.to(data.x.device)
        x, labels = data.rows(rows)
        condition = {}
        if self.conditional and labels is not None and data is not self._source:
            condition["y"] = labels.to(self.device)
        return x.to(self.device, torch.float32), condition


# Held-out samples of an endless stream: indices that no run reaches.
_FAR = 2**62
_RESIDENT = 2 << 30  # bytes of a data set that is kept on an accelerator whole


def _held_start(data: Data) -> int:
    return _FAR if data.size is None else 0


def _order(data: Data | None, seed: int) -> _Order | None:
    return None if data is None or data.size is None else _Order(data.size, seed)


def _parts(data: Data, holdout: float, seed: int, device: torch.device) -> tuple[Any, Any]:
    """The training and held-out part; a small set moves to the accelerator once."""
    if data.size is None:
        return data, data if holdout else None
    if data.x.numel() * 4 <= _RESIDENT:
        labels = None if data.labels is None else data.labels.to(device)
        data = Dataset(data.x.to(device, torch.float32), labels, data.name)
    return split(data, holdout, seed)


class PairSource:
    """Pairs (x0, x1) of a PairStore, the last `holdout` of them held out (every pair is an
    independent draw)."""

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

    def draw(self, start: int, count: int) -> Draw:
        return self._pick(self._order.rows(start, count))

    def held_out(self) -> Draw | None:
        if not self._held:
            return None
        return self._pick(self._train + torch.arange(min(self._held, HELD_OUT)))
