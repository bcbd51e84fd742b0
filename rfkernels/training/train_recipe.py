"""`train_recipe`: runs any recipe of `rfkernels.training.recipes` on data or on a teacher's
pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from rfkernels.data import Data, as_dataset
from rfkernels.training.checks import (
    check_call,
    check_labels,
    check_model,
    check_start,
)
from rfkernels.training.objective import Setting
from rfkernels.training.pair_run import open_pairs, run_on_pairs
from rfkernels.training.pairs import PairStore
from rfkernels.training.recipes import PairRecipe, Recipe
from rfkernels.training.teacher import AnyTeacher, Teacher, find_teacher
from rfkernels.training.train import Samples, data_source, run_trainer
from rfkernels.training.trainer import RunResult
from rfkernels.training.trial import TRIAL, try_objective
from rfkernels.training.write_pairs import model_hash

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
        sample_shape: shape of one sample; known for a run, with data and with pairs.
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
    pairs = open_pairs(pairs)
    found = None
    if teacher is not None:
        shape = sample_shape or (dataset and dataset.sample_shape)
        found = find_teacher(teacher, shape, pairs)
    trained = found.student() if model is None else model
    device = check_model(trained)
    recipe.check_network(trained)
    if found is not None:
        found.model.to(device)
    if on_pairs:
        return run_on_pairs(
            name,
            recipe.objective,
            trained,
            found,
            recipe,
            pairs=pairs,
            labels=labels,
            purpose="pairs 1",
            probe=recipe.probe,
            run=run,
            resume=resume,
            progress=progress,
        )
    return _on_data(recipe, trained, dataset, found, x0, run, resume, progress)


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
    model: nn.Module,
    data: Data,
    teacher: Teacher | None,
    x0: Samples | None,
    run: str | Path | None,
    resume: bool,
    progress: bool,
) -> RunResult:
    name, train = recipe.name, recipe.train
    source, null_label, described = data_source(model, data, x0, train)
    draw = source.draw(0, min(TRIAL, train.batch_size))
    zero = torch.zeros(len(draw.x1), device=source.device)
    check_call(model, draw.x1, zero, {**draw.condition, **recipe.probe(draw.x1, zero)})
    frozen = None if teacher is None else teacher.model
    if recipe.teacher == "required":
        if described["conditional"]:
            check_labels(frozen, data)
        check_call(frozen, draw.x1, zero, draw.condition, "teacher")
    try_objective(name, recipe.objective, model, draw, train, null_label, frozen)
    described["teacher_sha256"] = None if frozen is None else model_hash(frozen)
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
