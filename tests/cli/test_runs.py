"""train -> reflow -> distill -> sample -> eval through the command, on tiny networks; and Ctrl-C."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rfkernels.cli.main import main

TINY = ["--batch-size", "32", "--quiet"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert main([
        "train", "--dataset", "digits", "--run", str(folder / "a"), "--conditional", "--steps", "8",
        "--model-option", "width=32", "--model-option", "depth=1", *TINY,
    ]) == 0  # fmt: skip
    pairs = ["--pairs", "64", "--pair-steps", "1"]
    assert (
        main(
            ["reflow", str(folder / "a"), "--out", str(folder / "b"), *pairs, "--steps", "4", *TINY]
        )
        == 0
    )
    assert main([
        "distill", str(folder / "b"), "--out", str(folder / "c"), "--pairs-from", str(folder / "b" / "pairs"),
        "--steps", "4", *TINY,
    ]) == 0  # fmt: skip
    return folder


def test_run_folders_hold_what_was_asked_for(runs):
    described = {name: json.loads((runs / name / "config.json").read_text()) for name in "abc"}
    assert [described[name]["kind"] for name in "abc"] == ["train", "reflow", "distill"]
    assert described["a"]["config"]["label_dropout"] == 0.1
    assert described["a"]["model"]["options"]["num_classes"] == 10
    assert described["b"]["config"]["train"]["time_distribution"] == "u-shaped"
    assert described["b"]["config"]["pairs"] == 64
    assert not (runs / "c" / "pairs").exists()


def test_the_command_trains_what_python_trains(runs, tmp_path):
    """The same options through the library give the same weights, bit for bit."""
    from rfkernels import derive_seed, models, training
    from rfkernels.data import digits

    network = models.build(
        "mlp",
        seed=derive_seed(0, "init"),
        sample_shape=(1, 8, 8),
        width=32,
        depth=1,
        num_classes=10,
    )
    config = training.TrainConfig(steps=8, batch_size=32, conditional=True, label_dropout=0.1)
    result = training.train_flow(network, digits(), config)
    loaded = training.load(runs / "a")
    for name, value in result.ema.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[name]), name


def test_arrays_round_trip_and_sample_i_is_the_same_whatever_n_is(runs, tmp_path):
    for n, file in ((5, "few.npz"), (9, "many.safetensors")):
        arguments = [
            "--n",
            str(n),
            "--batch",
            "4",
            "--steps",
            "2",
            "--out",
            str(tmp_path / file),
            "-q",
        ]
        assert main(["sample", str(runs / "a"), *arguments]) == 0
    with np.load(tmp_path / "few.npz", allow_pickle=False) as few:
        x, labels = few["x"], few["labels"]
    many = load_file(tmp_path / "many.safetensors")
    assert x.shape == (5, 1, 8, 8)
    assert x.dtype == np.float32
    assert labels.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(many["x"][:5].numpy(), x, rtol=1e-5, atol=1e-5)


def test_label_and_guidance_change_the_samples(runs, tmp_path):
    def drawn(*options):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
        assert (
            main(["sample", str(runs / "a"), "--n", "4", "--out", str(file), "-q", *options]) == 0
        )
        with np.load(file) as arrays:
            return arrays["x"], arrays["labels"]

    plain, _ = drawn("--label", "3")
    guided, labels = drawn("--label", "3", "--guidance", "2")
    assert labels.tolist() == [3] * 4
    assert np.abs(plain - guided).max() > 0


def test_guidance_needs_label_dropout(tmp_path, capsys):
    run = str(tmp_path / "run")
    options = [
        "--conditional",
        "--label-dropout",
        "0",
        "--steps",
        "1",
        "--model-option",
        "width=16",
    ]
    assert main(["train", "--dataset", "digits", "--run", run, *options, *TINY]) == 0
    arguments = ["sample", run, "--out", str(tmp_path / "x.npz"), "--guidance", "2"]
    assert main(arguments) == 2
    assert "guidance: needs a run trained with label dropout" in capsys.readouterr().err


def test_picture_is_a_png_and_is_not_replaced_without_force(runs, tmp_path, capsys):
    from PIL import Image

    file = tmp_path / "x.png"
    arguments = ["sample", str(runs / "c"), "--n", "9", "--steps", "1", "--out", str(file)]
    assert main([*arguments, "-q"]) == 0
    content = file.read_bytes()
    assert Image.open(io.BytesIO(content)).size == (3 * 50 + 2, 3 * 50 + 2)
    assert main([*arguments, "-q", "--seed", "1"]) == 2
    assert file.read_bytes() == content
    assert main([*arguments, "--seed", "1", "--force"]) == 0
    assert file.read_bytes() != content
    assert "network evaluations for each: 1." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--label", "10"], "label: must be from 0 to 9; got 10"),
        (["--steps", "0"], "rfkernels sample: steps must be at least 1; got 0"),
        (["--solver", "magic"], "solver must be one of"),
        (["--shift", "-1"], "shift must be positive"),
    ],
)
def test_bad_sampling_options(runs, tmp_path, capsys, options, said):
    assert main(["sample", str(runs / "a"), "--out", str(tmp_path / "x.npz"), "-q", *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert not list(tmp_path.iterdir())


def test_eval_writes_table_and_plot(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "eval"
    arguments = ["--steps", "2,1", "--draws", "1", "-q", "--out", str(out)]
    assert main(["eval", str(runs / "a"), str(runs / "b"), *arguments]) == 0
    rows = list(csv.DictReader((out / "quality.csv").read_text().splitlines()))
    assert [(r["model"], r["steps"]) for r in rows] == [
        ("a", "1"),
        ("a", "2"),
        ("b", "1"),
        ("b", "2"),
    ]
    assert all(
        0 <= float(r["one_nn_accuracy"]) <= 1 and float(r["frechet_distance"]) > 0 for r in rows
    )
    assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert all(f"│{name}" in table for name in ("a ", "b ", "held-out"))
    assert "0.5 is ideal" in table


def test_a_run_is_not_trained_over(runs, capsys):
    before = (runs / "a" / "config.json").read_bytes()
    assert main(["train", "--dataset", "digits", "--run", str(runs / "a")]) == 2
    assert "holds a run already; give another folder, or --resume" in capsys.readouterr().err
    assert main(["train", "--run", str(runs / "a"), "--resume", "--steps", "9", "-q"]) == 2
    assert "config.steps is 8 in the run and 9 now" in capsys.readouterr().err
    assert (runs / "a" / "config.json").read_bytes() == before


def test_eval_of_a_reflow_alone_asks_for_the_data(runs, capsys):
    assert main(["eval", str(runs / "b"), "-q"]) == 2
    assert "dataset: must be given" in capsys.readouterr().err


def test_points_are_drawn_and_measured(tmp_path, capsys):
    run = str(tmp_path / "moons")
    assert (
        main(
            [
                "train",
                "--dataset",
                "moons",
                "--run",
                run,
                "--steps",
                "3",
                "--model-option",
                "width=16",
                *TINY,
            ]
        )
        == 0
    )
    assert (
        main(["sample", run, "--out", str(tmp_path / "moons.png"), "--solver", "dopri5", "-q"]) == 0
    )
    out = tmp_path / "eval"
    assert main(["eval", run, "--steps", "1", "--draws", "1", "--out", str(out), "-q"]) == 0
    assert (out / "quality.png").exists()


def test_resume_needs_no_options_and_ends_with_the_same_weights(runs, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    options = [
        "--dataset",
        "digits",
        "--steps",
        "6",
        "--model-option",
        "width=16",
        "--set",
        "checkpoint_every=2",
        *TINY,
    ]
    assert main(["train", "--run", str(whole), *options]) == 0
    assert main(["train", "--run", str(halves), *options]) == 0
    last = sorted((halves / "checkpoints").glob("step-*"))[-1]
    assert last.name == "step-6"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    assert main(["train", "--run", str(halves), "--resume", "-q"]) == 0
    ours, theirs = (
        load_file(r / "checkpoints" / "step-6" / "ema.safetensors") for r in (halves, whole)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.skipif(os.name == "nt", reason="SIGINT to a process of its own")
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    run = tmp_path / "run"
    options = ["--steps", "100000", "--model-option", "width=16", "--set", "log_every=1", *TINY]
    command = [
        sys.executable,
        "-m",
        "rfkernels",
        "train",
        "--dataset",
        "digits",
        "--run",
        str(run),
        *options,
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"rfkernels train --run {run} --resume" in out
    assert "Traceback" not in err
    assert any(int(p.name.removeprefix("step-")) > 0 for p in (run / "checkpoints").glob("step-*"))
