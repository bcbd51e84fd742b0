"""Time distributions against scipy: draws, densities, distribution functions; the time shift."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from rfkernels.flow.times import (
    Beta,
    CosMap,
    LogitNormal,
    Mode,
    Shifted,
    Uniform,
    UShaped,
    get_time_distribution,
    inverse_time_shift,
    time_shift,
)
from rfkernels.ops.random import rand

# The density has a pole in the middle there, which quadrature cannot cross.
MODE_LIMIT = Mode(2 / (math.pi - 2))
ALL = [
    Uniform(),
    Uniform(0.001),
    Uniform(0.1, 0.9),
    LogitNormal(),
    LogitNormal(0.4, 0.5),
    UShaped(),
    UShaped(0.0),
    UShaped(60.0),
    Mode(1.29),
    Mode(-1.0),
    Mode(1.7),
    MODE_LIMIT,
    CosMap(),
    Beta(1.5, 1.0),
    Beta(0.7, 3.0),
    Shifted(Uniform(), 3.0),
    Shifted(LogitNormal(-0.5, 1.5), 0.4),
    Shifted(Shifted(CosMap(), 2.0), 1.5),
]
# Where the library has the same distribution under another roof.
INDEPENDENT = [
    (Uniform(0.1, 0.9), stats.uniform(0.1, 0.8).cdf),
    (LogitNormal(0.4, 0.5), lambda t: stats.norm(0.4, 0.5).cdf(np.log(t / (1 - t)))),
    (Beta(1.5, 1.0), stats.beta(1.5, 1.0).cdf),
    (Beta(0.7, 3.0), stats.beta(0.7, 3.0).cdf),
    # The mixture of an exponential truncated to [0, 1] and its mirror image.
    (
        UShaped(4.0),
        lambda t: (
            0.5 * stats.truncexpon(4.0, scale=0.25).cdf(t)
            + 0.5 * stats.truncexpon(4.0, scale=0.25).sf(1 - t)
        ),
    ),
]


@pytest.mark.parametrize("distribution", ALL, ids=repr)
def test_draws_follow_the_distribution_function(distribution):
    draws = distribution.sample(100_000, seed=3)
    assert draws.dtype == torch.float32
    assert draws.shape == (100_000,)
    assert draws.min() > 0
    assert draws.max() < 1
    statistic = stats.kstest(draws.double().numpy(), lambda t: distribution.cdf(t).numpy())
    assert statistic.statistic < 2.2 / math.sqrt(100_000)  # p about 1e-4


@pytest.mark.parametrize("distribution", [d for d in ALL if d != MODE_LIMIT], ids=repr)
def test_the_density_is_the_derivative_of_the_distribution_function(distribution):
    # Between quantiles, so that no end point's singularity is integrated across.
    edges = np.sort(distribution.sample(8, seed=1).double().numpy())
    for low, high in itertools.pairwise(edges):
        mass, _ = integrate.quad(lambda t: distribution.pdf(t).item(), low, high, epsabs=1e-13)
        expected = (distribution.cdf(high) - distribution.cdf(low)).item()
        assert mass == pytest.approx(expected, abs=1e-9)
    assert distribution.cdf(-0.5) == distribution.cdf(0.0) == 0
    assert distribution.cdf(1.0).item() == distribution.cdf(1.5).item()
    assert distribution.cdf(1.0).item() == pytest.approx(1, abs=1e-15)
    assert distribution.pdf(torch.tensor([-0.1, 1.1])).tolist() == [0, 0]
    assert distribution.pdf(math.nan).isnan()
    assert distribution.cdf(math.nan).isnan()


@pytest.mark.parametrize(("distribution", "cdf"), INDEPENDENT, ids=lambda v: repr(v)[:24])
def test_distribution_functions_against_independent_ones(distribution, cdf):
    t = np.linspace(0.001, 0.999, 199)
    np.testing.assert_allclose(distribution.cdf(torch.from_numpy(t)).numpy(), cdf(t), atol=1e-13)


def test_u_shape_constants():
    shape = UShaped(4.0)
    for t, density in {0.0: 2.0746, 1.0: 2.0746, 0.5: 0.5514}.items():
        assert shape.pdf(t).item() == pytest.approx(density, abs=5e-5)
    levels = torch.tensor([0.05, 0.10, 0.25, 0.40], dtype=torch.float64)
    quantiles = torch.tensor([0.02529, 0.05329, 0.16076, 0.33167], dtype=torch.float64)
    torch.testing.assert_close(shape.cdf(quantiles), levels, rtol=0, atol=2e-5)
    assert shape.cdf(0.1).item() == pytest.approx(0.17250, abs=5e-6)
    assert (shape.cdf(0.75) - shape.cdf(0.25)).item() == pytest.approx(0.32403, abs=5e-6)


@pytest.mark.parametrize(
    ("distribution", "quantiles"),
    [
        (LogitNormal(), (0.161806, 0.337492, 0.437000, 0.662508)),
        # MeanFlow's sigmoid(n - 0.4) on s = 1 - t.
        (LogitNormal(mean=0.4), (0.223592, 0.431805, 0.536598, 0.745450)),
        # SD3's s = 1 - u - a (cos(pi u / 2)^2 - 1 + u), which falls with u.
        (Mode(1.29), (0.106559, 0.383584, 0.470316, 0.616416)),
        (Mode(-0.5), (0.028078, 0.198223, 0.372746, 0.801777)),
        (CosMap(), (0.072960, 0.292893, 0.420808, 0.707107)),
        # u^(2/3), and 1 - (1 - u)^(2/3).
        (Beta(1.5, 1.0), (0.135721, 0.396850, 0.542884, 0.825482)),
        (Beta(1.0, 1.5), (0.033617, 0.174518, 0.288621, 0.603150)),
    ],
    ids=repr,
)
def test_golden_quantiles(distribution, quantiles):
    """Where 5, 25, 40 and 75 % of the times lie below, t = 0 the noise and t = 1 the data."""
    levels = torch.tensor([0.05, 0.25, 0.40, 0.75], dtype=torch.float64)
    found = distribution.cdf(torch.tensor(quantiles, dtype=torch.float64))
    torch.testing.assert_close(found, levels, rtol=0, atol=2e-6)
    draws = distribution.sample(200_000, seed=9).double()
    below = (draws[:, None] < torch.tensor(quantiles)).double().mean(0)
    torch.testing.assert_close(below, levels, rtol=0, atol=5e-3)


def test_a_million_u_shaped_draws():
    shape = UShaped(4.0)
    draws = shape.sample(1_000_000, seed=0).double()
    assert draws.mean().item() == pytest.approx(0.5, abs=0.002)
    assert draws.var().item() == pytest.approx(0.115671, abs=0.0006)
    assert stats.kstest(draws.numpy(), lambda t: shape.cdf(t).numpy()).statistic < 0.002
    assert stats.ks_2samp(draws.numpy(), 1 - draws.numpy()).statistic < 0.003


def test_a_small_u_shape_is_uniform():
    flat = UShaped(0.0).sample(1000, seed=5)
    torch.testing.assert_close(flat, Uniform().sample(1000, seed=5), rtol=0, atol=0)
    for a in (1e-12, 1e-6, 1e-3):
        nearly = UShaped(a)
        torch.testing.assert_close(nearly.sample(1000, seed=5), flat, rtol=0, atol=1e-6)
        assert nearly.pdf(0.9).item() == pytest.approx(1, abs=1e-6)
        assert nearly.cdf(0.3).item() == pytest.approx(0.3, abs=1e-6)


@pytest.mark.parametrize("distribution", [UShaped(), Mode(), CosMap(), LogitNormal()], ids=repr)
def test_symmetric_distributions(distribution):
    t = torch.linspace(0, 1, 51, dtype=torch.float64)
    torch.testing.assert_close(distribution.pdf(t), distribution.pdf(1 - t))
    torch.testing.assert_close(distribution.cdf(t), 1 - distribution.cdf(1 - t))


def test_which_end_the_parameters_favour():
    def mean(distribution):
        return distribution.sample(20_000, seed=2).mean().item()

    for toward_data, toward_noise in (
        (LogitNormal(0.4), LogitNormal(-0.4)),
        (Beta(3.0, 1.0), Beta(1.0, 3.0)),
        (Shifted(Uniform(), 1 / 3), Shifted(Uniform(), 3.0)),
    ):
        assert mean(toward_data) > 0.55
        assert mean(toward_noise) < 0.45
    assert Mode(1.29).pdf(0.5) > 1 > Mode(-0.5).pdf(0.5)


def test_draws_depend_on_seed_and_offset_only():
    for distribution in (Uniform(), LogitNormal(), UShaped(), Mode(), CosMap(), Beta(2.0, 2.0)):
        draws = distribution.sample(64, seed=7, offset=3)
        assert torch.equal(draws, distribution.sample(64, seed=7, offset=3))
        assert not torch.equal(draws, distribution.sample(64, seed=7, offset=4))
        assert not torch.equal(draws, distribution.sample(64, seed=8, offset=3))
        by_index = distribution.sample(6, seed=7, offset=torch.arange(6))
        alone = [distribution.sample(1, seed=7, offset=i) for i in range(6)]
        assert torch.equal(by_index, torch.cat(alone))


def test_times_are_the_middles_of_the_uniform_cells():
    uniform = rand(1000, seed=4, dtype=torch.float64)
    expected = (0.25 + 0.5 * (uniform + 2.0**-25)).float()
    assert torch.equal(Uniform(0.25, 0.75).sample(1000, seed=4), expected)


def test_extreme_parameters_stay_inside():
    for distribution in (LogitNormal(30.0), LogitNormal(-30.0), UShaped(200.0), Beta(0.01, 0.01)):
        draws = distribution.sample(1000, seed=1)
        assert ((draws > 0) & (draws < 1)).all()


def test_time_shift():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    s = 1 - t
    torch.testing.assert_close(time_shift(t, 3.0), 1 - 3 * s / (1 + 2 * s), rtol=0, atol=1e-15)
    torch.testing.assert_close(time_shift(time_shift(t, 2.0), 1.5), time_shift(t, 3.0))
    torch.testing.assert_close(inverse_time_shift(time_shift(t, 7.0), 7.0), t)
    torch.testing.assert_close(inverse_time_shift(t, 4.0), time_shift(t, 0.25))
    assert torch.equal(time_shift(t, 1.0), t)
    for shift in (1e-3, 0.5, 3.0, 1e3):
        assert time_shift(0.0, shift) == 0
        assert time_shift(1.0, shift) == 1
    assert time_shift(0.5, 3.0) < 0.5


def test_names_and_errors():
    assert get_time_distribution("uniform") == Uniform()
    assert get_time_distribution("beta", a=1.5, b=1.0) == Beta(1.5, 1.0)
    assert get_time_distribution(CosMap()) == CosMap()
    with pytest.raises(ValueError, match=r"one of uniform, .*; got 'gaussian'"):
        get_time_distribution("gaussian")
    with pytest.raises(TypeError, match="options are for names"):
        get_time_distribution(CosMap(), a=1)
    with pytest.raises(TypeError, match="got float"):
        get_time_distribution(0.5)
    for call, message in (
        (lambda: Uniform(0.5, 0.5), "0 <= eps < t_end <= 1"),
        (lambda: LogitNormal(std=0.0), "std must be positive"),
        (lambda: UShaped(-1.0), "a must lie in"),
        (lambda: UShaped(math.nan), "a must lie in"),
        (lambda: Mode(2.0), "scale must lie in"),
        (lambda: Beta(0.0, 1.0), "a must be positive"),
        (lambda: time_shift(0.5, 0.0), "shift must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="base must be a TimeDistribution"):
        Shifted("uniform", 2.0)


def test_beta_without_scipy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"rfkernels\[train\]"):
        Beta(2.0, 3.0).sample(4, seed=0)
