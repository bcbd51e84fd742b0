"""What the training loop reads: a sized set of samples, in memory or read as they are asked for, or
an endless stream keyed by sample index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from rfkernels.ops.random import derive_seed, rand

__all__ = [
    "Data",
    "Dataset",
    "OrderedData",
    "Rows",
    "Subset",
    "as_dataset",
    "epoch_order",
    "part_order",
    "split",
    "split_rows",
]


class Rows(NamedTuple):
    """Some samples: x (B, *sample_shape), labels (B, ...) or None."""

    x: torch.Tensor
    labels: torch.Tensor | None


class Data(Protocol):
    """A source of samples.

    `rows` is a pure function of the index: the same samples whatever was read before, in every
    process. That is what makes a run resume in the middle of an epoch without reading what came
    before, and draw the same samples on any number of processes.

    Attributes:
        name: what metrics and run folders call it.
        size: the number of samples; None for an endless stream, whose every int64 index is a sample
            of its own.
        sample_shape: the shape of one sample.
        has_labels: whether `rows` gives labels.
    """

    name: str
    size: int | None
    sample_shape: tuple[int, ...]
    has_labels: bool

    def rows(self, index: torch.Tensor) -> Rows:
        """The samples with these indices, int64 (B,), in their order; float32 x.

        Raises:
            ValueError: a sample cannot be read; the message names its file.
        """


class OrderedData(Data, Protocol):
    """Data that says in which order an epoch is best read; see `part_order`."""

    def order(self, rows: torch.Tensor, *, seed: int, epoch: int) -> torch.Tensor:
        """Every one of `rows`, int64 (n,), once, in an order that is a function of (seed, epoch).

        An index i + size stands for a variant of sample i (the mirrored image, of a data set that
        has one).
        """


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples in memory.

    Attributes:
        x: (N, *sample_shape) float32; images lie in [-1, 1].
        labels: None, int64 class labels (N,), or float condition vectors (N, C).
        name: what metrics and run folders call it.
        captions: None, or what each sample shows, in words.
    """

    x: torch.Tensor
    labels: torch.Tensor | None = None
    name: str = "tensor"
    captions: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.x, torch.Tensor):
            raise TypeError(f"x: must be a tensor; got {type(self.x).__name__}")
        if not self.x.is_floating_point():
            raise TypeError(f"x: must be a floating point tensor; got {self.x.dtype}")
        if self.x.dim() < 2 or len(self.x) == 0 or self.x[0].numel() == 0:
            raise ValueError(
                f"x: must have the shape (N, ...) with at least one sample; got "
                f"{tuple(self.x.shape)}"
            )
        if self.labels is not None:
            if not isinstance(self.labels, torch.Tensor):
                raise TypeError(
                    f"labels: must be a tensor or None; got {type(self.labels).__name__}"
                )
            if self.labels.dim() == 0 or len(self.labels) != len(self.x):
                raise ValueError(
                    f"labels: must have one row per sample, {len(self.x)}; got "
                    f"{tuple(self.labels.shape)}"
                )
        if self.captions is not None and len(self.captions) != len(self.x):
            raise ValueError(
                f"captions: must have one per sample, {len(self.x)}; got {len(self.captions)}"
            )

    @property
    def size(self) -> int:
        return len(self.x)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    @property
    def has_labels(self) -> bool:
        return self.labels is not None

    @property
    def num_classes(self) -> int | None:
        """One more than the greatest class label; None without integer labels."""
        if self.labels is None or self.labels.is_floating_point():
            return None
        return int(self.labels.max()) + 1

    def rows(self, index: torch.Tensor) -> Rows:
        return Rows(self.x[index], None if self.labels is None else self.labels[index])

    def take(self, index: torch.Tensor) -> Dataset:
        """The data set of these rows."""
        rows = self.rows(index)
        captions = self.captions
        if captions is not None:
            captions = tuple(
                captions[i] for i in torch.arange(self.size, device=index.device)[index].tolist()
            )
        return Dataset(rows.x, rows.labels, self.name, captions)


