"""Flow matching with minibatch optimal transport, `TrainConfig(coupling="ot")`: what a step is made
of against POT, and a field that is straighter for it."""

import numpy as np
import ot
import pytest
import torch
from scipy.spatial.distance import cdist

import rfkernels as rf
from rfkernels import metrics, models
from rfkernels.data import as_dataset, toy
from rfkernels.training import TrainConfig, train_flow
from rfkernels.training.objective import Setting
from rfkernels.training.recipes import FlowObjective
from rfkernels.training.sources import DataSource

BATCH = 64
DATA = toy("ring", 500)


def batch_of(coupling):
    train = TrainConfig(batch_size=BATCH, coupling=coupling, seed=4)
    source = DataSource(
        as_dataset(DATA), x0=None, coupling=coupling, seed=4, holdout=0.0, conditional=True,
        device=torch.device("cpu"),
    )  # fmt: skip
    return FlowObjective(Setting(source, train)).batch(2)


def ends(batch):
    """x0 and x1 of a batch, from its states."""
    t, x, v = batch["t"][:, None], batch["xt"], batch["target"]
    return (x - t * v).double(), (x + (1 - t) * v).double()


def rows(x):
    return {tuple(row) for row in np.round(x.numpy(), 3).tolist()}


@pytest.mark.parametrize("coupling", ["ot", "ot-global"])
def test_a_step_has_the_least_cost_and_the_same_samples(coupling):
    independent, coupled = batch_of("independent"), batch_of(coupling)
    (z, x), (z_ot, x_ot) = ends(independent), ends(coupled)
    assert rows(z) == rows(z_ot)  # a permutation of the noise
    torch.testing.assert_close(x, x_ot, rtol=0, atol=1e-5)  # the data stays, with its labels
    assert torch.equal(independent["condition.y"], coupled["condition.y"])
    weights = ot.unif(BATCH)
    optimum = ot.emd2(weights, weights, cdist(z.numpy(), x.numpy(), "sqeuclidean"))
    cost = coupled["target"].double().square().sum(1).mean().item()
    assert cost == pytest.approx(optimum, rel=1e-5)
    assert independent["target"].double().square().sum(1).mean().item() > 1.2 * optimum


def test_labels_stay_with_their_data():
    batch = batch_of("ot")
    _, x1 = ends(batch)
    angle = torch.atan2(x1[:, 1], x1[:, 0]) / (torch.pi / 4)
    assert torch.equal(angle.round().long() % 8, batch["condition.y"])


def test_the_trained_field_is_straighter():
    """Straightness of the learnt flow, 0 for a straight one: 2.5 with independent pairs, 0.002
    with coupled ones here."""
    found = {}
    for coupling in ("independent", "ot"):
        config = TrainConfig(
            steps=300, batch_size=128, learning_rate=3e-3, ema_decay=0.99, coupling=coupling,
            log_every=300, holdout=0.0, seed=1, conditional=False,
        )  # fmt: skip
        model = models.build("mlp", seed=0, sample_shape=(2,), width=64, depth=2)
        result = train_flow(model, toy("ring"), config)
        x0 = rf.randn(500, 2, seed=8)
        found[coupling] = metrics.straightness(result.ema, x0, steps=20)
    assert found["ot"] < 0.1 * found["independent"]
