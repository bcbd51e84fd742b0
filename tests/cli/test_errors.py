"""Bad input: one line on standard error that says what is wrong, exit code 2, and nothing written or overwritten."""

import os
from pathlib import Path

import pytest

from rfkernels._whole_file import write_whole
from rfkernels.cli.main import main


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    (tmp_path / "file.png").write_text("precious")


TRAIN = ["train", "--dataset", "digits", "--run", "new"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tarin"], "No such command 'tarin'"),
        (["train", "--dataset", "digits"], "Missing option '--run'"),
        (["train", "--run", "new"], "dataset: must be given"),
        (
            ["train", "--dataset", "nist", "--run", "new"],
            "dataset: must be one of digits, mnist, moons",
        ),
        ([*TRAIN, "--steps", "0"], "steps: must be at least 1; got 0"),
        ([*TRAIN, "--steps", "many"], "--steps"),
        ([*TRAIN, "--learning-rate", "-1"], "learning_rate: must be positive"),
        ([*TRAIN, "--path", "crooked"], "crooked"),
        ([*TRAIN, "--model", "cnn"], "must be one of mlp"),
        ([*TRAIN, "--model-option", "girth=3"], "girth: mlp has no such option"),
        ([*TRAIN, "--model-option", "width"], "model-option: must look like NAME=VALUE"),
        ([*TRAIN, "--set", "stpes=3"], "stpes: TrainConfig has no such option"),
        ([*TRAIN, "--set", "clip_norm=1", "--set", "clip_norm=2"], "clip_norm is given twice"),
        ([*TRAIN, "--device", "abacus"], "device: must be cpu"),
        ([*TRAIN, "--label-dropout", "0.1"], "label_dropout: needs a conditional network"),
        (["train", "--dataset", "digits", "--run", "full"], "full is not empty"),
        (["train", "--dataset", "digits", "--run", "file.png"], "file.png is a file"),
        (["train", "--dataset", "full", "--run", "new"], "full: holds no images"),
        (["reflow", "nothing", "--out", "new"], "nothing holds no run"),
        (["distill", "nothing", "--out", "new"], "nothing holds no run"),
        (["sample", "nothing", "--out", "new.png"], "nothing holds no run"),
        (
            ["sample", "nothing", "--out", "new.gif"],
            "out: must end in .png, .safetensors, .npz; got new.gif",
        ),
        (
            ["sample", "nothing", "--out", "file.png"],
            "file.png exists; give another name, or --force",
        ),
        (["sample", "nothing", "--out", "nowhere/x.png"], "the folder nowhere does not exist"),
        (["sample", "nothing", "--out", "new.png", "--n", "0"], "n: must be at least 1; got 0"),
        (["eval", "nothing"], "nothing holds no run"),
        (["eval", "nothing", "nothing"], "one of them is given twice"),
        (["eval", "nothing", "--steps", "1,x"], "steps: must be whole numbers with commas"),
        (["eval", "nothing", "--steps", "0,1"], "steps: must be at least 1; got 0"),
        (["eval", "nothing", "--out", "full"], "out: full is not empty"),
        (["demo", "--dataset", "moons"], "dataset: must be one of digits, mnist"),
        (["demo", "--budget", "huge"], "budget: must be one of full, small"),
        (["demo", "--out", "full"], "out: full is not empty"),
        (["demo", "--out", "file.png"], "out: file.png is a file"),
        (["demo", "--seed", "-1"], "seed: must be in [0, 2**63); got -1"),
        (["demo", "--resume"], "out: must say which demo to resume"),
        (["bench", "--benchmarks", "full"], "benchmarks: full has no run.py"),
    ],
)
def test_one_line_and_exit_code_2(arguments, said, capsys, tmp_path):
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("rfkernels")
    assert said in lines[0]
    assert captured.out == ""
    assert {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    "arguments",
    [["sample", "nothing", "--out", "full/x.png"], ["eval", "nothing", "--out", "full/new/x"]],
)
def test_a_read_only_folder_is_refused_before_the_work(arguments, monkeypatch, capsys):
    real = os.access
    monkeypatch.setattr(os, "access", lambda p, *a: real(p, *a) and Path(p).name != "full")
    assert main(arguments) == 2
    assert "out: cannot write to the folder full" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that takes no files")
def test_a_folder_that_takes_no_files_is_told_without_numbers_and_hidden_names(capsys):
    assert main(["train", "--dataset", "digits", "--run", "/proc/new"]) == 2
    assert capsys.readouterr().err.startswith("rfkernels train: run: cannot write to /proc/new (")
    with pytest.raises(OSError, match=r"'/proc/new\.png'$"):
        write_whole(Path("/proc/new.png"), b"")


def test_traceback_shows_where_an_error_came_from():
    with pytest.raises(ValueError, match="seed: must be in"):
        main(["--traceback", "demo", "--seed", "-1"])


def test_missing_package_is_named_with_its_cure(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["demo"]) == 2
    assert 'pip install "rfkernels[demo]"' in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch):
    import rfkernels.data as datasets

    def broken(name):
        raise ZeroDivisionError

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(ZeroDivisionError):
        main(TRAIN)
