"""`distill`: turns a flow into a student of k Euler steps (Liu et al., 2023, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from rfkernels.training.checks import check_start
from rfkernels.training.config import DistillConfig
from rfkernels.training.pair_run import open_pairs, run_on_pairs
from rfkernels.training.pairs import PairStore
from rfkernels.training.recipes.options import refuse_named
from rfkernels.training.recipes.rectified_flow import DistillObjective
from rfkernels.training.teacher import AnyTeacher, find_teacher
from rfkernels.training.trainer import RunResult

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
        sample_shape: shape of one sample; known for a run and with pairs.
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
    pairs = open_pairs(pairs)
    found = find_teacher(teacher, sample_shape, pairs)
    if pairs is not None and labels is not None:
        raise ValueError("labels: the pairs have theirs; give labels only for new pairs")
    return run_on_pairs(
        "distill",
        partial(DistillObjective, k=config.k, distance=config.distance, reverse=config.reverse),
        found.student() if student is None else student,
        found,
        config,
        pairs=pairs,
        labels=labels,
        purpose="distillation pairs",
        probe=lambda x, t: {},
        run=run,
        resume=resume,
        progress=progress,
    )
