"""Several processes train what one trains: the same losses, the same pairs, and a clean end of what fails."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rfkernels.training import read_metrics, train_flow

_FILE = Path(__file__).with_name("together_program.py")
_SPEC = importlib.util.spec_from_file_location("together_program", _FILE)
program = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(program)

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without torch.distributed"
)


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    done = torchrun(_FILE, "all", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def losses(folder: Path, name: str = "loss") -> torch.Tensor:
    return torch.tensor(
        [entry[name] for entry in read_metrics(folder / "metrics.jsonl")], dtype=torch.float64
    )


def weights(folder: Path, part: str = "model") -> dict[str, torch.Tensor]:
    newest = max(folder.glob("checkpoints/step-*"), key=lambda p: int(p.name.removeprefix("step-")))
    return load_file(newest / f"{part}.safetensors")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_loss_curve_of_one_process(together, tmp_path, kind):
    train_flow(program.network(), program.data(), program.config(), run=tmp_path / "one")
    alone, shared = losses(tmp_path / "one"), losses(together / kind)
    assert len(shared) == program.STEPS
    assert (shared / alone - 1).abs().max() < 1e-5
    for part in ("model", "ema"):
        for name, value in weights(tmp_path / "one", part).items():
            torch.testing.assert_close(
                weights(together / kind, part)[name], value, rtol=1e-3, atol=1e-5
            )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ot-global", {"coupling": "ot"}),
        ("accumulate", {}),
        ("adamp", {"optimizer": "adamp", "weight_decay": 0.01}),
        ("sgdp", {"optimizer": "sgdp", "weight_decay": 0.01}),
    ],
)
def test_ten_steps_of(together, name, options):
    alone = train_flow(program.network(), program.data(), program.config(steps=10, **options))
    alone = torch.tensor([entry["loss"] for entry in alone.metrics], dtype=torch.float64)
    assert (losses(together / name) / alone - 1).abs().max() < 1e-5


def test_an_average_in_shards_is_what_it_has_become(together, tmp_path):
    """Evaluated after every step, as held-out losses and targets are."""
    program.shortcut("ddp", tmp_path / "one")
    for name in ("loss", "holdout_loss"):
        alone, shared = losses(tmp_path / "one", name), losses(together / "shortcut", name)
        assert len(shared) == 10
        assert (shared / alone - 1).abs().max() < 1e-5


def test_rounds_of_reflow_in_shards(together, tmp_path):
    program.rounds("ddp", tmp_path / "one")
    for name, value in weights(tmp_path / "one" / "round-2", "ema").items():
        shared = weights(together / "rounds" / "round-2", "ema")[name]
        torch.testing.assert_close(shared, value, rtol=1e-3, atol=1e-5)


def test_ot_within_each_process_is_another_coupling(together):
    first = losses(together / "ot") / losses(together / "ot-global") - 1
    assert first.abs().max() > 1e-4


def test_pairs_do_not_depend_on_the_number_of_processes(together, tmp_path):
    program.pairs(tmp_path / "pairs")
    files = sorted(tmp_path.glob("pairs/*"))
    assert len(files) == 6  # five shards of 16, the last with 6, and the manifest
    for file in files:
        assert file.read_bytes() == (together / "pairs" / file.name).read_bytes()


def test_errors_reach_every_process(together):
    expected = "batch_size: must be a multiple of processes * accumulate, 2 * 1; got 63"
    assert [(together / f"error-{rank}.txt").read_text() for rank in (0, 1)] == [expected] * 2
    found = [(together / f"exists-{rank}.txt").read_text() for rank in (0, 1)]
    assert found == ["FileExistsError", "RuntimeError"]


def test_a_process_that_dies_ends_the_others_and_the_run_resumes(together, tmp_path):
    died = torchrun(_FILE, "kill", tmp_path)
    assert died.returncode != 0
    assert "SIGKILL" in died.stderr or "-9" in died.stderr
    resumed = torchrun(_FILE, "resume", tmp_path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    for part in ("model", "ema", "optimizer"):
        uninterrupted = weights(together / "fsdp", part)
        for name, value in weights(tmp_path / "killed", part).items():
            assert torch.equal(value, uninterrupted[name]), (part, name)


def test_the_command_under_torchrun(tmp_path):
    train = [
        "train",
        "--dataset",
        "moons",
        "--model-option",
        "width=32",
        "--steps",
        "20",
        "--batch-size",
        "64",
        "--set",
        "log_every=1",
        "--set",
        "num_threads=1",
        "--quiet",
        "--run",
    ]
    shared = torchrun("-m", "--", "rfkernels", *train, tmp_path / "two")
    assert shared.returncode == 0, shared.stdout + shared.stderr
    assert shared.stdout.count("Trained to step 20") == 1
    subprocess.run([sys.executable, "-m", "rfkernels", *train, tmp_path / "one"], check=True)
    assert (losses(tmp_path / "two") / losses(tmp_path / "one") - 1).abs().max() < 1e-5
