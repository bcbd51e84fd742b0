"""Samplers with noise: their distributions against closed forms, and where the noise comes from."""

import math
from itertools import pairwise

import pytest
import torch

import rfkernels as rf
from rfkernels.flow.closed_form import GaussianMixtureFlow
from rfkernels.sampling import SDE, Ancestral, Renoise, invert, sample
from rfkernels.sampling.stochastic import noise_keys

MEAN, STD, COUNT = 2.0, 0.5, 20_000
TARGET = GaussianMixtureFlow([[MEAN]], STD)


def moments(x):
    """Mean, variance and excess kurtosis, each in its standard errors from the Gaussian's."""
    x = x.double().flatten()
    n, mean, centred = len(x), x.mean(), x - x.mean()
    variance = centred.square().mean()
    kurtosis = (centred**4).mean() / variance**2 - 3
    return [
        (float(mean) - MEAN) / (STD / math.sqrt(n)),
        (float(variance) - STD**2) / (STD**2 * math.sqrt(2 / n)),
        float(kurtosis) / math.sqrt(24 / n),
    ]


@pytest.fixture(scope="module")
def noise():
    return rf.randn(COUNT, 1, seed=1)


SOLVERS = [
    *(Ancestral(), Ancestral(eta=0.5), SDE(), SDE(scale=1.5, diffusion="constant")),
    SDE(diffusion=lambda t: math.sqrt(2 * t * (1 - t))),
]
NAMES = ["ancestral", "ancestral 0.5", "sde", "sde constant", "sde of a function"]


@pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)
def test_the_flows_distribution_is_kept(solver, noise):
    x = sample(TARGET, noise, steps=400, solver=solver, seed=5)
    assert max(map(abs, moments(x))) < 5
    # It is not the deterministic solution: the noise has replaced where a sample began.
    straight = sample(TARGET, noise, steps=50, solver="midpoint")
    assert (x - straight).abs().mean() > 0.05
    middle = sample(TARGET, noise, steps=200, solver=solver, seed=5, t_end=0.5)
    spread = math.sqrt(0.5**2 + (0.5 * STD) ** 2)
    assert abs(float(middle.mean()) - 0.5 * MEAN) < 5 * spread / math.sqrt(COUNT)
    assert abs(float(middle.var()) - spread**2) < 5 * spread**2 * math.sqrt(2 / COUNT)


def variance(t):
    """Of the exact flow at t, whose mean is t MEAN."""
    return (1 - t) ** 2 + (t * STD) ** 2


def after_the_steps(solver, times):
    """(mean, variance) that the solver's own steps make of the exact ones at the start: its velocity is
    linear in x, so they follow in closed form."""
    mean, square = times[0] * MEAN, variance(times[0])
    for start, end in pairwise(times):
        of_state, weight, spread = solver.coefficients(start, end)
        gain = (start * STD**2 - (1 - start)) / variance(start)
        mean = of_state * mean + weight * (MEAN + gain * (mean - start * MEAN))
        square = (of_state + weight * gain) ** 2 * square + spread**2
    return mean, square


def evenly(start, end, steps):
    return [start + (end - start) * i / steps for i in range(steps)] + [end]


PARTS = [(0.0, 1.0), (0.3, 0.8), (0.0, 0.6), (0.5, 1.0)]


@pytest.mark.parametrize(("start", "end"), PARTS)
@pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)
def test_the_bias_of_the_variance_is_of_first_order(solver, start, end):
    """From any time to any time, without a draw; the mean has none."""
    errors = []
    for steps in (200, 400, 800):
        mean, square = after_the_steps(solver, evenly(start, end, steps))
        assert mean == pytest.approx(end * MEAN, abs=1e-12)
        errors.append(square - variance(end))
    assert abs(errors[0]) < 0.02
    for before, after in pairwise(errors):
        assert before / after == pytest.approx(2, rel=0.08)


