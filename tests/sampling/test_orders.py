"""The orders of the multistep, lagged and third-order solvers, one way and there and back, and what
each step costs."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from rfkernels.flow.closed_form import GaussianMixtureFlow
from rfkernels.sampling import (
    SDE,
    Ancestral,
    CurvedEuler,
    DPMSolver,
    Taylor,
    UniPC,
    evaluations,
    invert,
    multistep,
    reconstruct,
    sample,
)

RING = GaussianMixtureFlow.ring()
WHOLE, INSIDE = (0.0, 1.0), (0.1, 0.9)
FULL = UniPC(2, lower_order_final=False)
FULL_3 = UniPC(3, lower_order_final=False)
# (solver, order of one trip, order of a round trip). Even error terms cancel on the way back for
# fireflow. DPM-Solver++ begins by an Euler step, as published, which limits 3M; UniPC ends by one unless
# told otherwise.
ORDERS = [
    ("ab3", 3, 3),
    (Taylor(order=3), 3, 3),
    ("fireflow", 2, 3),
    ("uni-inv", 1, 1),
    (CurvedEuler("linear"), 1, 1),
    ("dpm++", 2, 2),
    (DPMSolver(kind="heun"), 2, 2),
    (DPMSolver(3), 2, 2),
    ("unipc", 2, 2),
    (UniPC(kind="bh1"), 2, 2),
    (FULL, 3, 3),
    (FULL_3, 3, 3),
]


def rms(a, b):
    return (a - b).square().mean().sqrt().item()


def slope(errors):
    return [math.log2(a / b) for a, b in pairwise(errors)][-1]


@pytest.fixture(scope="module")
def noise():
    return torch.from_numpy(np.random.default_rng(0).standard_normal((48, 2)))


@pytest.fixture(scope="module")
def truths(noise):
    return {
        (a, b): sample(RING, noise, steps=500, solver="rk4", t_start=a, t_end=b)
        for a, b in (WHOLE, INSIDE)
    }


@pytest.mark.parametrize(("solver", "order", "_"), ORDERS, ids=str)
def test_global_error_falls_with_the_order(solver, order, _, noise, truths):
    a, b = INSIDE
    options = {"solver": solver, "t_start": a, "t_end": b}
    errors = [rms(sample(RING, noise, steps=n, **options), truths[a, b]) for n in (128, 256)]
    wide = 0.3 if solver == FULL_3 else 0.09  # its error is still that of the fourth order in part
    assert slope(errors) == pytest.approx(order, abs=wide)


@pytest.mark.parametrize(("solver", "order", "_"), ORDERS[:5], ids=str)
def test_over_the_whole_of_time_on_an_uneven_grid(solver, order, _, noise, truths):
    errors = [
        rms(sample(RING, noise, steps=n, solver=solver, grid=1.7), truths[WHOLE])
        for n in (128, 256)
    ]
    assert slope(errors) == pytest.approx(order, abs=0.12)


@pytest.mark.parametrize("solver", ["dpm++", DPMSolver(3), "unipc", FULL_3], ids=str)
def test_logarithmic_times_keep_about_order_2_where_they_are_singular(solver, noise, truths):
    errors = [rms(sample(RING, noise, steps=n, solver=solver), truths[WHOLE]) for n in (128, 256)]
    assert 1.75 < slope(errors) < 2.25


@pytest.mark.parametrize(
    "solver", ["dpm++", DPMSolver(kind="heun"), DPMSolver(3), "unipc", UniPC(3), FULL_3], ids=str
)
@pytest.mark.parametrize("grid", [[0.0, 1e-8, 2e-8, 0.3, 0.5, 1.0], 1e6], ids=["listed", "shift"])
def test_logarithmic_times_of_steps_that_are_all_noise(solver, grid, noise, truths):
    """Levels above 1 - 1e-6 count as one, so the first steps have no difference to divide by."""
    steps = 40 if grid == 1e6 else None
    x = sample(RING, noise, steps=steps, grid=grid, solver=solver)
    euler = sample(RING, noise, steps=steps, grid=grid)
    assert rms(x, truths[WHOLE]) < rms(euler, truths[WHOLE])
    back = invert(RING, x, steps=steps, grid=grid, solver=solver)
    assert back.isfinite().all()


def test_the_exact_third_derivative(noise, truths):
    solver, (a, b) = Taylor(order=3, derivative="jvp"), INSIDE
    errors = [
        rms(sample(RING, noise, steps=n, solver=solver, t_start=a, t_end=b), truths[a, b])
        for n in (16, 32)
    ]
    assert slope(errors) == pytest.approx(3, abs=0.1)
    # dx/dt = x: one step multiplies by 1 + h + h^2/2 + h^3/6
    result = sample(lambda x, t: x, noise, steps=4, solver=solver)
    torch.testing.assert_close(result, noise * (1 + 1 / 4 + 1 / 32 + 1 / 384) ** 4)
    info = sample(RING, noise, steps=4, solver=solver, return_info=True)
    assert info.nfe == evaluations(solver, 4) == 12
    # dx/dt = t^2: exact, and only by the explicit dependence on time
    result = sample(lambda x, t: (t * t)[:, None].expand_as(x), noise, steps=2, solver=solver)
    torch.testing.assert_close(result, noise + 1 / 3)


def test_a_fixed_look_ahead_loses_the_second_order(noise, truths):
    """RF-Solver's 0.01: the order falls to 1 once steps are not longer than that."""
    errors = [
        rms(sample(RING, noise, steps=n, solver=Taylor(look_ahead=0.01)), truths[WHOLE])
        for n in (32, 64, 256, 512)
    ]
    assert slope(errors[:2]) > 1.8
    assert slope(errors[2:]) == pytest.approx(0.93, abs=0.06)
    # and with half the step it is the midpoint rule, in both directions
    for direction in (sample, invert):
        ours = direction(RING, noise, steps=8, solver=Taylor(look_ahead=1 / 16))
        midpoint = direction(RING, noise, steps=8, solver="midpoint")
        torch.testing.assert_close(ours, midpoint, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("solver", "sampler", "order"),
    [(s, None, r) for s, _, r in ORDERS if s != "uni-inv"] + [("uni-inv", "euler", 2)],
    ids=str,
)
def test_round_trips(solver, sampler, order, truths):
    a, b = INSIDE
    errors = [
        reconstruct(
            RING,
            truths[a, b],
            steps=n,
            solver=solver,
            sample_solver=sampler,
            t_start=a,
            t_end=b,
        )
        .error.square()
        .mean()
        .sqrt()
        .item()
        for n in (64, 128)
    ]
    assert slope(errors) == pytest.approx(order, abs=0.16)


