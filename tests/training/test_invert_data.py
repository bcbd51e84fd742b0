"""Pairs of real data: the ends of the inverse flow, stored with the data, whole or resumed."""

import pytest
import torch
from safetensors.torch import load_file

import rfkernels as rf
from rfkernels import models
from rfkernels.data import toy
from rfkernels.flow import GaussianMixtureFlow
from rfkernels.training import (
    DistillConfig,
    PairStore,
    TrainConfig,
    distill,
    invert_data,
    train_recipe,
)
from rfkernels.training.recipes import RectifiedFlowPlusPlus

DATA = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))


def shift(x, t, y=None):
    """Straight lines to 3 to the right, or 3 + y."""
    return torch.full_like(x, 3.0) if y is None else 3.0 + y[:, None].expand_as(x)


def make(folder, velocity=shift, data=DATA, **options):
    return invert_data(
        velocity, data, folder=folder, **{"steps": 2, "solver": "euler", "batch": 4, **options}
    )


def test_both_ends_are_stored_in_the_order_of_the_data(tmp_path):
    pairs = make(tmp_path / "p", noise_level=0.0)
    x0, x1, condition = pairs.batch(torch.tensor([7, 0, 9]))
    assert torch.equal(x1, DATA[[7, 0, 9]])
    torch.testing.assert_close(x0, x1 - 3.0)
    assert condition == {}
    files = sorted((tmp_path / "p").glob("shard-*"))
    assert len(files) == 3
    assert all(load_file(file).keys() == {"x0", "x1", "index"} for file in files)
    assert pairs.manifest["x0"] == "stored"
    assert pairs.manifest["data"]["size"] == 10


def test_the_ends_lie_where_the_closed_form_says(tmp_path):
    """N(0, I) to N(m, s^2 I): the state (1-e) x1 + e n at t = 1 - e came from x0 on x_t's line."""
    mean, std, level = torch.tensor([1.0, -2.0]), 0.5, 0.1
    flow = GaussianMixtureFlow(mean[None], std)
    x0, x1, _ = make(
        tmp_path / "p", flow.velocity, solver="rk4", steps=60, noise_level=level, seed=3
    ).batch(torch.arange(10))
    noise = rf.randn(10, 2, seed=rf.derive_seed(3, "inversion noise"), offset=torch.arange(10))
    t = 1 - level
    state = t * x1 + level * noise
    expected = (state - t * mean) / (level**2 + t**2 * std**2) ** 0.5
    torch.testing.assert_close(x0, expected, atol=1e-4, rtol=0)
    assert (x0 - (x1 - mean) / std).abs().max() > 0.05


def test_an_interrupted_store_is_finished_and_others_are_refused(tmp_path):
    whole = make(tmp_path / "whole")
    make(tmp_path / "p")
    (tmp_path / "p" / "shard-00001.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"finish them with invert_data\(..., resume=True\)"
    ):
        PairStore(tmp_path / "p")
    calls = []

    def counting(x, t):
        calls.append(len(x))
        return shift(x, t)

    again = make(tmp_path / "p", counting)
    assert calls == [1, 1, 4, 4]  # one sample to try, then the missing shard alone
    for one, other in zip(
        whole.batch(torch.arange(10)), again.batch(torch.arange(10)), strict=True
    ):
        assert one == {} or torch.equal(one, other)
    with pytest.raises(FileExistsError, match="holds pairs already"):
        make(tmp_path / "p", resume=False)
    for options, key in (({"data": DATA + 1}, "data"), ({"noise_level": 0.5}, "noise_level")):
        with pytest.raises(ValueError, match=f"was begun with other arguments: {key} is"):
            make(tmp_path / "p", **options)


def test_labels_reach_the_flow_and_the_pairs(tmp_path):
    labels = torch.arange(10) % 3
    pairs = make(tmp_path / "p", data=(DATA, labels), conditional=True, noise_level=0.0)
    x0, x1, condition = pairs.batch(torch.arange(10))
    assert torch.equal(condition["y"], labels)
    torch.testing.assert_close(x1 - x0, 3.0 + labels[:, None].expand(10, 2).float())
    plain = make(tmp_path / "q", data=(DATA, labels))
    assert plain.batch(torch.arange(2))[2] == {}
    network = models.build("mlp", seed=0, sample_shape=(2,), width=8, depth=1, num_classes=3)
    assert "y" in make(tmp_path / "r", network, data=(DATA, labels)).batch(torch.arange(2))[2]


def test_recipes_train_on_them(tmp_path):
    network = models.build("mlp", seed=0, sample_shape=(2,), width=8, depth=1)
    pairs = make(tmp_path / "p", network, data=toy("moons", 60))
    train = TrainConfig(steps=3, batch_size=8, warmup_steps=0)
    result = train_recipe(RectifiedFlowPlusPlus(train=train), teacher=network, pairs=tmp_path / "p")
    assert result.metrics[-1]["step"] == 3
    assert len(PairStore(tmp_path / "p")) == 60
    student = distill(network, DistillConfig(train=train), pairs=pairs)
    assert student.metrics[-1]["step"] == 3


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"data": toy("moons")}, ValueError, "data: must be a data set of known size"),
        ({"noise_level": 1.0}, ValueError, r"noise_level: must be in \[0, 1\); got 1.0"),
        ({"batch": 0}, ValueError, "batch: must be at least 1"),
        ({"conditional": True}, ValueError, "conditional: True needs data with labels"),
        ({"solver": "rf++"}, ValueError, r"solver 'rf\+\+' needs the initial noise"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path, options, kind, message):
    with pytest.raises(kind, match=message):
        make(tmp_path / "p", **options)
    assert not (tmp_path / "p").exists()
