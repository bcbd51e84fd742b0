"""The tables and the picture of the samplers: on made-up figures, and the guide's against the result file."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (ROOT / "benchmarks", ROOT / "benchmarks" / "samplers")


@pytest.fixture(scope="module")
def made():
    """The module of the tables."""
    import tables

    return tables


def row(field, solver, nfe, error, *, grid="uniform", steps="1", back="0.5"):
    return {
        "field": field, "solver": solver, "grid": grid, "steps": steps, "nfe": str(nfe), "error": error,
        "round_trip": back if error else "", "energy": "0.25", "samples": "16", "torch": "2", "commit": "abc",
        "date": "2026-01-02T03:04:05Z",
    }  # fmt: skip


@pytest.fixture
def rows():
    return [
        row("ring", "euler", 4, "0.4"),
        row("ring", "euler", 8, "0.2", back=""),
        row("ring", "dopri5", 7, "0.001", steps=""),
        row("ring", "sde", 4, ""),
        row("ring", "euler", 4, "0.3", grid="beta"),
        row("other", "euler", 4, "0.1"),
        row("other", "heun", 6, "0.05"),
    ]


def test_all_fields_side_by_side_then_each_in_a_fold(made, rows):
    text = made.tables(rows)
    table = text.partition("\n\n")[0].splitlines()
    assert table == [
        "| error of the end point | ring, 4 | 8 | 16 | other, 4 | 8 | 16 |",
        "|---|--:|--:|--:|--:|--:|--:|",
        "| euler | **0.4** | **0.2** | **0.2** | **0.1** | 0.1 | 0.1 |",
        "| heun |  |  |  |  | **0.05** | **0.05** |",
    ]
    assert text.count("<details>") == text.count("</details>") == 2
    ring = text.split("<details>")[1]
    assert ring.startswith("<summary>ring:")
    assert "| dopri5 |  | **0.001** | **0.001** |" in ring
    assert "| euler | **0.5** | **0.5** |" in ring  # round trips: that at 4 stands for 8
    assert "| sde | 0.25 |" in ring
    assert "| euler, beta | **0.3** |" in ring


def test_the_picture_is_drawn(made, rows, tmp_path):
    pytest.importorskip("matplotlib")
    from plot import plot

    plot(rows, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_guide_shows_the_result_file(made):
    page = (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8")
    shown = page.partition(made.BEGIN)[2].partition(made.END)[0].strip()
    assert shown == made.tables(made.read(ROOT / "benchmarks" / "results" / "samplers.csv"))


def test_the_picture_knows_every_solver_with_an_error(made):
    from plot import LOOKS, SAME

    measured = {
        r["solver"]
        for r in made.read(ROOT / "benchmarks" / "results" / "samplers.csv")
        if r["error"]
    }
    assert measured == set(LOOKS) | set(SAME)
