"""2-rectified flow++: its times and losses against NumPy, what its pseudo-Huber is worth, and a run
on digits from a network in EDM's convention, with real data by inversion."""

import math

import numpy as np
import pytest
import torch
from float64_cases import Table, Tiny, column, uniform_middles
from torch import nn

import rfkernels as rf
from rfkernels import data, metrics, models
from rfkernels.training import (
    OwnObject,
    TrainConfig,
    from_dict,
    invert_data,
    make_pairs,
    to_dict,
    train_flow,
    train_recipe,
)
from rfkernels.training.objective import Setting
from rfkernels.training.recipes import RectifiedFlowPlusPlus

BATCH, SEED, SHAPE, STEP = 32, 5, (2, 3, 4), 3
D = math.prod(SHAPE)
TRAIN = TrainConfig(steps=100, batch_size=BATCH, seed=SEED)
MIX = np.random.default_rng(4).standard_normal((D, 5)) / 4


def perceptual(prediction, target):
    """Mean squared difference of tanh features."""
    mix = torch.from_numpy(MIX)
    a, b = (torch.tanh(x.flatten(1) @ mix) for x in (prediction, target))
    return (a - b).square().mean(1)


def times_in_numpy(a=4.0):
    u = uniform_middles(SEED, "time", STEP, BATCH)
    t = u if a == 0 else 0.5 + np.arcsinh((2 * u - 1) * np.sinh(a / 2)) / a
    t = t.astype(np.float32)
    # The scaling is in float32, as the times are.
    scaled = np.float32(1e-5) + t * np.float32(1 - 2e-5)
    return t.astype(np.float64), scaled.astype(np.float64)


def loss_in_numpy(kind, source, network, divide=True, c=0.00054 * D):
    """The losses of the paper on its own axis s = 1 - t, v pointing from data to noise."""
    _, t = times_in_numpy()
    s = 1 - t
    rows = slice(STEP * BATCH, (STEP + 1) * BATCH)
    z, x = source.x0[rows].numpy(), source.x1[rows].numpy()
    xs = (1 - column(s, x)) * x + column(s, x) * z
    v = -network.numpy(xs, t)
    square = ((v - (z - x)) ** 2).reshape(BATCH, -1).sum(1)
    huber = (np.sqrt(square + c**2) - c) / D
    end = xs - column(s, x) * v
    features = [np.tanh(y.reshape(BATCH, -1) @ MIX) for y in (end, x)]
    lp = ((features[0] - features[1]) ** 2).mean(1)
    lp = lp / s if divide else lp
    return {
        "perceptual-huber": (1 - s) * huber + lp,
        "perceptual": lp,
        "huber": huber,
        "mse": square / D,
        "sqrt-mse": np.sqrt(square / D),
    }[kind].mean()


def objective_of(**options):
    recipe = RectifiedFlowPlusPlus(train=TRAIN, **options)
    return recipe.objective(Setting(Table(SHAPE, 10 * BATCH), TRAIN))


CASES = [
    ("perceptual-huber", {"perceptual": perceptual}),
    ("perceptual-huber", {"perceptual": perceptual, "divide": False}),
    ("perceptual-huber", {"perceptual": perceptual, "huber_c": 0.3}),
    ("perceptual", {"perceptual": perceptual, "loss": "perceptual"}),
    ("perceptual", {"perceptual": perceptual, "loss": "perceptual", "divide": False}),
    ("huber", {}),
    ("mse", {"loss": "mse"}),
    ("sqrt-mse", {"loss": "sqrt-mse"}),
]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_losses_are_what_the_formulas_say(kind, options):
    source, network = Table(SHAPE, 10 * BATCH), Tiny()
    objective = objective_of(**options)
    batch = objective.batch(STEP)
    expected = loss_in_numpy(
        kind, source, network, options.get("divide", True), options.get("huber_c", 0.00054 * D)
    )
    # Times agree to a unit of float32, in which the library computes them and the division by s
    # magnifies it next to the data.
    assert objective.loss(network, batch).item() == pytest.approx(expected, rel=2e-5)
    exact = dict(batch, t=batch["t"].double())
    again = objective.loss(network, exact).item()
    assert again == pytest.approx(numpy_loss(kind, exact, network, options), rel=1e-12)


def numpy_loss(kind, batch, network, options):
    """As `loss_in_numpy`, at the batch's own times to the last bit."""
    t, xt, target = (batch[k].numpy() for k in ("t", "xt", "target"))
    velocity, c = network.numpy(xt, t), options.get("huber_c", 0.00054 * D)
    square = ((velocity - target) ** 2).reshape(BATCH, -1).sum(1)
    huber = (np.sqrt(square + c**2) - c) / D
    if kind in ("huber", "mse", "sqrt-mse"):
        return {"huber": huber, "mse": square / D, "sqrt-mse": np.sqrt(square / D)}[kind].mean()
    end = xt + column(1 - t, xt) * velocity
    both = [np.tanh(y.reshape(BATCH, -1) @ MIX) for y in (end, batch["x1"].numpy())]
    lp = ((both[0] - both[1]) ** 2).mean(1) / (1 - t if options.get("divide", True) else 1)
    return (lp + t * huber if kind == "perceptual-huber" else lp).mean()


