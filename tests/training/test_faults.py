"""A disk that is full at any write: one clear error, and a resumed run that ends where an undisturbed one does."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors.torch import load_file

import rfkernels as rf
from rfkernels.training import TrainConfig, train_flow, train_recipe
from rfkernels.training.recipes import SlimFlowReflow

STEPS = 12


def config() -> TrainConfig:
    return TrainConfig(
        steps=STEPS, batch_size=8, checkpoint_every=6, log_every=3, holdout=0.0, tensorboard=False
    )


def network(width: int) -> torch.nn.Module:
    return rf.models.build("mlp", seed=1, sample_shape=(2,), width=width, depth=1)


@pytest.fixture(scope="module")
def teacher():
    return train_flow(network(24), rf.randn(64, 2, seed=0), config())


def run(teacher, folder) -> None:
    """Pairs in two shards, then the training on them."""
    recipe = SlimFlowReflow(pairs=14, pair_batch=8, pair_steps=2, train=config())
    train_recipe(recipe, network(16), teacher=teacher, run=folder, resume=True)


def tensors(folder) -> dict[str, dict[str, torch.Tensor]]:
    return {str(f.relative_to(folder)): load_file(f) for f in folder.rglob("*.safetensors")}


class FullDisk:
    """os.fsync that fails at one call; the others write."""

    def __init__(self) -> None:
        self.real, self.calls, self.fails_at = os.fsync, 0, None

    def __call__(self, handle: int) -> None:
        self.calls += 1
        if self.calls == self.fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.real(handle)


def test_a_disk_that_is_full_at_any_write(teacher, tmp_path, monkeypatch):
    disk = FullDisk()
    monkeypatch.setattr(os, "fsync", disk)
    run(teacher, tmp_path / "whole")
    writes, whole = disk.calls, tensors(tmp_path / "whole")
    assert writes > 30
    assert len(whole) == 2 + 3 * 3  # shards; three checkpoints of three files
    for number in range(1, writes + 1):
        folder = tmp_path / str(number)
        disk.calls, disk.fails_at = 0, number
        with pytest.raises(OSError, match="No space left"):
            run(teacher, folder)
        disk.fails_at = None
        leftovers = list(folder.rglob("*.tmp"))
        assert not leftovers, leftovers
        run(teacher, folder)
        found = tensors(folder)
        assert found.keys() == whole.keys()
        for name, parts in whole.items():
            for key, value in parts.items():
                assert torch.equal(found[name][key], value), (number, name, key)


def test_the_error_says_what_could_not_be_written(teacher, tmp_path, monkeypatch):
    ordinary = rf.training.checkpoint.write_tensors

    def full(file, values):
        if "step-6" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        ordinary(file, values)

    monkeypatch.setattr(rf.training.checkpoint, "write_tensors", full)
    with pytest.raises(OSError, match=r"cannot write the checkpoint of step 6 to .*resume=True"):
        run(teacher, tmp_path / "other")
    assert sorted(p.name for p in (tmp_path / "other/checkpoints").iterdir()) == ["step-0"]


@pytest.mark.parametrize("damage", ["truncated", "emptied", "overwritten"])
def test_a_damaged_shard_is_made_again_and_nothing_is_lost(teacher, tmp_path, damage):
    run(teacher, tmp_path / "whole")
    folder = tmp_path / "damaged"
    run(teacher, folder)
    shard = folder / "pairs" / "shard-00001.safetensors"
    content = shard.read_bytes()
    bad = {"truncated": content[:-5], "emptied": b"", "overwritten": b"x" * len(content)}[damage]
    shard.write_bytes(bad)
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors: damaged shard"):
        rf.training.PairStore(folder / "pairs")
    run(teacher, folder)
    assert shard.read_bytes() == content
    assert tensors(folder).keys() == tensors(tmp_path / "whole").keys()
