"""`rfkernels compare`: the report of images and of points, and what it refuses."""

import base64
import io
import json
import re

import pytest
from PIL import Image

from rfkernels.cli.main import main

TINY = ["--steps", "3", "--batch-size", "16", "--model-option", "width=16", "--quiet"]
FILES = {"report.html", "samples.png", "quality.png", "quality.csv", "quality.json"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("a", "b <c>"):
        command = ["train", "--dataset", "digits", "--run", str(folder / name), *TINY]
        assert main([*command, "--seed", str(len(name))]) == 0
    assert main(["train", "--dataset", "moons", "--run", str(folder / "moons"), *TINY]) == 0
    return folder


def test_report_of_images(runs, tmp_path, capsys):
    out = tmp_path / "out"
    both = [str(runs / "a"), str(runs / "b <c>")]
    assert main(["compare", *both, "--steps", "1,2", "--draws", "1", "-q", "--out", str(out)]) == 0
    assert {file.name for file in out.iterdir()} == FILES
    report = (out / "report.html").read_text()
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", report)
    assert len(pictures) == 2 * 2 + 1 + 1  # two runs at two numbers of steps, real data, the plot
    sizes = [Image.open(io.BytesIO(base64.b64decode(p))).size for p in pictures]
    assert sizes[:5] == [(10 * 34 + 2, 3 * 34 + 2)] * 5
    # One file that needs nothing else, with names as text.
    assert not re.search(r'(src|href)="(?!data:)', report)
    assert "<script" not in report
    assert "<c>" not in report
    assert "b &lt;c&gt;" in report
    assert "prefers-color-scheme: dark" in report
    assert "$" not in re.sub(r"base64,[^\"]*", "", report)
    rows = json.loads((out / "quality.json").read_text())["rows"]
    for row in rows:
        assert f"<b>{row['frechet_distance']:.3g}</b>" in report
    with Image.open(out / "samples.png") as picture:
        assert picture.size[0] > 2 * sizes[0][0]
    assert "report.html" in capsys.readouterr().out


def test_report_of_points(runs, tmp_path):
    out = tmp_path / "out"
    arguments = ["--steps", "1", "--draws", "1", "--solver", "heun", "-q", "--out", str(out)]
    assert main(["compare", str(runs / "moons"), *arguments]) == 0
    assert {file.name for file in out.iterdir()} == FILES
    assert "Real points" in (out / "report.html").read_text()
    assert json.loads((out / "quality.json").read_text())["rows"][0]["nfe"] == 2


def test_the_same_runs_give_the_same_files(runs, tmp_path):
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        arguments = ["--steps", "1", "--draws", "1", "-q", "--out", str(out)]
        assert main(["compare", str(runs / "a"), *arguments]) == 0
    for name in FILES - {"report.html"}:
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (["a"], ["--steps", "x"], "steps: must be whole numbers"),
        (["a"], ["--solver", "dopri5"], "solver: must take numbers of steps; got dopri5"),
        (["a", "a"], [], "one of them is given twice"),
        (["a", "moons"], [], "runs: moons makes samples of the shape (2,)"),
        (["nothing"], [], "holds no run"),
    ],
)
def test_bad_input(runs, tmp_path, capsys, names, options, said):
    out = tmp_path / "out"
    folders = [str(runs / name) for name in names]
    assert main(["compare", *folders, *options, "-q", "--out", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert not out.exists()


def test_a_full_folder_is_not_touched(runs, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert main(["compare", str(runs / "a"), "--out", str(tmp_path), "-q"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