@pytest.mark.parametrize(("start", "end"), PARTS)
@pytest.mark.parametrize("solver", [*SOLVERS, Renoise()], ids=[*NAMES, "renoise"])
def test_few_steps_have_the_moments_that_follow_from_them(solver, start, end, noise):
    """Of a run from a noised state: no more noise than the formula, and no less."""
    x = start * MEAN + math.sqrt(variance(start)) * noise
    options = {"steps": 6, "t_start": start, "t_end": end}
    found = sample(TARGET, x, solver=solver, seed=5, **options).double()
    mean, square = after_the_steps(solver, evenly(start, end, 6))
    assert abs(float(found.mean()) - mean) < 5 * math.sqrt(square / COUNT)
    assert abs(float(found.var()) - square) < 5 * square * math.sqrt(2 / COUNT)


def test_noise_is_independent_between_steps_and_samples():
    """Drawn back from the states of a run: of 400 samples and 30 steps, 64 numbers each."""
    x0 = torch.zeros(400, 64, dtype=torch.float64)
    for seed in (3, torch.arange(400)):
        info = sample(lambda x, t: 0 * x, x0, steps=30, solver="sde", seed=seed, return_info=True)
        draws = []
        for (start, end), before, after in zip(
            pairwise(info.times.tolist()), info.trajectory, info.trajectory[1:], strict=False
        ):
            of_state, _, spread = SDE().coefficients(start, end)
            draws.append((after - of_state * before) / spread)
        z = torch.stack(draws)  # (steps, samples, numbers)
        assert z.mean().abs() < 5 / math.sqrt(z.numel())
        assert abs(z.var() - 1) < 5 * math.sqrt(2 / z.numel())
        for one, other in ((z[1:], z[:-1]), (z[:, 1:], z[:, :-1]), (z[:, :, 1:], z[:, :, :-1])):
            assert (one * other).mean().abs() < 5 / math.sqrt(one.numel())


def test_two_modes_keep_their_weights(noise):
    flow = GaussianMixtureFlow([[-2.0], [2.0]], 0.3, weights=[0.25, 0.75])
    for solver in (Ancestral(), SDE(scale=1.5)):
        x = sample(flow, noise, steps=200, solver=solver, seed=5)
        right = float((x > 0).float().mean())
        assert abs(right - 0.75) < 5 * math.sqrt(0.75 * 0.25 / COUNT)
        width = float(x[x > 0].std())
        assert width == pytest.approx(0.3, rel=5 / math.sqrt(2 * 0.75 * COUNT) + 0.01)


def test_renoising_the_estimate_does_not_keep_it_and_says_so(noise):
    """The estimate is a mean, so the spread is too small, and no number of steps brings it back."""
    few, many, more = (
        float(sample(TARGET, noise, steps=n, solver="renoise", seed=5).std()) for n in (5, 250, 500)
    )
    assert few < 0.32
    assert many == pytest.approx(more, abs=0.01)
    assert more == pytest.approx(0.351, abs=0.005)
    assert "Not a solver of the flow" in Renoise.__doc__


def test_noise_without_the_score_would_be_seen(noise):
    """The SDE's own step with the score left out: the moments above tell."""
    x, h = noise.clone(), 1 / 200
    for i in range(200):
        g = math.sqrt(1 - i * h)
        x = x + h * TARGET(x, i * h) + g * math.sqrt(h) * rf.randn(COUNT, 1, seed=9, offset=i)
    assert max(map(abs, moments(x))) > 20


