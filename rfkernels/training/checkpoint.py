"""Checkpoints: a folder step-N of safetensors files and a state.json, which appears whole or not at
all.

Everything is written to a hidden folder, flushed to the disk and renamed. state.json carries the
SHA-256 of the other files, so a damaged checkpoint is recognised when it is read, and the one
before it is used.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rfkernels.training.files import read_json, sha256, sync_folder, write_json, write_tensors

__all__ = ["Checkpoint", "latest", "save", "steps_on_disk"]

FORMAT = 1
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole."""

    folder: Path
    step: int
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of `<name>.safetensors`, on the CPU."""
        return load_file(self.folder / f"{name}.safetensors")


def steps_on_disk(folder: Path) -> list[int]:
    """The steps of the checkpoints in `folder`, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for p in folder.iterdir() if (m := _STEP.fullmatch(p.name)))


def save(
    folder: Path,
    step: int,
    parts: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Writes `folder`/step-`step` with a safetensors file per part; only the newest `keep` stay."""
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    temporary = folder / f".step-{step}.{os.getpid()}.tmp"
    temporary.mkdir()
    try:
        for name, tensors in parts.items():
            write_tensors(temporary / f"{name}.safetensors", tensors)
        digests = {p.name: sha256(p) for p in sorted(temporary.glob("*.safetensors"))}
        description = {"format": FORMAT, "step": step, **state, "sha256": digests}
        write_json(temporary / "state.json", description)
        # What is there of this step or of later ones is damaged: the run would have gone on from
        # it.
        for stale in steps_on_disk(folder):
            if stale >= step:
                _discard(folder / f"step-{stale}")
        temporary.rename(folder / f"step-{step}")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder)
    prune(folder, step, keep=keep)
    return folder / f"step-{step}"


def prune(folder: Path, newest: int, *, keep: int) -> None:
    """Removes all but `keep` checkpoints of those up to step `newest`, which is whole."""
    for old in [step for step in steps_on_disk(folder) if step <= newest][:-keep]:
        _discard(folder / f"step-{old}")


def _discard(folder: Path) -> None:
    """Removes a checkpoint; renamed first, so that a half-removed one is never read."""
    doomed = folder.with_name(f".{folder.name}.old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Removes what a killed process left half-written or half-removed."""
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _damage(folder: Path, step: int) -> tuple[dict[str, Any], str | None]:
    """The state of a checkpoint, and what is wrong with it (None: nothing)."""
    try:
        state = read_json(folder / "state.json")
    except (OSError, ValueError) as error:
        return {}, str(error)
    if (
        state.get("format") != FORMAT
        or state.get("step") != step
        or not isinstance(state.get("sha256"), dict)
    ):
        return state, f"state.json is not that of step {step} in format {FORMAT}"
    for name, digest in state["sha256"].items():
        file = folder / name
        if not file.is_file():
            return state, f"{name} is missing"
        if sha256(file) != digest:
            return state, f"{name} is damaged (its SHA-256 is not the one recorded)"
    return state, None


def latest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint; None when there is none at all. A damaged one is passed over
    with a warning.

    Raises:
        ValueError: there are checkpoints, and all of them are damaged.
    """
    steps = steps_on_disk(folder)
    problems = []
    for step in reversed(steps):
        path = folder / f"step-{step}"
        state, damage = _damage(path, step)
        if damage is None:
            if problems:
                warnings.warn(f"{'; '.join(problems)}; using {path} instead", stacklevel=2)
            return Checkpoint(path, step, state)
        problems.append(f"{path}: {damage}")
    if problems:
        raise ValueError(f"{'; '.join(problems)}; no whole checkpoint is left")
    return None
