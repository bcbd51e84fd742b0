"""What `test_processes.py` starts by torchrun in two processes: `together_program.py WHAT FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

import rfkernels as rf
from rfkernels.training import (
    ReflowConfig,
    TrainConfig,
    make_pairs,
    reflow,
    train_flow,
    train_recipe,
)
from rfkernels.training.processes import join_processes, leave_processes, processes
from rfkernels.training.recipes import Shortcut
from rfkernels.training.trainer import Trainer

# Depth 2, so that sharding has blocks to split; row counts that two processes do not divide evenly.
OPTIONS = {"sample_shape": (2,), "width": 36, "depth": 2, "num_classes": 3}
STEPS = 100


def network() -> torch.nn.Module:
    return rf.models.build("mlp", seed=3, **OPTIONS)


def config(**options) -> TrainConfig:
    defaults = {
        "steps": STEPS,
        "batch_size": 64,
        "log_every": 1,
        "checkpoint_every": 25,
        "conditional": True,
        "label_dropout": 0.2,
        "num_threads": 1,
        "tensorboard": False,
    }
    return TrainConfig(**{**defaults, **options})


def data() -> rf.data.Dataset:
    x = rf.randn(500, 2, seed=1) + 2.0
    return rf.data.Dataset(x, torch.arange(500) % 3, "points")


def pairs(folder: Path) -> None:
    make_pairs(network(), 70, (2,), folder=folder, batch=16, steps=2, labels=torch.arange(70) % 3)


def shortcut(parallel: str, run: Path) -> None:
    """A recipe whose targets come from the averaged network, with its held-out loss at every step."""
    flow_map = rf.models.build("mlp", seed=3, **OPTIONS, flow_map=True)
    train = config(steps=10, holdout_every=1, ema_decay=0.5, parallel=parallel)
    train_recipe(Shortcut(finest=8, bootstrap_fraction=0.5, train=train), flow_map, data(), run=run)


def rounds(parallel: str, run: Path) -> None:
    """Two rounds of reflow."""
    train = config(steps=5, conditional=None, parallel=parallel)
    options = ReflowConfig(rounds=2, pairs=64, pair_steps=1, train=train)
    reflow(network(), options, sample_shape=(2,), run=run)


def _kill_at(step: int) -> None:
    """The second process dies in the middle of that step."""
    ordinary = Trainer._step

    def deadly(self: Trainer, now: int) -> None:
        if now == step and processes().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ordinary(self, now)

    Trainer._step = deadly


def main(what: str, folder: Path) -> None:
    torch.set_num_threads(1)
    join_processes("cpu")
    if what == "all":
        for kind in ("ddp", "fsdp"):
            train_flow(network(), data(), config(parallel=kind), run=folder / kind)
        for coupling in ("ot", "ot-global"):
            options = {"coupling": coupling, "steps": 10}
            train_flow(network(), data(), config(**options), run=folder / coupling)
        accumulated = config(accumulate=2, steps=10, parallel="fsdp")
        train_flow(network(), data(), accumulated, run=folder / "accumulate")
        for optimizer in ("adamp", "sgdp"):
            options = {"optimizer": optimizer, "steps": 10, "weight_decay": 0.01}
            sharded = config(**options, parallel="fsdp")
            train_flow(network(), data(), sharded, run=folder / optimizer)
        pairs(folder / "pairs")
        shortcut("fsdp", folder / "shortcut")
        rounds("fsdp", folder / "rounds")
        try:
            train_flow(network(), data(), config(batch_size=63), run=folder / "odd")
        except ValueError as error:
            (folder / f"error-{processes().rank}.txt").write_text(str(error))
        try:  # only the first process meets the folder's own run, and all must stop
            train_flow(network(), data(), config(), run=folder / "ddp")
        except (FileExistsError, RuntimeError) as error:
            (folder / f"exists-{processes().rank}.txt").write_text(type(error).__name__)
    elif what == "kill":
        _kill_at(40)
        train_flow(network(), data(), config(parallel="fsdp"), run=folder / "killed")
    elif what == "resume":
        train_flow(network(), data(), config(parallel="fsdp"), run=folder / "killed", resume=True)
    leave_processes()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
