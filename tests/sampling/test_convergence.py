"""The fixed-step solvers against closed forms, against each other, and against their orders."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from rfkernels.flow.closed_form import GaussianMixtureFlow
from rfkernels.sampling import Dopri5, Taylor, invert, sample

RING = GaussianMixtureFlow.ring()
JVP = Taylor(derivative="jvp")
ORDERS = [
    ("euler", 1),
    ("midpoint", 2),
    ("heun", 2),
    ("ab2", 2),
    ("taylor", 2),
    (JVP, 2),
    ("rk4", 4),
]
ALL = [solver for solver, _ in ORDERS] + ["dopri5"]


def rms(a, b):
    return (a - b).square().mean().sqrt().item()


def slopes(errors):
    """log2 of the error ratio from each step count to its double."""
    return [math.log2(a / b) for a, b in pairwise(errors)]


@pytest.fixture(scope="module")
def noise():
    return torch.from_numpy(np.random.default_rng(0).standard_normal((64, 2)))


@pytest.fixture(scope="module")
def truth(noise):
    return sample(RING, noise, steps=600, solver="rk4")


@pytest.mark.parametrize(("solver", "order"), ORDERS, ids=str)
def test_global_error_falls_with_the_order_of_the_solver(solver, order, noise, truth):
    steps = (64, 128) if order == 4 or solver is JVP else (256, 512)
    errors = [rms(sample(RING, noise, steps=n, solver=solver), truth) for n in steps]
    assert slopes(errors)[-1] == pytest.approx(order, abs=0.04)


@pytest.mark.parametrize(("solver", "order"), ORDERS[:5] + ORDERS[6:], ids=str)
def test_the_order_holds_on_an_uneven_grid(solver, order, noise, truth):
    steps = (64, 128) if order == 4 or solver is JVP else (256, 512)
    errors = [rms(sample(RING, noise, steps=n, solver=solver, grid=0.5), truth) for n in steps]
    assert slopes(errors)[-1] == pytest.approx(order, abs=0.08)


@pytest.mark.parametrize(
    ("solver", "order"),
    [("euler", 1), ("ab2", 3), ("heun", 3), ("midpoint", 3), ("taylor", 3), ("rk4", 5)],
)
def test_a_round_trip_from_data_gains_an_order_where_the_order_is_even(solver, order, truth):
    steps = (64, 128) if order == 5 else (128, 256)
    errors = []
    for n in steps:
        back = invert(RING, truth, steps=n, solver=solver)
        errors.append(rms(sample(RING, back, steps=n, solver=solver), truth))
    assert slopes(errors)[-1] == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("direction", [sample, invert])
def test_rf_solver_is_the_midpoint_rule(direction, dtype, tolerance, noise):
    """The four-term text of RF-Solver, written out, with h < 0 backwards."""
    steps = 16
    h = (1 if direction is sample else -1) / steps
    x, t = noise.to(dtype), 0.0 if direction is sample else 1.0
    for _ in range(steps):
        v = RING(x, t)
        half = RING(x + h / 2 * v, t + h / 2)
        x = x + h * v + h**2 / 2 * ((half - v) / (h / 2))
        t += h
    taylor = direction(RING, noise.to(dtype), steps=steps, solver="taylor")
    midpoint = direction(RING, noise.to(dtype), steps=steps, solver="midpoint")
    torch.testing.assert_close(taylor, x, rtol=0, atol=tolerance)
    torch.testing.assert_close(midpoint, x, rtol=0, atol=tolerance)


@pytest.mark.parametrize("solver", ALL, ids=str)
def test_a_straight_flow_takes_one_step(solver, noise):
    target = torch.linspace(-3, 3, noise.numel(), dtype=torch.float64).reshape(noise.shape)
    for direction, start, end in ((sample, noise, target), (invert, target, noise)):
        result = direction(lambda x, t: target - noise, start, steps=1, solver=solver)
        torch.testing.assert_close(result, end, rtol=0, atol=1e-13)


def test_gaussian_to_gaussian_follows_its_closed_form_at_every_time(noise):
    """N(0, 1) to N(m, 1), independent: Z_t = t m + Z_0 sqrt(t^2 + (1 - t)^2)."""
    mean, fine = 2.5, Dopri5(rtol=1e-7, atol=1e-7)

    def velocity(x, t):
        t = t[:, None]
        return mean + (2 * t - 1) / (t**2 + (1 - t) ** 2) * (x - t * mean)

    for solver, steps, tolerance in (("rk4", 50, 1e-6), (fine, 50, 1e-5), ("euler", 50, 1e-1)):
        info = sample(velocity, noise, steps=steps, solver=solver, return_info=True)
        t = info.times[:, None, None]
        exact = t * mean + noise * (t**2 + (1 - t) ** 2).sqrt()
        torch.testing.assert_close(info.trajectory, exact, rtol=0, atol=tolerance)
        torch.testing.assert_close(info.x, mean + noise, rtol=0, atol=tolerance)


def test_taylor_with_an_exact_derivative_is_the_series_of_the_exponential(noise):
    """dx/dt = x: one step of h multiplies by 1 + h + h^2 / 2."""
    result = sample(lambda x, t: x, noise, steps=4, solver=JVP)
    torch.testing.assert_close(result, noise * (1 + 1 / 4 + 1 / 32) ** 4)


def test_taylor_sees_the_explicit_time_dependence(noise):
    """dx/dt = t: exact for order 2, and J v alone would give the Euler result."""
    result = sample(lambda x, t: t[:, None].expand_as(x), noise, steps=3, solver=JVP)
    torch.testing.assert_close(result, noise + 0.5)


def test_ab2_is_the_textbook_recursion_after_a_midpoint_step(noise):
    steps, x = 5, noise
    h = 1 / steps
    previous = RING(x, 0.0)
    x = x + h * RING(x + h / 2 * previous, h / 2)
    for i in range(1, steps):
        v = RING(x, i * h)
        x, previous = x + h * (1.5 * v - 0.5 * previous), v
    torch.testing.assert_close(sample(RING, noise, steps=steps, solver="ab2"), x)


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun"])
def test_equality_with_torchdiffeq_on_the_same_grid(method, noise):
    torchdiffeq = pytest.importorskip("torchdiffeq")
    times = [0.0, 0.1, 0.35, 0.5, 0.8, 1.0]
    theirs = torchdiffeq.odeint(
        lambda t, x: RING(x, t),
        noise,
        torch.tensor(times, dtype=torch.float64),
        method={"heun": "heun2"}.get(method, method),
    )
    info = sample(RING, noise, solver=method, grid=times, return_info=True)
    torch.testing.assert_close(info.trajectory, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ALL, ids=str)
def test_invert_undoes_sample(solver, noise):
    x1 = sample(RING, noise, steps=100, solver=solver)
    back = invert(RING, x1, steps=100, solver=solver)
    assert rms(back, noise) < (0.1 if solver == "euler" else 2e-3)
    assert rms(x1, noise) > 1


def test_float32_and_float64_agree(noise):
    double = sample(RING, noise, steps=20, solver="heun")
    single = sample(RING, noise.float(), steps=20, solver="heun")
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=0, atol=2e-5)
