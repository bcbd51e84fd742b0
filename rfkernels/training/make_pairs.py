"""`make_pairs`: solves a teacher's ODE from fresh noise and keeps where it ends, shard by shard."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rfkernels.ops.random import randn
from rfkernels.sampling import sample
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
from rfkernels.training.trainer import device_of

__all__ = ["make_pairs", "model_hash"]

_log = logging.getLogger("rfkernels")
_MAX_SHARDS = 1024


def model_hash(velocity: Callable[..., torch.Tensor]) -> str | None:
    """SHA-256 over a network's weights and their names; None for what is no nn.Module."""
    if not isinstance(velocity, nn.Module):
        return None
    return tensors_sha256(velocity.state_dict())


def make_pairs(
    velocity: Callable[..., torch.Tensor],
    count: int,
    shape: Sequence[int],
    *,
    folder: str | Path,
    seed: int = 0,
    solver: str = "heun",
    steps: int | None = 20,
    batch: int = 1000,
    labels: torch.Tensor | None = None,
    condition: Mapping[str, torch.Tensor] | None = None,
    guidance_scale: float | None = None,
    device: torch.device | str | None = None,
    resume: bool = True,
    progress: bool = False,
) -> PairStore:
    """Draws `count` noises, integrates `velocity` from t = 0 to t = 1, and stores the ends.

    The noise of pair i is randn(*shape, seed=seed, offset=i): it is drawn again when the pairs are
    read. The disk needed is said, and checked against what is free, before anything is computed.
    Processes of torch.distributed share the shards; the pairs are the same for any number of them.

    Args:
        velocity: the teacher, velocity(x, t, **condition); a network is used in evaluation mode.
        count: how many pairs.
        shape: of one sample.
        folder: where the shards go.
        seed: of the noise.
        solver, steps: as in `rfkernels.sample`; None steps for an adaptive solver.
        batch: samples solved at a time.
        labels: (count,) or (count, C), short for condition={"y": labels}.
        condition: tensors with `count` rows, handed to the teacher and stored with the pairs.
        guidance_scale: classifier-free guidance; the unconditional call leaves the condition out.
        device: where to compute; default the device of the network.
        resume: keep the finished shards of an interrupted call with the same arguments. False
            refuses a folder that holds pairs.
        progress: show a bar.

    Raises:
        ValueError, TypeError: arguments that do not fit, or pairs of other arguments in the folder.
        FileExistsError: the folder holds pairs and `resume` is false.
        OSError: too little space.
    """
    folder, shape = Path(folder), tuple(int(n) for n in shape)
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"count: must be a whole number; got {count!r}")
    if count < 1 or batch < 1:
        raise ValueError(f"count: count and batch must be at least 1; got {count} and {batch}")
    conditions = _conditions(count, labels, condition)
    if guidance_scale is not None and not conditions:
        raise ValueError("guidance_scale: needs labels or a condition; got none")
    if device is None:
        device = device_of(velocity) if isinstance(velocity, nn.Module) else torch.device("cpu")
    manifest = {
        "format": FORMAT,
        "count": count,
        "shape": list(shape),
        "seed": seed,
        "x0": "drawn",
        "solver": solver,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "model_sha256": model_hash(velocity),
        "condition_sha256": tensors_sha256(conditions) if conditions else None,
        "shard_size": batch * max(1, math.ceil(count / batch / _MAX_SHARDS)),
    }
    on_first(lambda: _check_folder(folder, manifest, resume))
    device, here = torch.device(device), processes()
    with (
        Bar("pairs", count, show=progress and here.rank == 0) as bar,
        _evaluating(velocity),
        torch.no_grad(),
    ):
        todo = _unfinished(folder, manifest, bar)
        if todo:
            # Arguments that cannot work are refused before anything is written.
            _solve(velocity, manifest, torch.zeros(1, dtype=torch.int64), conditions, device)
            on_first(lambda: _begin(folder, manifest, conditions, todo, bar))
        for done, number in enumerate(todo[here.rank :: here.count]):
            try:
                _make_shard(velocity, folder, manifest, number, conditions, batch, device, bar)
            except KeyboardInterrupt:
                whole = shard_count(manifest)
                raise KeyboardInterrupt(
                    f"make_pairs: stopped; {whole - len(todo) + done} of {whole} shards are "
                    f"finished in {folder}; go on with resume=True"
                ) from None
    barrier()
    return PairStore(folder)


