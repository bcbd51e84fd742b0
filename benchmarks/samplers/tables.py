"""The tables of ``docs/samplers.md`` and its picture from the result file.

    python benchmarks/samplers/tables.py benchmarks/results/samplers.csv --into docs/samplers.md
    python benchmarks/samplers/tables.py benchmarks/results/samplers.csv --plot docs/samplers.png

The tables stand between ``<!-- table:samplers -->`` and ``<!-- /table:samplers -->``: one of all fields, and
a fold with the rest a field. The picture, by ``plot.py`` beside this file, needs matplotlib.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rows as files
from plot import plot

BEGIN, END = "<!-- table:samplers -->", "<!-- /table:samplers -->"
COUNTS = (4, 8, 16, 32, 64)
FEW = (4, 8, 16)  # of the table of all fields

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """The rows of the result file."""
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def value_within(rows: list[Row], nfe: int, key: str) -> str:
    """The number of the row with the most evaluations up to ``nfe``; "" without one."""
    fitting = [row for row in rows if float(row["nfe"]) <= nfe and row[key]]
    return max(fitting, key=lambda row: float(row["nfe"]))[key] if fitting else ""


def _table(heads: list[str], names: list[str], cells: list[list[str]], *, bold: bool = True) -> str:
    """Markdown, with the least number of every column in bold where that means something."""
    best = [
        min((float(c) for c in column if c), default=None) for column in zip(*cells, strict=True)
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    for name, row in zip(names, cells, strict=True):
        shown = [
            ""
            if not c
            else f"**{float(c):.2g}**"
            if bold and float(c) == least
            else f"{float(c):.2g}"
            for c, least in zip(row, best, strict=True)
        ]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def tables(rows: list[Row]) -> str:
    """The error of all fields side by side, then a fold of every field."""
    fields = list(dict.fromkeys(row["field"] for row in rows))
    return "\n\n".join((_overview(rows, fields), *(_fold(rows, field) for field in fields)))


def _even(rows: list[Row], field: str) -> list[Row]:
    return [row for row in rows if row["field"] == field and row["grid"] == "uniform"]


def _exact(rows: list[Row]) -> list[str]:
    """The solvers without noise, which have an error."""
    return list(dict.fromkeys(row["solver"] for row in rows if row["error"]))


def _cells(
    rows: list[Row], names: list[str], key: str, counts: tuple[int, ...] = COUNTS
) -> list[list[str]]:
    return [
        [value_within([r for r in rows if r["solver"] == name], n, key) for n in counts]
        for name in names
    ]


def _overview(rows: list[Row], fields: list[str]) -> str:
    # An adaptive solver's evaluations are what they are; at this few it is far from where it is meant to be.
    names = list(dict.fromkeys(r["solver"] for r in rows if r["error"] and r["steps"]))
    parts = [_cells(_even(rows, field), names, "error", FEW) for field in fields]
    cells = [[cell for part in row for cell in part] for row in zip(*parts, strict=True)]
    heads = [f"{field}, {n}" if i == 0 else str(n) for field in fields for i, n in enumerate(FEW)]
    return _table(["error of the end point", *heads], names, cells)


def _fold(rows: list[Row], field: str) -> str:
    """Error, round trip, energy of all samplers, and grids, of one field."""
    own = [row for row in rows if row["field"] == field]
    even = _even(rows, field)
    exact, solvers = _exact(even), list(dict.fromkeys(row["solver"] for row in even))
    counts = list(map(str, COUNTS))
    gridded = {row["solver"] for row in own if row["grid"] != "uniform"}
    pairs = {(r["solver"], r["grid"]): None for r in own if r["solver"] in gridded}
    order = sorted(pairs, key=lambda pair: solvers.index(pair[0]))
    grids = [
        [
            value_within([r for r in own if (r["solver"], r["grid"]) == pair], n, "error")
            for n in COUNTS
        ]
        for pair in order
    ]
    first = own[0]
    commit = first["commit"] or "unknown"
    blocks = [
        f"<details><summary>{field}: errors up to {COUNTS[-1]} evaluations, round trips, distance to the "
        f"data, other grids</summary>",
        f"{first['samples']} noises, torch {first['torch']}, commit {commit}, {first['date'][:10]}. "
        "Columns are evaluations.",
        _table(["error of the end point", *counts], exact, _cells(even, exact, "error")),
        _table(["round trip, each way", *counts], exact, _cells(even, exact, "round_trip")),
        # Differences of the size of its scatter about 0: no winner to mark.
        _table(
            ["energy distance to data", *counts],
            solvers,
            _cells(even, solvers, "energy"),
            bold=False,
        ),
        _table(["error, by grid", *counts], [", ".join(pair) for pair in order], grids),
        "</details>",
    ]
    return "\n\n".join(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the CSV file")
    parser.add_argument("--into", type=Path, help="a page with the markers")
    parser.add_argument("--plot", type=Path, help="a .png file")
    options = parser.parse_args()
    rows = read(options.file)
    if options.plot is not None:
        plot(rows, options.plot)
    text = tables(rows)
    if options.into is None:
        if options.plot is None:
            print(text)
        return
    try:
        page = files.between(options.into.read_text(encoding="utf-8"), BEGIN, END, text)
    except ValueError as error:
        parser.error(str(error))
    files.replace_file(options.into, page.encode())


if __name__ == "__main__":
    main()
