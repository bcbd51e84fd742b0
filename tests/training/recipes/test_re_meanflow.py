"""Re-MeanFlow: its intervals, weights and phases against NumPy, and a one-step student of pairs."""

import numpy as np
import pytest
import torch
from flow_map_truth import CLASSES, GaussianMap, Table, TinyFlowMap

import rfkernels as rf
from rfkernels import models
from rfkernels.flow import UShaped
from rfkernels.training import TrainConfig, make_pairs, train_recipe
from rfkernels.training.objective import Setting
from rfkernels.training.recipes import ReMeanFlow

BATCH, SEED, STEP = 256, 5, 3
TRAIN = TrainConfig(steps=100, batch_size=BATCH, seed=SEED, holdout=0.0)


def draws_in_numpy(recipe):
    """t of the U-shape and the gap, float32 as drawn."""
    seeds = {p: rf.derive_seed(SEED, p) for p in ("time", "gap")}
    u = rf.rand(BATCH, seed=seeds["time"], offset=STEP).double().numpy() + 2.0**-25
    a = recipe.a
    t = (0.5 + np.arcsinh((2 * u - 1) * np.sinh(a / 2)) / a).astype(np.float32)
    normal = rf.randn(BATCH, seed=seeds["gap"], offset=STEP).double().numpy()
    return t, (1 / (1 + np.exp(-(recipe.gap_mean + recipe.gap_std * normal)))).astype(np.float32)


def intervals_in_numpy(recipe):
    """t and h as float32 arithmetic gives them."""
    t, gap = draws_in_numpy(recipe)
    t = np.maximum(t, np.float32(recipe.time_least))
    end = np.minimum(t + gap, np.float32(1))
    end[(t < 0.2) & (end > 0.6)] = 1
    return t.astype(float), (end - t).astype(float)


def published_intervals(recipe):
    """The rules as they are published, on s = 1 - t, whose U-shape is the same."""
    t, gap = (value.astype(float) for value in draws_in_numpy(recipe))
    s = np.minimum(1 - t, 1 - recipe.time_least)
    r = np.maximum(s - gap, 0)
    r[(s > 0.8) & (r < 0.4)] = 0
    return 1 - s, s - r


def in_numpy(recipe, table, model, *, weighted=True, power=None, jump=True):
    t, h = intervals_in_numpy(recipe)
    if not jump:
        h = np.minimum(h, 0.3)
    rows = np.arange(STEP * BATCH, (STEP + 1) * BATCH)
    x0, x1 = table.x0.numpy()[rows], table.x1.numpy()[rows]
    i, q = np.arange(BATCH), recipe.span_fraction
    h = np.where(np.floor((i + 1) * q) > np.floor(i * q), h, 0.0)
    x, v = (1 - t[:, None]) * x0 + t[:, None] * x1, x1 - x0
    target = v + h[:, None] * model.derivative(x, t, h, v, 1.0, -1.0)
    e = ((model.numpy(x, t, h) - target) ** 2).sum(1)
    loss = e / (e + recipe.weight_floor) ** (recipe.weight_power if power is None else power)
    if recipe.prune and weighted:
        every = np.linalg.norm((table.x1 - table.x0).numpy()[: 16 * BATCH], axis=1)
        loss *= np.linalg.norm(v, axis=1) <= np.quantile(every, 1 - recipe.prune)
        loss /= 1 - recipe.prune
    return t, h, target, loss.mean()


