"""`rfkernels eval` with solvers, features and measures of choice, on tiny runs."""

import csv
import json

import pytest

import rfkernels.metrics.features.classifier as classifier
from rfkernels.cli.main import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs on digits, one of them of the same name in another folder, and one on moons."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "other").mkdir()
    tiny = ["--steps", "3", "--batch-size", "16", "--model-option", "width=16", "--quiet"]
    for dataset, name in (("digits", "a"), ("digits", "other/a"), ("moons", "moons")):
        command = ["train", "--dataset", dataset, "--run", str(folder / name), *tiny]
        assert main([*command, "--seed", str(len(name))]) == 0
    return folder


def rows_of(out):
    return list(csv.DictReader((out / "quality.csv").read_text().splitlines()))


def test_solvers_side_by_side(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out"
    solvers = ["--solver", "euler", "--solver", "heun", "--solver", "dopri5"]
    both = [str(runs / "a"), str(runs / "other" / "a")]
    assert (
        main(["eval", *both, *solvers, "--steps", "1,2", "--draws", "1", "-q", "--out", str(out)])
        == 0
    )
    rows = rows_of(out)
    assert [(r["solver"], r["steps"]) for r in rows[:5]] == [
        ("euler", "1"), ("euler", "2"), ("heun", "1"), ("heun", "2"), ("dopri5", "")
    ]  # fmt: skip
    assert [float(r["nfe"]) for r in rows[:4]] == [1, 2, 2, 4]
    assert {r["model"] for r in rows} == set(both)  # the folder's name alone would not tell
    found = json.loads((out / "quality.json").read_text())
    assert found["settings"]["data"] == "digits"
    assert found["settings"]["samples"] == found["settings"]["held_out_samples"]
    assert len(found["rows"]) == len(rows) == 10
    assert found["real_data"]["memorisation_ratio"] == 1
    assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert "dopri5" in text
    assert "memorisation" in text


def test_features_and_measures(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "_STEPS", 5)
    out, cache = tmp_path / "out", tmp_path / "cache"
    measures = ("frechet", "kid", "precision-recall", "straightness", "transport-cost")
    options = [word for name in measures for word in ("--metric", name)]
    command = ["eval", str(runs / "a"), "--steps", "1", "--draws", "1", "-q", "--out", str(out)]
    assert main([*command, "--features", "classifier", "--cache", str(cache), *options]) == 0
    assert len(list(cache.glob("classifier-*.safetensors"))) == 1
    (row,) = rows_of(out)
    assert list(row) == [
        "model", "solver", "steps", "nfe", "frechet_distance", "kernel_distance",
        "kernel_distance_error", "precision", "recall", "nearest_training_distance",
        "memorisation_ratio", "close_share", "straightness", "transport_cost",
    ]  # fmt: skip
    assert float(row["straightness"]) > 0


def test_the_command_measures_what_python_measures(runs, tmp_path):
    from rfkernels import metrics

    out = tmp_path / "out"
    command = ["eval", str(runs / "moons"), "--steps", "1,3", "--draws", "1", "--seed", "5", "-q"]
    assert main([*command, "--out", str(out)]) == 0
    found = metrics.evaluate([runs / "moons"], steps=(1, 3), draws=1, seed=5)
    for ours, theirs in zip(rows_of(out), found.table(), strict=True):
        assert ours == {name: "" if value is None else str(value) for name, value in theirs.items()}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--metric", "fid"], "metric: must be one of frechet, one-nn, kid"),
        (["--features", "vgg"], "features: must be one of pixels, classifier"),
        (["--features", "inception:nowhere.pt"], "inception: no file nowhere.pt"),
        (["--features", "classifier"], "classifier needs data with class labels"),
        (["--features", "random-conv"], "images must have the shape"),
        (["--solver", "magic"], "solver must be one of"),
        (["--guidance", "2"], "guidance: needs a run trained with --conditional"),
        (["--dataset", "digits"], "moons makes samples of the shape (2,)"),
        (["--draws", "0"], "draws: must be at least 1"),
    ],
)
def test_bad_options(runs, tmp_path, capsys, options, said):
    out = tmp_path / "out"
    assert main(["eval", str(runs / "moons"), "-q", "--out", str(out), *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert not out.exists()
