"""MeanFlow: both recipes against NumPy with complex-step derivatives, the identity on a flow whose
average velocity is known, guidance in the target, a toy that becomes a one-step sampler."""

import math

import numpy as np
import pytest
import torch
from flow_map_truth import CLASSES, GaussianMap, Table, TinyFlowMap
from torch import nn

import rfkernels as rf
from rfkernels import models
from rfkernels.data import toy
from rfkernels.flow import LogitNormal
from rfkernels.training import TrainConfig, train_recipe
from rfkernels.training.objective import Setting
from rfkernels.training.processes import Processes
from rfkernels.training.recipes import ImprovedMeanFlow, MeanFlow
from rfkernels.training.recipes.meanflow import adaptive_loss, derivative_along

BATCH, SEED, STEP = 40, 5, 3
TRAIN = TrainConfig(steps=100, batch_size=BATCH, seed=SEED)


def logit_normal(purpose, mean):
    normal = rf.randn(BATCH, seed=rf.derive_seed(SEED, purpose), offset=STEP).double().numpy()
    return (1 / (1 + np.exp(-(mean + normal)))).astype(np.float32)


def in_numpy(recipe, table, model, *, tangent=None, mean=0.4, power=None, average=True):
    """(t, h, x_t, target, loss) of a step; the options switch a part of the recipe off or over."""
    rows = np.arange(STEP * BATCH, (STEP + 1) * BATCH)
    x0, x1 = table.x0.numpy()[rows], table.x1.numpy()[rows]
    a, b = logit_normal("first time", mean), logit_normal("second time", mean)
    t, h = np.minimum(a, b).astype(float), np.abs(a - b).astype(float)
    i = np.arange(BATCH)
    q = recipe.span_fraction
    h[np.floor((i + 1) * q) == np.floor(i * q)] = 0.0
    x = (1 - t[:, None]) * x0 + t[:, None] * x1
    v, y, still = x1 - x0, None, np.zeros(BATCH)
    if table.y is not None:
        y = table.y.numpy()[rows].copy()
        u = rf.rand(BATCH, seed=rf.derive_seed(SEED, "label dropout"), offset=STEP).numpy()
        y[u < recipe.train.label_dropout] = CLASSES
        w, k = recipe.target_guidance_scale, recipe.target_guidance_mix
        guided = w * v + k * model.numpy(x, t, still, y)
        guided += (1 - w - k) * model.numpy(x, t, still, np.full(BATCH, CLASSES))
        v = np.where((y == CLASSES)[:, None], v, guided)
    own = isinstance(recipe, ImprovedMeanFlow)
    along = model.numpy(x, t, still, y) if own else v
    dx, dt, dh = (along, 1.0, -1.0) if tangent is None else (along, *tangent)
    change = model.derivative(x, t, h, dx, dt, dh, y)
    target = v + h[:, None] * change * average
    e = ((model.numpy(x, t, h, y) - target) ** 2).sum(1)
    p = recipe.weight_power if power is None else power
    return t, h, x, target, (e / (e + recipe.weight_floor) ** p).mean()


def of_the_objective(recipe, table, model):
    setting = Setting(table, recipe.train, null_label=CLASSES)
    objective = recipe.objective(setting)
    batch = objective.batch(STEP)
    target = objective._average_target(model, batch, objective._guided_velocity(model, batch))
    values = (batch["t"], batch["span"], batch["xt"], target, objective.loss(model, batch))
    return [value.detach().double().numpy() for value in values]


GUIDED = {
    "target_guidance_scale": 1.6,
    "target_guidance_mix": 0.3,
    "train": TrainConfig(steps=100, batch_size=BATCH, seed=SEED, label_dropout=0.25),
}
BOTH = (MeanFlow, ImprovedMeanFlow)
RECIPES = [
    (MeanFlow(train=TRAIN), False),
    (ImprovedMeanFlow(train=TRAIN), False),
    (MeanFlow(train=TRAIN, weight_power=0.5, weight_floor=0.3, span_fraction=1.0), True),
    (MeanFlow(**GUIDED), True),
    (ImprovedMeanFlow(**GUIDED), True),
]


@pytest.mark.parametrize(("recipe", "labels"), RECIPES)
def test_times_states_targets_and_loss_are_those_of_numpy(recipe, labels):
    table, model = Table(10 * BATCH, labels), TinyFlowMap()
    found = of_the_objective(recipe, table, model)
    for mine, expected in zip(found, in_numpy(recipe, table, model), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-10, atol=1e-10)
    assert (found[1] > 0).sum() == round(recipe.span_fraction * BATCH)


@pytest.mark.parametrize(
    "changed",
    [
        {"tangent": (1.0, 0.0)},  # the span's end not held
        {"tangent": (0.0, 0.0)},  # the paper's failing ablation: along (v, 0, 0)
        {"tangent": (-1.0, 1.0)},  # the other time axis
        {"average": False},  # plain flow matching
        {"power": 0.0},
        {"mean": -0.4},  # the paper's number on the wrong axis
    ],
)
@pytest.mark.parametrize("recipe", [cls(train=TRAIN, weight_power=0.5) for cls in BOTH])
def test_it_differs_without_what_makes_the_recipe(recipe, changed):
    table, model = Table(10 * BATCH), TinyFlowMap()
    loss = of_the_objective(recipe, table, model)[-1]
    assert abs(loss - in_numpy(recipe, table, model, **changed)[-1]) > 1e-3