def test_at_equal_evaluations_fireflow_reconstructs_best(truths):
    errors = {}
    for solver, steps in (("euler", 32), ("taylor", 16), ("fireflow", 31)):
        found = reconstruct(RING, truths[WHOLE], solver=solver, steps=steps)
        assert found.nfe == 64
        errors[solver] = found.error.mean().item()
    assert errors["fireflow"] < errors["taylor"] / 2
    assert errors["taylor"] < errors["euler"] / 10


def test_reconstruct_reports_both_ways(truths, noise):
    found = reconstruct(RING, truths[WHOLE], solver="uni-inv", sample_solver="euler", steps=20)
    torch.testing.assert_close(
        found.x0, invert(RING, truths[WHOLE], solver="uni-inv", steps=20), rtol=0, atol=0
    )
    torch.testing.assert_close(found.x, sample(RING, found.x0, steps=20), rtol=0, atol=0)
    torch.testing.assert_close(found.error, (found.x - truths[WHOLE]).square().mean(1).sqrt())
    assert found.nfe == 21 + 20
    adaptive = reconstruct(RING, truths[WHOLE], solver="dopri5", rtol=1e-8, atol=1e-8)
    assert adaptive.nfe.shape == (48,)
    assert adaptive.error.max() < 1e-6
    torch.testing.assert_close(adaptive.x0, noise, rtol=0, atol=1e-6)
    times = [0.0, 0.3, 0.6, 1.0]
    listed = reconstruct(RING, truths[WHOLE], grid=times)
    once = reconstruct(RING, truths[WHOLE], grid=iter(times))
    assert torch.equal(listed.x, once.x)
    # Differences of low-precision data are not rounded to their precision.
    low = reconstruct(RING, truths[WHOLE].bfloat16(), steps=4)
    exact = (low.x.double() - truths[WHOLE].bfloat16().double()).square().mean(1).sqrt()
    torch.testing.assert_close(low.error.double(), exact, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="sample_solver must be deterministic; got 'renoise'"):
        reconstruct(RING, noise, steps=2, sample_solver="renoise")
    with pytest.raises(TypeError, match="reconstruct: seed must be left out; got 3"):
        reconstruct(RING, noise, steps=2, seed=3)


def test_ab3_has_the_textbook_weights_and_integrates_parabolas():
    np.testing.assert_allclose(multistep.ab3(1, 1, 1), (23 / 12, -16 / 12, 5 / 12), rtol=1e-14)
    h, p, q = 0.3, 0.2, 0.7
    weights = multistep.ab3(h, p, q)
    for power in range(3):
        values = [x**power for x in (0.0, -p, -p - q)]
        exact = h ** (power + 1) / (power + 1)
        assert np.dot(weights, values) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("theta", [0.5, 1.0])
def test_lagged_solvers_are_their_text(theta, noise):
    """x^ = x + theta h u, w = v(x^), x <- x + h w, u <- w, on an uneven grid and backwards."""
    name, grid = {0.5: "fireflow", 1.0: "uni-inv"}[theta], [0.0, 0.2, 0.3, 0.7, 1.0]
    for direction, times in ((sample, grid), (invert, grid[::-1])):
        info = direction(RING, noise, grid=grid, solver=name, return_info=True)
        x, u, states = noise, RING(noise, times[0]), [noise]
        for start, end in pairwise(times):
            h = end - start
            u = RING(x + theta * h * u, start + theta * h)
            x = x + h * u
            states.append(x)
        assert info.nfe == 5
        torch.testing.assert_close(info.trajectory, torch.stack(states), rtol=0, atol=1e-11)
        assert torch.equal(info.x, direction(RING, noise, grid=grid, solver=name))


