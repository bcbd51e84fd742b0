"""`--grid optimised`: made once for a run's weights, kept in its folder, used by sample, invert and --compare."""

import json
import shutil

import numpy as np
import pytest
import torch

from rfkernels.cli.main import main
from rfkernels.data import digits
from rfkernels.metrics.drawer import Drawer
from rfkernels.sampling import OptimisedGrid, invert, optimise_grid
from rfkernels.training import load

SMALL = ["--batch-size", "32", "--model-option", "width=32", "--model-option", "depth=1", "-q"]


def train(folder, *options):
    return main(["train", "--dataset", "digits", "--run", str(folder), *SMALL, *options])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert train(folder, "--steps", "6", "--conditional", "--set", "checkpoint_every=3") == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def sample(run, *options, grid="optimised"):
    out = run.parent / "x.npz"
    words = ["sample", str(run), "--grid", grid, "-n", "4", "--steps", "4", "--force"]
    assert main([*words, "--out", str(out), *options]) == 0
    return np.load(out)["x"]


def test_it_is_made_once_and_kept_beside_the_checkpoint(run, capsys):
    file = run / "grid.json"
    x = sample(run)
    said = capsys.readouterr().out
    assert f"Optimised grid: 48 network evaluations of 64 noises, kept in {file}" in said
    kept = json.loads(file.read_text())
    assert kept["made_for"]["checkpoint"] == "step-6"
    assert kept["made_for"]["weights"] == "ema"
    state = json.loads((run / "checkpoints" / "step-6" / "state.json").read_text())
    assert kept["made_for"]["sha256"] == state["sha256"]["ema.safetensors"]
    again = sample(run)
    assert "Optimised grid" not in capsys.readouterr().out
    np.testing.assert_array_equal(again, x)
    # It is what the file says that is used.
    grid = OptimisedGrid.load(file)
    drawer = Drawer(load(run, device="cpu"))
    drawn, _ = drawer.draw(torch.arange(4), seed=0, steps=4, grid=grid)
    np.testing.assert_array_equal(x, drawn.numpy())
    assert np.abs(sample(run, grid="uniform") - x).max() > 1e-3
    OptimisedGrid((0.0, 0.5, 1.0), (1.0, 9.0)).save(file, made_for=kept["made_for"])
    assert np.abs(sample(run) - x).max() > 1e-3


def test_it_is_the_grid_of_the_runs_own_velocity(run):
    sample(run, "-q")
    drawer = Drawer(load(run, device="cpu"))
    index = torch.arange(400)
    with torch.no_grad():
        expected = optimise_grid(
            drawer.velocity, drawer.noise(index, 5), order=2, condition={"y": index % 10}
        )
    # Other noises, and more of them, tell much the same: to a step of its own fine run.
    times = OptimisedGrid.load(run / "grid.json").times(8, 0.0, 1.0)
    np.testing.assert_allclose(times, expected.times(8, 0.0, 1.0), atol=0.02)


def test_other_weights_and_other_guidance_have_another(run, capsys):
    file = run / "grid.json"
    sample(run, "-q")
    first = json.loads(file.read_text())
    assert capsys.readouterr().out == ""
    sample(run, "--guidance", "3")
    assert "96 network evaluations of 64 noises" in capsys.readouterr().out  # guided ones cost two
    second = json.loads(file.read_text())
    assert second["made_for"]["guidance"] == 3
    assert second["knots"] == first["knots"]
    assert second["density"] != first["density"]
    sample(run, "--guidance", "1")
    assert json.loads(file.read_text()) == first
    # An older checkpoint of the same run has weights of its own.
    shutil.rmtree(run / "checkpoints" / "step-6")
    capsys.readouterr()
    sample(run)
    assert "48 network evaluations" in capsys.readouterr().out
    third = json.loads(file.read_text())
    assert third["made_for"]["checkpoint"] == "step-3"
    assert third["density"] != first["density"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"made_for": null}', None])
def test_a_damaged_file_is_made_again(text, run, capsys):
    file = run / "grid.json"
    x = sample(run)
    whole = file.read_bytes()
    made_for = json.loads(whole)["made_for"]
    file.write_text(json.dumps({"made_for": made_for, "knots": [1, 0]}) if text is None else text)
    capsys.readouterr()
    np.testing.assert_array_equal(sample(run), x)
    assert "Optimised grid: 48" in capsys.readouterr().out
    assert file.read_bytes() == whole


def test_a_run_that_may_not_be_written_is_sampled_all_the_same(run, capsys, monkeypatch):
    x = sample(run)
    (run / "grid.json").unlink()

    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", "grid.json")

    monkeypatch.setattr(OptimisedGrid, "save", refuse)
    capsys.readouterr()
    np.testing.assert_array_equal(sample(run), x)
    assert "not kept: " in capsys.readouterr().out
    assert not (run / "grid.json").exists()


def test_compare_and_invert_take_it_too(run, capsys, monkeypatch):
    asked, original = [], Drawer.draw

    def draw(self, index, **options):
        asked.append((options["solver"], options["grid"]))
        return original(self, index, **options)

    monkeypatch.setattr(Drawer, "draw", draw)
    out = ["--force", "--out", str(run.parent / "x.png"), "--grid", "optimised"]
    words = ["--compare", "--solver", "euler,heun,dopri5", "--nfe", "4", "-n", "2"]
    assert main(["sample", str(run), *words, *out]) == 0
    grid = OptimisedGrid.load(run / "grid.json")
    assert asked == [("euler", grid), ("heun", grid), ("dopri5", None)]
    noise = run.parent / "noise.npz"
    words = ["invert", str(run), "--in", "digits", "-n", "6", "--steps", "6", "--force"]
    found = []
    for name in ("optimised", "karras"):
        assert main([*words, "--grid", name, "--out", str(noise)]) == 0
        found.append(np.load(noise)["x0"])
    assert capsys.readouterr().out.count("Optimised grid") == 1
    read = digits().rows(torch.arange(6))
    given = {"condition": {"y": read.labels}, "steps": 6, "solver": "fireflow", "grid": grid}
    velocity = Drawer(load(run, device="cpu")).velocity
    with torch.no_grad():
        expected = invert(velocity, read.x, **given).numpy()
    np.testing.assert_allclose(found[0], expected, atol=1e-6)
    assert np.abs(found[1] - expected).max() > 1e-4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sample", "--solver", "dopri5"], "dopri5 chooses its own times; leave --grid out"),
        (["invert", "--in", "digits", "--solver", "dopri5"], "dopri5 chooses its own times"),
        (["sample", "--shift", "2"], "give it or shift, not both; got 'optimised' and 2"),
        (["invert", "--in", "digits", "--shift", "2"], "give it or shift, not both"),
        (["sample", "--grid", "optimized"], "got 'optimized'; or optimised, made for the run"),
    ],
)
def test_refused(arguments, said, run, capsys):
    command, *rest = arguments
    out = run.parent / "never.npz"
    assert main([command, str(run), "--grid", "optimised", *rest, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not out.exists()
    assert not (run / "grid.json").exists()
