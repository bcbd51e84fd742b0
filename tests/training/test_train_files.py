"""What train_flow leaves in a run's folder, and what load makes of it."""

import warnings

import pytest
import torch
from small_runs import Recorder, data, network, small, weights

import rfkernels as rf
from rfkernels import models
from rfkernels.training import read_metrics, train_flow


def test_run_folder_holds_what_it_should(tmp_path):
    model = models.build("mlp", sample_shape=(1, 4, 4), width=16, depth=1, num_classes=3)
    samples = (torch.rand(40, 1, 4, 4) * 2 - 1, torch.arange(40) % 3)
    config = small(sample_every=6, sample_steps=2, keep_checkpoints=2)
    result = train_flow(model, samples, config, run=tmp_path / "run")
    files = {
        str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()
    }
    parts = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")
    expected = {f"checkpoints/step-{n}/{part}" for n in (6, 12) for part in parts}
    expected |= {f"samples/step-{n}.safetensors" for n in (6, 12)} | {
        "config.json",
        "metrics.jsonl",
    }
    assert files - {".lock", "samples/step-6.png", "samples/step-12.png"} == expected
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == result.metrics
    assert [entry["step"] for entry in result.metrics] == [4, 8, 12]


def test_own_network_trains_and_loads_only_with_its_code(tmp_path):
    train_flow(Recorder(), data(), small(conditional=True), run=tmp_path / "run")
    with pytest.raises(ValueError, match=r"network of your own \(.*Recorder\); pass one as load"):
        rf.load(tmp_path / "run")
    loaded = rf.load(tmp_path / "run", model=Recorder(), which="model")
    assert loaded.conditional
    with pytest.raises(ValueError, match="model: is not the network of"):
        rf.load(tmp_path / "run", model=network())


def test_load_gives_the_average_or_the_last_weights(tmp_path):
    result = train_flow(network(2), data(), small(), run=tmp_path / "run")
    for which, module in (("ema", result.ema), ("model", result.model)):
        loaded = rf.load(tmp_path / "run", which=which)
        assert torch.equal(weights(loaded.model), weights(module))
        assert not loaded.model.training
    assert (loaded.kind, loaded.path, loaded.step, loaded.num_classes) == ("train", "linear", 12, 2)
    assert loaded.sample_shape == (2,)
    assert loaded.config == small()
    with pytest.raises(ValueError, match="which: must be 'ema' or 'model'"):
        rf.load(tmp_path / "run", which="best")
    with pytest.raises(FileNotFoundError, match="holds no run"):
        rf.load(tmp_path)


def test_tensorboard_is_asked_for_by_name(tmp_path):
    with pytest.raises(ValueError, match="tensorboard: writes files"):
        train_flow(network(), data(), small(tensorboard=True))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="pip install tensorboard"):
            train_flow(network(), data(), small(tensorboard=True), run=tmp_path / "run")
        assert not (tmp_path / "run").exists()
