"""What is refused before a run writes anything: networks, data, options that do not fit."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from rfkernels.data import Data
from rfkernels.training.config import TrainConfig
from rfkernels.training.objective import Objective, batch_condition
from rfkernels.training.processes import processes
from rfkernels.training.trainer import check_processes, device_of

__all__ = [
    "check_call",
    "check_class_labels",
    "check_coupling",
    "check_label_dropout",
    "check_labels",
    "check_model",
    "check_output",
    "check_start",
    "evaluating",
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


def check_class_labels(model: object, labels: torch.Tensor | None) -> None:
    """Refuses class labels of pairs that a network does not have; its null label it has. On a GPU
    such a label would stop the device, long after the run has begun."""
    null_label = getattr(model, "null_label", None)
    if labels is None or labels.is_floating_point() or not isinstance(null_label, int):
        return
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most > null_label:
        raise ValueError(
            f"labels: must be from 0 to the network's null label, {null_label}; got "
            f"{least if least < 0 else most}"
        )


def check_start(name: str, config: TrainConfig, run: object) -> None:
    """What keeps the public function `name` from training here, whatever the network and the data:
    options that write files need a run folder, TensorBoard must be there, processes must share a
    step evenly, and gradients must be possible."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{name}: cannot train inside torch.inference_mode()")
    check_processes(config, processes().count)
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
    """One evaluation on an objective's samples; see `check_call`."""
    batch = objective.batch(0)
    check_call(model, batch["xt"], batch["t"], batch_condition(batch))


def check_call(
    model: nn.Module,
    x: torch.Tensor,
    t: torch.Tensor,
    condition: dict[str, torch.Tensor],
    name: str = "model",
) -> None:
    """One evaluation before anything is written, of the first two samples: refuses a network that
    cannot take them."""
    x, t, condition = x[:2], t[:2], {key: value[:2] for key, value in condition.items()}
    try:
        with evaluating(model), torch.no_grad():
            out = model(x, t, **condition)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        inputs = ", ".join([f"x {tuple(x.shape)}", "t", *condition])
        raise ValueError(f"{name}: cannot take the samples ({inputs}): {error}") from error
    if not isinstance(out, torch.Tensor) or out.shape != x.shape:
        got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise ValueError(
            f"{name}: must return a tensor of the shape of x, {tuple(x.shape)}; got {got}"
        )


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """A network is in evaluation mode inside, and as it was afterwards; what is no network is left
    alone."""
    if not isinstance(model, nn.Module):
        yield
        return
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
