"""Self-distilled flow maps: both recipes against NumPy with a complex step, the exact map that has
nothing to learn, and a toy in one step."""

import numpy as np
import pytest
import torch
from flow_map_truth import CLASSES, GaussianMap, Table, TinyFlowMap

import rfkernels as rf
from rfkernels import models
from rfkernels.training import TrainConfig, train_recipe
from rfkernels.training.objective import Setting
from rfkernels.training.recipes import LagrangianSelfDistillation, SplitMeanFlow

BATCH, SEED, STEP = 80, 5, 3
TRAIN = TrainConfig(steps=100, batch_size=BATCH, seed=SEED)
RECIPES = [
    LagrangianSelfDistillation(train=TRAIN),
    LagrangianSelfDistillation(train=TRAIN, span_fraction=1.0),
    SplitMeanFlow(train=TRAIN),
    SplitMeanFlow(train=TRAIN, span_fraction=1.0),
]


def uniform(purpose):
    return rf.rand(BATCH, seed=rf.derive_seed(SEED, purpose), offset=STEP).double().numpy()


def in_numpy(recipe, table, model, *, slope=True, reached=True, second=True):
    """(t, h, loss) of a step; the options switch a part of the recipe off."""
    rows = np.arange(STEP * BATCH, (STEP + 1) * BATCH)
    x0, x1 = table.x0.numpy()[rows], table.x1.numpy()[rows]
    y = None if table.y is None else table.y.numpy()[rows]
    a, b = ((uniform(p) + 2.0**-25).astype(np.float32) for p in ("first time", "second time"))
    i, q = np.arange(BATCH), recipe.span_fraction
    off = np.floor((i + 1) * q + 1e-9) > np.floor(i * q + 1e-9)
    t32, h32 = np.where(off, np.minimum(a, b), a), np.where(off, np.abs(a - b), np.float32(0))
    t, h = t32.astype(float), h32.astype(float)
    x, v, still = (1 - t[:, None]) * x0 + t[:, None] * x1, x1 - x0, np.zeros(BATCH)
    u, column = model.numpy(x, t, h, y), h[:, None]
    if isinstance(recipe, SplitMeanFlow):
        share32 = rf.rand(BATCH, seed=rf.derive_seed(SEED, "part"), offset=STEP).numpy()
        part = (share32 * h32).astype(float)
        first = model.numpy(x, t, part, y)
        middle = x + part[:, None] * first if reached else x
        start, rest = (t32 + share32 * h32).astype(float), (h32 - share32 * h32).astype(float)
        after = model.numpy(middle, start, rest, y)
        share = share32.astype(float)[:, None]
        target = share * first + (1 - share) * after if second else first
    else:
        end = (t32 + h32).astype(float)
        target = model.numpy(x + column * u if reached else x, end, still, y)
        u = u + slope * column * model.derivative(x, t, h, 0 * x, 0.0, 1.0, y)
    target = np.where(off[:, None], target, v)
    return t, h, ((u - target) ** 2).mean()


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_times_and_loss_are_those_of_numpy(recipe, labels):
    table, model = Table(10 * BATCH, labels), TinyFlowMap()
    objective = recipe.objective(Setting(table, TRAIN, CLASSES))
    batch = objective.batch(STEP)
    t, h, loss = in_numpy(recipe, table, model)
    np.testing.assert_allclose(batch["t"].double().numpy(), t, rtol=1e-10)
    np.testing.assert_allclose(batch["span"].double().numpy(), h, rtol=1e-10)
    np.testing.assert_allclose(objective.loss(model, batch).item(), loss, rtol=1e-10)
    assert (h > 0).sum() == round(recipe.span_fraction * BATCH)