RECIPES = [
    ReMeanFlow(train=TRAIN),
    ReMeanFlow(train=TRAIN, time_least=1 / 81, a=2.0, gap_mean=0.3, gap_std=0.5, prune=0.2),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_intervals_targets_and_loss_are_those_of_numpy(recipe):
    table, model = Table(16 * BATCH), TinyFlowMap()
    objective = recipe.objective(Setting(table, TRAIN))
    batch = objective.batch(STEP)
    found = [batch["t"], batch["span"], objective._average_target(model, batch, batch["target"])]
    found = [value.double().numpy() for value in [*found, objective.loss(model, batch).detach()]]
    for mine, expected in zip(found, in_numpy(recipe, table, model), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-10, atol=1e-10)
    t, span = objective.intervals(STEP)
    for mine, expected in zip((t, span), published_intervals(recipe), strict=True):
        np.testing.assert_allclose(mine.double().numpy(), expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("off", [{"weighted": False}, {"power": 1.0}, {"jump": False}])
def test_it_differs_without_what_makes_the_recipe(off):
    recipe, table, model = RECIPES[1], Table(16 * BATCH), TinyFlowMap()
    objective = recipe.objective(Setting(table, TRAIN))
    loss = objective.loss(model, objective.batch(STEP)).item()
    assert abs(loss / in_numpy(recipe, table, model, **off)[-1] - 1) > 1e-3


def test_the_intervals_are_those_that_one_step_needs():
    train = TrainConfig(batch_size=200_000, holdout=0.0)
    objective = ReMeanFlow(train=train, span_fraction=1.0).objective(Setting(Table(8), train))
    t, span = objective.intervals(0)
    assert (t > 0).all()
    assert (span > 0).all()
    assert (t + span <= 1).all()
    early = t < 0.2
    assert not ((t + span)[early & (t + span < 1)] > 0.6).any()
    for edge in (0.1, 0.5, 0.8):
        share = (t < edge).double().mean().item()
        assert abs(share - UShaped(4.0).cdf(edge).item()) < 5 * (0.25 / 200_000) ** 0.5


def test_guidance_ends_with_its_phase():
    options = {"target_guidance_scale": 2.5, "guided_steps": 0.5}
    train = TrainConfig(steps=100, batch_size=BATCH, label_dropout=0.1, holdout=0.0)
    recipe = ReMeanFlow(train=train, **options)
    objective = recipe.objective(Setting(Table(200 * BATCH, labels=True), train, CLASSES))
    assert "dropped" in objective.batch(49)
    assert "dropped" not in objective.batch(50)
    always = ReMeanFlow(train=train, target_guidance_scale=2.5)
    assert "dropped" in always.objective(objective.setting).batch(99)


class TrueFlow(torch.nn.Module):
    """The Gaussian flow as a teacher."""

    sample_shape = (1,)

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t):
        return GaussianMap().velocity(x, t) + 0 * self.nothing


def test_a_one_step_student(tmp_path):
    """One step from noise against the teacher's own end points, over their spread: 0.019 here.
    The same network trained with h = 0 alone has 0.084."""
    train = TrainConfig(
        steps=400, batch_size=256, learning_rate=3e-3, ema_decay=0.99, log_every=400, holdout=0.0,
        seed=1,
    )  # fmt: skip
    teacher = TrueFlow()
    pairs = make_pairs(teacher, 5000, (1,), folder=tmp_path / "pairs", seed=3, steps=20)
    model = models.build("mlp", seed=0, sample_shape=(1,), width=48, depth=2, flow_map=True)
    result = train_recipe(ReMeanFlow(train=train), model, teacher=teacher, pairs=pairs)
    x0 = rf.randn(2000, 1, seed=9)
    end = rf.sample(teacher, x0, steps=20, solver="heun")
    one = rf.sample(result.ema, x0, steps=1, solver="flow-map")
    assert (one - end).square().mean().sqrt() / end.std() < 0.05


def test_a_velocity_is_no_student():
    teacher = models.build("mlp", sample_shape=(2,), width=8, depth=1)
    recipe = ReMeanFlow(train=TRAIN, pairs=8, pair_steps=1)
    with pytest.raises(ValueError, match="span: this MLPVelocity was built without flow_map=True"):
        train_recipe(recipe, teacher=teacher)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"a": -1.0}, r"UShaped: a must lie in \[0, 200\]"),
        ({"gap_std": 0.0}, "LogitNormal: std must be positive"),
        ({"time_least": 1.0}, r"time_least: must be in \[0, 1\)"),
        ({"prune": 1.0}, r"prune: must be in \[0, 1\)"),
        ({"guided_steps": 2.5}, "guided_steps: a fraction of the run must be in"),
        ({"weight_power": -1}, "weight_power: must not be negative"),
        ({"pairs": 1}, "pairs: must be at least 2"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ReMeanFlow(**options)
