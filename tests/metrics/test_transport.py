"""Straightness, crossing and cost against closed forms, and their identity on exact flows."""

import itertools
import math

import ot
import pytest
import torch

import rfkernels as rf
from rfkernels.flow.closed_form import GaussianMixtureFlow
from rfkernels.flow.couplings import MinibatchOT
from rfkernels.metrics import (
    crossing,
    relative_transport_cost,
    straightness,
    straightness_of_trajectory,
    transport_cost,
)


def even_normals(n):
    """(n, 1) quantiles of the normal: expectations over it are near exact."""
    levels = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.special.ndtri(levels)[:, None]


def test_two_gaussians():
    """N(0,1) to N(m,1): S = 2 - pi/2, V = pi/2, the cost drops from m^2 + 2 to m^2."""
    m = 1.7
    flow = GaussianMixtureFlow([[m]], 1.0)
    x0 = even_normals(4000)
    assert straightness(flow, x0, 400) == pytest.approx(2 - math.pi / 2, abs=0.005)
    noise = x0.repeat(25, 1)
    order = torch.randperm(len(noise), generator=torch.Generator().manual_seed(0))
    data = noise[order] + m
    assert transport_cost(noise, data) == pytest.approx(m**2 + 2, abs=0.05)
    assert crossing(flow, noise, data, draws=50) == pytest.approx(math.pi / 2, abs=0.02)
    end = rf.sample(flow, x0, steps=50, solver="rk4")
    torch.testing.assert_close(end, x0 + m, rtol=0, atol=1e-5)
    assert transport_cost(x0, end) == pytest.approx(m**2, abs=1e-4)
    # The reflowed coupling does not cross, and its flow is the constant m.
    assert crossing(lambda x, _: torch.full_like(x, m), x0, x0 + m) == pytest.approx(0, abs=1e-12)


def test_straightness_converges_with_the_steps():
    flow = GaussianMixtureFlow([[0.5]], 1.0)
    x0 = even_normals(2000)
    errors = [abs(straightness(flow, x0, n) - (2 - math.pi / 2)) for n in (50, 100, 200)]
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.3)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.3)


def test_straightness_is_its_definition_and_that_of_the_trajectory():
    flow = GaussianMixtureFlow.ring()
    x0 = torch.randn(64, 2, dtype=torch.float64)
    states, n = [x0], 12
    for i in range(n):
        states.append(states[-1] + flow(states[-1], i / n) / n)
    written_out = sum(
        ((b - a) * n - (states[-1] - x0)).square().sum(1).mean() / n
        for a, b in itertools.pairwise(states)
    )
    assert straightness(flow, x0, n) == pytest.approx(written_out.item(), rel=1e-9)
    info = rf.sample(flow, x0, steps=n, return_info=True)
    recorded = straightness_of_trajectory(info.times, info.trajectory)
    assert recorded == pytest.approx(written_out.item(), rel=1e-9)
    descending = straightness_of_trajectory(info.times.flip(0), info.trajectory.flip(0))
    assert descending == pytest.approx(recorded, rel=1e-12)


def test_straight_flows_have_none():
    x0 = torch.randn(100, 3)
    target = 1e3 * torch.ones(3)

    def constant(x, _):
        return target.expand_as(x)

    assert straightness(constant, x0, 64) == 0
    assert straightness(constant, x0, 1) == 0
    uneven = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64)
    line = x0.double() + uneven[:, None, None] * target
    assert straightness_of_trajectory(uneven, line) == pytest.approx(0, abs=1e-18)


def test_the_trajectory_measure_weighs_intervals_by_their_length():
    """z = t^2 sampled unevenly: sum of dt (slope - 1)^2 with slopes t_i + t_{i+1}."""
    times = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    states = times.square()[:, None, None]
    expected = 0.25 * (0.25 - 1) ** 2 + 0.75 * (1.25 - 1) ** 2
    assert straightness_of_trajectory(times, states) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_identity_on_the_ring(seed):
    """E|x1-x0|^2 - E|Z1-Z0|^2 = V + S, and every convex cost drops, with the exact velocity."""
    flow, n = GaussianMixtureFlow.ring(), 4000
    x1 = flow.sample(n, seed=seed, dtype=torch.float64)
    x0 = rf.randn(n, 2, seed=seed + 10, dtype=torch.float64)
    z0 = rf.randn(n, 2, seed=seed + 20, dtype=torch.float64)
    z1 = rf.sample(flow, z0, steps=40, solver="rk4")

    def fourth(difference):
        return difference.square().sum(1).square()

    for cost in ("squared-euclidean", "euclidean", "manhattan", fourth):
        assert transport_cost(z0, z1, cost=cost) < transport_cost(x0, x1, cost=cost)
    drop = transport_cost(x0, x1) - transport_cost(z0, z1)
    v = crossing(flow, x0, x1, draws=16, seed=seed)
    # The Euler form is off by a term in 1/steps; two of them take it out.
    s = 2 * straightness(flow, z0, 200) - straightness(flow, z0, 100)
    squared = (x1 - x0).square().sum(1)
    error = squared.std().item() / math.sqrt(n)
    assert drop == pytest.approx(v + s, abs=5 * error)
    assert v == pytest.approx(7.95, abs=0.4)
    covariance = z1.T.cov()
    assert (covariance - 8.25 * torch.eye(2)).abs().max() < 5 * 8.25 * math.sqrt(2 / n)