@pytest.mark.parametrize(
    ("recipe", "off"),
    [
        (RECIPES[0], "slope"),
        (RECIPES[0], "reached"),
        (RECIPES[3], "reached"),
        (RECIPES[3], "second"),
    ],
)
def test_it_differs_without_what_makes_the_recipe(recipe, off):
    table, model = Table(10 * BATCH), TinyFlowMap()
    objective = recipe.objective(Setting(table, TRAIN))
    loss = objective.loss(model, objective.batch(STEP)).item()
    assert abs(loss - in_numpy(recipe, table, model, **{off: False})[-1]) > 1e-3


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_gradient_is_that_of_a_fixed_target(recipe):
    """Of the loss's derivative in a direction of the weights, by differences with the target held;
    in the Lagrangian case it passes through the forward derivative."""
    table, model = Table(10 * BATCH), TinyFlowMap()
    objective = recipe.objective(Setting(table, TRAIN))
    batch = objective.batch(STEP)
    objective.loss(model, batch).backward()
    found = (model.b.grad * torch.arange(6.0)).sum().item()
    t, h, x = (batch[n].double().numpy() for n in ("t", "span", "xt"))
    column = h[:, None]

    def prediction(step):
        moved = TinyFlowMap()
        with torch.no_grad():
            moved.b += step * torch.arange(6.0)
        u = moved.numpy(x, t, h)
        if isinstance(recipe, LagrangianSelfDistillation):
            u = u + column * moved.derivative(x, t, h, 0 * x, 0.0, 1.0)
        return u

    if isinstance(recipe, SplitMeanFlow):
        target = objective.targets(model, batch).numpy()
    else:
        end = (batch["t"] + batch["span"]).double().numpy()
        there = model.numpy(x + column * model.numpy(x, t, h), end, 0 * t)
        target = np.where(column > 0, there, batch["target"].numpy())
    losses = [((prediction(s) - target) ** 2).mean() for s in (1e-5, -1e-5)]
    assert found == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-6)


class Truth(torch.nn.Module):
    def forward(self, x, t, span):
        return GaussianMap(mean=1.0).average(x, t, span)


@pytest.mark.parametrize("recipe", [RECIPES[1], RECIPES[3]])
def test_the_exact_map_has_no_loss(recipe):
    """T18: the two parts make the whole, and the map's derivative in its end is the velocity."""
    table = Table(10 * BATCH)
    table.sample_shape, (table.x0, table.x1) = (
        (1,),
        GaussianMap(mean=1.0).sample(10 * BATCH, seed=3),
    )
    objective = recipe.objective(Setting(table, TRAIN))
    # float32 times: t + h rounds, and the velocity is taken there
    assert objective.loss(Truth(), objective.batch(STEP)) < 1e-12


@pytest.mark.parametrize("recipe", [RECIPES[0], RECIPES[2]])
def test_the_held_out_loss_is_that_of_the_velocity(recipe):
    objective = recipe.objective(Setting(Table(100, held=True), TRAIN))
    model, batch = TinyFlowMap(), objective.held_out()
    expected = (model(batch["xt"], batch["t"]) - batch["target"]).square().mean()
    torch.testing.assert_close(objective.loss(model, batch), expected)


@pytest.mark.parametrize(
    ("recipe", "most"), [(LagrangianSelfDistillation, 0.35), (SplitMeanFlow, 0.65)]
)
def test_it_learns_a_one_step_map(recipe, most):
    """One step of the trained network against the true map of a Gaussian, over the error of one
    Euler step of the true velocity: 0.18 and 0.52 here. Without intervals it is 0.77."""
    train = TrainConfig(
        steps=400, batch_size=256, learning_rate=3e-3, ema_decay=0.99, log_every=400, holdout=0.0,
        seed=1,
    )  # fmt: skip
    flow = GaussianMap()
    _, data = flow.sample(20_000, seed=4, dtype=torch.float32)
    model = models.build("mlp", seed=0, sample_shape=(1,), width=48, depth=2, flow_map=True)
    result = train_recipe(recipe(train=train), model, data)
    x0, _ = flow.sample(2000, seed=3, dtype=torch.float32)
    end = flow.mean + flow.std * x0
    one = rf.sample(result.ema, x0, steps=1, solver="flow-map")
    assert (one - end).square().mean().sqrt() / (flow.mean - end).square().mean().sqrt() < most


@pytest.mark.parametrize("recipe", [LagrangianSelfDistillation, SplitMeanFlow])
def test_bad_options_are_refused(recipe):
    with pytest.raises(ValueError, match=r"span_fraction: must be in \[0, 1\]"):
        recipe(span_fraction=-0.1)
    with pytest.raises(ValueError, match=r"train\.loss: this recipe has its own loss"):
        recipe(train=TrainConfig(loss="pseudo_huber"))
