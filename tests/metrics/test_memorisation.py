"""Memorisation against SciPy's tree: copies, half copies, new samples, blur."""

import numpy as np
import pytest
import torch
from scipy.spatial import KDTree

from rfkernels.metrics import memorisation


def test_against_a_tree():
    samples, train, held_out = (torch.randn(n, 3, dtype=torch.float64) for n in (301, 100, 51))
    found = memorisation(samples, train, held_out)
    tree = KDTree(train.numpy())
    ours, theirs = (tree.query(s.numpy())[0] for s in (samples, held_out))
    assert found.distance == pytest.approx(np.median(ours), rel=1e-12)
    assert found.held_out_distance == pytest.approx(np.median(theirs), rel=1e-12)
    assert found.ratio == pytest.approx(np.median(ours) / np.median(theirs), rel=1e-12)
    assert found.close == pytest.approx((ours < np.quantile(theirs, 0.05)).mean(), abs=1e-12)


def test_copies_are_told_from_new_samples():
    train, held_out, new = (torch.randn(1000, 1, 4, 4) for _ in range(3))
    honest = memorisation(new, train, held_out)
    assert honest.ratio == pytest.approx(1, abs=0.05)
    assert honest.close == pytest.approx(0.05, abs=0.03)
    copies = memorisation(train + 1e-3 * new, train, held_out)
    assert copies.ratio < 0.01
    assert copies.close == 1
    # A fifth of copies moves the median little, and the share a lot.
    some = memorisation(torch.cat([new[:800], train[:200]]), train, held_out)
    assert some.ratio > 0.9
    assert some.close > 0.2
    assert memorisation(5 * new, train, held_out).ratio > 3


def test_errors_name_the_argument():
    x = torch.randn(5, 3)
    with pytest.raises(ValueError, match="reference must have 3 numbers per sample"):
        memorisation(x, x[:, :2], x)