@dataclass(frozen=True, eq=False)
class Subset:
    """Some rows of a sized data set: sample i is sample index[i] of `data`.

    Attributes:
        data: the whole.
        index: int64 (n,), without repetition.
    """

    data: Data
    index: torch.Tensor

    @property
    def name(self) -> str:
        return self.data.name

    @property
    def size(self) -> int:
        return len(self.index)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.data.sample_shape

    @property
    def has_labels(self) -> bool:
        return self.data.has_labels

    @property
    def num_classes(self) -> int | None:
        return getattr(self.data, "num_classes", None)

    def rows(self, index: torch.Tensor) -> Rows:
        return self.data.rows(self._whole(index))

    def order(self, rows: torch.Tensor, *, seed: int, epoch: int) -> torch.Tensor:
        """`rows` of this part in the order that suits the whole; see `part_order`."""
        order = part_order(self.data, self.index[rows], seed=seed, epoch=epoch)
        size, by_row = self.data.size or 0, torch.argsort(self.index)
        place = torch.searchsorted(self.index[by_row], order % size)
        return by_row[place] + self.size * (order // size)

    def _whole(self, index: torch.Tensor) -> torch.Tensor:
        """Indices of the whole; a variant stays one."""
        index = index.to(self.index.device)
        return self.index[index % self.size] + (self.data.size or 0) * (index // self.size)


def as_dataset(data: Data | torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> Data:
    """Accepts a data set, a tensor of samples, or a pair (samples, labels)."""
    if isinstance(data, torch.Tensor):
        return Dataset(data)
    if isinstance(data, tuple) and len(data) == 2:
        return Dataset(*data)
    if not all(
        hasattr(data, field) for field in ("rows", "size", "sample_shape", "has_labels", "name")
    ):
        raise TypeError(
            "data: must be a data set of rfkernels.data, a tensor, or a pair (samples, labels); "
            f"got {type(data).__name__}"
        )
    return data


def epoch_order(size: int, *, seed: int, epoch: int) -> torch.Tensor:
    """A permutation of 0..size-1, int64, that is a function of (seed, epoch) alone.

    Sorting 48-bit keys rather than one 24-bit uniform keeps ties, which would favour low indices,
    out of big sets.
    """
    draws = (rand(2 * size, seed=seed, offset=epoch) * 2.0**24).to(torch.int64)
    return torch.argsort((draws[:size] << 24) | draws[size:], stable=True)


def part_order(data: Data, rows: torch.Tensor, *, seed: int, epoch: int) -> torch.Tensor:
    """The indices of `data` that one epoch over `rows` reads, int64 (n,): a function of (seed,
    epoch).

    Data with an `order` of its own (shards, which are read mostly in sequence; images that are
    mirrored by chance) says so; of any other the order is `epoch_order`.

    Args:
        data: a sized data set.
        rows: ascending indices, for instance those that are not held out.
        seed: the run's seed for shuffling.
        epoch: from 0.
    """
    own = getattr(data, "order", None)
    if own is None:
        return rows[epoch_order(len(rows), seed=seed, epoch=epoch)]
    return own(rows, seed=seed, epoch=epoch)


def split_rows(size: int, fraction: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(training rows, held-out rows) of `size` samples, each ascending; see `split`."""
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"fraction: must be in [0, 1); got {fraction}")
    count = max(1, round(size * fraction)) if fraction else 0
    if count >= size:
        raise ValueError(f"fraction: {fraction} of {size} samples leaves none to train on")
    order = epoch_order(size, seed=derive_seed(seed, "holdout"), epoch=0)
    # Ascending, so that the training part keeps the order of the data set.
    return order[count:].sort().values, order[:count].sort().values


def split(data: Data, fraction: float, seed: int = 0) -> tuple[Any, Any]:
    """(training part, held-out part): `fraction` of the samples, drawn by (seed, "holdout"), are
    held out.

    The training loop makes the same split from its own seed, so an evaluation can find the samples
    it never saw.

    Args:
        data: a sized data set. The parts of a `Dataset` are `Dataset`s, of any other a `Subset`.
        fraction: in [0, 1); 0 gives None for the held-out part, anything more holds out one sample
            at least.
        seed: the run's seed.
    """
    if data.size is None:
        raise ValueError(f"data: must have a size to be split; {data.name} is an endless stream")
    train, held = split_rows(data.size, fraction, seed)
    if isinstance(data, Dataset):
        return data.take(train), data.take(held) if len(held) else None
    return Subset(data, train), Subset(data, held) if len(held) else None
