"""The table of ``docs/samplers.md`` and its picture from the result file.

    python benchmarks/samplers/tables.py benchmarks/results/samplers.csv --into docs/samplers.md
    python benchmarks/samplers/tables.py benchmarks/results/samplers.csv --plot docs/samplers.png

The tables stand between ``<!-- table:samplers -->`` and ``<!-- /table:samplers -->``. The picture needs
matplotlib.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rows as files

BEGIN, END = "<!-- table:samplers -->", "<!-- /table:samplers -->"
COUNTS = (4, 8, 16, 32, 64)

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """The rows of the result file."""
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def value_within(rows: list[Row], nfe: int, key: str) -> str:
    """The number of the row with the most evaluations up to ``nfe``; "" without one."""
    fitting = [row for row in rows if float(row["nfe"]) <= nfe and row[key]]
    return max(fitting, key=lambda row: float(row["nfe"]))[key] if fitting else ""


def _table(title: str, names: list[str], cells: list[list[str]], *, bold: bool = True) -> str:
    """Markdown, with the least number of every column in bold where that means something."""
    best = [
        min((float(c) for c in column if c), default=None) for column in zip(*cells, strict=True)
    ]
    lines = [f"| {title} | " + " | ".join(map(str, COUNTS)) + " |"]
    lines.append("|---|" + "--:|" * len(COUNTS))
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
    """One block a field: error, round trip, energy of noisy samplers, and grids."""
    blocks = []
    for field in dict.fromkeys(row["field"] for row in rows):
        own = [row for row in rows if row["field"] == field]
        even = [row for row in own if row["grid"] == "uniform"]
        solvers = list(dict.fromkeys(row["solver"] for row in even))
        exact = [s for s in solvers if any(r["error"] for r in even if r["solver"] == s)]
        first = own[0]
        blocks.append(
            f"**{field}**, {first['samples']} noises, torch {first['torch']}, commit "
            f"{first['commit'] or 'unknown'}, {first['date'][:10]}. Columns are evaluations."
        )

        def cells(key: str, names: list[str], even: list[Row] = even) -> list[list[str]]:
            return [
                [value_within([r for r in even if r["solver"] == name], n, key) for n in COUNTS]
                for name in names
            ]

        blocks.append(_table("error of the end point", exact, cells("error", exact)))
        blocks.append(_table("round trip, each way", exact, cells("round_trip", exact)))
        # Differences of the size of its scatter about 0: no winner to mark.
        blocks.append(
            _table("energy distance to data", solvers, cells("energy", solvers), bold=False)
        )
        pairs = [
            (row["solver"], row["grid"])
            for row in own
            if row["solver"] in {r["solver"] for r in own if r["grid"] != "uniform"}
        ]
        pairs = sorted(dict.fromkeys(pairs), key=lambda pair: solvers.index(pair[0]))
        grids = [
            [
                value_within([r for r in own if (r["solver"], r["grid"]) == pair], n, "error")
                for n in COUNTS
            ]
            for pair in pairs
        ]
        blocks.append(_table("error, by grid", [", ".join(pair) for pair in pairs], grids))
    return "\n\n".join(blocks)


def plot(rows: list[Row], path: Path) -> None:
    """Error against evaluations, a panel a field, both axes logarithmic."""
    from matplotlib.figure import Figure

    fields = list(dict.fromkeys(row["field"] for row in rows))
    figure = Figure(figsize=(5.5 * len(fields), 4.6), dpi=150, layout="constrained")
    for axes, field in zip(figure.subplots(1, len(fields), squeeze=False)[0], fields, strict=True):
        own = [r for r in rows if r["field"] == field and r["grid"] == "uniform" and r["error"]]
        for i, solver in enumerate(dict.fromkeys(row["solver"] for row in own)):
            points = sorted(
                (float(r["nfe"]), float(r["error"])) for r in own if r["solver"] == solver
            )
            style = ("-", "--", ":")[i // 6]
            axes.loglog(*zip(*points, strict=True), style, marker="o", markersize=3, label=solver)
        axes.set_title(field)
        axes.set_xlabel("evaluations of the network")
        axes.set_ylabel("rms error of the end point")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path)


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
