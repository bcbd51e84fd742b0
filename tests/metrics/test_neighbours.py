"""Nearest-neighbour measures: against scipy's tree, ties, and what the accuracy means."""

import math

import pytest
import torch
from scipy.spatial import KDTree

import rfkernels.metrics._pairwise as pairwise
from rfkernels.metrics import nearest_distance, nearest_neighbour_test


def test_accuracy_against_a_tree(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, 3, generator=generator)
    y = torch.randn(150, 3, generator=generator) + 0.7
    pooled = torch.cat([x, y]).numpy()
    _, neighbour = KDTree(pooled).query(pooled, k=2)
    correct = (neighbour[:, 1] >= 150) == (torch.arange(300).numpy() >= 150)
    assert nearest_neighbour_test(x, y) == pytest.approx(correct.mean(), abs=1e-12)
    monkeypatch.setattr(pairwise, "_BLOCK", 150 * 40)
    assert nearest_neighbour_test(x, y) == pytest.approx(correct.mean(), abs=1e-12)


def test_what_the_accuracy_means():
    x, y = torch.randn(2, 2000, 2).unbind(0)
    assert nearest_neighbour_test(x, y) == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(4000) * 1.5)
    assert nearest_neighbour_test(x, y + 100) == 1
    jitter = 1e-4 * torch.randn(2000, 2)
    assert nearest_neighbour_test(y + jitter, y) < 0.1
    assert nearest_neighbour_test(y, y) < 0.1


def test_ties_count_one_half():
    constant = torch.ones(5, 2)
    assert nearest_neighbour_test(constant, constant) == 0.5


def test_distances_against_a_tree(monkeypatch):
    x, y = torch.randn(40, 3, 2, dtype=torch.float64), torch.randn(70, 3, 2, dtype=torch.float64)
    expected, _ = KDTree(y.flatten(1).numpy()).query(x.flatten(1).numpy())
    ours = nearest_distance(x, y)
    torch.testing.assert_close(ours, torch.from_numpy(expected))
    monkeypatch.setattr(pairwise, "_BLOCK", 70 * 9)
    assert torch.equal(nearest_distance(x, y), ours)
    assert nearest_distance(x, torch.cat([y, x])).max() == 0
    monkeypatch.setattr(pairwise, "_EXACT_WORK", 0)
    assert nearest_distance(x, torch.cat([y, x])).max() < 1e-6


def test_nan_stays_in_its_row_and_errors():
    x, y = torch.randn(2, 8, 3).unbind(0)
    broken = x.clone()
    broken[2, 1] = math.nan
    assert nearest_distance(broken, y).isnan().nonzero().flatten().tolist() == [2]
    assert math.isnan(nearest_neighbour_test(broken, y))
    with pytest.raises(ValueError, match="as many rows as samples, 8; got 7"):
        nearest_neighbour_test(x, y[:7])
    with pytest.raises(ValueError, match="n at least 2"):
        nearest_neighbour_test(x[:1], y[:1])
    with pytest.raises(ValueError, match="reference must have 3 numbers"):
        nearest_distance(x, y[:, :1])
