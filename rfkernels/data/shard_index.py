"""Where each sample of a tar shard lies: built in one pass over the headers, kept as JSON.

A shard is an uncompressed tar whose members are grouped by name, as the webdataset package writes
them: everything before the first dot of the file name is the key, the rest the field, and neighbours
with the same key (folder included) are one sample. Nothing is ever extracted to disk.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from rfkernels._whole_file import read_json_kept, write_json_whole
from rfkernels.data.decode import ARRAY_SUFFIXES, IMAGE_SUFFIXES, decode_integer

__all__ = ["FIELDS", "ShardIndex", "ShardSummary", "index_shards", "read_shard", "scan_shard"]

FIELDS = (*IMAGE_SUFFIXES, *ARRAY_SUFFIXES, "json", "txt", "cls")
_FORMAT = 1
_ABSENT = (-1, 0)
_BLOCK = 512
_THREADS = 4


class ShardIndex(NamedTuple):
    """The samples of one shard: keys[i], and for each field an int64 array (samples, 2) with the
    offset in the file and the number of bytes; the offset is -1 where a sample lacks the field."""

    keys: list[str]
    fields: dict[str, np.ndarray]


class ShardSummary(NamedTuple):
    """What opening a set needs of a shard. `fields` are those every sample has; `classes` is one more
    than the greatest `cls`, 0 without any."""

    samples: int
    fields: list[str]
    classes: int


def _split_name(name: str) -> tuple[str, str]:
    """(key, field): "a/b.left.jpg" is ("a/b", "left.jpg")."""
    folder, _, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), field.lower()


def scan_shard(file: Path, ignore: frozenset[str] = frozenset()) -> ShardIndex:
    """Reads the headers of a shard.

    Args:
        file: an uncompressed tar.
        ignore: fields to leave unread.

    Raises:
        ValueError: it is not a whole tar, or holds a member that is refused (an unknown field such as
            pkl or pth, a link), a key that comes back after another one or a field twice; the message
            names the file, and the byte or the member.
    """
    keys: list[str] = []
    seen: set[str] = set()
    fields: dict[str, list[tuple[int, int]]] = {}
    end = 0
    with file.open("rb") as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for member in archive:
                    end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                    where = f"{file}: {member.name} at byte {member.offset}"
                    archive.members = []  # type: ignore[attr-defined]  # else they add up in memory
                    if member.isdir():
                        end = member.offset_data
                        continue
                    if not member.isreg() or member.issparse():
                        raise ValueError(f"{where}: must be a plain file; got a link or the like")
                    key, field = _split_name(member.name)
                    if field in ignore:
                        continue
                    if field.rpartition(".")[2] not in FIELDS:
                        raise ValueError(
                            f"{where}: field {field or '(none)'} has no decoder and is refused; known "
                            f"are {', '.join(FIELDS)}; to leave such members unread, name the field "
                            "in ignore"
                        )
                    if not keys or keys[-1] != key:
                        if key in seen:
                            raise ValueError(
                                f"{where}: key {key} comes a second time in this shard"
                            )
                        seen.add(key)
                        keys.append(key)
                    column = fields.setdefault(field, [])
                    if len(column) == len(keys):
                        raise ValueError(f"{where}: sample {key} has the field {field} twice")
                    column += [_ABSENT] * (len(keys) - 1 - len(column))
                    column.append((member.offset_data, member.size))
        except tarfile.TarError as error:
            raise ValueError(
                f"{file}: not a whole uncompressed tar: {error}, after sample {len(keys)} at byte {end}"
            ) from error
        # The reader takes a bad header and a cut between members for the end of the archive.
        stream.seek(end)
        block = stream.read(_BLOCK)
        if len(block) < _BLOCK or any(block):
            what = "a damaged header" if len(block) == _BLOCK else "the file is cut off"
            raise ValueError(f"{file}: {what} at byte {end}, after sample {len(keys)}")
    for column in fields.values():
        column += [_ABSENT] * (len(keys) - len(column))
    return ShardIndex(keys, _arrays(fields))


def _arrays(fields: dict[str, list[Any]]) -> dict[str, np.ndarray]:
    return {name: np.array(column, np.int64).reshape(-1, 2) for name, column in fields.items()}


def read_shard(stream: BinaryIO, file: Path, place: tuple[int, int], what: str) -> bytes:
    """The bytes of a member at place = (offset, bytes).

    Raises:
        ValueError: the file ends before them.
    """
    offset, count = place
    stream.seek(offset)
    data = stream.read(count)
    if len(data) != count:
        raise ValueError(f"{file}: {what} at byte {offset}: the file is cut off")
    return data


def _classes(file: Path, index: ShardIndex) -> int:
    """One more than the greatest number in the `cls` members."""
    greatest = -1
    if "cls" not in index.fields:
        return 0
    with file.open("rb") as stream:
        for key, (offset, count) in zip(index.keys, index.fields["cls"].tolist(), strict=True):
            if offset >= 0:
                data = read_shard(stream, file, (offset, count), f"{key}.cls")
                where = f"{file}: {key}.cls at byte {offset}"
                greatest = max(greatest, decode_integer(data, where))
    return greatest + 1


def _state(file: Path) -> list[int]:
    """What tells a changed shard."""
    stat = file.stat()
    return [_FORMAT, stat.st_size, stat.st_mtime_ns]


class IndexCache:
    """The JSON files of a set's index, in one folder. None of them is trusted for a shard whose size
    or time of change differs."""

    def __init__(self, folder: Path | None, ignore: frozenset[str]) -> None:
        self.folder, self._ignore = folder, ignore

    def _file(self, shard: Path) -> Path | None:
        if self.folder is None:
            return None
        name = f"{shard.resolve()}|{','.join(sorted(self._ignore))}"
        return self.folder / f"{shard.name}-{hashlib.sha256(name.encode()).hexdigest()[:12]}.json"

    def index(self, shard: Path) -> ShardIndex:
        """Of one shard, from its file or scanned."""
        file = self._file(shard)
        kept = read_json_kept(file, "state", _state(shard))
        if kept is not None:
            return ShardIndex(kept["keys"], _arrays(kept["fields"]))
        state = _state(shard)
        index = scan_shard(shard, self._ignore)
        if file is not None:
            fields = {name: column.tolist() for name, column in index.fields.items()}
            write_json_whole(file, {"state": state, "keys": index.keys, "fields": fields})
        return index

    def summaries(self, shards: list[Path]) -> list[ShardSummary]:
        """Of all shards, from one file or through `index`."""
        states = [_state(shard) for shard in shards]
        names = "|".join([*(str(s.resolve()) for s in shards), *sorted(self._ignore)])
        file = None
        if self.folder is not None:
            file = self.folder / f"set-{hashlib.sha256(names.encode()).hexdigest()[:12]}.json"
        kept = read_json_kept(file, "state", states)
        if kept is not None:
            return [ShardSummary(*row) for row in kept["shards"]]
        with ThreadPoolExecutor(_THREADS) as pool:
            rows = list(pool.map(self._summarize, shards))
        if file is not None:
            write_json_whole(file, {"state": states, "shards": rows})
        return rows

    def _summarize(self, shard: Path) -> ShardSummary:
        index = self.index(shard)
        complete = [name for name, column in index.fields.items() if (column[:, 0] >= 0).all()]
        return ShardSummary(len(index.keys), complete, _classes(shard, index))


def index_shards(
    shards: list[Path], cache: str | Path | None, ignore: frozenset[str]
) -> tuple[IndexCache, list[ShardSummary]]:
    """The index of a set of shards, kept in `cache`; None: `.rfkernels-index` beside the first shard,
    or, where that cannot be written, below $XDG_CACHE_HOME (~/.cache)."""
    if cache is not None:
        folders = [Path(cache)]
    else:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folders = [shards[0].parent / ".rfkernels-index", home / "rfkernels" / "index"]
    chosen = next((folder for folder in folders if _writable(folder)), None)
    if chosen is None:
        warnings.warn(
            f"{shards[0].parent}: neither {' nor '.join(map(str, folders))} can be written; the shards "
            "are scanned anew at every start; name a folder in cache",
            stacklevel=3,
        )
    index = IndexCache(chosen, ignore)
    return index, index.summaries(shards)


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
