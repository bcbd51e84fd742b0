"""Hugging Face `datasets`, map-style and iterable, as data sets with random access; local files only."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from rfkernels._whole_file import read_json_kept, write_json_whole
from rfkernels.data.captions import caption_vectors
from rfkernels.data.dataset import Rows
from rfkernels.data.decode import as_samples, check_image_options, decode_image
from rfkernels.data.order import block_order, locate

__all__ = ["HuggingFaceData", "HuggingFaceStream", "from_huggingface", "load_huggingface"]

_BLOCKS_IN_MEMORY = 8


def _import_datasets(who: str) -> Any:
    """The package `datasets`.

    Raises:
        ImportError: it is not installed (the extra `data` brings it).
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f'{who}: needs datasets; install it with: pip install "rfkernels[data]"'
        ) from error
    return datasets


class _Columns:
    """Which columns are samples and conditions, and how they become tensors.

    Images are taken undecoded, so that the decoder, its crop and its errors are those of every other
    data set of this library.
    """

    def __init__(
        self,
        data: Any,
        *,
        image_size: int,
        channels: int,
        x: str | None,
        condition: str | None,
        caption_dim: int,
        num_classes: int | None,
    ) -> None:
        datasets = _import_datasets("from_huggingface")
        check_image_options(image_size, channels)
        features = data.features
        if features is None:
            raise ValueError(
                "data: must know its features, which map() drops from a stream unless it is told "
                "features=...; got none"
            )
        images = [n for n, f in features.items() if isinstance(f, datasets.Image)]
        if x is None and len(images) != 1:
            raise ValueError(
                f"x: must name the column of the samples, since there is not exactly one of images; "
                f"the columns are {', '.join(features)}"
            )
        self.x = images[0] if x is None else x
        labels = [n for n, f in features.items() if isinstance(f, datasets.ClassLabel)]
        if condition == "auto":
            condition = labels[0] if len(labels) == 1 else None
        for argument, name in (("x", self.x), ("condition", condition)):
            if name is not None and name not in features:
                raise ValueError(f"{argument}: must be one of {', '.join(features)}; got {name!r}")
        self.condition, self.caption_dim = condition, caption_dim
        self.num_classes = num_classes
        if condition in labels:
            self.num_classes = features[condition].num_classes
        self._is_image, self._image = self.x in images, (image_size, channels)
        columns = [name for name in (self.x, condition) if name is not None]
        data = data.select_columns(columns)
        if self._is_image:
            data = data.cast_column(self.x, datasets.Image(decode=False))
        self.data = data

    def rows(self, name: str, index: Sequence[int], examples: Sequence[dict[str, Any]]) -> Rows:
        """Tensors of examples, whose indices errors name."""
        samples = []
        for i, example in zip(index, examples, strict=True):
            where = f"{name}: row {i}: {self.x}"
            samples.append(self._sample(example[self.x], where))
            if samples[-1].shape != samples[0].shape:
                raise ValueError(
                    f"{where} must have the shape {samples[0].shape}, as others; got "
                    f"{samples[-1].shape}"
                )
        if self.condition is None:
            return Rows(as_samples(samples), None)
        values = [example[self.condition] for example in examples]
        return Rows(as_samples(samples), self._labels(name, index, values))

    def _labels(self, name: str, index: Sequence[int], values: list[Any]) -> torch.Tensor:
        if all(isinstance(value, str) for value in values):
            return caption_vectors(values, self.caption_dim)
        for i, value in zip(index, values, strict=True):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(
                    f"{name}: row {i}: {self.condition} must be a string or a whole number from 0; "
                    f"got {value!r}"
                )
        return torch.tensor(values, dtype=torch.int64, device="cpu")

    def _sample(self, value: Any, where: str) -> np.ndarray:
        if not self._is_image:
            array = np.asarray(value)
            if array.dtype.kind not in "fu" or array.ndim == 0:
                raise ValueError(f"{where} must be an array of floating point; got {array.dtype}")
            if not np.isfinite(array).all():
                raise ValueError(f"{where} holds values that are not finite")
            return array.astype(np.float32) if array.dtype != np.uint8 else array
        source = None if value is None else value["bytes"] or value["path"]
        if not source:
            raise ValueError(f"{where} is missing")
        if isinstance(source, str) and "://" in source:
            raise ValueError(f"{where} is not a local file; got {source}")
        return decode_image(source, where, image_size=self._image[0], channels=self._image[1])


