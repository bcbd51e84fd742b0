"""Fills a store of pairs shard by shard: what `make_pairs` and `invert_data` share."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rfkernels.training.checks import evaluating
from rfkernels.training.files import tensors_sha256, write_json, write_tensors
from rfkernels.training.pairs import (
    FORMAT,
    PairStore,
    read_manifest,
    read_shard,
    shard_count,
    shard_file,
    shard_rows,
)
from rfkernels.training.processes import barrier, on_first, processes
from rfkernels.training.progress import Bar

__all__ = ["describe_pairs", "model_hash", "write_pairs"]

_log = logging.getLogger("rfkernels")
_MAX_SHARDS = 1024

# The tensors of some pairs by their index, on the CPU: x1, and x0 where the store keeps it.
Solve = Callable[[torch.Tensor], dict[str, torch.Tensor]]


def model_hash(velocity: Callable[..., torch.Tensor]) -> str | None:
    """SHA-256 over a network's weights and their names; None for what is no nn.Module."""
    if not isinstance(velocity, nn.Module):
        return None
    return tensors_sha256(velocity.state_dict())


def describe_pairs(
    velocity: Callable[..., torch.Tensor],
    count: int,
    shape: tuple[int, ...],
    conditions: Mapping[str, torch.Tensor],
    *,
    batch: int,
    **options: Any,
) -> dict[str, Any]:
    """The manifest of a store; `options` are x0 ("drawn" or "stored") and how pairs are made."""
    return {
        "format": FORMAT,
        "count": count,
        "shape": list(shape),
        **options,
        "model_sha256": model_hash(velocity),
        "condition_sha256": tensors_sha256(conditions) if conditions else None,
        "shard_size": batch * max(1, math.ceil(count / batch / _MAX_SHARDS)),
    }


def write_pairs(
    name: str,
    velocity: Callable[..., torch.Tensor],
    solve: Solve,
    *,
    folder: Path,
    manifest: dict[str, Any],
    conditions: dict[str, torch.Tensor],
    batch: int,
    resume: bool,
    progress: bool,
) -> PairStore:
    """Makes the shards that are missing, `batch` pairs at a time, and opens the store.

    `name` is the public function, for messages. Processes of torch.distributed share the shards.

    Raises:
        As `make_pairs`.
    """
    on_first(lambda: _check_folder(folder, manifest, resume))
    here = processes()
    with (
        Bar("pairs", manifest["count"], show=progress and here.rank == 0) as bar,
        evaluating(velocity),
        torch.no_grad(),
    ):
        todo = _unfinished(name, folder, manifest, bar)
        if todo:
            # Arguments that cannot work are refused before anything is written.
            solve(torch.zeros(1, dtype=torch.int64, device="cpu"))
            on_first(lambda: _begin(name, folder, manifest, conditions, todo, bar))
        for done, number in enumerate(todo[here.rank :: here.count]):
            try:
                _make_shard(name, solve, folder, manifest, number, conditions, batch, bar)
            except KeyboardInterrupt:
                whole = shard_count(manifest)
                raise KeyboardInterrupt(
                    f"{name}: stopped; {whole - len(todo) + done} of {whole} shards are "
                    f"finished in {folder}; go on with resume=True"
                ) from None
    barrier()
    return PairStore(folder)


def _check_folder(folder: Path, manifest: dict[str, Any], resume: bool) -> None:
    """Refuses a folder that holds other pairs, or something else."""
    if (folder / "manifest.json").exists():
        _check_same(folder, manifest, resume)
    elif folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir()):
        raise FileExistsError(
            f"pairs: {folder} is not empty and holds no pairs; give another folder"
        )


def _begin(
    name: str,
    folder: Path,
    manifest: dict[str, Any],
    conditions: dict[str, torch.Tensor],
    todo: list[int],
    bar: Bar,
) -> None:
    """Checks the space, and writes the manifest of a new store."""
    pairs_to_do = sum(len(shard_rows(manifest, n)) for n in todo)
    _say_space(name, folder, manifest, conditions, pairs_to_do, bar)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "manifest.json").exists():
        write_json(folder / "manifest.json", manifest)


def _check_same(folder: Path, manifest: dict[str, Any], resume: bool) -> None:
    if not resume:
        raise FileExistsError(
            f"pairs: {folder} holds pairs already; give another folder, or resume=True"
        )
    old = read_manifest(folder)
    for key, value in manifest.items():
        if old.get(key) != value:
            raise ValueError(
                f"pairs: {folder} was begun with other arguments: {key} is {old.get(key)!r} "
                f"there and {value!r} now"
            )


def _unfinished(name: str, folder: Path, manifest: dict[str, Any], bar: Bar) -> list[int]:
    """The shards still to be made; a damaged one is made again, and that is said."""
    todo = []
    for number in range(shard_count(manifest)):
        file, rows = shard_file(folder, number), shard_rows(manifest, number)
        if file.is_file():
            try:
                read_shard(file, rows)
                bar.advance(len(rows))
                continue
            except ValueError as error:
                _log.warning("%s: %s; making it again", name, error)
        todo.append(number)
    return todo


def _say_space(
    name: str,
    folder: Path,
    manifest: dict[str, Any],
    conditions: dict[str, torch.Tensor],
    count: int,
    bar: Bar,
) -> None:
    kept = 2 if manifest["x0"] == "stored" else 1
    per_pair = 4 * kept * math.prod(manifest["shape"]) + 8
    per_pair += sum(v[0].numel() * v.element_size() for v in conditions.values())
    need = count * per_pair
    existing = next(p for p in (folder, *folder.resolve().parents) if p.is_dir())
    free = shutil.disk_usage(existing).free
    text = (
        f"{count} pairs need {need / 2**20:.1f} MiB in {folder} ({free / 2**20:.0f} MiB are free)"
    )
    _log.info(text)
    bar.say(text)
    if need > free:
        raise OSError(f"{name}: {text}")


def _make_shard(
    name: str,
    solve: Solve,
    folder: Path,
    manifest: dict[str, Any],
    number: int,
    conditions: dict[str, torch.Tensor],
    batch: int,
    bar: Bar,
) -> None:
    rows, pieces = shard_rows(manifest, number), []
    for first in range(rows.start, rows.stop, batch):
        index = torch.arange(first, min(first + batch, rows.stop), device="cpu")
        piece = solve(index)
        if not all(torch.isfinite(value).all() for value in piece.values()):
            raise ValueError(
                f"{name}: the teacher's flow is not finite for pairs {first} to "
                f"{first + len(index) - 1}"
            )
        pieces.append(piece)
        bar.advance(len(index))
    made = {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}
    stored = {
        f"condition.{key}": value[rows.start : rows.stop] for key, value in conditions.items()
    }
    index = torch.arange(rows.start, rows.stop, device="cpu")
    write_tensors(shard_file(folder, number), {**made, "index": index, **stored})