@pytest.mark.parametrize("a", [4.0, 2.0, 0.0])
def test_times_states_and_targets(a):
    source = Table(SHAPE, 10 * BATCH)
    batch = objective_of(a=a).batch(STEP)
    drawn, scaled = times_in_numpy(a)
    np.testing.assert_allclose(batch["t"].numpy(), scaled, rtol=0, atol=1.2e-7)
    assert np.abs(scaled - drawn).max() > 1e-6
    assert 0 < batch["t"].min() < batch["t"].max() < 1
    rows = slice(STEP * BATCH, (STEP + 1) * BATCH)
    x0, x1 = source.x0[rows].numpy(), source.x1[rows].numpy()
    t = column(batch["t"].double().numpy(), x1)
    np.testing.assert_allclose(batch["xt"].numpy(), (1 - t) * x0 + t * x1, atol=1e-10)
    np.testing.assert_allclose(batch["target"].numpy(), x1 - x0, atol=1e-10)


@pytest.mark.parametrize(
    "change", [{"a": 0.0}, {"divide": False}, {"perceptual": None}, {"huber_c": 1.0}]
)
def test_without_what_distinguishes_it_it_is_something_else(change):
    expected = loss_in_numpy("perceptual-huber", Table(SHAPE, 10 * BATCH), Tiny())
    right = objective_of(perceptual=perceptual)
    assert right.loss(Tiny(), right.batch(STEP)).item() == pytest.approx(expected, rel=2e-5)
    wrong = objective_of(**{"perceptual": perceptual, **change})
    assert abs(wrong.loss(Tiny(), wrong.batch(STEP)).item() / expected - 1) > 0.01


def test_both_configurations_differ_by_the_division_alone():
    """F - E = P (1 / s - 1)."""
    losses = {}
    for divide in (True, False):
        for kind in ("perceptual-huber", "perceptual"):
            objective = objective_of(perceptual=perceptual, loss=kind, divide=divide)
            losses[kind, divide] = objective.loss(Tiny(), objective.batch(STEP)).item()
    both, alone = (
        losses[kind, True] - losses[kind, False] for kind in ("perceptual-huber", "perceptual")
    )
    assert both == pytest.approx(alone, rel=1e-9)
    assert alone > 0.1 * losses["perceptual", False]


def test_the_times_are_u_shaped_within_their_margins():
    train = TrainConfig(batch_size=200_000)
    source = Table((1,), 200_000)
    times = RectifiedFlowPlusPlus(train=train).objective(Setting(source, train)).batch(0)["t"]
    assert times.min() >= 1e-5
    assert times.max() <= 1 - 1e-5 + 1e-7
    assert (times < 0.1).double().mean().item() == pytest.approx(0.1725, abs=0.005)
    middle = ((times > 0.25) & (times < 0.75)).double().mean().item()
    assert middle == pytest.approx(0.32403, abs=0.006)


@pytest.mark.parametrize(("std", "value"), [(0.1, 0.0013456), (1.0, 0.01749), (2.0, 0.03500)])
def test_the_pseudo_huber_of_an_image(std, value):
    """d = 3 x 32 x 32, c = 1.65888: quadratic in a small residual, linear in a large one."""
    d, c = 3072, 1.65888
    residual = std * torch.from_numpy(np.random.default_rng(1).standard_normal((1, d)))
    prediction = residual.clone().requires_grad_()
    target = torch.zeros_like(residual)
    loss = rf.flow_loss(prediction, target, kind="pseudo_huber")
    assert loss.item() == pytest.approx(value, rel=0.03)
    (gradient,) = torch.autograd.grad(loss, prediction)
    expected = residual / (d * math.sqrt(residual.square().sum().item() + c**2))
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=0)
    small = rf.flow_loss(1e-3 / std * residual, target, kind="pseudo_huber").item()
    square = (1e-3 / std * residual).square().sum().item()
    assert small == pytest.approx(square / (2 * c * d), rel=1e-3)