@contextmanager
def _evaluating(velocity: Callable[..., torch.Tensor]) -> Iterator[None]:
    """A network is in evaluation mode inside, and as it was afterwards."""
    if not isinstance(velocity, nn.Module):
        yield
        return
    training = velocity.training
    velocity.eval()
    try:
        yield
    finally:
        velocity.train(training)


def _conditions(
    count: int, labels: torch.Tensor | None, condition: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    found = dict(condition or {})
    if labels is not None:
        if "y" in found:
            raise ValueError("labels: are the condition y; give one of the two")
        found["y"] = labels
    for name, value in found.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"condition: {name} must be a tensor; got {type(value).__name__}")
        if value.dim() == 0 or len(value) != count:
            raise ValueError(
                f"condition: {name} must have {count} rows; got the shape {tuple(value.shape)}"
            )
    return {name: value.detach().cpu() for name, value in found.items()}


def _check_folder(folder: Path, manifest: dict[str, Any], resume: bool) -> None:
    """Refuses a folder that holds other pairs, or something else."""
    if (folder / "manifest.json").exists():
        _check_same(folder, manifest, resume)
    elif folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir()):
        raise FileExistsError(
            f"pairs: {folder} is not empty and holds no pairs; give another folder"
        )


def _begin(
    folder: Path,
    manifest: dict[str, Any],
    conditions: dict[str, torch.Tensor],
    todo: list[int],
    bar: Bar,
) -> None:
    """Checks the space, and writes the manifest of a new store."""
    pairs_to_do = sum(len(shard_rows(manifest, n)) for n in todo)
    _say_space(folder, tuple(manifest["shape"]), conditions, pairs_to_do, bar)
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


def _unfinished(folder: Path, manifest: dict[str, Any], bar: Bar) -> list[int]:
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
                _log.warning("make_pairs: %s; making it again", error)
        todo.append(number)
    return todo


def _say_space(
    folder: Path, shape: tuple[int, ...], conditions: dict[str, torch.Tensor], count: int, bar: Bar
) -> None:
    per_pair = 4 * math.prod(shape) + 8
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
        raise OSError(f"make_pairs: {text}")


def _solve(
    velocity: Callable[..., torch.Tensor],
    manifest: dict[str, Any],
    index: torch.Tensor,
    conditions: dict[str, torch.Tensor],
    device: torch.device,
) -> torch.Tensor:
    """The ends of the pairs `index`, on the CPU."""
    guided = manifest["guidance_scale"] is not None
    x0 = randn(len(index), *manifest["shape"], seed=manifest["seed"], offset=index.to(device))
    x1 = sample(
        velocity,
        x0,
        steps=manifest["steps"],
        solver=manifest["solver"],
        condition={name: value[index].to(device) for name, value in conditions.items()},
        uncondition={} if guided else None,
        guidance_scale=manifest["guidance_scale"],
    )
    return x1.cpu()


def _make_shard(
    velocity: Callable[..., torch.Tensor],
    folder: Path,
    manifest: dict[str, Any],
    number: int,
    conditions: dict[str, torch.Tensor],
    batch: int,
    device: torch.device,
    bar: Bar,
) -> None:
    rows, ends = shard_rows(manifest, number), []
    for first in range(rows.start, rows.stop, batch):
        index = torch.arange(first, min(first + batch, rows.stop))
        x1 = _solve(velocity, manifest, index, conditions, device)
        if not torch.isfinite(x1).all():
            raise ValueError(
                f"make_pairs: the teacher's flow is not finite for pairs {first} to "
                f"{first + len(index) - 1}"
            )
        ends.append(x1)
        bar.advance(len(index))
    stored = {
        f"condition.{name}": value[rows.start : rows.stop] for name, value in conditions.items()
    }
    index = torch.arange(rows.start, rows.stop)
    write_tensors(shard_file(folder, number), {"x1": torch.cat(ends), "index": index, **stored})
