"""`reflow`: straightens a flow by training on its own ODE's pairs (Liu et al., 2023, 3.1)."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from rfkernels.ops.random import derive_seed
from rfkernels.training.checks import check_label_dropout, check_start
from rfkernels.training.config import DistillConfig, ReflowConfig, TrainConfig
from rfkernels.training.make_pairs import make_pairs
from rfkernels.training.objective import Setting
from rfkernels.training.pairs import PairStore
from rfkernels.training.parallel import whole
from rfkernels.training.processes import processes
from rfkernels.training.recipes.rectified_flow import FlowObjective
from rfkernels.training.run_folder import RunFolder
from rfkernels.training.sources import PairSource
from rfkernels.training.teacher import AnyTeacher, Teacher, check_flow, find_teacher, pair_labels
from rfkernels.training.train import open_run, run_trainer
from rfkernels.training.trainer import RunResult, device_of
from rfkernels.training.write_pairs import model_hash

__all__ = ["reflow"]


def reflow(
    teacher: AnyTeacher,
    config: ReflowConfig | None = None,
    *,
    sample_shape: Sequence[int] | None = None,
    labels: torch.Tensor | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> RunResult:
    """Makes pairs with the teacher's EMA network and trains a copy of it on them.

    Args:
        teacher: a RunResult, a run folder, a LoadedRun, or a network (velocity of time t = 0
            source, 1 data).
        config: a ReflowConfig; None for its defaults. Of several rounds, each has the network of
            the one before as its teacher.
        sample_shape: shape of one sample; known for a run.
        labels: (config.pairs,) labels or (config.pairs, C) condition vectors of the pairs; by
            default every class of a class-conditional teacher equally often.
        run: the run folder, which also keeps the pairs (several rounds: in round-1, round-2, ...).
            Without one the pairs lie in a temporary folder while they are needed.
        resume: go on with the run in that folder; finished shards of pairs are kept.
        progress: show bars.

    Returns:
        RunResult of the last round.

    Raises:
        As `train_flow` and `make_pairs`.
    """
    config = ReflowConfig() if config is None else config
    if not isinstance(config, ReflowConfig):
        raise TypeError(f"config: must be a ReflowConfig; got {type(config).__name__}")
    check_start("reflow", config.train, run)
    found = find_teacher(teacher, sample_shape)
    labels = pair_labels(found, labels, config.pairs)
    check_flow(found, labels, config)
    check_label_dropout(found.model, config.train, labels is not None)
    if config.rounds == 1:
        return _round(found, config, 1, labels, run, resume, progress)
    with ExitStack() as stack:
        described = _described(found, labels, 0)
        top = open_run(
            stack, run, "reflow", found.model, config, found.sample_shape, described, resume
        )
        for number in range(1, config.rounds + 1):
            folder = None if top is None else top.path / f"round-{number}"
            result = _round(found, config, number, labels, folder, resume, progress)
            found = _successor(found, result.ema)
    if top is not None:
        result.run = top.path
    return result


def _successor(teacher: Teacher, average: nn.Module) -> Teacher:
    """The teacher with the averaged weights of its student, which may lie in shards."""
    model = copy.deepcopy(teacher.model)
    model.load_state_dict(whole(average.state_dict()))
    return replace(teacher, model=model)


def _described(teacher: Teacher, labels: torch.Tensor | None, number: int) -> dict[str, object]:
    return {
        "round": number,
        "teacher_sha256": model_hash(teacher.model),
        "conditional": labels is not None,
        "num_classes": teacher.num_classes,
    }


def _round(
    teacher: Teacher,
    config: ReflowConfig,
    number: int,
    labels: torch.Tensor | None,
    run: Path | str | None,
    resume: bool,
    progress: bool,
) -> RunResult:
    described = _described(teacher, labels, number)
    with ExitStack() as stack:
        opened = open_run(
            stack, run, "reflow", teacher.model, config, teacher.sample_shape, described, resume
        )
        pairs = teacher_pairs(teacher, config, labels, opened, f"pairs {number}", stack, progress)
        student = teacher.student()
        source = pair_source(pairs, config.train, device_of(student))
        null_label = getattr(student, "null_label", None)
        return run_trainer(
            "reflow",
            "reflow",
            student,
            FlowObjective(Setting(source, config.train, null_label)),
            config,
            train=config.train,
            run=opened,
            resume=resume,
            progress=progress,
            sample_shape=teacher.sample_shape,
            described=described,
        )


def pair_source(pairs: PairStore, train: TrainConfig, device: torch.device) -> PairSource:
    """The samples of a run on pairs."""
    return PairSource(pairs, seed=train.seed, holdout=train.holdout, device=device)


def teacher_pairs(
    teacher: Teacher,
    config: ReflowConfig | DistillConfig,
    labels: torch.Tensor | None,
    run: RunFolder | None,
    purpose: str,
    stack: ExitStack,
    progress: bool,
) -> PairStore:
    """The teacher's pairs in the run's folder, or in a temporary one that `stack` removes."""
    if run is None and processes().count > 1:
        raise ValueError("run: several processes need a run folder to share pairs in; got None")
    if run is None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rfkernels-pairs-")))
    else:
        folder = run.pairs
    return make_pairs(
        teacher.model,
        config.pairs,
        teacher.sample_shape,
        folder=folder,
        seed=derive_seed(config.train.seed, purpose),
        solver=config.solver,
        steps=config.pair_steps,
        batch=config.pair_batch,
        labels=labels,
        guidance_scale=config.guidance_scale,
        progress=progress,
    )
