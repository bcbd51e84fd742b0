"""Checkpoints: whole or absent, pruned, recognised when damaged, and free of pickle."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rfkernels.training import checkpoint as checkpoints


def write(folder, step, value=None, keep=3):
    parts = {"model": {"w": torch.full((3,), float(step if value is None else value))}}
    return checkpoints.save(folder, step, parts, {"note": step}, keep=keep)


def test_round_trip_and_pruning(tmp_path):
    for step in (0, 10, 9, 100):
        write(tmp_path, step, keep=2)
    assert checkpoints.steps_on_disk(tmp_path) == [9, 100]
    found = checkpoints.latest(tmp_path)
    assert (found.step, found.state["note"]) == (100, 100)
    assert torch.equal(found.tensors("model")["w"], torch.full((3,), 100.0))
    assert checkpoints.latest(tmp_path / "absent") is None


def _flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "torn tensors": lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 9),
    "one bit": lambda f: _flip(f / "model.safetensors"),
    "no tensors": lambda f: (f / "model.safetensors").unlink(),
    "torn state": lambda f: (f / "state.json").write_text('{"step": 2'),
    "empty": lambda f: [p.unlink() for p in f.iterdir()],
    "other step": lambda f: (f / "state.json").write_text('{"format": 1, "step": 3, "sha256": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_falls_back(tmp_path, damage):
    write(tmp_path, 1)
    DAMAGE[damage](write(tmp_path, 2))
    with pytest.warns(UserWarning, match=r"step-2: .*using .*step-1 instead"):
        assert checkpoints.latest(tmp_path).step == 1
    # The run passes step 2 again: the good one takes the place of the damaged one, even when only
    # one is kept, and even when the next save comes at an earlier step.
    write(tmp_path, 1, value=5, keep=1)
    assert checkpoints.steps_on_disk(tmp_path) == [1]
    write(tmp_path, 2, keep=1)
    assert checkpoints.latest(tmp_path).step == 2


def test_all_damaged_is_an_error(tmp_path):
    for step in (1, 2):
        DAMAGE["one bit"](write(tmp_path, step))
    with pytest.raises(ValueError, match=r"step-2.*damaged.*step-1.*damaged.*no whole checkpoint"):
        checkpoints.latest(tmp_path)


def test_half_written_folders_are_never_seen_and_are_cleared(tmp_path):
    write(tmp_path, 1)
    for leftover in (".step-2.77.tmp", ".step-0.old.tmp"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "model.safetensors").write_bytes(b"half")
    assert checkpoints.latest(tmp_path).step == 1
    write(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-2"]


def test_tied_and_strided_weights(tmp_path):
    w = torch.arange(6.0).reshape(2, 3)
    parts = {"model": {"a": w, "tied": w, "turned": w.T, "none": torch.zeros(0)}}
    folder = checkpoints.save(tmp_path, 1, parts, {}, keep=1)
    found = checkpoints.latest(tmp_path).tensors("model")
    assert torch.equal(found["tied"], w)
    assert torch.equal(found["turned"], w.T)
    assert folder.name == "step-1"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs file size limits")
def test_full_disk_is_an_oserror_and_leaves_nothing_behind(tmp_path):
    code = """
import resource, signal, sys, torch
from pathlib import Path
from rfkernels.training import checkpoint
folder = Path(sys.argv[1])
checkpoint.save(folder, 1, {"model": {"w": torch.zeros(10)}}, {}, keep=3)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    checkpoint.save(folder, 2, {"model": {"w": torch.zeros(10_000)}}, {}, keep=3)
except OSError as error:
    print("OSError", error)
"""
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    assert out.startswith("OSError")
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_nothing_in_the_room_can_pickle():
    import rfkernels.training

    room = Path(rfkernels.training.__file__).parent
    sources = [
        p for name in ("training", "data", "models") for p in (room.parent / name).glob("*.py")
    ]
    assert len(sources) > 20
    for source in sources:
        text = source.read_text()
        for word in ("import pickle", "torch.load(", "torch.save(", "allow_pickle=True", "joblib"):
            assert word not in text, f"{source.name}: {word}"


def test_state_is_plain_json(tmp_path):
    state = json.loads((write(tmp_path, 4) / "state.json").read_text())
    assert state["step"] == 4
    assert set(state["sha256"]) == {"model.safetensors"}