def test_the_gradient_is_that_of_a_fixed_target():
    """The target and the weight carry no gradient."""
    model, table = TinyFlowMap(), Table(10 * BATCH)
    recipe = MeanFlow(train=TRAIN)
    objective = recipe.objective(Setting(table, TRAIN))
    batch = objective.batch(STEP)
    objective.loss(model, batch).backward()
    target = torch.tensor(in_numpy(recipe, table, model)[3])
    prediction = model(batch["xt"], batch["t"], span=batch["span"])
    e = (prediction - target).square().sum(1)
    weight = 1 / (e.detach() + 0.01)
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    expected = torch.autograd.grad((weight * e).mean(), list(model.parameters()), allow_unused=True)
    expected = [g for g in expected if g is not None]
    assert len(found) == len(expected) == 6  # every weight but the labels'
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_the_closed_form_average_velocity_solves_the_identity():
    """T18: u = v + h du/dt on the Gaussian flow; with the tangents (v, 0, 0) it does not."""
    flow = GaussianMap()
    n = 2000
    t, u = (rf.rand(n, seed=s, dtype=torch.float64) for s in (1, 2))
    span = (1 - t) * u
    x = flow.moved(rf.randn(n, 1, seed=3, dtype=torch.float64), torch.zeros(n), t)
    v = flow.velocity(x, t)
    average = flow.average(x, t, span)
    identity = v + span[:, None] * derivative_along(flow.average, x, t, span, v)
    assert (identity - average).abs().max() < 1e-12
    still = (torch.zeros_like(t), torch.zeros_like(span))
    _, wrong = torch.func.jvp(flow.average, (x, t, span), (v, *still))
    assert (v + span[:, None] * wrong - average).abs().max() > 1
    # Two intervals make one, and the map's own derivative in its end is the velocity there.
    half = span / 2
    middle = flow.moved(x, t, t + half)
    there = middle + half[:, None] * flow.average(middle, t + half, half)
    torch.testing.assert_close(there, x + span[:, None] * average, rtol=0, atol=1e-13)


def test_the_expected_gradient_vanishes_at_the_closed_form():
    """At the true average velocity the samples' residual u - target has mean zero given x_t; that of
    the wrong tangents has not. p = 0, where the loss's gradient is the residual."""
    flow, n = GaussianMap(), 400_000
    x0, x1 = flow.sample(n, seed=7)
    # One (t, h), and a test function of x_t alone: 1, and x_t itself.
    t, span = torch.full((n,), 0.3, dtype=torch.float64), torch.full((n,), 0.5, dtype=torch.float64)
    x, v = 0.7 * x0 + 0.3 * x1, x1 - x0
    prediction = flow.average(x, t, span)

    def moments(change):
        residual = prediction - v - span[:, None] * change
        return [
            (m.mean() / (m.std() / math.sqrt(n))).abs().item() for m in (residual, residual * x)
        ]

    right = derivative_along(flow.average, x, t, span, v)
    _, wrong = torch.func.jvp(
        flow.average, (x, t, span), (v, torch.zeros_like(t), torch.zeros_like(span))
    )
    assert max(moments(right)) < 5  # standard errors
    assert max(moments(wrong)) > 50


def test_the_weight_is_that_of_the_squared_error_of_a_sample():
    prediction, target = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.zeros(2, 2)
    for power in (0.0, 0.5, 1.0):
        loss = adaptive_loss(prediction, target, power=power, floor=0.01)
        assert loss.item() == pytest.approx((5 / 5.01**power + 0.0) / 2)


def chosen(fraction, size, steps, processes=1):
    """Which samples of the first steps are among the fraction, a row a step, of all processes."""
    train = TrainConfig(steps=steps, batch_size=size)
    found = [
        MeanFlow(train=train)
        .objective(Setting(Table(size * steps), train, processes=Processes(rank, processes)))
        .chosen(step, fraction)
        for step in range(steps)
        for rank in range(processes)
    ]
    return torch.cat(found).reshape(steps, size)


def test_averages_are_spread_evenly():
    for fraction in (0.0, 0.25, 0.5, 0.75, 1.0, 1 / 3, 0.1):
        mask = chosen(fraction, 120, 2)
        assert torch.equal(mask, chosen(fraction, 120, 2, processes=4))
        for row in mask:
            assert row.sum() == round(120 * fraction)
            for part in row.chunk(4):  # a process's or a micro-batch's share
                assert abs(part.sum() - 30 * fraction) < 1


@pytest.mark.parametrize("size", [1, 3, 4])
def test_steps_of_few_samples_have_averages_too(size):
    """A quarter of three samples is less than one: every so many steps has it."""
    mask = chosen(0.25, size, 40)
    assert mask.sum() == 10 * size
    for first in range(0, 40, 4):
        assert mask[first : first + 4].sum() == size