def test_minibatch_optimal_transport_on_the_ring():
    flow, n = GaussianMixtureFlow.ring(), 1024
    x1 = flow.sample(n, seed=5, dtype=torch.float64)
    x0 = rf.randn(n, 2, seed=6, dtype=torch.float64)
    costs = [transport_cost(x0, x1)]
    for size in (16, 64, 256, 1024):
        batches = zip(x0.split(size), x1.split(size), strict=True)
        assigned = torch.cat([MinibatchOT()(a, b)[0] for a, b in batches])
        costs.append(transport_cost(assigned, x1))
    assert costs == sorted(costs, reverse=True)
    assert costs[1] < 0.6 * costs[0]
    assert relative_transport_cost(x0, x1) == pytest.approx(costs[0] - costs[-1], rel=1e-9)


def test_the_flow_of_unequal_clusters_costs_more_than_the_optimal_assignment():
    flow = GaussianMixtureFlow([[3.0, 0.0], [-1.0, 4.0], [-2.0, -1.0]], 0.3, [0.6, 0.3, 0.1])
    x0 = rf.randn(500, 2, seed=6, dtype=torch.float64)
    z1 = rf.sample(flow, x0, steps=50, solver="rk4")
    x1 = flow.sample(500, seed=5, dtype=torch.float64)
    gap = relative_transport_cost(x0, z1)
    assert 0 < gap < 0.1 * relative_transport_cost(x0, x1)


def test_relative_cost_against_pot():
    x0, x1 = torch.randn(2, 60, 3, dtype=torch.float64)
    optimal = ot.emd2(ot.unif(60), ot.unif(60), ot.dist(x0.numpy(), x1.numpy()))
    expected = transport_cost(x0, x1) - optimal
    assert relative_transport_cost(x0, x1) == pytest.approx(expected, rel=1e-9)
    assert relative_transport_cost(x0, x0) == 0


def test_costs_written_out():
    x0, x1 = torch.randn(2, 9, 2, 2)
    d = (x1 - x0).flatten(1).double()
    assert transport_cost(x0, x1) == pytest.approx(d.square().sum(1).mean().item(), rel=1e-6)
    assert transport_cost(x0, x1, cost="manhattan") == pytest.approx(
        d.abs().sum(1).mean().item(), rel=1e-6
    )
    assert transport_cost(x0, x1, cost="euclidean") == pytest.approx(
        d.square().sum(1).sqrt().mean().item(), rel=1e-6
    )


def test_crossing_of_a_known_residual_on_another_path_and_with_a_condition():
    x0, x1 = torch.randn(2, 10, 4)
    calls = []

    def field(x, t, *, shift):
        calls.append(t)
        return torch.zeros_like(x) + shift

    expected = ((x1 - x0) - 0.5).square().sum(1).mean().item()
    value = crossing(field, x0, x1, draws=4, condition={"shift": 0.5})
    assert value == pytest.approx(expected, rel=1e-5)
    assert all(t.shape == (10,) and t.dtype == torch.float32 for t in calls)
    assert all((t >= i / 4).all() and (t <= (i + 1) / 4).all() for i, t in enumerate(calls))
    # On the spherical path the target's square integrates to (pi/2)^2 (|x0|^2 + |x1|^2) / 2 + ...
    a = (math.pi / 2) ** 2 * (x0.square() + x1.square()).sum(1).mean() / 2
    b = -(math.pi / 2) * (x0 * x1).sum(1).mean()
    value = crossing(field, x0, x1, draws=400, path="spherical", condition={"shift": 0.0})
    assert value == pytest.approx((a + b).item(), rel=1e-2)


def test_errors_name_the_argument():
    x0, x1 = torch.randn(2, 6, 3)
    flow = GaussianMixtureFlow([[0.0, 0.0, 0.0]], 1.0)
    for call, message in (
        (lambda: straightness(flow, x0, 0), "steps must be at least 1; got 0"),
        (lambda: straightness(flow, x0[:0], 5), "x0 must be .*n at least 1"),
        (lambda: straightness(lambda x, _: x[:1], x0, 5), "velocity must return a tensor"),
        (lambda: crossing(flow, x0, x1, draws=0), "draws must be at least 1"),
        (lambda: crossing(flow, x0[:2], x1), "x0 must have the shape of x1"),
        (lambda: transport_cost(x0, x1, cost="l7"), "cost must be one of .* got 'l7'"),
        (lambda: transport_cost(x0, x1, cost=torch.mean), "cost must return shape"),
        (lambda: straightness_of_trajectory(torch.rand(2), x0), "times must have shape"),
        (
            lambda: straightness_of_trajectory(torch.tensor([0.0, 0.5, 0.4]), torch.randn(3, 2, 2)),
            "strictly monotone",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
