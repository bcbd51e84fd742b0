"""`train_flow`: trains a velocity network on a data set (the first rectified flow)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rfkernels.models as models
from rfkernels.data import Data, as_dataset
from rfkernels.training.config import TrainConfig
from rfkernels.training.config_json import to_dict
from rfkernels.training.files import tensors_sha256
from rfkernels.training.objectives import FlowObjective, Objective
from rfkernels.training.pictures import Pictures
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
    data = as_dataset(data)
    source_data = None if x0 is None else as_dataset(x0)
    device = check_model(model)
    _check_coupling(config, data, source_data)
    check_destination(config, run)
    conditional = _is_conditional(model, data, config)
    if conditional:
        _check_labels(model, data)
    null_label = check_label_dropout(model, config, conditional)
    source = DataSource(
        data,
        x0=source_data,
        coupling=config.coupling,
        seed=config.seed,
        holdout=config.holdout,
        conditional=conditional,
        device=device,
    )
    objective = FlowObjective(source, config, null_label)
    check_output(model, objective)
    classes = getattr(data, "num_classes", None) if conditional else None
    described = {
        "data": _data_of(data),
        "source": None if source_data is None else _data_of(source_data),
        "conditional": conditional,
        "num_classes": classes,
    }
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
    """Opens the run folder, trains, and gathers the result: what train_flow, reflow and distill
    have in common."""
    description = describe_run(kind, model, config, sample_shape, described)
    opened = run if isinstance(run, RunFolder) else None
    folder = opened
    if folder is None and run is not None:
        folder = RunFolder(run, description, resume=resume)
    try:
        picture = None
        if train.sample_every and folder is not None:
            picture = Pictures(
                folder.samples,
                sample_shape,
                train,
                num_classes=described.get("num_classes"),
                device=device_of(model),
            )
        trainer = Trainer(name, model, objective, train, folder, progress, picture)
        ema, metrics = trainer.fit()
    finally:
        if folder is not None and opened is None:
            folder.close()
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


def check_model(model: nn.Module) -> torch.device:
    """The network's device; refuses what is no network or has nothing to train."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: must be a torch.nn.Module; got {type(model).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model: has no weights to train (no parameter requires a gradient)")
    return device_of(model)


def _check_coupling(config: TrainConfig, data: Data, x0: Data | None) -> None:
    if x0 is not None and x0.sample_shape != data.sample_shape:
        raise ValueError(
            f"x0: samples must have the shape of the data's, {data.sample_shape}; got "
            f"{x0.sample_shape}"
        )
    if config.coupling != "given":
        return
    if x0 is None:
        raise ValueError(
            'coupling: "given" needs x0, whose row i belongs to row i of the data; got None'
        )
    if x0.size != data.size:
        raise ValueError(
            f'coupling: "given" needs as many rows in x0 as in the data, {data.size}; got {x0.size}'
        )


def _is_conditional(model: nn.Module, data: Data, config: TrainConfig) -> bool:
    """Whether labels reach the network."""
    if config.conditional is None:
        return data.has_labels and getattr(model, "null_label", None) is not None
    if config.conditional and not data.has_labels:
        raise ValueError("conditional: True needs data with labels; got data without")
    return config.conditional


def _check_labels(model: nn.Module, data: Data) -> None:
    """Class labels must be those that the network has, whose null label is the next one."""
    classes, null_label = getattr(data, "num_classes", None), getattr(model, "null_label", None)
    if classes is not None and isinstance(null_label, int) and classes > null_label:
        raise ValueError(
            f"data: labels must be below the network's num_classes, {null_label}; got {classes - 1}"
        )


def check_destination(config: TrainConfig, run: object) -> None:
    """Options that write files need a run folder; TensorBoard must be there before a run begins."""
    if run is None and (config.sample_every or config.tensorboard):
        name = "sample_every" if config.sample_every else "tensorboard"
        raise ValueError(f"{name}: writes files, so it needs run, a folder; got None")
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ImportError(
            "tensorboard: it is not installed; install it with: pip install tensorboard"
        )


def check_label_dropout(
    model: nn.Module, config: TrainConfig, conditional: bool
) -> int | float | None:
    """The label that stands for no condition, or None where it is not needed."""
    null_label = getattr(model, "null_label", None)
    if config.label_dropout == 0.0:
        return null_label
    if not conditional:
        raise ValueError(
            f"label_dropout: needs a conditional network and labels; got {config.label_dropout} "
            f"without"
        )
    if null_label is None:
        raise ValueError(
            "label_dropout: the network must say which label means none, in an attribute "
            "null_label; "
            f"{type(model).__name__} has none"
        )
    return null_label


def check_output(model: nn.Module, objective: Objective) -> None:
    """One evaluation before anything is written: a network that cannot take the samples is refused
    here."""
    batch = {name: value[:2] for name, value in objective.batch(0).items()}
    condition = {
        name.removeprefix("condition."): v
        for name, v in batch.items()
        if name.startswith("condition.")
    }
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            out = model(batch["xt"], batch["t"], **condition)
    except (RuntimeError, IndexError, TypeError) as error:
        inputs = ", ".join(["x " + str(tuple(batch["xt"].shape)), "t", *condition])
        raise ValueError(f"model: cannot take the samples ({inputs}): {error}") from error
    finally:
        model.train(training)
    if not isinstance(out, torch.Tensor) or out.shape != batch["xt"].shape:
        got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise ValueError(
            f"model: must return a tensor of the shape of x, {tuple(batch['xt'].shape)}; got {got}"
        )


def _data_of(data: Data) -> dict[str, Any]:
    return {
        "name": data.name,
        "size": data.size,
        "seed": getattr(data, "seed", None),
        "sha256": None if data.size is None else _fingerprint(data),
    }


def _fingerprint(data: Data) -> str:
    """SHA-256 of up to 4096 evenly spaced rows, so that a run is not resumed on other data."""
    rows = torch.linspace(0, data.size - 1, min(data.size, 4096)).to(torch.int64)
    x, labels = data.rows(rows)
    return tensors_sha256({"x": x} if labels is None else {"x": x, "labels": labels})
