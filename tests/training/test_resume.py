"""Interruption: killed at any moment, or stopped by Ctrl-C, a resumed run ends with the same
weights, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rfkernels import models
from rfkernels.data import toy
from rfkernels.training import TrainConfig, read_metrics, train_flow

CONFIG = {"steps": 20, "batch_size": 8, "log_every": 3, "checkpoint_every": 5, "label_dropout": 0.2}


def network():
    return models.build(
        "mlp", seed=1, sample_shape=(2,), width=16, depth=1, num_classes=2, dropout=0.2
    )


def run(folder, resume=False, model=None, **options):
    config = TrainConfig(**{**CONFIG, **options})
    return train_flow(model or network(), toy("moons", 50), config, run=folder, resume=resume)


def state(result):
    return {
        **result.model.state_dict(),
        **{f"ema.{n}": v for n, v in result.ema.state_dict().items()},
    }


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


class Stopping(models.MLPVelocity):
    """Stops the process's main thread in the forward pass of a training step."""

    def __init__(self, at, how):
        super().__init__((2,), 16, 1, 2, 0.2)
        self.load_state_dict(network().state_dict())
        self.at, self.how, self.calls = at, how, 0

    def forward(self, x, t, y=None):
        self.calls += self.training
        if self.training and self.calls == self.at:
            self.how()
        return super().forward(x, t, y)


class Power(Exception):
    """Stands for a death in the middle of a step."""


def cut():
    raise Power


@pytest.mark.parametrize("at", [1, 5, 6, 14, 20])
def test_resumed_in_process(tmp_path, at):
    whole = run(tmp_path / "whole", model=Stopping(99, cut))
    with pytest.raises(Power):
        run(tmp_path / "cut", model=Stopping(at, cut))
    # The weights come from the checkpoint: the resumed network may start from others.
    fresh = Stopping(99, cut)
    with torch.no_grad():
        for p in fresh.parameters():
            p.fill_(0.5)
    resumed = run(tmp_path / "cut", resume=True, model=fresh)
    assert_same(state(whole), state(resumed))
    for name in ("model", "ema", "optimizer"):
        last = "checkpoints/step-20/" + name + ".safetensors"
        assert_same(load_file(tmp_path / "whole" / last), load_file(tmp_path / "cut" / last))
    # The metrics too, but for the clock; every line once.
    for a, b in zip(whole.metrics, resumed.metrics, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_resuming_a_finished_run_returns_it(tmp_path):
    whole = run(tmp_path / "a")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a" / "checkpoints").rglob("*")}
    again = run(tmp_path / "a", resume=True)
    assert_same(state(whole), state(again))
    assert again.metrics == whole.metrics
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "a" / "checkpoints").rglob("*")}


def test_other_data_or_options_are_not_resumed(tmp_path):
    run(tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"resume: .* was begun with other options: config.steps is 20"
    ):
        run(tmp_path / "a", resume=True, steps=21)
    config = TrainConfig(**CONFIG)
    with pytest.raises(ValueError, match=r"other options: data\.seed|other options: data\.sha256"):
        train_flow(network(), toy("moons", 50, seed=1), config, run=tmp_path / "a", resume=True)
    wide = models.build("mlp", sample_shape=(2,), width=8, depth=1, num_classes=2, dropout=0.2)
    with pytest.raises(ValueError, match=r"model.options.width is 16 in the run and 8 now"):
        train_flow(wide, toy("moons", 50), config, run=tmp_path / "a", resume=True)


def test_damaged_newest_checkpoint_resumes_from_the_one_before(tmp_path):
    whole = run(tmp_path / "whole")
    run(tmp_path / "a")
    (tmp_path / "a" / "checkpoints" / "step-20" / "ema.safetensors").write_bytes(b"gone")
    with pytest.warns(UserWarning, match=r"ema.safetensors is damaged.*using .*step-15"):
        resumed = run(tmp_path / "a", resume=True)
    assert_same(state(whole), state(resumed))


def test_killed_before_the_oldest_checkpoint_went(tmp_path):
    run(tmp_path / "a")
    folder = tmp_path / "a" / "checkpoints"
    kept = sorted(p.name for p in folder.iterdir())
    assert len(kept) == 3
    shutil.copytree(folder / "step-10", folder / "step-5")
    run(tmp_path / "a", resume=True)
    assert sorted(p.name for p in folder.iterdir()) == kept
    # What stands beyond damaged ones is all there is.
    shutil.copytree(folder / "step-10", folder / "step-8")
    for damaged in ("step-15", "step-20"):
        (folder / damaged / "ema.safetensors").write_bytes(b"gone")
    with pytest.warns(UserWarning, match="using .*step-10"):
        run(tmp_path / "a", resume=True)
    assert sorted(p.name for p in folder.iterdir()) == kept


def press():
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_saves_between_steps_and_says_how_to_go_on(tmp_path):
    whole = run(tmp_path / "whole", model=Stopping(99, cut))
    with pytest.raises(
        KeyboardInterrupt, match=r"stopped after step 7 and saved; go on with resume=True"
    ):
        run(tmp_path / "a", model=Stopping(7, press))
    assert (tmp_path / "a" / "checkpoints" / "step-7" / "state.json").is_file()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same(state(whole), state(run(tmp_path / "a", resume=True, model=Stopping(99, cut))))


def test_ctrl_c_in_the_last_step_is_not_swallowed(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="stopped after step 20 and saved"):
        run(tmp_path / "a", model=Stopping(20, press))
    assert (tmp_path / "a" / "checkpoints" / "step-20" / "state.json").is_file()


def test_second_ctrl_c_stops_at_once(tmp_path):
    def twice():
        press()
        press()

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", model=Stopping(7, twice))
    assert not (tmp_path / "a" / "checkpoints" / "step-7").exists()


def test_without_a_folder_ctrl_c_says_that_nothing_is_kept():
    with pytest.raises(KeyboardInterrupt, match="without a run folder nothing is kept"):
        run(None, model=Stopping(7, press))


def test_training_works_in_another_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path / "a")))
    thread.start()
    thread.join()
    assert results[0].metrics[-1]["step"] == 20


def test_torn_metrics_line_is_dropped(tmp_path):
    run(tmp_path / "a")
    file = tmp_path / "a" / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 21, "lo')
    assert [e["step"] for e in read_metrics(file)] == [3, 6, 9, 12, 15, 18, 20]
    run(tmp_path / "a", resume=True)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()][-1] == 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments(tmp_path):
    """kill -9 again and again: every weight, average, moment and pair is that of a run never
    killed."""
    program = Path(__file__).with_name("interrupted_program.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    files = sorted(p.relative_to(whole) for p in whole.rglob("*.safetensors"))
    assert len(files) > 30
    # Checkpoints at the same steps, pairs in the same shards, nothing half-written among them.
    assert files == sorted(p.relative_to(killed) for p in killed.rglob("*.safetensors"))
    for file in files:
        assert_same(load_file(whole / file), load_file(killed / file))
    for part in ("first", "second", "third"):
        lines = [read_metrics(root / part / "metrics.jsonl") for root in (whole, killed)]
        for a, b in zip(*lines, strict=True):
            assert {**a, "seconds": 0} == {**b, "seconds": 0}
