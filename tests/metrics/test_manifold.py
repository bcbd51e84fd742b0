"""Precision, recall, density and coverage against scikit-learn's neighbours and NumPy, and what they mean."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

import rfkernels.metrics._pairwise as pairwise
from rfkernels.metrics import density_coverage, precision_recall


def two_sets():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 4, generator=generator, dtype=torch.float64) + 0.8
    return x, torch.randn(90, 4, generator=generator, dtype=torch.float64)


def radii(points, k):
    tree = NearestNeighbors(n_neighbors=k + 1).fit(points)
    return tree.kneighbors(points)[0][:, k]


def distances(x, y):
    return np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1))


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [2**22, 90 * 7])
def test_against_scikit_learn(k, block, monkeypatch):
    monkeypatch.setattr(pairwise, "_BLOCK", block)
    x, y = two_sets()
    a, b = x.numpy(), y.numpy()
    far = distances(a, b)
    precision = (far <= radii(b, k)[None]).any(1).mean()
    recall = (far <= radii(a, k)[:, None]).any(0).mean()
    found = precision_recall(x, y, k=k)
    assert found.precision == pytest.approx(precision, abs=1e-12)
    assert found.recall == pytest.approx(recall, abs=1e-12)
    density = (far <= radii(b, k)[None]).sum() / (k * len(a))
    coverage = (far.min(0) <= radii(b, k)).mean()
    found = density_coverage(x, y, k=k)
    assert found.density == pytest.approx(density, rel=1e-12)
    assert found.coverage == pytest.approx(coverage, abs=1e-12)


def test_what_they_mean():
    y = torch.randn(400, 2)
    narrow, wide = 0.3 * torch.randn(400, 2), 4 * torch.randn(400, 2)
    few = precision_recall(narrow, y)
    assert few.precision > 0.95
    assert few.recall < 0.6
    many = precision_recall(wide, y)
    assert many.precision < 0.5
    assert many.recall > 0.9
    away = y + 100
    assert precision_recall(away, y) == (0, 0)
    assert density_coverage(away, y) == (0, 0)
    assert precision_recall(y, y) == (1, 1)
    assert density_coverage(y, y).coverage == 1


def test_coverage_and_density_of_equal_distributions():
    """Naeem et al. 2020: coverage 1 - prod (n - i) / (2 n - i) over i = 1 .. k, density 1."""
    n, k, found = 100, 5, []
    for _ in range(100):
        found.append(density_coverage(torch.randn(n, 3), torch.randn(n, 3), k=k))
    values = torch.tensor(found, dtype=torch.float64)
    expected = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    assert values[:, 0].mean() == pytest.approx(1, abs=0.03)
    assert values[:, 1].mean() == pytest.approx(expected, abs=4 * values[:, 1].std().item() / 10)


def test_one_outlier_spoils_precision_but_not_density():
    y = torch.randn(200, 2)
    spoilt = torch.cat([y[:-1], torch.tensor([[40.0, 40.0]])])
    ring = 6 * torch.nn.functional.normalize(torch.randn(200, 2))
    assert precision_recall(ring, y).precision < 0.2
    assert precision_recall(ring, spoilt).precision > 0.2
    assert density_coverage(ring, spoilt).density < 0.3


def test_nan_and_errors():
    x, y = two_sets()
    broken = x.clone()
    broken[0, 0] = math.nan
    assert all(math.isnan(value) for value in precision_recall(broken, y))
    assert all(math.isnan(value) for value in density_coverage(y, broken))
    with pytest.raises(ValueError, match="k must be at least 1; got 0"):
        precision_recall(x, y, k=0)
    with pytest.raises(ValueError, match="more than k = 5 samples; got 5"):
        density_coverage(x, y[:5])
    with pytest.raises(ValueError, match="n at least 4"):
        precision_recall(x[:3], y)
