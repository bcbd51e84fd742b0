"""`rfkernels sample --compare` and other grids and solvers, and `rfkernels invert`, on tiny networks."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rfkernels.cli.main import main
from rfkernels.sampling import SOLVERS

TINY = [
    "--steps",
    "8",
    "--batch-size",
    "32",
    "--model-option",
    "width=32",
    "--model-option",
    "depth=1",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train = ["train", "--quiet", *TINY, "--dataset"]
    assert main([*train, "digits", "--run", str(folder / "plain")]) == 0
    assert main([*train, "digits", "--conditional", "--run", str(folder / "labels")]) == 0
    assert main([*train, "moons", "--run", str(folder / "points")]) == 0
    return folder


def size_of(picture):
    with pytest.importorskip("PIL.Image").open(picture) as image:
        return image.size


def test_one_picture_of_every_solver(runs, tmp_path, capsys):
    out = tmp_path / "solvers.png"
    assert main(["sample", str(runs / "plain"), "--compare", "--out", str(out), "-n", "4"]) == 0
    shown = len(SOLVERS) - 3  # without those that need another kind of network
    assert f"4 noises, {shown} solvers, 4,8,16 network evaluations" in capsys.readouterr().out
    wide, high = size_of(out)
    assert high > wide


def test_chosen_solvers_counts_and_guidance(runs, tmp_path, monkeypatch):
    from rfkernels.metrics.drawer import Drawer

    asked, original = [], Drawer.draw

    def draw(self, index, **options):
        asked.append((options["solver"], options["steps"], options["grid"]))
        return original(self, index, **options)

    monkeypatch.setattr(Drawer, "draw", draw)
    options = ["--solver", "euler,heun,rk4,fireflow,dopri5", "--nfe", "2,8", "--grid", "beta"]
    out = tmp_path / "few.png"
    assert main([
        "sample", str(runs / "labels"), "--compare", *options, "--guidance", "2", "--out", str(out), "-q",
    ]) == 0  # fmt: skip
    # Guided steps cost twice: of 2 evaluations heun, rk4 and fireflow make no step.
    assert asked == [
        ("euler", 1, "beta"), ("euler", 4, "beta"), ("heun", 2, "beta"), ("rk4", 1, "beta"),
        ("fireflow", 3, "beta"), ("dopri5", None, None),
    ]  # fmt: skip
    out = tmp_path / "points.png"
    assert (
        main(["sample", str(runs / "points"), "--compare", "--solver", "sde", "--out", str(out)])
        == 0
    )
    assert out.stat().st_size > 1000


@pytest.mark.parametrize("solver", ["sde", "unipc", "fireflow"])
def test_sample_i_is_the_same_whatever_else_is_drawn(solver, runs, tmp_path):
    files = []
    for n in (3, 6):
        files.append(tmp_path / f"{n}.npz")
        options = ["--solver", solver, "--grid", "karras", "--steps", "4", "--batch", "4", "-q"]
        assert (
            main(["sample", str(runs / "plain"), "-n", str(n), "--out", str(files[-1]), *options])
            == 0
        )
    few, more = (np.load(file)["x"] for file in files)
    np.testing.assert_allclose(few, more[:3], atol=1e-6)


def test_invert_finds_the_noise_of_its_own_samples(runs, tmp_path, capsys):
    images, noise, again = tmp_path / "x.npz", tmp_path / "noise.safetensors", tmp_path / "n.npz"
    run = str(runs / "labels")
    assert (
        main(["sample", run, "-n", "12", "--solver", "heun", "--steps", "64", "--out", str(images)])
        == 0
    )
    assert main(["invert", run, "--in", str(images), "--out", str(noise), "--batch", "5"]) == 0
    said = capsys.readouterr().out
    assert "12 images, network evaluations for each way: 33. Round trip error" in said
    found = load_file(noise)
    assert sorted(found) == ["labels", "round_trip", "x0"]
    assert found["labels"].tolist() == [i % 10 for i in range(12)]
    assert found["round_trip"].max() < 1e-3
    from rfkernels.metrics.drawer import Drawer
    from rfkernels.training import load

    true = Drawer(load(run, device="cpu")).noise(torch.arange(12), 0)
    torch.testing.assert_close(found["x0"], true, rtol=0, atol=5e-3)
    # Uni-Inv goes back by Euler.
    options = ["--solver", "uni-inv", "--steps", "20", "--label", "3", "-n", "4"]
    assert main(["invert", run, "--in", str(images), "--out", str(again), *options]) == 0
    assert "for each way: 20.5." in capsys.readouterr().out
    assert np.load(again)["labels"].tolist() == [3] * 4


def test_invert_reads_folders_of_images_at_the_runs_size(runs, tmp_path):
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (16, 16), dtype=np.uint8)
        image.fromarray(pixels).save(folder / f"{i}.png")
    out = tmp_path / "noise.npz"
    assert main(["invert", str(runs / "plain"), "--in", str(folder), "--out", str(out), "-q"]) == 0
    assert np.load(out)["x0"].shape == (3, 1, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sample", "plain", "--compare", "--out", "x.npz"], "out: must end in .png"),
        (
            ["sample", "plain", "--compare", "--steps", "3", "--out", "x.png"],
            "leave it out with --compare",
        ),
        (
            ["sample", "plain", "--compare", "--nfe", "4,x", "--out", "x.png"],
            "nfe: must be whole numbers",
        ),
        (["sample", "plain", "--nfe", "8", "--out", "x.png"], "nfe: belongs to --compare"),
        (
            ["sample", "plain", "--compare", "--nfe", "0", "--out", "x.png"],
            "nfe: must be at least 1; got 0",
        ),
        (
            ["sample", "plain", "--compare", "--solver", "rk4", "--nfe", "2", "--out", "x.png"],
            "nfe: must allow a step",
        ),
        (["sample", "plain", "--compare", "--solver", "rk5", "--out", "x.png"], "got 'rk5'"),
        (
            ["sample", "plain", "--grid", "beta", "--shift", "2", "--out", "x.png"],
            "not both; got 'beta'",
        ),
        (
            ["sample", "plain", "--grid", "log", "--out", "x.png"],
            "grid must be one of uniform, shifted",
        ),
        (
            ["invert", "plain", "--in", "digits", "--out", "x.png"],
            "out: must end in .safetensors, .npz",
        ),
        (
            ["invert", "plain", "--in", "moons", "--out", "x.npz"],
            "must have the run's shape, (1, 8, 8)",
        ),
        (["invert", "points", "--in", "moons", "--out", "x.npz"], "which has no end; got None"),
        (
            ["invert", "plain", "--in", "digits", "--out", "x.npz", "--solver", "sde"],
            "must be deterministic",
        ),
        (
            ["invert", "plain", "--in", "digits", "--out", "x.npz", "-n", "0"],
            "n: must be at least 1; got 0",
        ),
        (["invert", "plain", "--in", "nothing", "--out", "x.npz"], "got 'nothing'"),
    ],
)
def test_refused(arguments, said, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments[1] = str(runs / arguments[1])
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
