"""The recipes of flow maps, by several processes and in micro-batches: together they see the samples
of one, and every share has averages to learn."""

import pytest
import torch
from flow_map_truth import CLASSES, Table, TinyFlowMap

from rfkernels.training import TrainConfig
from rfkernels.training.objective import Setting
from rfkernels.training.processes import Processes
from rfkernels.training.recipes import (
    ConsistencyFM,
    ImprovedMeanFlow,
    LagrangianSelfDistillation,
    MeanFlow,
    ReMeanFlow,
    Shortcut,
    SplitMeanFlow,
)

BATCH = 64
TRAIN = TrainConfig(steps=100, batch_size=BATCH, seed=5, label_dropout=0.2, holdout=0.0)
FLOW_MAPS = [
    MeanFlow(train=TRAIN, target_guidance_scale=2.0),
    ImprovedMeanFlow(train=TRAIN),
    ReMeanFlow(train=TRAIN, prune=0.2),
    Shortcut(train=TRAIN, target_guidance_scale=2.0),
    LagrangianSelfDistillation(train=TRAIN),
    SplitMeanFlow(train=TRAIN, span_fraction=0.25),
]


def objective_of(recipe, here=None):
    setting = Setting(Table(64 * BATCH, labels=True), recipe.train, CLASSES, processes=here)
    objective = recipe.objective(setting)
    objective.attach(TinyFlowMap(1))
    return objective


@pytest.mark.parametrize("recipe", [*FLOW_MAPS, ConsistencyFM(train=TRAIN, first_phase=0)])
def test_processes_share_the_samples_of_one(recipe):
    whole = objective_of(recipe, Processes()).batch(2)
    parts = [objective_of(recipe, Processes(rank, 4)).batch(2) for rank in range(4)]
    for name, value in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), value), name
    if recipe.flow_map:
        shares = [(part["span"] > 1 / 128).sum().item() for part in parts]
        assert max(shares) - min(shares) <= 1 < sum(shares)


@pytest.mark.parametrize("recipe", FLOW_MAPS)
def test_micro_batches_add_up(recipe):
    """Also where one has no averages: the loss is the mean of its parts' losses."""
    objective, model = objective_of(recipe, Processes()), TinyFlowMap()
    batch = objective.batch(2)
    sizes = (1, 2, 13, 48)
    split = {name: value.split(sizes) for name, value in batch.items()}
    losses = [
        size * objective.loss(model, {name: values[i] for name, values in split.items()})
        for i, size in enumerate(sizes)
    ]
    torch.testing.assert_close(sum(losses) / BATCH, objective.loss(model, batch))
