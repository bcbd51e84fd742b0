"""`train_recipe`: runs any recipe of `rfkernels.training.recipes` on data or on a teacher's
pairs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from rfkernels.data import Data, as_dataset
from rfkernels.training.checks import (
    check_call,
    check_class_labels,
    check_coupling,
    check_label_dropout,
    check_labels,
    check_model,
    check_start,
    is_conditional,
)
from rfkernels.training.make_pairs import model_hash
from rfkernels.training.objective import Setting
from rfkernels.training.pairs import PairStore
from rfkernels.training.recipes import PairRecipe, Recipe
from rfkernels.training.reflow import pair_source, teacher_pairs
from rfkernels.training.run_folder import RunFolder
from rfkernels.training.sources import DataSource, Draw
from rfkernels.training.teacher import AnyTeacher, Teacher, check_flow, find_teacher, pair_labels
from rfkernels.training.train import Samples, describe_data, describe_run, run_trainer
from rfkernels.training.trainer import RunResult, device_of
from rfkernels.training.trial import TRIAL, noise_draw, try_objective

__all__ = ["train_recipe"]


def train_recipe(
    recipe: Recipe,
    model: nn.Module | None = None,
    data: Samples | None = None,
    *,
    teacher: AnyTeacher | None = None,
    pairs: PairStore | str | Path | None = None,
    x0: Samples | None = None,
    labels: torch.Tensor | None = None,
    sample_shape: Sequence[int] | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> RunResult:
    """Trains a network by a recipe.

    Args:
        recipe: an object of `rfkernels.training.recipes`, which says what it needs of the rest.
        model: the network to train, in place; None for a copy of the teacher with its EMA weights.
        data: the data set, for a recipe that trains on data.
        teacher: a RunResult, a run folder, a LoadedRun or a network, for a recipe that has one.
        pairs: a store of pairs or its folder, for a recipe that trains on pairs; None makes new
            ones with the teacher.
        x0: the source samples, with data; None for standard normal noise.
        labels: (recipe.pairs,) labels or (recipe.pairs, C) condition vectors of new pairs; by
            default every class of a class-conditional teacher equally often.
        sample_shape: shape of one sample; known for a run, and with data.
        run: the run folder. resume: go on with the run in it. progress: show bars.

    Returns:
        RunResult; `rfkernels.training.load` reads the folder.

    Raises:
        ValueError, TypeError: an option, the data or the network's output does not fit; nothing has
        been written. FileExistsError: `run` holds a run already and `resume` is false.
        TrainingDivergedError: the loss is not finite. OSError: the folder cannot be written.
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe: must be a Recipe object; got {type(recipe).__name__}")
    name, on_pairs = recipe.name, isinstance(recipe, PairRecipe)
    check_start(name, recipe.train, run)
    _check_given(recipe, on_pairs, model, data, teacher, pairs, x0, labels)
    dataset = None if data is None else as_dataset(data)
    found = None
    if teacher is not None:
        found = find_teacher(teacher, sample_shape or (dataset and dataset.sample_shape))
    trained = found.student() if model is None else model
    device = check_model(trained)
    recipe.check_network(trained)
    if found is not None:
        found.model.to(device)
    plan = _on_pairs if on_pairs else _on_data
    return plan(recipe, name, trained, dataset, found, pairs, x0, labels, run, resume, progress)


def _check_given(recipe, on_pairs, model, data, teacher, pairs, x0, labels) -> None:
    def refuse(argument: str, rule: str) -> None:
        raise ValueError(f"{argument}: {rule} ({recipe.name}); got {_GOT[argument]}")

    if on_pairs and data is not None:
        refuse("data", "this recipe trains on a teacher's pairs, not on data")
    if not on_pairs and data is None:
        refuse("no data", "this recipe trains on a data set")
    if not on_pairs and pairs is not None:
        refuse("pairs", "this recipe trains on data")
    if x0 is not None and on_pairs:
        refuse("x0", "the pairs have their own source")
    if labels is not None and (pairs is not None or not on_pairs):
        refuse("labels", "belong to new pairs; data and stored pairs have theirs")
    if recipe.teacher == "none" and teacher is not None:
        refuse("teacher", "this recipe has none")
    if recipe.teacher == "required" and teacher is None:
        refuse("no teacher", "this recipe needs one")
    if model is None and teacher is None:
        refuse("no model", "give a network to train, or a teacher to start from")


