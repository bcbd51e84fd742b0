"""The demo's machinery with networks too small to learn: files, report, targets; and its pictures and measures."""

import dataclasses
import io
import json
import re
import shlex

import pytest
import torch
from PIL import Image

from rfkernels.cli import demo_run
from rfkernels.cli.main import main
from rfkernels.cli.pictures import one_grid, sample_rows
from rfkernels.cli.quality import STEPS, Yardstick
from rfkernels.data import digits

EASY = demo_run.Target(gain=0.0, frechet=1e9, one_nn_many=1.0, one_nn_one=1.0)
TINY = demo_run.Budget(
    width=16, steps=(4, 3, 2), pairs=64, held_out=60, draws=1, target=EASY, pair_steps=1
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(demo_run.BUDGETS, ("digits", "small"), TINY)


def test_demo_writes_everything(tiny, tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--budget", "small", "--out", str(out), "-q"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["training images"] == 1797 - 60
    assert {(r["model"], r["steps"]) for r in results["quality"]} == {
        *((m, n) for m in demo_run.MODELS for n in STEPS), ("fitted Gaussian", None)
    }  # fmt: skip
    assert all(check["holds"] for check in results["checks"])
    assert set(results["transport_cost"]) == {"independent", "1-RF", "2-RF"}
    report = (out / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:)', report)
    assert "<script" not in report
    assert "$" not in re.sub(r"base64,[^\"]*", "", report)
    for name in ("samples.png", "quality.png"):
        Image.open(out / name).verify()
    assert len((out / "quality.csv").read_text().splitlines()) == 1 + 3 * len(STEPS) + 1
    text = capsys.readouterr().out
    assert "fitted Gaussian" in text
    assert "held-out images" in text

    before = (out / "2-rf" / "config.json").read_bytes()
    assert main(["demo", "--budget", "small", "--out", str(out), "-q"]) == 2
    assert main(["demo", "--budget", "small", "--out", str(out), "-q", "--resume"]) == 0
    assert (out / "2-rf" / "config.json").read_bytes() == before
    assert json.loads((out / "results.json").read_text())["quality"] == results["quality"]
    assert (
        main(["demo", "--budget", "small", "--out", str(out), "-q", "--resume", "--seed", "1"]) == 2
    )


def test_the_demos_runs_are_sampled_inverted_and_edited(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(demo_run.BUDGETS, ("digits", "full"), TINY)
    assert main(["demo", "--out", "demo", "-q"]) == 0
    said = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    shown = [shlex.split(line)[1:] for line in said if line.startswith("rfkernels ")]
    assert [words[0] for words in shown] == ["sample", "sample", "edit"]
    assert main(shown[0]) == 0
    assert main([*shown[1], "--solver", "euler,ab2", "--nfe", "4"]) == 0
    assert main([*shown[2], "--steps", "4", "--set", "n_max=4"]) == 0
    for run in ("1-rf", "2-rf"):
        words = ["--in", "digits", "-n", "4", "--steps", "4", "--force", "--out", "x0.npz"]
        assert main(["invert", f"demo/{run}", *words]) == 0
        words = ["--in", "digits", "-n", "4", "--target-label", "8", "--force", "--out", "e.png"]
        assert main(["edit", f"demo/{run}", *words]) == 0
    capsys.readouterr()
    assert main(["sample", "demo", "--out", "x.png"]) == 2
    assert "; the runs in it are 1-rf, 2-rf, distilled" in capsys.readouterr().err


def test_a_missed_target_is_said_and_fails(monkeypatch, tmp_path, capsys):
    hard = dataclasses.replace(TINY, target=dataclasses.replace(EASY, frechet=0.0))
    monkeypatch.setitem(demo_run.BUDGETS, ("digits", "small"), hard)
    assert main(["demo", "--budget", "small", "--out", str(tmp_path / "demo"), "-q"]) == 1
    assert "Missed: Frechet distance, 2-RF, 1 step" in capsys.readouterr().out


def test_without_out_an_earlier_demo_stays(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rfkernels-demo").mkdir()
    assert main(["demo", "--budget", "small", "-q"]) == 0
    assert not list((tmp_path / "rfkernels-demo").iterdir())
    assert (tmp_path / "rfkernels-demo-2" / "report.html").exists()


def test_pixels_are_enlarged_whole():
    """Every tile of the grid is its image, each pixel a square of one colour."""
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with Image.open(io.BytesIO(one_grid(x))) as image:
        assert image.size == (102, 102)
        tile = torch.tensor(list(image.convert("L").crop((2, 2, 50, 50)).tobytes())).reshape(48, 48)
    expected = (
        ((x[0, 0] + 1) * 127.5)
        .round()
        .to(torch.int64)
        .repeat_interleave(6, 0)
        .repeat_interleave(6, 1)
    )
    assert torch.equal(tile, expected)


def test_rows_keep_the_columns_aligned():
    white, black = torch.ones(3, 1, 8, 8), -torch.ones(3, 1, 8, 8)
    with Image.open(
        io.BytesIO(sample_rows([("a", "#d55e00", [("1 step", white), ("2 steps", black)])]))
    ) as image:
        right = image.convert("L").crop((118, 0, image.width, image.height))
    columns = torch.tensor(list(right.tobytes())).reshape(right.height, right.width)
    dark = (columns == 0).all(0) if (columns == 0).all(0).any() else (columns == 0).any(0)
    starts = [i for i in range(1, len(dark)) if dark[i] and not dark[i - 1]]
    assert len(starts) in (2, 3)
    assert bool(dark[0])


def test_the_measures_fail_differently():
    """A fitted Gaussian passes the Frechet distance and fails the 1-NN test; copies show in the third measure."""
    x = digits().x
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held_out = x[order[297:]], x[order[:297]]
    yardstick = Yardstick(train, held_out, draws=4)
    gaussian = yardstick.measure(yardstick.gaussian(seed=0))
    assert gaussian.frechet < 0.2
    assert gaussian.one_nn > 0.78
    copies = yardstick.measure(train[: yardstick.count])
    assert copies.nearest == pytest.approx(0, abs=1e-3)
    assert copies.one_nn < 0.56
    assert yardstick.held_out_nearest() > 1.5


def test_large_images_are_compared_after_averaging():
    """A 64 x 64 image whose squares of 2 x 2 pixels are constant measures as its 32 x 32 original."""
    small = torch.rand(40, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    plain = Yardstick(small[:20], small[20:30], draws=1).measure(small[30:])
    averaged = Yardstick(large[:20], large[20:30], draws=1).measure(large[30:])
    assert averaged.frechet == pytest.approx(plain.frechet, rel=1e-4)
    assert averaged.nearest == pytest.approx(plain.nearest, rel=1e-4)