class HuggingFaceData:
    """A map-style `datasets.Dataset`: rows are read from its memory-mapped Arrow table."""

    def __init__(self, columns: _Columns, name: str) -> None:
        self._columns, self.name = columns, name
        self.size: int = len(columns.data)
        self.num_classes = columns.num_classes
        if self.size == 0:
            raise ValueError(f"data: {name} holds no samples")
        probe = self.rows(torch.tensor([0], device="cpu"))
        self.sample_shape = tuple(probe.x.shape[1:])
        self.has_labels = probe.labels is not None

    def rows(self, index: torch.Tensor) -> Rows:
        """The samples of these indices, read and decoded now.

        Raises:
            ValueError: one cannot be decoded; the message names the data set, its row and column.
        """
        numbers = index.tolist()
        table = self._columns.data[numbers]
        examples = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
        return self._columns.rows(self.name, numbers, examples)


class HuggingFaceStream:
    """An `datasets.IterableDataset` with random access, by blocks.

    It is read once to the end to count it; the state of the stream at every `block` samples is kept
    (as JSON in `cache`, where that is given), so that reading row i means resuming at its block and
    reading that. `order` shuffles blocks, and the rows of `mix` blocks together, so that an epoch
    reads every block about once.
    """

    def __init__(
        self, columns: _Columns, name: str, *, block: int, mix: int, cache: str | Path | None
    ) -> None:
        if block < 1 or not 1 <= mix <= _BLOCKS_IN_MEMORY // 2:
            raise ValueError(
                f"block, mix: must be at least 1, mix at most {_BLOCKS_IN_MEMORY // 2}; got {block}, "
                f"{mix}"
            )
        self._columns, self.name, self.block, self.mix = columns, name, block, mix
        self.num_classes = columns.num_classes
        self._blocks: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()
        self._lock = Lock()
        self._initial = columns.data.state_dict()
        file = None if cache is None else Path(cache)
        kept = read_json_kept(file, "block", block)
        if kept is None:
            kept = self._count()
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json_whole(file, kept)
        self.size: int = kept["size"]
        self._states, self._firsts = kept["states"], kept["firsts"]
        if self.size == 0:
            raise ValueError(f"data: {name} holds no samples")
        self._starts = torch.arange(0, self.size, block, device="cpu")
        probe = self.rows(torch.tensor([0], device="cpu"))
        self.sample_shape = tuple(probe.x.shape[1:])
        self.has_labels = probe.labels is not None

    def rows(self, index: torch.Tensor) -> Rows:
        """The samples of these indices.

        Raises:
            ValueError: one cannot be decoded, or the stream gives other samples than it first did;
            the message names the data set and the row.
        """
        numbers = index.tolist()
        if numbers and not 0 <= min(numbers) <= max(numbers) < self.size:
            raise IndexError(f"index: must be from 0 to {self.size - 1}; got {numbers}")
        blocks = locate(self._starts, index.cpu()).tolist()
        with self._lock:  # the stream has one state
            wanted = {block: self._read(block) for block in sorted(set(blocks))}
        examples = [wanted[b][i - b * self.block] for b, i in zip(blocks, numbers, strict=True)]
        return self._columns.rows(self.name, numbers, examples)

    def order(self, rows: torch.Tensor, *, seed: int, epoch: int) -> torch.Tensor:
        """`rows` shuffled by (seed, epoch): blocks, and rows of `mix` blocks; see `block_order`."""
        return block_order(rows, self._starts, mix=self.mix, seed=seed, epoch=epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_blocks": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())

    def _count(self) -> dict[str, Any]:
        data = self._columns.data
        states, firsts, size = [], [], 0
        state = self._initial
        for example in data:
            if size % self.block == 0:
                states.append(state)
                firsts.append(_digest(example))
            size += 1
            if size % self.block == 0:
                state = data.state_dict()
        return {"block": self.block, "size": size, "states": states, "firsts": firsts}

    def _read(self, block: int) -> list[dict[str, Any]]:
        """The undecoded examples of a block; a few blocks stay in memory."""
        if block not in self._blocks:
            data, count = self._columns.data, min(self.block, self.size - block * self.block)
            data.load_state_dict(self._states[block])
            examples = [example for _, example in zip(range(count), data, strict=False)]
            if len(examples) != count or _digest(examples[0]) != self._firsts[block]:
                raise ValueError(
                    f"{self.name}: row {block * self.block}: the stream gives other samples than when "
                    "it was counted; its order must be repeatable (no shuffle() of its own; this "
                    "library shuffles) and its files and the file in cache must belong together"
                )
            self._blocks[block] = examples
            if len(self._blocks) > _BLOCKS_IN_MEMORY:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(block)
        return self._blocks[block]


def _digest(example: dict[str, Any]) -> str:
    """Tells whether an example is the same as before."""
    digest = hashlib.blake2b(digest_size=8)

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value):
                digest.update(key.encode())
                add(value[key])
        elif isinstance(value, bytes):
            digest.update(value)
        elif isinstance(value, np.ndarray):
            digest.update(value.tobytes())
        else:
            digest.update(repr(value).encode())

    add(example)
    return digest.hexdigest()


