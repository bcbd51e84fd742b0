"""The feature-weighted loss against NumPy, what it learns and what it cannot, and translation between
two sets of points in both directions."""

import math

import numpy as np
import pytest
import torch
from float64_cases import Table, Tiny, column, uniform_middles
from torch import nn

import rfkernels as rf
from rfkernels import metrics, models
from rfkernels.data import toy
from rfkernels.training import OwnObject, TrainConfig, from_dict, to_dict, train_recipe
from rfkernels.training.objective import Setting
from rfkernels.training.recipes import FeatureWeighted

BATCH, SEED, SHAPE, STEP = 16, 5, (2, 3, 4), 2
D = math.prod(SHAPE)
TRAIN = TrainConfig(steps=100, batch_size=BATCH, seed=SEED)
MIX = np.random.default_rng(4).standard_normal((D, 7)) / 4


def features(x):
    return torch.tanh(x.flatten(1) @ torch.from_numpy(MIX).to(x.dtype))


def in_numpy(source, network, at="xt"):
    """(t, x_t, loss): J_h is diag(1 - tanh^2) times the matrix."""
    t = uniform_middles(SEED, "time", STEP, BATCH).astype(np.float32).astype(np.float64)
    rows = slice(STEP * BATCH, (STEP + 1) * BATCH)
    x0, x1 = source.x0[rows].numpy(), source.x1[rows].numpy()
    xt = (1 - column(t, x1)) * x0 + column(t, x1) * x1
    residual = (x1 - x0 - network.numpy(xt, t)).reshape(BATCH, D)
    if at is None:
        return t, xt, (residual**2).mean()
    point = {"xt": xt, "x1": x1}[at].reshape(BATCH, D)
    seen = (1 - np.tanh(point @ MIX) ** 2) * (residual @ MIX)
    return t, xt, (seen**2).mean()


def objective():
    source = Table(SHAPE, 10 * BATCH)
    return source, FeatureWeighted(features=features, train=TRAIN).objective(Setting(source, TRAIN))


def test_it_is_what_the_formula_says():
    source, ours = objective()
    t, xt, loss = in_numpy(source, Tiny())
    batch = ours.batch(STEP)
    np.testing.assert_allclose(batch["t"].numpy(), t, atol=1e-10)
    np.testing.assert_allclose(batch["xt"].numpy(), xt, atol=1e-10)
    assert ours.loss(Tiny(), batch).item() == pytest.approx(loss, rel=1e-10)


@pytest.mark.parametrize("at", [None, "x1"])
def test_without_the_features_or_with_their_slope_elsewhere_it_is_something_else(at):
    source, ours = objective()
    _, _, other = in_numpy(source, Tiny(), at)
    assert abs(ours.loss(Tiny(), ours.batch(STEP)).item() / other - 1) > 0.05


def test_the_gradient_is_that_of_the_loss():
    """Against central differences in the network's weights."""
    _, ours = objective()
    batch, network = ours.batch(STEP), Tiny()
    (gradient,) = torch.autograd.grad(ours.loss(network, batch), network.weight)
    for i, step in enumerate(1e-5 * torch.eye(3, dtype=torch.float64)):
        ends = []
        for sign in (1, -1):
            moved = Tiny()
            with torch.no_grad():
                moved.weight += sign * step
            ends.append(ours.loss(moved, batch).item())
        assert gradient[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


class Waves(nn.Module):
    """Sines and multiples of 16 projections of the plane: a map that tells all points apart."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(2, 16, generator=generator) / 2)

    def forward(self, x):
        projected = x @ self.weight
        return torch.cat([torch.sin(projected), 0.3 * projected], dim=1)


def test_directions_that_the_features_do_not_see_are_not_learnt():
    network = models.build("mlp", seed=0, sample_shape=(2,), width=16, depth=1)
    train = TrainConfig(steps=30, batch_size=32, warmup_steps=0)
    recipe = FeatureWeighted(features=lambda x: x[:, :1] ** 3, train=train)
    result = train_recipe(recipe, network, toy("moons", 200))
    x, t = rf.randn(50, 2, seed=0), torch.full((50,), 0.4)
    # A weight of the way into x is shared by both outputs; the last layer's second row is not.
    assert not result.model.leave.weight[1].any()
    assert result.model.leave.weight[0].abs().max() > 1e-3
    assert result.model(x, t).isfinite().all()


def test_two_domains_are_translated_in_both_directions_by_one_network():
    """Ring to moons by `sample`, moons to ring by `invert`; there and back is where one was."""
    features = Waves()
    network = models.build("mlp", seed=0, sample_shape=(2,), width=64, depth=2)
    train = TrainConfig(
        steps=400, batch_size=256, learning_rate=5e-3, ema_decay=0.99, coupling="ot"
    )
    result = train_recipe(
        FeatureWeighted(features=features, train=train),
        network,
        toy("moons", size=3000),
        x0=toy("ring", size=3000),
    )
    assert features.weight.requires_grad  # the recipe froze a copy
    assert features.weight.grad is None
    ring, moons = toy("ring", size=1500, seed=5).x, toy("moons", size=1500, seed=6).x
    solve = {"steps": 20, "solver": "midpoint"}
    forward = rf.sample(result.ema, ring, **solve)
    backward = rf.invert(result.ema, moons, **solve)
    assert float(metrics.energy_distance(ring, moons)) > 0.8
    assert float(metrics.energy_distance(forward, moons)) < 0.04
    assert float(metrics.energy_distance(backward, ring)) < 0.08
    for start, there, back in ((ring, forward, rf.invert), (moons, backward, rf.sample)):
        returned = back(result.ema, there, **solve)
        assert (returned - start).square().sum(1).mean().sqrt() < 0.2
        assert (there - start).square().sum(1).mean().sqrt() > 1.0


def test_options(tmp_path):
    recipe = FeatureWeighted(features=Waves(), train=TRAIN)
    read = from_dict(FeatureWeighted, to_dict(recipe))
    assert read.features == OwnObject(f"{__name__}.Waves")
    with pytest.raises(ValueError, match="features: give the object itself"):
        read.objective(Setting(Table(SHAPE, BATCH), TRAIN))
    with pytest.raises(TypeError, match="features: must be a callable; got int"):
        FeatureWeighted(features=3)
    network = models.build("mlp", seed=0, sample_shape=(2,), width=8, depth=1)
    small = TrainConfig(steps=6, batch_size=8, checkpoint_every=3, log_every=3, warmup_steps=0)
    small_recipe = FeatureWeighted(features=Waves(), train=small)
    train_recipe(small_recipe, network, toy("moons", 50), run=tmp_path / "run")
    loaded = rf.load(tmp_path / "run")
    assert loaded.kind == "feature-weighted"
