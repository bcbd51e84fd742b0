"""A run on a teacher's pairs, given or made: what `distill` and the recipes on pairs share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rfkernels.training.checks import (
    check_call,
    check_class_labels,
    check_label_dropout,
    check_model,
)
from rfkernels.training.objective import Objective, Setting
from rfkernels.training.pairs import PairStore
from rfkernels.training.reflow import pair_source, teacher_pairs
from rfkernels.training.teacher import Teacher, check_flow, pair_labels
from rfkernels.training.train import open_run, run_trainer
from rfkernels.training.trainer import RunResult
from rfkernels.training.trial import TRIAL, noise_draw, try_objective
from rfkernels.training.write_pairs import model_hash

__all__ = ["open_pairs", "run_on_pairs"]

Probe = Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]


def run_on_pairs(
    name: str,
    make: Callable[[Setting], Objective],
    model: nn.Module,
    teacher: Teacher,
    config: Any,
    *,
    pairs: PairStore | None,
    labels: torch.Tensor | None,
    purpose: str,
    probe: Probe,
    run: str | Path | None,
    resume: bool,
    progress: bool,
) -> RunResult:
    """Checks what was given, opens the folder, makes the pairs that are missing, and trains.

    Args:
        name: the public function or recipe, for messages and config.json.
        make: the objective of a setting.
        model: the network to train.
        config: a DistillConfig or PairRecipe.
        pairs: a store; None makes pairs with the teacher.
        labels: of new pairs; None for the teacher's classes in turn.
        purpose: what the seed of new pairs is derived by.
        probe: keyword arguments of a trial call at (x, t), besides the condition.
    """
    train, device = config.train, check_model(model)
    if pairs is None:
        labels = pair_labels(teacher, labels, config.pairs)
        check_flow(teacher, labels, config)
        draw = noise_draw(min(TRIAL, config.pairs), teacher.sample_shape, labels, device)
    else:
        if pairs.sample_shape != teacher.sample_shape:
            raise ValueError(
                f"pairs: must be of the teacher's shape, {teacher.sample_shape}; got "
                f"{pairs.sample_shape}"
            )
        draw, labels = (
            pair_source(pairs, train, device).draw(0, min(TRIAL, len(pairs))),
            pairs.labels,
        )
    null_label = check_label_dropout(model, train, labels is not None)
    check_class_labels(model, labels)
    t = torch.zeros(len(draw.x1), device=device)
    check_call(model, draw.x1, t, {**draw.condition, **probe(draw.x1, t)})
    try_objective(name, make, model, draw, train, null_label, teacher.model)
    described = {
        "teacher_sha256": model_hash(teacher.model),
        "pairs": None if pairs is None else pairs.manifest,
        "conditional": labels is not None,
        "num_classes": _classes(teacher, model, labels),
    }
    with ExitStack() as stack:
        opened = open_run(stack, run, name, model, config, teacher.sample_shape, described, resume)
        if pairs is None:
            pairs = teacher_pairs(teacher, config, labels, opened, purpose, stack, progress)
        setting = Setting(pair_source(pairs, train, device), train, null_label, teacher.model)
        return run_trainer(
            name,
            name,
            model,
            make(setting),
            config,
            train=train,
            run=opened,
            resume=resume,
            progress=progress,
            sample_shape=teacher.sample_shape,
            described=described,
        )


def open_pairs(pairs: PairStore | str | Path | None) -> PairStore | None:
    """A store of pairs, given as it is or by its folder; None for none."""
    if pairs is None or isinstance(pairs, PairStore):
        return pairs
    if not isinstance(pairs, (str, Path)):
        raise TypeError(f"pairs: must be a PairStore or its folder; got {type(pairs).__name__}")
    return PairStore(pairs)


def _classes(teacher: Teacher, model: nn.Module, labels: torch.Tensor | None) -> int | None:
    """How many class labels the network takes; the pairs may be of another teacher, with labels
    where this one has none."""
    if labels is None or labels.is_floating_point():
        return None
    null_label = getattr(model, "null_label", None)
    return teacher.num_classes or (null_label if isinstance(null_label, int) else None)