def from_huggingface(
    data: Any,
    *,
    image_size: int = 32,
    channels: int = 3,
    x: str | None = None,
    condition: str | None = "auto",
    caption_dim: int = 64,
    num_classes: int | None = None,
    block: int = 1000,
    mix: int = 4,
    cache: str | Path | None = None,
    name: str = "huggingface",
) -> HuggingFaceData | HuggingFaceStream:
    """A `datasets.Dataset` or `datasets.IterableDataset` as a data set of this library.

    Args:
        data: one split, already opened; nothing is fetched from a hub.
        image_size, channels: of images, cropped and resized as those of `ImageFolder`.
        x: the column of the samples: images, or arrays of one shape; None: the one of images.
        condition: the column of labels: integers, or strings, which become `caption_vectors`; "auto":
            the one ClassLabel column; None for none.
        caption_dim: length of the caption vectors.
        num_classes: of an integer column that is not a ClassLabel.
        block, mix: of an IterableDataset, see `HuggingFaceStream`; `mix` blocks of undecoded samples
            are in memory, at most twice as many.
        cache: of an IterableDataset, the JSON file where its count and states are kept; without it,
            every process reads the whole stream once at its start.
        name: what errors and run folders call it.

    Raises:
        TypeError: neither kind. ValueError: a column that is not there, no samples, or a sample that
        cannot be decoded. ImportError: `datasets` or Pillow is not installed (the extra `data`).
    """
    datasets = _import_datasets("from_huggingface")
    if not isinstance(data, (datasets.Dataset, datasets.IterableDataset)):
        raise TypeError(
            "data: must be a Dataset or an IterableDataset (one split of a DatasetDict); got "
            f"{type(data).__name__}"
        )
    columns = _Columns(
        data,
        image_size=image_size,
        channels=channels,
        x=x,
        condition=condition,
        caption_dim=caption_dim,
        num_classes=num_classes,
    )
    if isinstance(data, datasets.Dataset):
        return HuggingFaceData(columns, name)
    return HuggingFaceStream(columns, name, block=block, mix=mix, cache=cache)


def load_huggingface(
    path: str | Path, *, cache: str | Path | None = None, **options: Any
) -> HuggingFaceData:
    """A data set that `datasets` stored: the folder of `save_to_disk`, or a .parquet or .arrow file.

    Args:
        path: the folder or file.
        cache: where `datasets` keeps the Arrow table that it makes of a parquet file; None: where it
            always does. (.arrow files and folders are mapped as they are.)
        options: those of `from_huggingface` but for streams.

    Raises:
        FileNotFoundError: no such file. ValueError: it cannot be read. Others as `from_huggingface`.
    """
    datasets = _import_datasets("load_huggingface")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        if path.is_dir():
            data = datasets.load_from_disk(str(path))
        elif path.suffix == ".arrow":
            data = datasets.Dataset.from_file(str(path))
        else:
            kept = None if cache is None else str(cache)
            data = datasets.Dataset.from_parquet(str(path), cache_dir=kept)
    except Exception as error:  # pyarrow's and datasets' own kinds are many
        raise ValueError(f"{path}: not a readable data set of datasets ({error})") from error
    return from_huggingface(data, name=path.stem, **options)