@pytest.mark.parametrize(
    "solver", [Ancestral(eta=0.0), SDE(scale=0.0), CurvedEuler("linear")], ids=str
)
def test_without_noise_or_curvature_it_is_euler(solver, noise):
    seed = {"seed": 1} if solver.stochastic else {}
    ours = sample(RING, noise, steps=7, solver=solver, **seed)
    torch.testing.assert_close(ours, sample(RING, noise, steps=7), rtol=0, atol=1e-13)


@pytest.mark.parametrize("path", ["trigonometric", "sub-vp", "vp"])
@pytest.mark.parametrize("steps", [1, 3])
def test_curved_euler_is_exact_for_constant_estimates(path, steps, noise):
    """Of one data point per sample, the velocity of the path is dalpha x1 + dsigma x0."""
    from rfkernels.flow import get_path

    data, found = torch.flip(noise, [0]) * 3, get_path(path)

    def velocity(x, t):
        alpha, sigma, dalpha, dsigma = (c[:, None] for c in found.coefficients(t))
        x0 = (x - alpha * data) / sigma
        return dalpha * data + dsigma * x0

    alpha, sigma, *_ = found.coefficients(0.0)
    start = alpha * data + sigma * noise
    result = sample(velocity, start, steps=steps, solver=CurvedEuler(path))
    torch.testing.assert_close(result, data, rtol=0, atol=1e-9)
    assert rms(sample(velocity, start, steps=steps), data) > 0.1
    if path == "vp":
        with pytest.raises(ValueError, match=r"where a step begins, at t <= .*; got t = 1"):
            invert(velocity, data, steps=2, solver=CurvedEuler(path))
    else:
        early = sample(velocity, start, steps=2, t_end=0.9, solver=CurvedEuler(path))
        back = invert(velocity, early, steps=2, t_end=0.9, solver=CurvedEuler(path))
        torch.testing.assert_close(back, start, rtol=0, atol=1e-9)


@pytest.mark.parametrize("path", ["trigonometric", "sub-vp", "vp"])
def test_curved_euler_is_ddim_and_of_first_order_on_curved_paths(path, noise):
    """From N(0, 1) to N(m, c^2) on alpha x1 + sigma x0, where every state is its mean plus a scaled start."""
    from rfkernels.flow import get_path

    mean, std, found = 2.0, 0.5, get_path(path)

    def moments(t):
        alpha, sigma, dalpha, dsigma = found.coefficients(torch.as_tensor(t, dtype=torch.float64))
        return alpha, sigma, dalpha, dsigma, alpha**2 * std**2 + sigma**2

    def velocity(x, t):
        alpha, sigma, dalpha, dsigma, variance = (c[:, None] for c in moments(t))
        gain = (alpha * dalpha * std**2 + sigma * dsigma) / variance
        return dalpha * mean + gain * (x - alpha * mean)

    (first, *_, before), (last, *_, after) = moments(0.0), moments(0.9)
    exact = last * mean + (after / before).sqrt() * (noise - first * mean)
    options = {"solver": CurvedEuler(path), "t_end": 0.9}
    errors = [rms(sample(velocity, noise, steps=n, **options), exact) for n in (64, 128)]
    assert slope(errors) == pytest.approx(1, abs=0.05)
    # Both estimates solved for at each state, and put together again at the next level.
    x, times = noise, [0.0, 0.3, 0.7, 0.9]
    for start, end in pairwise(times):
        alpha, sigma, dalpha, dsigma, _ = moments(start)
        v = velocity(x, torch.full((len(x),), start, dtype=torch.float64))
        system = torch.stack([torch.stack([alpha, sigma]), torch.stack([dalpha, dsigma])])
        pair = torch.linalg.solve(system, torch.stack([x, v]).reshape(2, -1))
        data, source = pair.reshape(2, *x.shape)
        x = moments(end)[0] * data + moments(end)[1] * source
    ours = sample(velocity, noise, grid=times, solver=CurvedEuler(path))
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-10)


REFUSED = [
    (lambda: Taylor(look_ahead=0.1, order=3), "look_ahead is for order=2"),
    (lambda: Taylor(look_ahead=-0.1), r"look_ahead must be in \(0, 1\]"),
    (lambda: DPMSolver(4), "DPMSolver: order must be 1, 2 or 3; got 4"),
    (lambda: DPMSolver(kind="bh1"), "kind must be 'midpoint' or 'heun'"),
    (lambda: UniPC(0), "UniPC: order must be 1, 2 or 3; got 0"),
    (lambda: UniPC(kind="heun"), "kind must be 'bh2' or 'bh1'"),
    (lambda: Ancestral(eta=1.5), r"eta must be in \[0, 1\]; got 1.5"),
    (lambda: SDE(scale=-1.0), "scale must be finite and not negative"),
    (lambda: SDE(diffusion="linear"), "diffusion must be 'decreasing'"),
    (lambda: CurvedEuler("round"), "path: must be one of"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_refused_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()
