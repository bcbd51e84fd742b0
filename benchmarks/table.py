"""Tables and a plot from a result file, so that no figure in the documentation is typed by hand.

    python benchmarks/table.py results/cpu.csv                            the table on stdout
    python benchmarks/table.py results/cpu.csv --into docs/speed.md       between the markers of that file
    python benchmarks/table.py results/cpu.csv --all --into docs/x.md     every dtype and kind of memory
    python benchmarks/table.py results/cpu.csv --plot docs/ratios.png     needs matplotlib

The markers are ``<!-- bench:begin -->`` and ``<!-- bench:end -->``; what stands between them is replaced. Attention has
tables of its own: ``attention/tables.py``.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import rows as files
from rows import Row
from targets import SIZES, quickest, ratio

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_SIZE_OF = {name: size for size, name in SIZES.items()}
_MEMORY = {"new": "allocates", "out": "`out=`", "inplace": "in place"}


def table(rows: list[Row], everything: bool = False) -> str:
    """Markdown: a line of what was measured where, and one table.

    Args:
        rows: of one run on one device.
        everything: all dtypes and kinds of memory; else float32 (and the mixture), ``out=`` where the op has it.
    """
    first = rows[0]
    where = f"{first['device']} (driver {first['driver']})" if first["driver"] else first["cpu"]
    lines = [
        f"{where}, {first['threads']} threads, {first['isa']}, torch {first['torch']}, "
        f"commit {first['commit'] or 'unknown'}, {first['date'][:10]}.",
        "",
        "| op | elements | outputs | us | of a copy | x naive | x best eager (bytes allow) | x compile | error |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for place in _places(rows, everything):
        lines.append(_line(rows, place))
    return "\n".join(lines)


def _places(rows: list[Row], everything: bool) -> list[dict[str, str]]:
    """The table's lines as values of columns, in the order of the file."""
    names = ("case", "dtype", "shape_name", "memory", "backend")
    ours = [row for row in rows if row["role"] == "fused" and row["op"] != "attention"]
    places = [
        dict(zip(names, values, strict=True))
        for values in dict.fromkeys(tuple(r[n] for n in names) for r in ours)
    ]
    if everything:
        return places
    with_out = {row["case"] for row in ours if row["memory"] == "out"}
    return [
        place
        for place in places
        if place["dtype"] != "bfloat16"
        and place["memory"] == ("out" if place["case"] in with_out else "new")
    ]


def _line(rows: list[Row], place: dict[str, str]) -> str:
    ours = quickest(rows, role="fused", **place)
    shared = {name: place[name] for name in ("case", "dtype", "shape_name")}
    naive = quickest(rows, role="naive", **shared)
    best, compiled = (_rival(rows, role, place) for role in ("best", "compile"))
    limit = f" ({float(best['byte_limit']):.2f})" if best is not None and best["byte_limit"] else ""
    name = place["case"] + ("" if place["dtype"] == "float32" else f" {place['dtype']}")
    if len({row["backend"] for row in rows if row["role"] == "fused"}) > 1:
        name += f" ({place['backend']})"
    return (
        f"| {name} | {_SIZE_OF.get(place['shape_name'], place['shape_name'])} | {_MEMORY[place['memory']]} "
        f"| {float(ours['us_p50']):.1f} | {float(ours['pct_copy_peak']):.0f} % | {_times(ratio(naive, ours))} "
        f"| {_times(ratio(best, ours))}{limit} | {_times(ratio(compiled, ours))} | {ours['err_vs_ref']} |"
    )


def _rival(rows: list[Row], role: str, place: dict[str, str]) -> Row | None:
    """The quickest rival with the same kind of memory; where it has none (``randn``), of any kind."""
    shared = {name: place[name] for name in ("case", "dtype", "shape_name")}
    same = quickest(rows, role=role, memory=place["memory"], **shared)
    return same if same is not None else quickest(rows, role=role, **shared)


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def plot(rows: list[Row]) -> bytes:
    """A PNG: for every size the ratios of the best eager and of torch.compile to ours, and what bytes allow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    places = _places(rows, everything=False)
    backend = places[0]["backend"]
    places = [place for place in places if place["backend"] == backend]
    sizes = list(dict.fromkeys(place["shape_name"] for place in places))
    cases = list(dict.fromkeys(place["case"] for place in places))[::-1]  # the first at the top
    figure, axes = pyplot.subplots(
        1, len(sizes), figsize=(4 * len(sizes) + 1, 0.5 * len(cases) + 1.6), sharey=True
    )
    for axis, size in zip([axes] if len(sizes) == 1 else axes, sizes, strict=True):
        for place in (place for place in places if place["shape_name"] == size):
            y, ours = cases.index(place["case"]), quickest(rows, role="fused", **place)
            best, compiled = (_rival(rows, role, place) for role in ("best", "compile"))
            axis.barh(y + 0.2, ratio(best, ours) or 0, 0.36, color="#3465a4", label="best eager")
            axis.barh(
                y - 0.2, ratio(compiled, ours) or 0, 0.36, color="#a0a0a0", label="torch.compile"
            )
            if best is not None and best["byte_limit"]:
                limit = float(best["byte_limit"])
                axis.plot(
                    [limit, limit],
                    [y, y + 0.4],
                    color="#cc0000",
                    linewidth=2,
                    label="bytes allow (best eager)",
                )
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_title(f"{_SIZE_OF.get(size, size)} elements")
        axis.set_xscale("log")
        axis.set_xlabel("their time / ours (over 1: ours is quicker)")
        axis.set_yticks(range(len(cases)), cases)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return picture.getvalue()


def main(command_line: list[str] | None = None) -> int:
    """Writes what the options ask for; exit code 2 with one line where it cannot."""
    parser = argparse.ArgumentParser(prog="benchmarks/table.py", description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, metavar="FILE.csv")
    parser.add_argument(
        "--into", type=Path, metavar="FILE.md", help="replace what stands between its markers"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write the plot of ratios")
    parser.add_argument("--all", action="store_true", help="every dtype and kind of memory")
    options = parser.parse_args(command_line)
    try:
        rows = files.read(options.results)
        if not _places(rows, everything=True):
            raise ValueError(f"{options.results}: there is no row of this package's flow ops in it")
        content = table(rows, options.all)
        if options.into:
            text = files.between(options.into.read_text(), BEGIN, END, content)
            files.replace_file(options.into, text.encode())
        if options.plot:
            files.replace_file(options.plot, plot(rows))
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    if not (options.into or options.plot):
        print(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
