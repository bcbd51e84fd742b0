"""A store of pairs (x0, x1) that a teacher's flow made: a folder of safetensors shards and a
manifest.

Layout: `manifest.json` and `shard-00000.safetensors`, ... Each shard holds x1 (n, ...), index (n,)
int64 and one `condition.<name>` for every condition. The noise x0 of pair i is randn(*shape,
seed=manifest seed, offset=i) and is not stored; only pairs whose x0 is no draw carry it, as the
entry x0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rfkernels.ops.random import randn
from rfkernels.training.files import read_json

__all__ = ["PairStore", "StoredPairs", "read_manifest", "shard_file", "shard_rows"]

FORMAT = 1
_IN_MEMORY = 2 << 30  # bytes; a larger store stays in mapped files


class StoredPairs(NamedTuple):
    """Rows of a store as they lie on the disk: x0 is None where it is a draw."""

    x1: torch.Tensor
    index: torch.Tensor
    x0: torch.Tensor | None
    condition: dict[str, torch.Tensor]


def shard_file(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{number:05d}.safetensors"


def shard_rows(manifest: dict[str, Any], number: int) -> range:
    """The pair indices of a shard."""
    size = manifest["shard_size"]
    return range(number * size, min((number + 1) * size, manifest["count"]))


def shard_count(manifest: dict[str, Any]) -> int:
    """How many shards the whole store has."""
    return -(-manifest["count"] // manifest["shard_size"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged or of another format.
    """
    file = folder / "manifest.json"
    if not file.is_file():
        raise FileNotFoundError(f"pairs: {folder} holds no pairs (no manifest.json)")
    manifest = read_json(file)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{file}: must be of format {FORMAT}; got {manifest.get('format')!r}")
    return manifest


def read_shard(file: Path, rows: range) -> dict[str, torch.Tensor]:
    """A shard's tensors, checked to be the pairs `rows`.

    Raises:
        ValueError: the file is damaged or holds other pairs.
    """
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: damaged shard ({error})") from error
    index = tensors.get("index")
    if (
        index is None
        or "x1" not in tensors
        or not torch.equal(index, torch.arange(rows.start, rows.stop, device="cpu"))
    ):
        raise ValueError(f"{file}: does not hold the pairs {rows.start} to {rows.stop - 1}")
    if any(len(value) != len(rows) for value in tensors.values()):
        raise ValueError(f"{file}: its tensors do not all have {len(rows)} rows")
    return tensors


class PairStore:
    """The finished pairs in `folder`; `batch(indices)` gives (x0, x1, condition).

    Attributes:
        folder, manifest: where and what they are.
        seed: of the noise; the noise of pair i has offset i.
        sample_shape: shape of one sample.

    Raises:
        FileNotFoundError: no pairs there, or some shards are still to be made.
        ValueError: a damaged manifest or shard.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.seed: int = self.manifest["seed"]
        self.sample_shape: tuple[int, ...] = tuple(self.manifest["shape"])
        count = shard_count(self.manifest)
        missing = [n for n in range(count) if not shard_file(self.folder, n).is_file()]
        if missing:
            maker = "invert_data" if self.manifest.get("x0") == "stored" else "make_pairs"
            raise FileNotFoundError(
                f"pairs: {len(missing)} of {count} shards are missing in {self.folder}; finish "
                f"them with {maker}(..., resume=True)"
            )
        shards = [
            read_shard(shard_file(self.folder, n), shard_rows(self.manifest, n))
            for n in range(count)
        ]
        size = sum(
            value.numel() * value.element_size() for shard in shards for value in shard.values()
        )
        if size <= _IN_MEMORY:
            shards = [{name: torch.cat([s[name] for s in shards]) for name in shards[0]}]
        self._shards, self._rows = shards, len(shards[0]["index"])

    def __len__(self) -> int:
        return int(self.manifest["count"])

    @property
    def x1(self) -> torch.Tensor:
        """Every x1, (len, *sample_shape), in the order of the indices."""
        return (
            torch.cat([s["x1"] for s in self._shards])
            if len(self._shards) > 1
            else self._shards[0]["x1"]
        )

    @property
    def labels(self) -> torch.Tensor | None:
        """The condition y of every pair, (len, ...); None without it."""
        if "condition.y" not in self._shards[0]:
            return None
        return torch.cat([s["condition.y"] for s in self._shards])

    def stored(self, indices: torch.Tensor) -> StoredPairs:
        """The rows of these pairs, int64 (B,), without drawing their noise."""
        if len(self._shards) == 1:
            rows = {name: value[indices] for name, value in self._shards[0].items()}
        else:
            rows = self._gather(indices)
        prefix = "condition."
        condition = {n.removeprefix(prefix): v for n, v in rows.items() if n.startswith(prefix)}
        return StoredPairs(rows["x1"], rows["index"], rows.get("x0"), condition)

    def batch(
        self, indices: torch.Tensor, *, device: torch.device | str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """(x0, x1, condition) of these pairs, int64 (B,); x0 is drawn again from (seed, index)."""
        rows = self.stored(torch.as_tensor(indices, dtype=torch.int64))
        x0 = rows.x0
        index = rows.index.to(device)
        if x0 is None:
            x0 = randn(
                len(index), *self.sample_shape, seed=self.seed, offset=index, device=index.device
            )
        return (
            x0.to(device),
            rows.x1.to(device),
            {n: v.to(device) for n, v in rows.condition.items()},
        )

    def _gather(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        number = torch.div(indices, self._rows, rounding_mode="floor")
        first = self._shards[0]
        out = {name: v.new_empty((len(indices), *v.shape[1:])) for name, v in first.items()}
        for n in number.unique().tolist():
            mask = number == n
            for name, value in self._shards[n].items():
                out[name][mask] = value[indices[mask] - n * self._rows]
        return out
