"""`distill`: turns a flow into a student of k Euler steps (Liu et al., 2023, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from rfkernels.training.checks import (
    check_call,
    check_destination,
    check_label_dropout,
    check_model,
)
from rfkernels.training.config import DistillConfig
from rfkernels.training.make_pairs import model_hash
from rfkernels.training.objective import Setting
from rfkernels.training.pairs import PairStore
from rfkernels.training.recipes.rectified_flow import DistillObjective
from rfkernels.training.reflow import teacher_pairs
from rfkernels.training.run_folder import RunFolder
from rfkernels.training.sources import PairSource
from rfkernels.training.teacher import AnyTeacher, Teacher, check_flow, find_teacher, pair_labels
from rfkernels.training.train import describe_run, run_trainer
from rfkernels.training.trainer import RunResult, device_of

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
    check_model(trained)
    check_destination(config.train, run)
    null_label = check_label_dropout(trained, config.train, conditional)
    _check_student(trained, found, labels if pairs is None else pairs)
    described = {
        "teacher_sha256": model_hash(found.model),
        "pairs": None
        if pairs is None
        else {k: pairs.manifest[k] for k in ("seed", "count", "model_sha256")},
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
        source = PairSource(
            pairs, seed=config.train.seed, holdout=config.train.holdout, device=device_of(trained)
        )
        objective = DistillObjective(
            Setting(source, config.train, null_label),
            k=config.k,
            distance=config.distance,
            reverse=config.reverse,
        )
        return run_trainer(
            "distill",
            "distill",
            trained,
            objective,
            config,
            train=config.train,
            run=opened,
            resume=resume,
            progress=progress,
            sample_shape=found.sample_shape,
            described=described,
        )


def _check_student(
    student: nn.Module, teacher: Teacher, source: torch.Tensor | PairStore | None
) -> None:
    """One evaluation on the kind of samples that the student will see."""
    device = device_of(student)
    if isinstance(source, PairStore):
        x, _, condition = source.batch(torch.arange(min(2, len(source))), device=device)
    else:
        x = torch.zeros(2, *teacher.sample_shape, device=device)
        condition = {} if source is None else {"y": source[:2].to(device)}
    check_call(student, x, torch.zeros(len(x), device=device), condition)
