"""Shortcut models: the objective against NumPy, the closed form that it must leave alone, targets
from the average that resume, a toy in one step."""

import json

import numpy as np
import pytest
import torch
from flow_map_truth import CLASSES, GaussianMap, Table, TinyFlowMap

import rfkernels as rf
from rfkernels import models
from rfkernels.training import TrainConfig, train_recipe
from rfkernels.training.objective import Setting
from rfkernels.training.recipes import Shortcut

BATCH, SEED, STEP = 64, 5, 3
TRAIN = TrainConfig(steps=100, batch_size=BATCH, seed=SEED)


def uniform(purpose):
    return rf.rand(BATCH, seed=rf.derive_seed(SEED, purpose), offset=STEP).double().numpy()


def in_numpy(recipe, table, model, average, *, clip=True, frozen=True, guided=True, halves=True):
    """(t, d, x_t, target, loss) of a step; the options switch a part of the recipe off."""
    rows = np.arange(STEP * BATCH, (STEP + 1) * BATCH)
    x0, x1 = table.x0.numpy()[rows], table.x1.numpy()[rows]
    m, q, i = recipe.finest, recipe.bootstrap_fraction, np.arange(BATCH)
    large = np.floor((i + 1) * q) > np.floor(i * q)
    sizes = round(np.log2(m))
    d = np.where(large, 2.0 ** -np.floor(uniform("step size") * sizes), 1 / m)
    t = np.floor(uniform("time") / d) * d
    x = (1 - t[:, None]) * x0 + t[:, None] * x1
    y = None
    if table.y is not None:
        y = table.y.numpy()[rows].copy()
        y[uniform("label dropout") < recipe.train.label_dropout] = CLASSES
    bound = recipe.clip if clip else np.inf
    source, half = (average if frozen else model), d / 2
    w = recipe.target_guidance_scale if guided else 1.0

    def u(x, t):
        value = source.numpy(x, t, half, y)
        if y is None:
            return value
        lacking = source.numpy(x, t, half, np.full(BATCH, CLASSES))
        scale = np.where(half == 1 / m, w, 1.0)[:, None]
        return lacking + scale * (value - lacking)

    first = u(x, t)
    second = u(np.clip(x + half[:, None] * first, -bound, bound), t + half)
    mean = np.clip((first + second) / 2 if halves else first, -bound, bound)
    target = np.where(large[:, None], mean, x1 - x0)
    return t, d, x, target, ((model.numpy(x, t, d, y) - target) ** 2).mean()


def of_the_objective(recipe, table, model, average):
    objective = recipe.objective(Setting(table, recipe.train, null_label=CLASSES))
    objective.attach(average)
    batch = objective.batch(STEP)
    values = (batch["t"], batch["span"], batch["xt"], objective._targets(batch))
    values = (*values, objective.loss(model, batch))
    return [value.detach().double().numpy() for value in values]


DROPPING = TrainConfig(steps=100, batch_size=BATCH, seed=SEED, label_dropout=0.2)
RECIPES = [
    (Shortcut(train=TRAIN, clip=1.0), False),
    (Shortcut(train=TRAIN, finest=8, bootstrap_fraction=1.0, clip=1.5), True),
    (Shortcut(train=DROPPING, finest=4, bootstrap_fraction=0.5, target_guidance_scale=2.5), True),
]


@pytest.mark.parametrize(("recipe", "labels"), RECIPES)
def test_steps_states_targets_and_loss_are_those_of_numpy(recipe, labels):
    table, model, average = Table(10 * BATCH, labels), TinyFlowMap(), TinyFlowMap(1)
    found = of_the_objective(recipe, table, model, average)
    for mine, expected in zip(found, in_numpy(recipe, table, model, average), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-10, atol=1e-10)
    t, d = found[:2]
    large = d > 1 / recipe.finest
    assert large.sum() == round(recipe.bootstrap_fraction * BATCH)
    assert not (t / d % 1).any()  # on the grid, and the step ends inside
    assert (t + d <= 1).all()


@pytest.mark.parametrize("off", ["clip", "frozen", "guided", "halves"])
def test_it_differs_without_what_makes_the_recipe(off):
    recipe = Shortcut(
        train=DROPPING, finest=4, bootstrap_fraction=0.5, target_guidance_scale=2.5, clip=1.0
    )
    table, model, average = Table(10 * BATCH, True), TinyFlowMap(), TinyFlowMap(1)
    loss = of_the_objective(recipe, table, model, average)[-1]
    expected = in_numpy(recipe, table, model, average, **{off: False})[-1]
    assert abs(loss - expected) > 1e-3


