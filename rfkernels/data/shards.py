"""Tar shards (the layout of the webdataset package) as a data set with random access: any row is
read by its offset, whatever was read before."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
import torch

from rfkernels.data.captions import caption_vectors
from rfkernels.data.dataset import Rows
from rfkernels.data.decode import (
    ARRAY_SUFFIXES,
    IMAGE_SUFFIXES,
    as_samples,
    check_image_options,
    decode_array,
    decode_image,
    decode_integer,
    decode_json,
    decode_text,
)
from rfkernels.data.order import block_order, locate
from rfkernels.data.shard_index import ShardIndex, index_shards, read_shard

__all__ = ["TarShards", "find_shards"]

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_OPEN_INDICES = 64  # indices of shards in memory: some 150 bytes per sample and field


def find_shards(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """The shards of a folder (its *.tar), of one file, of a pattern ("data/train-*.tar", sorted by
    name), of a range ("data/train-{000..146}.tar", all of which must be there) or a list.

    Raises:
        FileNotFoundError: none. ValueError: a compressed one.
    """
    span = _RANGE.search(str(source)) if isinstance(source, (str, Path)) else None
    if span:
        first, last = span[1], span[2]
        head, tail = str(source)[: span.start()], str(source)[span.end() :]
        numbers = range(int(first), int(last) + 1)
        source = [f"{head}{number:0{len(first)}d}{tail}" for number in numbers]
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir():
            shards = sorted(path.glob("*.tar"))
            squeezed = sorted([*path.glob("*.tar.*"), *path.glob("*.tgz")]) if not shards else []
        else:
            shards = [path] if path.is_file() else sorted(path.parent.glob(path.name))
            squeezed = []
    else:
        shards, squeezed = [Path(s) for s in source], []
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0]}: no such file")
    squeezed += [shard for shard in shards if shard.suffix != ".tar"]
    if squeezed:
        raise ValueError(
            f"{squeezed[0]}: shards must be uncompressed and end in .tar, so that samples can be read "
            "by their offset; unpack it once, for instance with gunzip"
        )
    if not shards:
        raise FileNotFoundError(f"{source}: no .tar shards there")
    return shards


class TarShards:
    """The samples of tar shards, decoded when they are read.

    Per sample: x from an image field (png, jpg, jpeg, webp, ...; cropped in the middle and resized as
    `ImageFolder` does) or from npy (an array of one shape, such as a latent; uint8 is scaled to
    [-1, 1]); a condition from cls (an integer), txt or json. Other fields are refused, never
    unpickled. The first opening scans the headers of all shards once and keeps an index as JSON;
    after that, opening reads the counts, and a sample is one seek.

    Args:
        source: a folder of *.tar, a file, a pattern, or a list of files; see `find_shards`.
        image_size, channels: of images.
        x: the field of the samples; None: the one image or npy field that all samples have.
        condition: where labels come from: "cls", "txt", "json:KEY", None for none; "auto": cls where
            all samples have it. A string becomes a `caption_vectors` row, an integer a class.
        caption_dim: length of the caption vectors.
        num_classes: of integers from json; those of cls are counted.
        mix: shards that are shuffled together; see `order`.
        ignore: fields to leave unread, for instance ("pkl",), instead of refusing them.
        cache: folder of the index; None: `.rfkernels-index` beside the shards, or below
            $XDG_CACHE_HOME where that cannot be written.

    Raises:
        FileNotFoundError: no shards. ValueError: a shard is cut off or damaged, a key is duplicated, a
        member refused, a field missing, no samples; the message names file and member.
        ImportError: Pillow is needed and not installed (the extra `data` brings it).
    """

    def __init__(
        self,
        source: str | Path | Sequence[str | Path],
        *,
        image_size: int = 32,
        channels: int = 3,
        x: str | None = None,
        condition: str | None = "auto",
        caption_dim: int = 64,
        num_classes: int | None = None,
        mix: int = 4,
        ignore: Sequence[str] = (),
        cache: str | Path | None = None,
    ) -> None:
        check_image_options(image_size, channels)
        if mix < 1:
            raise ValueError(f"mix: must be at least 1; got {mix}")
        self.shards = find_shards(source)
        self.mix, self._caption_dim = mix, caption_dim
        self._cache, summaries = index_shards(self.shards, cache, frozenset(ignore))
        self._counts = [summary.samples for summary in summaries]
        counts = torch.tensor(self._counts, device="cpu")
        self.size = int(counts.sum())
        first = self.shards[0]
        self.name = first.parent.resolve().name if len(self.shards) > 1 else first.stem
        if self.size == 0:
            raise ValueError(f"{first.parent}: the {len(self.shards)} shards hold no samples")
        self._starts = torch.cumsum(counts, 0) - counts
        self._indices: OrderedDict[int, ShardIndex] = OrderedDict()
        self._lock = Lock()
        # Fields that every sample of every shard has.
        filled = [summary for summary in summaries if summary.samples]
        self._fields = set.intersection(*(set(summary.fields) for summary in filled))
        self._x = self._choose_x(x)
        if condition == "auto":
            condition = "cls" if "cls" in self._fields else None
        self._condition, self._key = condition, None
        if condition is not None:
            self._condition, _, self._key = condition.partition(":")
            if self._condition not in ("cls", "txt", "json") or bool(self._key) != (
                self._condition == "json"
            ):
                raise ValueError(
                    f"condition: must be auto, cls, txt, json:KEY or None; got {condition!r}"
                )
            self._require(self._condition)
        self._image = (image_size, channels)
        self.num_classes = num_classes
        if self._condition == "cls":
            self.num_classes = max(summary.classes for summary in filled)
        probe = self.rows(torch.tensor([0], device="cpu"))
        self.sample_shape = tuple(probe.x.shape[1:])
        self.has_labels = probe.labels is not None

    def rows(self, index: torch.Tensor) -> Rows:
        """The samples of these indices, read and decoded now.

        Raises:
            ValueError: a sample cannot be read or decoded, or has another shape; the message names
            the shard, the member and its byte.
        """
        samples: list[np.ndarray] = [np.empty(0)] * len(index)
        conditions: list[Any] = [None] * len(index)

        def take(at: int, stream: BinaryIO, shard: int, row: int) -> None:
            samples[at] = self._sample(stream, shard, row)
            if self._condition is not None:
                conditions[at] = self._read_condition(stream, shard, row)

        self._visit(index, take)
        for at, sample in enumerate(samples):
            if sample.shape != samples[0].shape or sample.dtype != samples[0].dtype:
                raise ValueError(
                    f"{self.where(int(index[at]))}: must be {samples[0].dtype} {samples[0].shape} as "
                    f"others are; got {sample.dtype} {sample.shape}"
                )
        return Rows(as_samples(samples), self._labels(conditions, index))

    def captions(self, index: torch.Tensor) -> list[str]:
        """The txt fields of these samples.

        Raises:
            ValueError: not all samples have one.
        """
        self._require("txt")
        found = [""] * len(index)

        def take(at: int, stream: BinaryIO, shard: int, row: int) -> None:
            found[at] = decode_text(*self._member(stream, shard, row, "txt"))

        self._visit(index, take)
        return found

    def order(self, rows: torch.Tensor, *, seed: int, epoch: int) -> torch.Tensor:
        """`rows` shuffled by (seed, epoch): the shards first, then all samples of `mix` neighbouring
        ones together, so that reads stay within a few files; see `block_order`."""
        return block_order(rows, self._starts, mix=self.mix, seed=seed, epoch=epoch)

    def where(self, index: int) -> str:
        """What errors call a sample: its shard and key."""
        shard, row = self._locate(index)
        return f"{self.shards[shard]}: {self._index(shard).keys[row]}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_indices": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())

    def _visit(self, index: torch.Tensor, take: Any) -> None:
        """Calls take(place in index, open file, shard, row) for every index, by ascending place in the
        files; each file is opened once."""
        index = index.cpu()
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.size:
            raise IndexError(f"index: must be from 0 to {self.size - 1}; got {index.tolist()}")
        opened, stream = -1, None
        try:
            for at in torch.argsort(index, stable=True).tolist():
                shard, row = self._locate(int(index[at]))
                if shard != opened or stream is None:
                    if stream is not None:
                        stream.close()
                    opened, stream = shard, self.shards[shard].open("rb")
                take(at, stream, shard, row)
        finally:
            if stream is not None:
                stream.close()

    def _locate(self, index: int) -> tuple[int, int]:
        shard = int(locate(self._starts, torch.tensor([index], device="cpu")))
        return shard, index - int(self._starts[shard])

    def _index(self, shard: int) -> ShardIndex:
        with self._lock:
            if shard not in self._indices:
                index = self._cache.index(self.shards[shard])
                if len(index.keys) != self._counts[shard]:
                    raise ValueError(f"{self.shards[shard]}: has changed since the set was opened")
                self._indices[shard] = index
                if len(self._indices) > _OPEN_INDICES:
                    self._indices.popitem(last=False)
            self._indices.move_to_end(shard)
            return self._indices[shard]

    def _member(self, stream: BinaryIO, shard: int, row: int, field: str) -> tuple[bytes, str]:
        """(bytes, what errors call it) of a field of a sample."""
        index, file = self._index(shard), self.shards[shard]
        offset, count = index.fields[field][row].tolist()
        name = f"{index.keys[row]}.{field}"
        data = read_shard(stream, file, (offset, count), name)
        return data, f"{file}: {name} at byte {offset}"

    def _sample(self, stream: BinaryIO, shard: int, row: int) -> np.ndarray:
        data, where = self._member(stream, shard, row, self._x)
        if self._x.rpartition(".")[2] in ARRAY_SUFFIXES:
            return decode_array(data, where)
        return decode_image(data, where, image_size=self._image[0], channels=self._image[1])

    def _read_condition(self, stream: BinaryIO, shard: int, row: int) -> Any:
        data, where = self._member(stream, shard, row, self._condition or "")
        if self._condition == "cls":
            return decode_integer(data, where)
        if self._condition == "txt":
            return decode_text(data, where)
        value = decode_json(data, where)
        if not isinstance(value, dict) or self._key not in value:
            raise ValueError(f"{where}: has no key {self._key}")
        found = value[self._key]
        if (
            isinstance(found, bool)
            or not isinstance(found, (int, str))
            or (isinstance(found, int) and found < 0)
        ):
            raise ValueError(f"{where}: {self._key} must be a string or a whole number from 0")
        return found

    def _labels(self, conditions: list[Any], index: torch.Tensor) -> torch.Tensor | None:
        if self._condition is None:
            return None
        if all(isinstance(value, str) for value in conditions):
            return caption_vectors(conditions, self._caption_dim)
        odd = next((i for i, value in enumerate(conditions) if isinstance(value, str)), None)
        if odd is not None:
            raise ValueError(
                f"{self.where(int(index[odd]))}: {self._key} must be a number, as others"
            )
        return torch.tensor(conditions, dtype=torch.int64, device="cpu")

    def _choose_x(self, x: str | None) -> str:
        if x is not None:
            self._require(x)
            if x.rpartition(".")[2] not in (*IMAGE_SUFFIXES, *ARRAY_SUFFIXES):
                raise ValueError(f"x: must be an image or npy field; got {x!r}")
            return x
        kinds = (*IMAGE_SUFFIXES, *ARRAY_SUFFIXES)
        choices = sorted(f for f in self._fields if f.rpartition(".")[2] in kinds)
        if len(choices) != 1:
            found = ", ".join(choices) or "none"
            raise ValueError(
                f"x: must name the field of the samples, since {self.name} has not exactly one image "
                f"or npy field that all samples have; it has {found}"
            )
        return choices[0]

    def _require(self, field: str) -> None:
        """Raises for the first sample without this field."""
        if field in self._fields:
            return
        for shard, file in enumerate(self.shards):
            index = self._index(shard)
            column = index.fields.get(field, np.full((len(index.keys), 2), -1))
            lacking = np.flatnonzero(column[:, 0] < 0)
            if len(lacking):
                raise ValueError(f"{file}: sample {index.keys[lacking[0]]} has no field {field}")
