"""`load`: the network of a run folder, ready to sample from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rfkernels.models as models
from rfkernels.training import checkpoint as checkpoints
from rfkernels.training.config import DistillConfig, ReflowConfig, TrainConfig
from rfkernels.training.config_json import from_dict
from rfkernels.training.recipes import RECIPES
from rfkernels.training.run_folder import read_config

__all__ = ["LoadedRun", "load"]

_CONFIGS = {"train": TrainConfig, "reflow": ReflowConfig, "distill": DistillConfig, **RECIPES}


@dataclass
class LoadedRun:
    """A run that was read from its folder.

    Attributes:
        model: the network, in evaluation mode; call it as velocity(x, t, y=None).
        config: TrainConfig, ReflowConfig, DistillConfig or a recipe, by `kind`.
        kind: "train", "reflow", "distill" or a recipe's name.
        path: the probability path that the network was trained on (config's).
        sample_shape: shape of one sample.
        num_classes: how many class labels it takes as `y`; None for none.
        conditional: whether it was trained with labels or condition vectors.
        folder: where the checkpoint lies; for several rounds of reflow, the last one's.
        step: of the checkpoint.
        which: "ema" or "model", the weights that it has.
        description: config.json as it is.
    """

    model: nn.Module
    config: Any
    kind: str
    path: Any
    sample_shape: tuple[int, ...]
    num_classes: int | None
    conditional: bool
    folder: Path
    step: int
    which: str
    description: dict[str, Any]

    @property
    def default_solver(self) -> str:
        """The solver that the run was trained for."""
        return getattr(self.config, "sample_solver", "euler")


def load(
    run_folder: str | Path,
    *,
    which: str = "ema",
    device: torch.device | str | None = None,
    model: nn.Module | None = None,
) -> LoadedRun:
    """Reads the newest checkpoint of a run.

    Args:
        run_folder: what `train_flow`, `reflow` or `distill` wrote.
        which: "ema" for the averaged weights, "model" for the last ones.
        device: where the network goes; default the CPU, or where `model` is.
        model: a network of the run's architecture to load into; needed for a network of your own,
            since the folder holds its weights and not its code.

    Raises:
        FileNotFoundError: the folder holds no run, or the run has no checkpoint yet.
        ValueError: a damaged run, or a network of your own without `model`.
    """
    if which not in ("ema", "model"):
        raise ValueError(f"which: must be 'ema' or 'model'; got {which!r}")
    folder = Path(run_folder)
    description = read_config(folder)
    kind = description.get("kind")
    if kind not in _CONFIGS:
        raise ValueError(
            f"{folder / 'config.json'}: kind must be one of {', '.join(_CONFIGS)}; got {kind!r}"
        )
    config = from_dict(_CONFIGS[kind], description["config"])
    folder = _with_checkpoints(folder)
    found = checkpoints.latest(folder / "checkpoints")
    if found is None:
        raise FileNotFoundError(f"run: {folder} has no checkpoint yet")
    if model is None:
        model = _rebuilt(description["model"])
    try:
        model.load_state_dict(found.tensors(which))
    except RuntimeError as error:
        raise ValueError(f"model: is not the network of {folder}: {error}") from error
    if device is not None:
        model = model.to(device)
    train = config if isinstance(config, TrainConfig) else config.train
    return LoadedRun(
        model=model.eval(),
        config=config,
        kind=kind,
        path=train.path,
        sample_shape=tuple(description["sample_shape"]),
        num_classes=description.get("num_classes"),
        conditional=bool(description.get("conditional")),
        folder=folder,
        step=found.step,
        which=which,
        description=description,
    )


def _rebuilt(described: dict[str, Any]) -> nn.Module:
    if "name" not in described:
        raise ValueError(
            f"model: this run trained a network of your own ({described.get('class')}); pass one "
            "as load(..., model=...)"
        )
    return models.build(described["name"], seed=0, **described["options"])


def _with_checkpoints(folder: Path) -> Path:
    """The folder itself, or that of the last round with a checkpoint (reflow of several rounds)."""
    rounds = sorted(folder.glob("round-*"), key=lambda p: int(p.name.removeprefix("round-")))
    return next(
        (p for p in reversed(rounds) if checkpoints.steps_on_disk(p / "checkpoints")), folder
    )
