"""Sample pictures start where the run's flow does."""

import pytest
import torch
from safetensors.torch import load_file

from rfkernels import models
from rfkernels.training import DistillConfig, TrainConfig, train_flow, train_recipe
from rfkernels.training.recipes import Shortcut

X = torch.linspace(-1, 1, 80).reshape(40, 2)


class Still(torch.nn.Module):
    """A flow that moves nothing, so that pictures are their starts; it notes its condition."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def forward(self, x, t, y=None):
        self.seen.append(y)
        return self.weight * x


def small(**options):
    base = {"steps": 1, "batch_size": 8, "learning_rate": 1e-30, "tensorboard": False}
    return TrainConfig(**{**base, "sample_every": 1, "sample_steps": 2, **options})


def pictures(run):
    return load_file(run / "samples" / "step-1.safetensors")["x"]


@pytest.mark.parametrize("holdout", [0.0, 0.25])
def test_a_flow_between_data_sets_starts_from_the_source(tmp_path, holdout):
    source = X + 100
    train_flow(Still(), X, small(holdout=holdout), x0=source, run=tmp_path / "run")
    found = pictures(tmp_path / "run")
    assert len(found) == (10 if holdout else 64)
    rows = {tuple(row) for row in source.tolist()}
    assert {tuple(row) for row in found.tolist()} <= rows


def test_condition_vectors_are_those_of_the_data(tmp_path):
    vectors = torch.arange(120.0).reshape(40, 3)
    network = Still()
    network.null_label = 0.0
    train_flow(network, (X, vectors), small(conditional=True), run=tmp_path / "run")
    assert pictures(tmp_path / "run").shape == (4, 2)  # as many as are held out


def test_noise_stays_the_start_of_all_others(tmp_path):
    train_flow(Still(), X, small(coupling="ot"), run=tmp_path / "run")
    found = pictures(tmp_path / "run")
    assert found.shape == (64, 2)
    assert abs(found.mean()) < 0.3


def test_steps_that_a_run_cannot_take(tmp_path):
    with pytest.raises(ValueError, match=r"train.sample_steps: must be a power of two up to 8"):
        Shortcut(finest=8, train=small(sample_steps=20))
    network = models.build("mlp", seed=0, sample_shape=(2,), width=8, depth=1, flow_map=True)
    train_recipe(Shortcut(finest=8, train=small()), network, X, run=tmp_path / "run")
    assert pictures(tmp_path / "run").isfinite().all()
    with pytest.raises(ValueError, match=r"train.sample_every: a student of the way back"):
        DistillConfig(reverse=True, train=small())


def test_a_default_device_does_not_matter(tmp_path):
    """The picture was laid out on it, and no file can be written from there."""
    model = models.build("mlp", seed=0, sample_shape=(1, 4, 4), width=8, depth=1)
    config = TrainConfig(steps=1, batch_size=4, sample_every=1)
    with torch.device("meta"):
        train_flow(model, torch.zeros(8, 1, 4, 4, device="cpu"), config, run=tmp_path / "run")
    assert load_file(tmp_path / "run" / "samples" / "step-1.safetensors")["x"].isfinite().all()
