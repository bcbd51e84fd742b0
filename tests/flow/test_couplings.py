"""Couplings: permutations, optimal cost against POT and brute force, labels, marginals."""

import itertools
import sys

import ot
import pytest
import torch

from rfkernels.flow.couplings import (
    COUPLINGS,
    Coupling,
    GivenPairs,
    Independent,
    MinibatchOT,
    get_coupling,
    optimal_assignment,
)


def batch(size=32, seed=0, shape=(2, 3), shift=2.0):
    generator = torch.Generator().manual_seed(seed)
    x0, x1 = torch.randn(2, size, *shape, generator=generator)
    return x0, x1 + shift, torch.randint(0, 4, (size,), generator=generator)


def rows(x):
    return sorted(map(tuple, x.flatten(1).tolist()))


def cost(x0, x1):
    return (x0.double() - x1.double()).flatten(1).square().sum(1).mean().item()


def test_the_assignment_is_a_permutation_and_data_and_labels_stay():
    x0, x1, labels = batch()
    new_x0, new_x1, new_labels = MinibatchOT()(x0, x1, labels)
    assert rows(new_x0) == rows(x0)
    assert new_x0.shape == x0.shape
    assert torch.equal(new_x1, x1)
    assert torch.equal(new_labels, labels)
    assert cost(new_x0, x1) < cost(x0, x1)


def test_the_cost_is_that_of_pot():
    for seed, shift in ((0, 0.0), (1, 3.0), (2, 1e4)):
        x0, x1, _ = batch(48, seed, shift=shift)
        new_x0, _, _ = MinibatchOT()(x0, x1)
        a, b = x0.flatten(1).double().numpy(), x1.flatten(1).double().numpy()
        squared = ((a[:, None] - b[None]) ** 2).sum(2)
        optimal = ot.emd2(ot.unif(48), ot.unif(48), squared)
        assert cost(new_x0, x1) == pytest.approx(optimal, rel=1e-9)


def test_the_assignment_is_the_best_of_all_permutations():
    x0, x1, _ = batch(6, seed=4)
    best = min(cost(x0[list(p)], x1) for p in itertools.permutations(range(6)))
    assert cost(x0[optimal_assignment(x0, x1)], x1) == pytest.approx(best, rel=1e-12)


def test_an_assignment_far_from_the_origin_keeps_its_digits():
    """Offset 1e9, where inner products of the raw samples round to multiples of 100."""
    generator = torch.Generator().manual_seed(0)
    points = 1e9 + torch.randn(40, 3, generator=generator, dtype=torch.float64)
    order = torch.randperm(40, generator=generator)
    found = optimal_assignment(points[order], points)
    assert torch.equal(points[order][found], points)


def test_within_labels_keeps_each_class_its_noise():
    x0, x1, labels = batch(64)
    new_x0, _, _ = MinibatchOT(within_labels=True)(x0, x1, labels)
    for label in range(4):
        mine = labels == label
        assert rows(new_x0[mine]) == rows(x0[mine])
        expected = x0[mine][optimal_assignment(x0[mine], x1[mine])]
        assert torch.equal(new_x0[mine], expected)
    whole, _, _ = MinibatchOT()(x0, x1, labels)
    assert cost(whole, x1) <= cost(new_x0, x1) < cost(x0, x1)


def test_identity_couplings():
    x0, x1, labels = batch()
    for coupling in (Independent(), GivenPairs()):
        result = coupling(x0, x1, labels)
        assert result[0] is x0
        assert result[1] is x1
        assert result[2] is labels
    assert Independent().independent
    assert not GivenPairs().independent
    assert not MinibatchOT().independent


def test_small_batches_and_dtypes():
    for size in (0, 1):
        x0, x1, _ = batch(size)
        assert torch.equal(MinibatchOT()(x0, x1)[0], x0)
    x0, x1, _ = batch()
    assert MinibatchOT()(x0.bfloat16(), x1.bfloat16())[0].dtype == torch.bfloat16
    assert not MinibatchOT()(x0.requires_grad_(), x1)[0].isnan().any()


def test_names_and_errors():
    for name in COUPLINGS:
        assert get_coupling(name).name == name
        assert isinstance(get_coupling(name), Coupling)
    own = MinibatchOT(within_labels=True)
    assert get_coupling(own) is own
    x0, x1, labels = batch()
    with pytest.raises(ValueError, match=r"one of independent, .*; got 'sinkhorn'"):
        get_coupling("sinkhorn")
    with pytest.raises(TypeError, match="got MinibatchOT"):
        get_coupling(MinibatchOT)
    with pytest.raises(TypeError, match="got function"):
        get_coupling(lambda x0, x1, labels: (x0, x1, labels))
    with pytest.raises(ValueError, match="x0 must have the shape of x1"):
        MinibatchOT()(x0[:3], x1)
    with pytest.raises(ValueError, match="labels must have 32 rows"):
        Independent()(x0, x1, labels[:5])
    with pytest.raises(ValueError, match=r"integers .* got None"):
        MinibatchOT(within_labels=True)(x0, x1)
    x0[3] = float("nan")
    with pytest.raises(ValueError, match="must be finite"):
        MinibatchOT()(x0, x1)


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    x0, x1, _ = batch()
    with pytest.raises(ImportError, match=r"rfkernels\[train\]"):
        MinibatchOT()(x0, x1)
