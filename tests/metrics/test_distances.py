"""Energy and sliced Wasserstein distances against scipy, POT and closed forms."""

import math

import numpy as np
import ot
import pytest
import torch
from scipy import stats

import rfkernels.metrics._pairwise as pairwise
from rfkernels.metrics import energy_distance, sliced_wasserstein
from rfkernels.ops.random import derive_seed, randn


def two_sets(n, m, d):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    return x, 1.5 * torch.randn(m, d, generator=generator) + 0.5


def test_energy_in_one_dimension_against_scipy():
    x, y = two_sets(300, 211, 1)
    expected = stats.energy_distance(x[:, 0].numpy(), y[:, 0].numpy()) ** 2
    assert energy_distance(x, y, estimator="biased") == pytest.approx(expected, rel=1e-5)


def test_energy_against_the_written_out_means():
    x, y = two_sets(40, 25, 3)
    xd, yd = x.double(), y.double()
    across = torch.cdist(xd, yd).mean()
    xx = torch.pdist(xd).sum() * 2
    yy = torch.pdist(yd).sum() * 2
    biased = 2 * across - xx / 40**2 - yy / 25**2
    unbiased = 2 * across - xx / (40 * 39) - yy / (25 * 24)
    assert energy_distance(x, y) == pytest.approx(unbiased.item(), rel=1e-12)
    assert energy_distance(x, y, estimator="biased") == pytest.approx(biased.item(), rel=1e-12)
    assert energy_distance(x, x, estimator="biased") == pytest.approx(0, abs=1e-12)


def test_the_unbiased_energy_scatters_around_zero():
    values = [energy_distance(*torch.randn(2, 100, 2).unbind(0)) for _ in range(200)]
    assert abs(np.mean(values)) < 5 * np.std(values) / math.sqrt(200)
    assert min(values) < 0


@pytest.mark.parametrize("size", [7, 64])
def test_blocks_do_not_change_the_answer(monkeypatch, size):
    x, y = two_sets(50, 70, 2)
    whole = energy_distance(x, y)
    monkeypatch.setattr(pairwise, "_BLOCK", size * 70)
    assert energy_distance(x, y) == pytest.approx(whole, rel=1e-12)


def test_the_matrix_product_agrees_with_the_exact_distances(monkeypatch):
    x, y = two_sets(60, 80, 40)
    far = 1e6
    exact = energy_distance(x.double() + far, y.double() + far)
    monkeypatch.setattr(pairwise, "_EXACT_WORK", 0)
    assert energy_distance(x.double() + far, y.double() + far) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("n", "m"), [(100, 100), (90, 37), (1, 5)])
def test_wasserstein_in_one_dimension(order, n, m):
    x, y = two_sets(n, m, 1)
    ours = sliced_wasserstein(x, y, order=order, projections=3)
    a, b = x[:, 0].double().numpy(), y[:, 0].double().numpy()
    expected = ot.wasserstein_1d(a, b, p=order) ** (1 / order)
    assert ours == pytest.approx(expected.item(), rel=1e-9)
    if order == 1:
        assert ours == pytest.approx(stats.wasserstein_distance(a, b), rel=1e-9)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("n", "m"), [(200, 200), (60, 101)])
def test_sliced_wasserstein_against_pot(order, n, m):
    x, y = two_sets(n, m, 5)
    directions = randn(50, 5, seed=derive_seed(9, "projections"), dtype=torch.float64).numpy()
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    expected = ot.sliced_wasserstein_distance(
        x.double().numpy(), y.double().numpy(), p=order, projections=directions.T
    )
    ours = sliced_wasserstein(x, y, order=order, projections=50, seed=9)
    assert ours == pytest.approx(float(expected), rel=1e-9)


def test_sliced_wasserstein_of_a_shift():
    """Moving a set by u costs |u . direction|; the mean square over the sphere is |u|^2 / d."""
    x = torch.randn(50, 3)
    shift = torch.tensor([2.0, -1.0, 0.5])
    value = sliced_wasserstein(x, x + shift, projections=20_000)
    assert value == pytest.approx(shift.norm().item() / math.sqrt(3), rel=0.02)
    assert sliced_wasserstein(x, x) == 0
    first, again, other = (sliced_wasserstein(x, x + shift, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_nan_and_errors():
    x, y = two_sets(10, 8, 3)
    broken = x.clone()
    broken[0, 0] = math.nan
    assert math.isnan(energy_distance(broken, y))
    assert math.isnan(sliced_wasserstein(y, broken))
    with pytest.raises(ValueError, match="reference must have 3 numbers per sample"):
        energy_distance(x, y[:, :2])
    with pytest.raises(ValueError, match="estimator must be unbiased or biased"):
        energy_distance(x, y, estimator="u")
    with pytest.raises(ValueError, match="n at least 2"):
        energy_distance(x[:1], y)
    with pytest.raises(ValueError, match="order must be 1 or 2"):
        sliced_wasserstein(x, y, order=3)
    with pytest.raises(ValueError, match="projections must be at least 1"):
        sliced_wasserstein(x, y, projections=0)
