"""A classifier of digits whose inputs change: its features are carried back, and it works again."""

import math

import pytest
import torch
from torch import nn

import rfkernels as rf
from rfkernels import data
from rfkernels.training import FeatureAdapter, TrainConfig, adapt_features

CONFIG = TrainConfig(
    steps=300, batch_size=128, learning_rate=3e-3, weight_decay=0.1, ema_decay=0.98, coupling="ot"
)


def half_contrast(x):
    return 0.4 * (x + 1) - 1


def turned(x):
    """By 25 degrees."""
    a = math.radians(25)
    turn = torch.tensor([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0]])
    grid = nn.functional.affine_grid(turn.expand(len(x), 2, 3), x.shape, align_corners=False)
    return nn.functional.grid_sample(x + 1, grid, align_corners=False) - 1


@pytest.fixture(scope="module")
def trained():
    """(features, accuracy(features, labels), training digits, other digits)."""
    train, test = data.split(data.digits(), 0.3, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 16))
        head = nn.Linear(16, 10)
        weights = [*body.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(weights, lr=3e-3, weight_decay=1e-2)
        for _ in range(400):
            rows = torch.randint(0, len(train.x), (128,))
            loss = nn.functional.cross_entropy(head(body(train.x[rows])), train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def accuracy(features, labels):
        return (head(features).argmax(1) == labels).double().mean().item()

    return torch.no_grad()(body), accuracy, train, test


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "before", "gain", "after"),
    [(half_contrast, (0.5, 0.75), 0.2, 0.9), (turned, (0.4, 0.6), 0.06, 0.55)],
    ids=["contrast", "turn"],
)
def test_a_classifier_works_again_on_changed_digits(trained, change, before, gain, after):
    features, accuracy, train, test = trained
    assert accuracy(features(test.x), test.labels) > 0.95
    new = features(change(test.x))
    unadapted = accuracy(new, test.labels)
    assert before[0] < unadapted < before[1]
    adapter = adapt_features(features(train.x), new, CONFIG)
    adapted = accuracy(adapter(new), test.labels)
    assert adapted > after
    assert adapted > unadapted + gain


def test_the_adapter_is_the_flow_in_units_of_the_spread(tmp_path):
    old, new = 5.0 * rf.randn(60, 3, seed=0), 2.0 + rf.randn(40, 3, seed=1)
    config = TrainConfig(steps=4, batch_size=16, warmup_steps=0)
    adapter = adapt_features(old, new, config, steps=3, run=tmp_path / "run")
    scale = old.std().item()
    assert adapter.scale == scale
    expected = scale * rf.sample(adapter.run.ema, new / scale, steps=3)
    assert torch.equal(adapter(new), expected)
    assert not torch.equal(adapter(new), new)
    again = FeatureAdapter(rf.load(tmp_path / "run").model, scale, steps=3)
    assert torch.equal(again(new), expected)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((torch.zeros(5, 3), torch.zeros(5, 3)), ValueError, "training_features: must vary"),
        ((torch.rand(5, 3), torch.rand(5, 2)), ValueError, r"new_features: must be \(N, 3\)"),
        ((torch.rand(5), torch.rand(5)), ValueError, r"training_features: must be \(N, 5\)"),
        ((torch.rand(5, 3), torch.arange(5)), TypeError, "new_features: must be a floating point"),
        (
            ([1.0], torch.rand(5, 3)),
            TypeError,
            "training_features: must be a floating point tensor",
        ),
    ],
)
def test_errors(arguments, kind, message):
    with pytest.raises(kind, match=message):
        adapt_features(*arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_features_of_another_precision(dtype):
    features = torch.linspace(-1, 1, 32).reshape(16, 2)
    config = TrainConfig(steps=2, batch_size=8, tensorboard=False)
    adapter = adapt_features(features, features + 1, config, steps=2)
    carried = adapter(features.to(dtype))
    assert carried.dtype == dtype
    torch.testing.assert_close(carried.float(), adapter(features), rtol=2e-3, atol=2e-3)