_GOT = {
    "data": "data",
    "no data": "none",
    "pairs": "pairs",
    "x0": "x0",
    "labels": "labels",
    "teacher": "a teacher",
    "no teacher": "none",
    "no model": "neither",
}


def _on_data(
    recipe: Recipe,
    name: str,
    model: nn.Module,
    data: Data,
    teacher: Teacher | None,
    _pairs: None,
    x0: Samples | None,
    _labels: None,
    run: str | Path | None,
    resume: bool,
    progress: bool,
) -> RunResult:
    train, device = recipe.train, device_of(model)
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
        device=device,
    )
    draw = source.draw(0, min(TRIAL, train.batch_size))
    _probe(recipe, model, draw)
    frozen = None if teacher is None else teacher.model
    if recipe.teacher == "required":
        zero = torch.zeros(len(draw.x1), device=device)
        if conditional:
            check_labels(frozen, data)
        check_call(frozen, draw.x1, zero, draw.condition, "teacher")
    try_objective(name, recipe.objective, model, draw, train, null_label, frozen)
    described = {
        "data": describe_data(data),
        "source": None if source_data is None else describe_data(source_data),
        "teacher_sha256": None if frozen is None else model_hash(frozen),
        "conditional": conditional,
        "num_classes": getattr(data, "num_classes", None) if conditional else None,
    }
    setting = Setting(source, train, null_label, frozen)
    return run_trainer(
        name,
        name,
        model,
        recipe.objective(setting),
        recipe,
        train=train,
        run=run,
        resume=resume,
        progress=progress,
        sample_shape=data.sample_shape,
        described=described,
    )


def _on_pairs(
    recipe: PairRecipe,
    name: str,
    model: nn.Module,
    _data: None,
    teacher: Teacher,
    pairs: PairStore | str | Path | None,
    _x0: None,
    labels: torch.Tensor | None,
    run: str | Path | None,
    resume: bool,
    progress: bool,
) -> RunResult:
    train, device = recipe.train, device_of(model)
    if pairs is None:
        labels = pair_labels(teacher, labels, recipe.pairs)
        check_flow(teacher, labels, recipe)
        draw = noise_draw(min(TRIAL, recipe.pairs), teacher.sample_shape, labels, device)
    else:
        pairs = pairs if isinstance(pairs, PairStore) else PairStore(pairs)
        if pairs.sample_shape != teacher.sample_shape:
            raise ValueError(
                f"pairs: must be of the teacher's shape, {teacher.sample_shape}; got "
                f"{pairs.sample_shape}"
            )
        draw = pair_source(pairs, train, device).draw(0, min(TRIAL, len(pairs)))
    conditional = "y" in draw.condition
    null_label = check_label_dropout(model, train, conditional)
    check_class_labels(model, labels if pairs is None else pairs.labels)
    _probe(recipe, model, draw)
    try_objective(name, recipe.objective, model, draw, train, null_label, teacher.model)
    described = {
        "teacher_sha256": model_hash(teacher.model),
        "pairs": None if pairs is None else pairs.manifest,
        "conditional": conditional,
        "num_classes": teacher.num_classes if conditional else None,
    }
    with ExitStack() as stack:
        opened = None
        if run is not None:
            description = describe_run(name, model, recipe, teacher.sample_shape, described)
            opened = RunFolder(run, description, resume=resume)
            stack.callback(opened.close)
        if pairs is None:
            pairs = teacher_pairs(teacher, recipe, labels, opened, "pairs 1", stack, progress)
        setting = Setting(pair_source(pairs, train, device), train, null_label, teacher.model)
        return run_trainer(
            name,
            name,
            model,
            recipe.objective(setting),
            recipe,
            train=train,
            run=opened,
            resume=resume,
            progress=progress,
            sample_shape=teacher.sample_shape,
            described=described,
        )


def _probe(recipe: Recipe, model: nn.Module, draw: Draw) -> None:
    """One evaluation before anything is written."""
    t = torch.zeros(len(draw.x1), device=draw.x1.device)
    check_call(model, draw.x1, t, {**draw.condition, **recipe.probe(draw.x1, t)})