def test_processes_and_micro_batches_without_averages_still_run():
    model = TinyFlowMap()
    recipe = MeanFlow(train=TRAIN, span_fraction=0.0)
    objective = recipe.objective(Setting(Table(10 * BATCH), TRAIN))
    batch = objective.batch(0)
    assert not batch["span"].any()
    e = (model(batch["xt"], batch["t"]) - batch["target"]).square().sum(1)
    expected = (e / (e + 0.01)).mean()
    torch.testing.assert_close(objective.loss(model, batch), expected)


def test_the_held_out_loss_is_that_of_the_velocity():
    objective = MeanFlow(train=TRAIN).objective(Setting(Table(100, held=True), TRAIN))
    model, batch = TinyFlowMap(), objective.held_out()
    expected = (model(batch["xt"], batch["t"]) - batch["target"]).square().mean()
    torch.testing.assert_close(objective.loss(model, batch), expected)


@pytest.mark.parametrize("recipe", BOTH)
def test_it_learns_the_average_velocity_of_a_gaussian(recipe):
    """The error of the trained network over that of the velocity taken for the average, on the
    times of the training: 0.50 and 0.52 here. Flow matching alone leaves 0.91, the tangents
    (v, 1, 0) 0.70, (v, 0, 0) 2.1, the wrong sign 1.5."""
    train = TrainConfig(
        steps=400, batch_size=512, learning_rate=3e-3, ema_decay=0.99, log_every=400, holdout=0.0,
        seed=1,
    )  # fmt: skip
    flow, n = GaussianMap(), 4000
    model = models.build("mlp", seed=0, sample_shape=(1,), width=48, depth=2, flow_map=True)
    _, data = flow.sample(20_000, seed=4, dtype=torch.float32)
    result = train_recipe(recipe(train=train), model, data)
    one, two = (LogitNormal(mean=0.4).sample(n, seed=s) for s in (21, 22))
    t, span = torch.minimum(one, two), (one - two).abs()
    x0, _ = flow.sample(n, seed=3, dtype=torch.float32)
    x = flow.moved(x0, torch.zeros(n), t)
    truth = flow.average(x, t, span)
    with torch.no_grad():
        error = (result.ema(x, t, span=span) - truth).square().mean()
    assert (error / (flow.velocity(x, t) - truth).square().mean()).sqrt() < 0.6


@pytest.mark.parametrize(
    ("name", "options"),
    [("mlp", {"dropout": 0.1}), ("dit", {"attention": "int8"}), ("unet", {"dropout": 0.1})],
)
def test_reference_networks_train_guided_and_in_bfloat16(name, options):
    """Attention, norms, convolutions and dropout all have the forward derivative."""
    shape = (1, 4, 4)
    model = models.build(
        name, seed=0, sample_shape=shape, width=16, num_classes=3, flow_map=True, **options
    )
    before = {n: p.clone() for n, p in model.named_parameters()}
    train = TrainConfig(
        steps=2, batch_size=8, label_dropout=0.1, autocast="bfloat16", log_every=1, holdout=0.0
    )
    recipe = ImprovedMeanFlow(train=train, target_guidance_scale=1.5, target_guidance_mix=0.2)
    labels = torch.arange(16) % 3
    with rf.use_backend("reference"):
        result = train_recipe(recipe, model, (rf.randn(16, *shape, seed=1), labels))
    assert all(math.isfinite(line["loss"]) for line in result.metrics)
    moved = [n for n, p in result.model.named_parameters() if not torch.equal(p, before[n])]
    assert "span.leave.weight" in moved or "leave.weight" in moved


class NoSpan(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x, t):
        return x * self.weight


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (NoSpan(), {}, r"model: cannot take the samples \(x \(2, 2\), t, span\)"),
        ("mlp", {}, "span: this MLPVelocity was built without flow_map=True"),
        ("map", {"target_guidance_scale": 2.0}, "target_guidance_scale: guidance in the target ne"),
    ],
)
def test_networks_that_cannot_are_refused(model, options, message, tmp_path):
    if isinstance(model, str):
        model = models.build("mlp", sample_shape=(2,), width=8, depth=1, flow_map=model == "map")
    with pytest.raises(ValueError, match=message):
        train_recipe(MeanFlow(train=TRAIN, **options), model, toy("moons"), run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"span_fraction": 1.5}, r"span_fraction: must be in \[0, 1\]"),
        ({"weight_power": -1}, "weight_power: must not be negative"),
        ({"weight_floor": 0}, "weight_floor: must be positive"),
        ({"target_guidance_mix": 1.0}, "target_guidance_mix: must be below 1"),
        ({"times": "normal"}, "distribution must be one of"),
        ({"train": TrainConfig(loss="pseudo_huber")}, "train.loss: this recipe has its own"),
        ({"train": TrainConfig(path="trigonometric")}, "train.path: this recipe is of the linear"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MeanFlow(**options)
