"""Whole evaluations: exact flows, counted evaluations, the same noises for all, copies found out, bad options."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rfkernels.flow.closed_form import GaussianMixtureFlow
from rfkernels.metrics import Drawer, RealData, Yardstick, evaluate, real_data

RING = GaussianMixtureFlow.ring()
DATA = RealData(RING.sample(600, seed=1), RING.sample(150, seed=2), None, "ring")


class Network(nn.Module):
    """A velocity with a weight, so that it has a device; counts its calls and keeps its first noise."""

    def __init__(self, velocity):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.velocity, self.calls, self.noise = velocity, 0, None

    def forward(self, x, t, span=None):
        self.calls += 1
        self.noise = x.clone() if self.noise is None else self.noise
        return self.velocity(x, t)


def run(velocity, **more):
    return SimpleNamespace(
        model=Network(velocity), sample_shape=(2,), num_classes=None, conditional=False,
        kind="train", config=SimpleNamespace(label_dropout=0.0), description={}, **more,
    )  # fmt: skip


def copies(x, t):
    """In one Euler step, the nearest training sample."""
    return DATA.train[torch.cdist(x, DATA.train).argmin(1)] - x


def test_an_exact_flow_gets_better_and_its_evaluations_are_counted():
    exact = run(RING)
    found = evaluate({"exact": exact}, DATA, steps=(4, 1, 32), solvers=["euler", "heun"], draws=4)
    points = [(row.solver, row.steps, row.nfe) for row in found.rows]
    assert points == [
        ("euler", 1, 1), ("euler", 4, 4), ("euler", 32, 32), ("heun", 1, 2), ("heun", 4, 8), ("heun", 32, 64)
    ]  # fmt: skip
    assert exact.model.calls == sum(row.nfe for row in found.rows)  # one batch of 600 each
    first, *_, last = (row.values for row in found.rows)
    assert first["frechet_distance"] > 20 * last["frechet_distance"]
    assert first["energy_distance"] > 20 * abs(last["energy_distance"])
    assert first["one_nn_accuracy"] > 0.9
    assert last["one_nn_accuracy"] == pytest.approx(0.5, abs=0.06)
    assert last["memorisation_ratio"] == pytest.approx(1, abs=0.2)
    assert found.settings["samples"] == 600


def test_all_start_from_the_same_noises():
    runs = {"a": run(RING), "b": run(RING)}
    found = evaluate(runs, DATA, steps=(1, 2), solvers=["euler", "midpoint"], draws=1, keep=10)
    assert torch.equal(runs["a"].model.noise, runs["b"].model.noise)
    assert torch.equal(found.samples["a", "midpoint", 2], found.samples["b", "midpoint", 2])
    assert found.samples["a", "euler", 1].shape == (10, 2)
    other = evaluate({"a": run(RING)}, DATA, steps=(1,), draws=1, keep=10, seed=1)
    assert not torch.equal(other.samples["a", "euler", 1], found.samples["a", "euler", 1])


def test_copies_are_found_out_though_they_score_well():
    found = evaluate({"copies": run(copies), "exact": run(RING)}, DATA, steps=(1,), draws=2)
    values = found.rows[0].values
    assert values["memorisation_ratio"] < 1e-5
    assert values["close_share"] == 1


def test_a_run_has_a_solver_of_its_own_and_an_adaptive_one_is_one_point():
    runs = {"own": run(RING, default_solver="flow-map"), "plain": run(RING)}
    found = evaluate(runs, DATA, steps=(2,), draws=1, metrics=["energy", "straightness"])
    assert [(row.run, row.solver, row.nfe) for row in found.rows] == [
        ("own", "flow-map", 2),
        ("plain", "euler", 2),
    ]
    assert "straightness" not in found.rows[0].values
    assert found.rows[1].values["straightness"] > 0
    assert found.table()[0]["straightness"] is None
    adaptive = evaluate({"plain": run(RING)}, DATA, solvers=["dopri5"], draws=1)
    (row,) = adaptive.rows
    assert row.steps is None
    assert row.nfe > 20
    assert row.values["frechet_distance"] < 0.2


def test_every_metric_and_what_real_data_scores():
    names = [
        "frechet",
        "one-nn",
        "kid",
        "energy",
        "precision-recall",
        "density-coverage",
        "transport-cost",
    ]
    found = evaluate({"exact": run(RING)}, DATA, steps=(32,), draws=2, metrics=names)
    values, real, gaussian = found.rows[0].values, found.real, found.gaussian
    assert set(values) == {
        "frechet_distance", "one_nn_accuracy", "one_nn_accuracy_std", "kernel_distance",
        "kernel_distance_error", "energy_distance", "precision", "recall", "density", "coverage",
        "transport_cost", "nearest_training_distance", "memorisation_ratio", "close_share",
    }  # fmt: skip
    assert real["memorisation_ratio"] == 1
    assert real["precision"] > 0.7
    assert real["one_nn_accuracy"] == pytest.approx(0.5, abs=0.1)
    # The ring's mean and covariance, and nothing of the ring.
    assert gaussian["frechet_distance"] < 0.2
    assert gaussian["one_nn_accuracy"] > 0.7
    assert gaussian["precision"] < 0.8 * real["precision"]


def test_features_are_what_is_compared():
    """Features that see one coordinate are blind to the other."""
    wrong = run(lambda x, t: torch.stack((RING(x, t)[:, 0], torch.full_like(x[:, 0], 50.0)), 1))
    blind = evaluate({"wrong": wrong}, DATA, steps=(1,), draws=1, features=lambda x: x[:, :1] * 0)
    seeing = evaluate({"wrong": wrong}, DATA, steps=(1,), draws=1)
    assert blind.rows[0].values["frechet_distance"] == 0
    assert seeing.rows[0].values["frechet_distance"] > 2000
    assert blind.settings["features"] == "callable"


def test_a_drawer_draws_sample_i_whatever_else_is_drawn():
    drawer = Drawer(run(RING))
    told = []
    many, nfe = drawer.draw(torch.arange(9), seed=3, steps=4, batch=4, done=told.append)
    few, _ = drawer.draw(torch.tensor([7, 2]), seed=3, steps=4)
    torch.testing.assert_close(few, many[[7, 2]])
    assert (nfe, told) == (4.0, [4, 4, 1])


def test_a_solver_that_draws_noise_draws_it_by_sample():
    drawer = Drawer(run(RING))
    options = {"seed": 3, "steps": 4, "solver": "renoise"}
    many, _ = drawer.draw(torch.arange(9), batch=4, **options)
    few, _ = drawer.draw(torch.tensor([7, 2]), **options)
    torch.testing.assert_close(few, many[[7, 2]])
    other, _ = drawer.draw(torch.arange(9), **{**options, "seed": 4})
    assert not torch.allclose(other, many)


def test_real_data_is_what_training_held_out():
    from rfkernels.data import digits, split
    from rfkernels.training import TrainConfig

    config = TrainConfig(holdout=0.25, seed=3)
    described = SimpleNamespace(
        config=config, description={"data": {"name": "digits", "size": 1797}}
    )
    pairs = SimpleNamespace(config=SimpleNamespace(train=TrainConfig()), description={})
    found = real_data([pairs, described])
    train, held_out = split(digits(), 0.25, 3)
    assert torch.equal(found.train, train.x)
    assert torch.equal(found.held_out, held_out.x)
    assert torch.equal(found.labels, train.labels)
    assert found.name == "digits"
    with pytest.raises(ValueError, match="dataset: must be given, the runs were trained on pairs"):
        real_data([pairs])


def test_errors_name_the_argument():
    runs = {"a": run(RING)}
    for options, said in (
        ({"metrics": ["fid"]}, "metric: must be one of frechet"),
        ({"steps": (0, 1)}, "steps: must be at least 1; got 0"),
        ({"steps": ()}, "steps: must be at least 1; got none"),
        ({"draws": 0}, "draws: must be at least 1; got 0"),
        ({"seed": -1}, "seed: must not be negative; got -1"),
        ({"solvers": ["magic"]}, "solver must be one of"),
        ({"features": "vgg"}, "features: must be one of"),
        ({"features": "classifier"}, "classifier needs data with class labels"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate(runs, DATA, **options)
    with pytest.raises(ValueError, match="runs: must be at least one"):
        evaluate({}, DATA)
    with pytest.raises(ValueError, match=r"runs: a makes samples of the shape \(2,\)"):
        evaluate(runs, RealData(torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 8), None, "x"))
    with pytest.raises(ValueError, match="metric: must be one of"):
        Yardstick(DATA.train, DATA.held_out, metrics=["straightness"])
    with pytest.raises(ValueError, match="at least two held-out samples"):
        Yardstick(DATA.train, DATA.held_out[:1])