def test_the_gradient_is_the_network_s_alone():
    recipe, model, average = (
        Shortcut(train=TRAIN, bootstrap_fraction=1.0),
        *map(TinyFlowMap, (0, 1)),
    )
    objective = recipe.objective(Setting(Table(10 * BATCH), TRAIN))
    objective.attach(average)
    objective.loss(model, objective.batch(0)).backward()
    assert all(p.grad is None for p in average.parameters())
    assert model.A.grad.any()


def test_the_exact_map_is_its_own_target():
    """Two halves of the true average velocity make the whole: where every sample bootstraps from
    the truth, the truth has no loss."""
    flow = GaussianMap(mean=1.0)
    table = Table(10 * BATCH)
    table.sample_shape, table.x0, table.x1 = (1,), *flow.sample(10 * BATCH, seed=3)
    recipe = Shortcut(train=TRAIN, bootstrap_fraction=1.0, clip=100.0)
    objective = recipe.objective(Setting(table, TRAIN))

    class Truth(torch.nn.Module):
        def forward(self, x, t, span):
            return flow.average(x, t, span)

    objective.attach(Truth())
    assert objective.loss(Truth(), objective.batch(0)) < 1e-25
    held = Shortcut(train=TRAIN, bootstrap_fraction=0.0).objective(Setting(table, TRAIN))
    held.attach(Truth())
    # Without bootstrapping it is flow matching, whose loss is the variance that no field removes.
    batch = held.batch(0)
    torch.testing.assert_close(
        held.loss(Truth(), batch),
        (flow.average(batch["xt"], batch["t"], batch["span"]) - batch["target"]).square().mean(),
    )


def test_the_held_out_loss_is_that_of_the_smallest_step():
    objective = Shortcut(train=TRAIN).objective(Setting(Table(100, held=True), TRAIN))
    objective.attach(TinyFlowMap(1))
    model, batch = TinyFlowMap(), objective.held_out()
    assert not (batch["t"] * 128 % 1).any()
    u = model(batch["xt"], batch["t"], span=torch.full((8,), 1 / 128))
    torch.testing.assert_close(objective.loss(model, batch), (u - batch["target"]).square().mean())


def network(seed=0):
    return models.build("mlp", seed=seed, sample_shape=(1,), width=48, depth=2, flow_map=True)


def test_it_learns_large_steps():
    """One step of the trained network against the true map of a Gaussian, over the error of one
    Euler step of the true velocity, which collapses onto the mean: 0.19 here. Without bootstrapping
    it is 0.87."""
    train = TrainConfig(
        steps=400, batch_size=256, learning_rate=3e-3, ema_decay=0.99, log_every=400, holdout=0.0,
        seed=1,
    )  # fmt: skip
    flow = GaussianMap()
    _, data = flow.sample(20_000, seed=4, dtype=torch.float32)
    recipe = Shortcut(train=train, finest=8, bootstrap_fraction=0.25)
    result = train_recipe(recipe, network(), data)
    x0, _ = flow.sample(2000, seed=3, dtype=torch.float32)
    end = flow.mean + flow.std * x0
    one = rf.sample(result.ema, x0, steps=1, solver="flow-map")
    assert (one - end).square().mean().sqrt() / (flow.mean - end).square().mean().sqrt() < 0.4


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    """The targets come from the average, which the checkpoint brings back."""
    data = GaussianMap().sample(64, seed=4, dtype=torch.float32)[1]

    def config(steps):
        return Shortcut(
            bootstrap_fraction=0.5,
            train=TrainConfig(
                steps=steps, batch_size=16, log_every=2, checkpoint_every=4, schedule="constant"
            ),
        )

    whole = train_recipe(config(8), network(), data, run=tmp_path / "whole")
    train_recipe(config(4), network(), data, run=tmp_path / "parts")
    described = tmp_path / "parts" / "config.json"
    saved = json.loads(described.read_text())
    saved["config"]["train"]["steps"] = 8  # as if it had been stopped at step 4 of 8
    described.write_text(json.dumps(saved))
    parts = train_recipe(config(8), network(7), data, run=tmp_path / "parts", resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name])
    for name, value in whole.ema.state_dict().items():
        assert torch.equal(value, parts.ema.state_dict()[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"finest": 96}, "finest: must be a power of two; got 96"),
        ({"finest": 1}, "finest: must be at least 2"),
        ({"bootstrap_fraction": 2}, r"bootstrap_fraction: must be in \[0, 1\]"),
        ({"clip": 0}, "clip: must be positive"),
        ({"train": TrainConfig(path="vp")}, "train.path: this recipe is of the linear path"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Shortcut(**options)


def test_guidance_needs_labels():
    recipe = Shortcut(train=TRAIN, target_guidance_scale=2.0)
    with pytest.raises(ValueError, match="target_guidance_scale: guidance in the target needs"):
        train_recipe(recipe, network(), torch.randn(64, 1))
