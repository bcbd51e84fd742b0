"""A teacher's pairs and real ones in one store: which rows, how often, and that training takes it."""

import pytest
import torch

import rfkernels as rf
from rfkernels import models
from rfkernels.training import MixedPairs, TrainConfig, invert_data, make_pairs, train_recipe
from rfkernels.training.recipes import RectifiedFlowPlusPlus

REAL = 100.0 + torch.arange(14.0).reshape(7, 2)


def shift(x, t, y=None):
    return torch.full_like(x, 3.0)


@pytest.fixture
def stores(tmp_path):
    options = {"solver": "euler", "steps": 1}
    made = make_pairs(shift, 40, (2,), folder=tmp_path / "made", seed=2, **options)
    real = invert_data(shift, REAL, folder=tmp_path / "real", noise_level=0.0, **options)
    return made, real


@pytest.mark.parametrize(("fraction", "count", "real_rows"), [(0.2, 50, 10), (0.5, 80, 40)])
def test_every_made_pair_once_and_real_ones_between(stores, fraction, count, real_rows):
    mixed = MixedPairs(*stores, fraction)
    assert len(mixed) == count
    x0, x1, _ = mixed.batch(torch.arange(count))
    torch.testing.assert_close(x1 - x0, torch.full_like(x0, 3.0), rtol=0, atol=1e-4)
    is_real = x1[:, 0] > 50
    assert is_real.sum() == real_rows
    assert torch.equal(x1[~is_real], stores[0].x1)
    assert torch.equal(x1[is_real], REAL[torch.arange(real_rows) % 7])
    assert torch.equal(x0[~is_real], rf.randn(40, 2, seed=2, offset=torch.arange(40)))
    # Spread evenly: every stretch of ten has its share.
    assert (is_real.reshape(-1, 10).sum(1) == 10 * fraction).all()
    some = torch.tensor([17, 3, 49, 17])
    assert torch.equal(mixed.batch(some)[1], x1[some])
    assert torch.equal(mixed.x1, x1)


def test_counts_that_do_not_divide_stay_inside_the_stores(stores):
    for fraction in (0.07, 1 / 3, 0.999):
        mixed = MixedPairs(*stores, fraction)
        _, x1, _ = mixed.batch(torch.arange(len(mixed)))
        share = (x1[:, 0] > 50).double().mean().item()
        assert share == pytest.approx(fraction, abs=1 / len(mixed))


def test_recipes_train_on_them(stores):
    network = models.build("mlp", seed=0, sample_shape=(2,), width=8, depth=1)
    recipe = RectifiedFlowPlusPlus(train=TrainConfig(steps=3, batch_size=8, warmup_steps=0))
    mixed = MixedPairs(*stores, 0.2)
    result = train_recipe(recipe, teacher=network, pairs=mixed)
    assert result.metrics[-1]["step"] == 3
    other = train_recipe(recipe, teacher=network, pairs=stores[0])
    assert not torch.equal(result.model.leave.weight, other.model.leave.weight)


def test_refusals(stores, tmp_path):
    made, real = stores
    labelled = make_pairs(
        shift, 8, (2,), folder=tmp_path / "y", steps=1, labels=torch.arange(8) % 2
    )
    wide = make_pairs(shift, 8, (3,), folder=tmp_path / "w", steps=1)
    for arguments, kind, message in (
        ((made, real, 0.0), ValueError, r"fraction: must be in \(0, 1\)"),
        ((made, real, 1.0), ValueError, r"fraction: must be in \(0, 1\)"),
        ((made, real, "half"), TypeError, "fraction: must be a number"),
        ((labelled, real, 0.5), ValueError, r"real: conditions must be made's, \['y'\]; got \[\]"),
        ((wide, real, 0.5), ValueError, r"real: samples must have the shape of made's, \(3,\)"),
        ((made, REAL, 0.5), TypeError, "real: must be a PairStore; got Tensor"),
    ):
        with pytest.raises(kind, match=message):
            MixedPairs(*arguments)
