"""What `rfkernels sample --compare` shows and says, on tiny networks; and the tables of pictures it draws."""

import io
import re

import pytest
import torch

from rfkernels.cli import pictures
from rfkernels.cli.main import main
from rfkernels.metrics.drawer import Drawer
from rfkernels.sampling import SOLVERS, Dopri5
from rfkernels.training import load

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    small = ["--steps", "8", "--batch-size", "32", "--model-option", "width=32", "--conditional"]
    assert main(["train", "-q", *small, "--dataset", "digits", "--run", str(folder)]) == 0
    return folder


@pytest.fixture
def table(monkeypatch):
    """The arguments of the table of pictures that was drawn last."""
    seen, original = {}, pictures.grid_table

    def grid_table(columns, rows, cells, across):
        seen.update(columns=[title for title, _ in columns], rows=rows, cells=cells, across=across)
        return original(columns, rows, cells, across)

    monkeypatch.setattr(pictures, "grid_table", grid_table)
    return seen


def compare(run, out, *options):
    return main(["sample", str(run), "--compare", "--out", str(out), *options])


def test_by_default_every_solver_stands_in_a_line_of_eight(run, table, tmp_path, capsys):
    assert compare(run, tmp_path / "x.png") == 0
    assert table["across"] == 8
    assert table["columns"] == ["4 evaluations", "8 evaluations", "16 evaluations"]
    names = [row.partition("\n")[0] for row in table["rows"]]
    assert set(names) == set(SOLVERS) - {"curved-euler", "rf++", "flow-map"}
    noisy = {row.partition("\n")[0] for row in table["rows"] if row.endswith("\nwith noise")}
    assert noisy == {"ancestral", "sde", "renoise"}
    assert all(len(x) == 8 for row in table["cells"] for x in row if x is not None)
    assert "8 noises, 15 solvers, 4,8,16 network evaluations" in capsys.readouterr().out


def test_places_that_allow_no_step_say_what_it_takes(run, table, tmp_path):
    options = ["--solver", "rk4,ab2", "--nfe", "2,8", "--guidance", "2", "-n", "2", "-q"]
    assert compare(run, tmp_path / "x.png", *options) == 0
    assert table["rows"] == ["rk4", "ab2"]
    assert table["cells"][0][0] == "a step takes 8"
    assert table["cells"][0][1].shape == (2, 1, 8, 8)
    assert table["cells"][1][0] == "a step takes 4"


def test_distances_are_those_to_the_adaptive_solver(run, table, tmp_path, capsys):
    options = ["--solver", "euler,heun,sde,dopri5", "--nfe", "1,4", "-n", "6", "--seed", "3"]
    assert compare(run, tmp_path / "x.png", *options) == 0
    said = capsys.readouterr().out
    drawer, index = Drawer(load(run, device="cpu")), torch.arange(6)
    exact, cost = drawer.draw(index, seed=3, solver="dopri5", steps=None)
    assert table["rows"][-1] == f"dopri5\n{cost:.0f} evaluations"
    assert table["cells"][-1][0] is None
    torch.testing.assert_close(table["cells"][-1][1], exact)

    def distance(solver, steps):
        x, _ = drawer.draw(index, seed=3, solver=solver, steps=steps)
        return f"{float((x - exact).pow(2).mean().sqrt()):.2g}"

    lines = {
        cells[0]: cells[1:]
        for line in said.splitlines()
        if line.startswith("│")
        for cells in [[cell.strip() for cell in line.strip("│").split("│")]]
    }
    assert lines == {
        "euler": [distance("euler", 1), distance("euler", 4)],
        "heun": ["", distance("heun", 2)],
    }
    assert compare(run, tmp_path / "y.png", "--solver", "heun") == 0  # nothing to compare it with
    assert "│" not in capsys.readouterr().out
    assert table["rows"] == ["heun"]


@pytest.fixture
def _gives_up(monkeypatch):
    monkeypatch.setitem(SOLVERS, "dopri5", lambda: Dopri5(max_steps=1))


@pytest.mark.usefixtures("_gives_up")
@pytest.mark.parametrize("command", ["sample", "invert"])
def test_an_adaptive_solver_that_gives_up_is_one_line(command, run, tmp_path, capsys):
    images = ["--in", "digits", "-n", "1"] if command == "invert" else ["-n", "1"]
    out = tmp_path / "x.npz"
    assert main([command, str(run), *images, "--solver", "dopri5", "--out", str(out), "-q"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"rfkernels {command}: dopri5: samples must finish within max_steps, 1;")
    assert not out.exists()


@pytest.mark.usefixtures("_gives_up")
def test_an_adaptive_solver_that_gives_up_leaves_the_others(run, table, tmp_path):
    assert compare(run, tmp_path / "x.png", "--solver", "euler,dopri5", "--nfe", "2") == 0
    assert table["rows"] == ["euler", "dopri5"]
    assert table["cells"][1] == ["does not reach its tolerances"]


def test_one_solver_of_points_with_an_empty_place(tmp_path):
    folder = tmp_path / "points"
    small = ["--steps", "4", "--batch-size", "32", "--model-option", "width=16"]
    assert main(["train", "-q", *small, "--dataset", "moons", "--run", str(folder)]) == 0
    options = ["--solver", "rk4", "--nfe", "2,4", "-n", "50", "-q"]
    assert compare(folder, tmp_path / "x.png", *options) == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width > 1.5 * picture.height


def ink(png):
    """Where a picture is not white, (H, W)."""
    with Image.open(io.BytesIO(png)) as image:
        grey = image.convert("L")
    return torch.tensor(list(grey.tobytes())).reshape(grey.height, grey.width) < 250


@pytest.mark.parametrize("label", ["ab", "a long name of a solver\n1234567 evaluations of it"])
def test_labels_and_titles_are_not_cut(label):
    x = torch.zeros(1, 1, 8, 8)
    png = pictures.grid_table([("sixteen evaluations", "#000000")], [label], [[x]], 1)
    seen = ink(png)
    assert not seen[:, :4].any()
    assert not seen[:, -4:].any()
    assert seen[:, 4:40].any()


def test_words_stand_where_there_are_no_images():
    x = torch.zeros(2, 1, 8, 8)

    def last_cell(cell):
        seen = ink(pictures.grid_table([("a", "#000000")] * 2, ["b"], [[x, cell]], 2))
        return seen[44:, seen.shape[1] - 80 :]

    assert last_cell(None).sum() == 0
    assert 0 < last_cell("a step takes 8").sum() < last_cell(x).sum()


def test_an_image_stands_above_its_edit():
    before, after = torch.ones(20, 1, 8, 8), -torch.ones(20, 1, 8, 8)
    png = pictures.beside(before, after, "To class 8")
    with Image.open(io.BytesIO(png)) as image:
        grey = image.convert("L")
    values = torch.tensor(list(grey.tobytes())).reshape(grey.height, grey.width)
    black = (values == 0).sum(0)  # every column of pixels: the edits of both lines, 48 pixels each
    assert black[118 : 118 + 4 * 52 - 4].max() == 96
    assert black[118 + 4 * 52 : 118 + 16 * 52 - 4].max() == 48
    one = ink(pictures.beside(before[:1], after[:1], "To class 8 by a method of a long name"))
    assert not one[:, -4:].any()


@pytest.mark.parametrize("command", ["sample", "invert"])
def test_the_help_names_the_grids(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([command, "--help"]) == 0
    assert re.search(r"uniform, karras, exponential, beta; or optimised", capsys.readouterr().out)