def test_the_step_is_its_formula_and_its_noise_randn():
    x0, h = rf.randn(6, 4, seed=1, dtype=torch.float64), 0.25
    seeds, offsets = noise_keys(7, 6, torch.device("cpu"))

    def velocity(x, t):
        return t[:, None] - x

    x = x0
    for i in range(3):
        z = rf.randn(6, 4, seed=seeds, offset=offsets + i * 2**32, dtype=torch.float64)
        t, end = i * h, (i + 1) * h
        v = velocity(x, torch.full((6,), t, dtype=torch.float64))
        score = (t * v - x) / (1 - t)
        g = math.sqrt(1 - t)
        x = x + h * (v + g * g / 2 * score) + g * math.sqrt(h) * z
        # and of the ancestral sampler, on the noise level
        s, wanted = 1 - t, 1 - end
        down = wanted * (1 + (wanted / s - 1))
        moved = (
            (x0 + (s - down) * velocity(x0, torch.full((6,), t).double()))
            * (1 - wanted)
            / (1 - down)
        )
        spread = math.sqrt(wanted**2 - down**2 * (1 - wanted) ** 2 / (1 - down) ** 2)
        first = rf.randn(6, 4, seed=seeds, offset=offsets, dtype=torch.float64)
        theirs = sample(velocity, x0, grid=[t, end], solver="ancestral", seed=7)
        torch.testing.assert_close(theirs, moved + spread * first, rtol=0, atol=1e-12)
        # and of renoise, on the data estimate
        estimate = x0 + (1 - t) * velocity(x0, torch.full((6,), t).double())
        again = sample(velocity, x0, grid=[t, end], solver="renoise", seed=7)
        torch.testing.assert_close(again, end * estimate + (1 - end) * first, rtol=0, atol=1e-12)
    ours = sample(velocity, x0, grid=[0, h, 2 * h, 3 * h], solver="sde", seed=7)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)
    # The noise is not that of the same seed's x0.
    assert not torch.equal(rf.randn(6, 4, seed=7), rf.randn(6, 4, seed=seeds, offset=offsets))


@pytest.mark.parametrize("solver", ["ancestral", "sde", "renoise"])
def test_seeds_one_for_all_and_one_each(solver):
    x0 = rf.randn(5, 3, seed=1)

    def run(rows, seed):
        return sample(lambda x, t: -x, x0[rows], steps=4, solver=solver, seed=seed)

    whole = run(slice(None), 3)
    assert torch.equal(whole, run(slice(None), 3))
    assert torch.equal(whole, run(slice(None), torch.tensor(3)))
    assert torch.equal(whole[:2], run(slice(0, 2), 3))  # sample b is the b-th, of any batch
    assert not torch.equal(whole, run(slice(None), 4))
    seeds = torch.tensor([8, 3, 8, 2**62, 0])
    each = run(slice(None), seeds)
    for row in range(5):
        assert torch.equal(each[row], run(slice(row, row + 1), int(seeds[row]))[0])
    # The same noise for equal seeds, whatever the place.
    same = sample(lambda x, t: -x, x0[:1].expand(5, 3), steps=4, solver=solver, seed=seeds)
    assert torch.equal(same[0], same[2])
    assert not torch.equal(same[0], same[1])


def test_the_last_step_may_leave_its_noise_out():
    x0 = rf.randn(5, 3, seed=1)
    noisy = sample(lambda x, t: -x, x0, steps=4, solver=SDE(), seed=3)
    clean = sample(lambda x, t: -x, x0, steps=4, solver=SDE(noisy_end=False), seed=3)
    assert not torch.equal(noisy, clean)
    partial = {"steps": 4, "seed": 3, "t_end": 0.9}
    assert torch.equal(
        sample(lambda x, t: -x, x0, solver=SDE(), **partial),
        sample(lambda x, t: -x, x0, solver=SDE(noisy_end=False), **partial),
    )


def test_gradients_go_through_the_steps_and_not_through_the_noise():
    x0 = rf.randn(3, 2, seed=1, dtype=torch.float64).requires_grad_()
    for solver in ("ancestral", "sde", "renoise"):
        assert torch.autograd.gradcheck(
            lambda x, solver=solver: sample(
                lambda x, t: x.sin(), x, steps=2, solver=solver, seed=3
            ),
            (x0,),
        )


@pytest.mark.parametrize(
    ("call", "arguments", "error", "message"),
    [
        (
            sample,
            {},
            ValueError,
            "seed must be given with solver 'sde', which draws noise; got None",
        ),
        (invert, {"seed": 1}, ValueError, "invert: solver must be deterministic; got 'sde'"),
        (sample, {"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*63\); got -1"),
        (sample, {"seed": 1.5}, TypeError, "seed must be an int or an int64 tensor; got float"),
        (sample, {"seed": torch.ones(3).long()}, ValueError, r"\(5,\) tensor; got shape \(3,\)"),
        (sample, {"seed": torch.ones(5)}, TypeError, "seed must be an int or an int64 tensor"),
    ],
)
def test_refused(call, arguments, error, message):
    with pytest.raises(error, match=message):
        call(lambda x, t: -x, torch.zeros(5, 2), steps=2, solver="sde", **arguments)