class Features(nn.Module):
    """A perceptual distance of a fixed random network of two layers."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("first", torch.randn(8, 1, 3, 3, generator=generator) / 3)
        self.register_buffer("second", torch.randn(16, 8, 3, 3, generator=generator) / 72**0.5)

    def features(self, x):
        first = nn.functional.silu(nn.functional.conv2d(x, self.first, padding=1))
        return first, nn.functional.conv2d(first, self.second, stride=2)

    def forward(self, prediction, target):
        layers = zip(self.features(prediction), self.features(target), strict=True)
        return sum((a - b).square().flatten(1).mean(1) for a, b in layers)


@pytest.mark.slow
def test_digits_from_an_edm_network_in_one_step(tmp_path):
    """A network inside EDM's preconditioning is trained, makes the pairs, and is reflowed; then the
    inverted real digits fine-tune it."""
    digits = data.digits()
    inner = models.build("mlp", seed=0, sample_shape=digits.sample_shape, width=192, depth=2)
    options = {"batch_size": 128, "ema_decay": 0.99, "warmup_steps": 20}
    first = train_flow(
        models.EDMVelocity(inner), digits, TrainConfig(steps=500, learning_rate=3e-3, **options)
    )
    recipe = RectifiedFlowPlusPlus(
        pairs=3000,
        pair_steps=8,
        pair_batch=3000,
        perceptual=Features(),
        train=TrainConfig(steps=250, learning_rate=1.5e-3, **options),
    )
    second = train_recipe(recipe, teacher=first, run=tmp_path / "run")
    assert type(second.ema) is models.EDMVelocity
    noise = rf.randn(1500, 1, 8, 8, seed=1)

    def distance(network, steps, solver="euler"):
        x = rf.sample(network, noise, steps=steps, solver=solver)
        return float(metrics.frechet_distance(x, digits.x))

    assert distance(first.ema, 1) > 8
    for steps, solver in ((1, "euler"), (2, "euler"), (4, "rf++")):
        assert distance(second.ema, steps, solver) < 1.0
    loaded = rf.load(tmp_path / "run")
    assert loaded.config.perceptual == OwnObject(f"{Features.__module__}.Features")
    assert torch.equal(
        loaded.model(noise[:2], torch.zeros(2)), second.ema(noise[:2], torch.zeros(2))
    )

    real = invert_data(second.ema, digits, folder=tmp_path / "real", steps=8, batch=2000)
    x0, x1, _ = real.batch(torch.arange(len(real)))
    assert torch.equal(x1, digits.x)
    # Of the 64 pixels some are never inked: along those the network cannot tell how far to go back.
    assert x0.mean().abs() < 0.1
    assert 0.6 < x0.std() < 1.1
    again = rf.sample(second.ema, x0, steps=8, solver="heun")
    assert (again - x1).square().mean() < 0.05 * x1.var()
    tuned = train_recipe(
        RectifiedFlowPlusPlus(
            perceptual=Features(), train=TrainConfig(steps=40, learning_rate=2e-4, **options)
        ),
        teacher=second,
        pairs=real,
    )
    assert distance(tuned.ema, 1) < 1.0
    one = torch.zeros(len(x0))
    with torch.no_grad():
        misses = [
            (x0 + net(x0, one) - x1).square().mean().item() for net in (second.ema, tuned.ema)
        ]
    assert misses[1] < misses[0]


def test_config_round_trip_and_refusals(tmp_path):
    recipe = RectifiedFlowPlusPlus(a=2.0, loss="mse", train=TRAIN)
    assert from_dict(RectifiedFlowPlusPlus, to_dict(recipe)) == recipe
    named = from_dict(
        RectifiedFlowPlusPlus, to_dict(RectifiedFlowPlusPlus(perceptual=perceptual, train=TRAIN))
    )
    assert isinstance(named.perceptual, OwnObject)
    with pytest.raises(ValueError, match="perceptual: give the object itself; got the name of one"):
        named.objective(Setting(Table(SHAPE, BATCH), TRAIN))
    short = objective_of(perceptual=lambda a, b: (a - b).square().mean())
    with pytest.raises(ValueError, match=r"perceptual: must return \(32,\) distances; got \(\)"):
        short.loss(Tiny(), short.batch(0))
    for options, kind, message in (
        ({"a": -1.0}, ValueError, r"a must lie in \[0, 200\]"),
        ({"loss": "lpips"}, ValueError, "loss: must be None or one of perceptual-huber"),
        ({"loss": "perceptual"}, ValueError, "the loss 'perceptual' needs it; got None"),
        ({"loss": "mse", "perceptual": perceptual}, ValueError, "'mse' has no use for it"),
        ({"perceptual": 3}, TypeError, "perceptual: must be a callable or None; got int"),
        ({"huber_c": 1.0, "loss": "mse"}, ValueError, "huber_c: the loss 'mse' has no use for it"),
        ({"huber_c": 0.0}, ValueError, "huber_c: must be positive"),
        ({"divide": 1}, TypeError, "divide: must be true or false; got 1"),
        ({"train": TrainConfig(path="vp")}, ValueError, "train.path: the pairs are joined"),
    ):
        with pytest.raises(kind, match=message):
            RectifiedFlowPlusPlus(**options)


def test_labels_of_pairs_reach_the_network(tmp_path):
    network = models.build("mlp", seed=0, sample_shape=(2,), width=8, depth=1, num_classes=2)
    pairs = make_pairs(
        network, 40, (2,), folder=tmp_path / "p", steps=1, labels=torch.arange(40) % 2
    )
    train = TrainConfig(steps=3, batch_size=8, warmup_steps=0)
    result = train_recipe(RectifiedFlowPlusPlus(train=train), teacher=network, pairs=pairs)
    assert result.conditional
    assert result.num_classes == 2
