"""What is refused before a run writes anything: networks, data, options that do not fit."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from rfkernels.data import Data
from rfkernels.training.config import TrainConfig
from rfkernels.training.objective import Objective, batch_condition
from rfkernels.training.trainer import device_of

__all__ = [
    "check_call",
    "check_coupling",
    "check_destination",
    "check_label_dropout",
    "check_labels",
    "check_model",
    "check_output",
    "is_conditional",
]


def check_model(model: nn.Module) -> torch.device:
    """The network's device; refuses what is no network or has nothing to train."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: must be a torch.nn.Module; got {type(model).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model: has no weights to train (no parameter requires a gradient)")
    return device_of(model)


def check_coupling(config: TrainConfig, data: Data, x0: Data | None) -> None:
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
    if getattr(data, "mirror", False) and not getattr(x0, "mirror", False):
        raise ValueError(
            'coupling: "given" mirrors both sides or neither; got mirror=True of the data only'
        )


def is_conditional(model: nn.Module, data: Data, config: TrainConfig) -> bool:
    """Whether labels reach the network."""
    if config.conditional is None:
        return data.has_labels and getattr(model, "null_label", None) is not None
    if config.conditional and not data.has_labels:
        raise ValueError("conditional: True needs data with labels; got data without")
    return config.conditional


def check_labels(model: nn.Module, data: Data) -> None:
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
            "without"
        )
    if null_label is None:
        raise ValueError(
            "label_dropout: the network must say which label means none, in an attribute "
            f"null_label; {type(model).__name__} has none"
        )
    return null_label


def check_output(model: nn.Module, objective: Objective) -> None:
    """One evaluation on two of an objective's samples; see `check_call`."""
    batch = {name: value[:2] for name, value in objective.batch(0).items()}
    check_call(model, batch["xt"], batch["t"], batch_condition(batch))


def check_call(
    model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: dict[str, torch.Tensor]
) -> None:
    """One evaluation before anything is written: refuses a network that cannot take the samples."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            out = model(x, t, **condition)
    except (RuntimeError, IndexError, TypeError) as error:
        inputs = ", ".join([f"x {tuple(x.shape)}", "t", *condition])
        raise ValueError(f"model: cannot take the samples ({inputs}): {error}") from error
    finally:
        model.train(training)
    if not isinstance(out, torch.Tensor) or out.shape != x.shape:
        got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise ValueError(
            f"model: must return a tensor of the shape of x, {tuple(x.shape)}; got {got}"
        )
