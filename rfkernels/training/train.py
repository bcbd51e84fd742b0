"""`train_flow`: trains a velocity network on a data set (the first rectified flow)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rfkernels.models as models
from rfkernels.data import Data, as_dataset
from rfkernels.training.checks import (
    check_coupling,
    check_label_dropout,
    check_labels,
    check_model,
    check_output,
    check_start,
    is_conditional,
)
from rfkernels.training.config import TrainConfig
from rfkernels.training.config_json import to_dict
from rfkernels.training.files import tensors_sha256
from rfkernels.training.objective import Objective, Setting
from rfkernels.training.pictures import Pictures
from rfkernels.training.recipes.rectified_flow import FlowObjective
from rfkernels.training.run_folder import RunFolder
from rfkernels.training.sources import DataSource
from rfkernels.training.trainer import RunResult, Trainer, device_of

__all__ = ["train_flow"]

Samples = Data | torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def train_flow(
    model: nn.Module,
    data: Samples,
    config: TrainConfig | None = None,
    *,
    run: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    x0: Samples | None = None,
) -> RunResult:
    """Trains `model` as the velocity of a flow from noise, or from `x0`, to `data`.

    Args:
        model: called as model(x, t), or model(x, t, y=labels) when it is conditional; x (B,
            *sample_shape), t (B,) float32 in [0, 1], 0 at the source and 1 at the data. It is
            trained in place, on the device it is on.
        data: a data set of `rfkernels.data`, a tensor (N, ...), or a pair (samples, labels).
        config: a TrainConfig; None for its defaults.
        run: folder for config, metrics, checkpoints and samples; None to write nothing.
        resume: go on with the run in that folder, from its newest checkpoint; it ends with the
            weights that it would have had without the interruption, bit for bit at the same thread
            count. A folder without a run starts one.
        progress: show a bar with loss and time to go.
        x0: the source samples; None for standard normal noise.

    Returns:
        RunResult: the network, its average `ema`, the metrics.

    Raises:
        ValueError, TypeError: an option, the data or the network's output does not fit; nothing has
        been written. FileExistsError: `run` holds a run already and `resume` is false.
        TrainingDivergedError: the loss is not finite.
        OSError: the folder cannot be written.
    """
    config = TrainConfig() if config is None else config
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config: must be a TrainConfig; got {type(config).__name__}")
    check_start("train_flow", config, run)
    data = as_dataset(data)
    check_model(model)
    source, null_label, described = data_source(model, data, x0, config)
    objective = FlowObjective(Setting(source, config, null_label))
    check_output(model, objective)
    return run_trainer(
        "train_flow",
        "train",
        model,
        objective,
        config,
        train=config,
        run=run,
        resume=resume,
        progress=progress,
        sample_shape=data.sample_shape,
        described=described,
    )


def data_source(
    model: nn.Module, data: Data, x0: Samples | None, train: TrainConfig
) -> tuple[DataSource, int | float | None, dict[str, Any]]:
    """What a run on data draws from, the label that stands for none, and what config.json says of
    both; refuses what does not fit."""
    source_data = None if x0 is None else as_dataset(x0)
    check_coupling(train, data, source_data)
    conditional = is_conditional(model, data, train)
    if conditional:
        check_labels(model, data)
    null_label = check_label_dropout(model, train, conditional)
    source = DataSource(
        data,
        x0=source_data,
        coupling=train.coupling,
        seed=train.seed,
        holdout=train.holdout,
        conditional=conditional,
        device=device_of(model),
    )
    described = {
        "data": describe_data(data),
        "source": None if source_data is None else describe_data(source_data),
        "conditional": conditional,
        "num_classes": getattr(data, "num_classes", None) if conditional else None,
    }
    return source, null_label, described


def run_trainer(
    name: str,
    kind: str,
    model: nn.Module,
    objective: Objective,
    config: Any,
    *,
    train: TrainConfig,
    run: str | Path | RunFolder | None,
    resume: bool,
    progress: bool,
    sample_shape: tuple[int, ...],
    described: Mapping[str, Any],
) -> RunResult:
    """Opens the folder, trains, gathers the result: what the three public functions share."""
    with ExitStack() as stack:
        folder = run
        if not isinstance(run, RunFolder):
            folder = open_run(stack, run, kind, model, config, sample_shape, described, resume)
        picture = None
        if train.sample_every and folder is not None:
            picture = Pictures(
                folder.samples,
                sample_shape,
                train,
                solver=getattr(config, "sample_solver", "euler"),
                source=getattr(objective, "source", None),
                num_classes=described.get("num_classes"),
                device=device_of(model),
            )
        trainer = Trainer(name, model, objective, train, folder, progress, picture)
        ema, metrics = trainer.fit()
    path = None if folder is None else folder.path
    return RunResult(
        model,
        ema,
        path,
        metrics,
        kind,
        config,
        tuple(sample_shape),
        described["num_classes"],
        bool(described["conditional"]),
    )


def open_run(
    stack: ExitStack,
    run: str | Path | None,
    kind: str,
    model: nn.Module,
    config: Any,
    sample_shape: tuple[int, ...],
    described: Mapping[str, Any],
    resume: bool,
) -> RunFolder | None:
    """The run's folder, opened until `stack` closes it; None where nothing is written."""
    if run is None:
        return None
    description = describe_run(kind, model, config, sample_shape, described)
    folder = RunFolder(run, description, resume=resume)
    stack.callback(folder.close)
    return folder


def describe_run(
    kind: str,
    model: nn.Module,
    config: Any,
    sample_shape: tuple[int, ...],
    described: Mapping[str, Any],
) -> dict[str, Any]:
    """What config.json says of a run."""
    cls = type(model)
    own = {"class": f"{cls.__module__}.{cls.__qualname__}"}
    return {
        "kind": kind,
        "model": models.describe(model) or own,
        "sample_shape": list(sample_shape),
        **described,
        "config": to_dict(config),
    }


def describe_data(data: Data) -> dict[str, Any]:
    """What config.json says of a data set."""
    return {
        "name": data.name,
        "size": data.size,
        "seed": getattr(data, "seed", None),
        "sha256": None if data.size is None else _fingerprint(data),
    }


def _fingerprint(data: Data) -> str:
    """SHA-256 of up to 4096 evenly spaced rows, so that a run is not resumed on other data."""
    count = min(data.size, 4096)
    rows = torch.arange(count, device="cpu") * (data.size - 1) // max(count - 1, 1)
    x, labels = data.rows(rows)
    return tensors_sha256({"x": x} if labels is None else {"x": x, "labels": labels})
