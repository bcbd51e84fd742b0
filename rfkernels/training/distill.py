"""`distill`: turns a flow into a student of k Euler steps (Liu et al., 2023, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import nn

from rfkernels.training.checks import (
    check_call,
    check_class_labels,
    check_label_dropout,
    check_model,
    check_start,
)
from rfkernels.training.config import DistillConfig
from rfkernels.training.make_pairs import model_hash
from rfkernels.training.objective import Setting
from rfkernels.training.pairs import PairStore
from rfkernels.training.recipes.options import refuse_named
from rfkernels.training.recipes.rectified_flow import DistillObjective
from rfkernels.training.reflow import pair_source, teacher_pairs
from rfkernels.training.run_folder import RunFolder
from rfkernels.training.teacher import AnyTeacher, check_flow, find_teacher, pair_labels
from rfkernels.training.train import describe_run, run_trainer
from rfkernels.training.trainer import RunResult
from rfkernels.training.trial import TRIAL, noise_draw, try_objective

__all__ = ["distill"]


def distill(
    teacher: AnyTeacher,
    config: DistillConfig | None = None,
    *,
    pairs: PairStore | str | Path | None = None,
    student: nn.Module | None = None,
    sample_shape: Sequence[int] | None = None,
    labels: torch.Tensor | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> RunResult:
    """Trains a student whose k Euler steps, at t = 0, 1/k, ..., land where the teacher's ODE does.

    Args:
        teacher: a RunResult, a run folder, a LoadedRun, or a network. A straight (reflowed) one
            distils best.
        config: a DistillConfig; None for its defaults.
        pairs: a store of pairs or its folder, such as `<reflow run>/pairs`; None makes new ones
            with the teacher.
        student: the network to train; None for a copy of the teacher with its EMA weights.
        sample_shape: shape of one sample; known for a run.
        labels: as in `reflow`, for new pairs.
        run, resume, progress: as in `reflow`.

    Returns:
        RunResult; sample its `ema` with the Euler solver in k steps (or, of config.reverse, invert
        with it).

    Raises:
        As `train_flow` and `make_pairs`.
    """
    config = DistillConfig() if config is None else config
    if not isinstance(config, DistillConfig):
        raise TypeError(f"config: must be a DistillConfig; got {type(config).__name__}")
    check_start("distill", config.train, run)
    refuse_named(distance=config.distance)
    found = find_teacher(teacher, sample_shape)
    if pairs is not None and not isinstance(pairs, PairStore):
        pairs = PairStore(pairs)
    if pairs is None:
        labels = pair_labels(found, labels, config.pairs)
        check_flow(found, labels, config)
        conditional = labels is not None
    else:
        if labels is not None:
            raise ValueError("labels: the pairs have theirs; give labels only for new pairs")
        if pairs.sample_shape != found.sample_shape:
            raise ValueError(
                f"pairs: must be of the teacher's shape, {found.sample_shape}; got "
                f"{pairs.sample_shape}"
            )
        conditional = "y" in pairs.stored(torch.zeros(1, dtype=torch.int64)).condition
    trained = found.student() if student is None else student
    device = check_model(trained)
    null_label = check_label_dropout(trained, config.train, conditional)
    check_class_labels(trained, labels if pairs is None else pairs.labels)
    if pairs is None:
        draw = noise_draw(min(TRIAL, config.pairs), found.sample_shape, labels, device)
    else:
        draw = pair_source(pairs, config.train, device).draw(0, min(TRIAL, len(pairs)))
    check_call(trained, draw.x1, torch.zeros(len(draw.x1), device=device), draw.condition)
    make = partial(DistillObjective, k=config.k, distance=config.distance, reverse=config.reverse)
    try_objective("distill", make, trained, draw, config.train, null_label)
    described = {
        "teacher_sha256": model_hash(found.model),
        "pairs": None if pairs is None else pairs.manifest,
        "conditional": conditional,
        "num_classes": found.num_classes if conditional else None,
    }
    with ExitStack() as stack:
        opened = None
        if run is not None:
            description = describe_run("distill", trained, config, found.sample_shape, described)
            opened = RunFolder(run, description, resume=resume)
            stack.callback(opened.close)
        if pairs is None:
            pairs = teacher_pairs(
                found, config, labels, opened, "distillation pairs", stack, progress
            )
        source = pair_source(pairs, config.train, device)
        return run_trainer(
            "distill",
            "distill",
            trained,
            make(Setting(source, config.train, null_label)),
            config,
            train=config.train,
            run=opened,
            resume=resume,
            progress=progress,
            sample_shape=found.sample_shape,
            described=described,
        )
