"""Frechet distance against scipy's matrix square root and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from rfkernels.metrics import GaussianStatistics, frechet_distance, gaussian_statistics


def by_scipy(x, y):
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(ca @ cb)
    assert np.abs(np.imag(root)).max() < 1e-6
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * np.real(root))


@pytest.mark.parametrize(("n", "m", "d"), [(500, 300, 6), (2000, 2000, 48)])
def test_against_scipy(n, m, d):
    generator = torch.Generator().manual_seed(d)
    mix = torch.randn(d, d, generator=generator) / math.sqrt(d)
    x = torch.randn(n, d, generator=generator)
    y = torch.randn(m, d, generator=generator) @ mix + 0.3
    assert frechet_distance(x, y) == pytest.approx(by_scipy(x, y), rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y), rel=1e-12)


def test_closed_form_for_commuting_covariances():
    """|m1 - m2|^2 + sum of (s1 - s2)^2 when the axes agree, in any basis."""
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    first = torch.tensor([4.0, 1.0, 0.0, 9.0, 1e-12], dtype=torch.float64)
    second = torch.tensor([1.0, 1.0, 2.25, 0.0, 0.0], dtype=torch.float64)
    shift = torch.arange(5, dtype=torch.float64)
    a = GaussianStatistics(shift, basis @ first.diag() @ basis.T)
    b = GaussianStatistics(torch.zeros(5), basis @ second.diag() @ basis.T)
    expected = shift.square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-7)


def test_fewer_samples_than_features_stays_real_and_exact_for_equal_sets():
    x = torch.randn(20, 200, dtype=torch.float64)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 1) == pytest.approx(200, rel=1e-9)
    assert frechet_distance(x, 3 * x) > 0
    constant = torch.ones(10, 4)
    assert frechet_distance(constant, constant) == 0


def test_images_statistics_and_features():
    x, y = torch.randn(2, 64, 1, 4, 4).unbind(0)
    direct = frechet_distance(x, y)
    assert frechet_distance(x, gaussian_statistics(y)) == direct
    assert frechet_distance(gaussian_statistics(x), gaussian_statistics(y)) == direct
    pooled = frechet_distance(x, y, features=lambda image: image.mean(dim=(2, 3)))
    assert pooled == pytest.approx(frechet_distance(x.mean((2, 3)), y.mean((2, 3))), rel=1e-12)
    statistics = gaussian_statistics(x)
    np.testing.assert_allclose(statistics.covariance, np.cov(x.flatten(1).T), atol=1e-6)


def test_nan_and_errors():
    x = torch.randn(8, 3)
    broken = x.clone()
    broken[0, 0] = math.nan
    assert math.isnan(frechet_distance(broken, x))
    assert math.isnan(frechet_distance(x, broken))
    with pytest.raises(ValueError, match="n at least 2"):
        frechet_distance(x[:1], x)
    with pytest.raises(ValueError, match="reference must have 3 features like samples; got 2"):
        frechet_distance(x, x[:, :2])
    with pytest.raises(TypeError, match="samples must be a tensor; got ndarray"):
        frechet_distance(x.numpy(), x)
    with pytest.raises(ValueError, match=r"mean .* and covariance"):
        frechet_distance(GaussianStatistics(torch.zeros(3), torch.zeros(3)), x)
