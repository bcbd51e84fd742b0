"""The table of schedulers_cpu.csv: what a step of a diffusers pipeline costs outside the network, here and in diffusers.

    python benchmarks/schedulers_table.py benchmarks/results/schedulers_cpu.csv --into docs/diffusers.md

A row is a rule on one shape; columns are the two dtypes, each with our time over diffusers'.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# `python -P` leaves the script's folder out.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import rows as files

BEGIN, END = "<!-- table:schedulers -->", "<!-- /table:schedulers -->"
_PREFIX = "scheduler_"


def table(rows: list[files.Row]) -> str:
    """In Markdown, with a line that says what was measured, when and where."""
    roles: dict[tuple[str, str, str], dict[str, files.Row]] = {}
    for row in rows:
        place = row["case"].removeprefix(_PREFIX), row["shape"], row["dtype"]
        roles.setdefault(place, {})[row["role"]] = row
    dtypes = list(dict.fromkeys(dtype for _, _, dtype in roles))
    lines = [
        f"| | latents | {' | '.join(f'{dtype}: us, of diffusers' for dtype in dtypes)} | host reads here, in diffusers |",
        f"|---|---|{'--:|' * len(dtypes)}--:|",
    ]
    for case, shape in dict.fromkeys(place[:2] for place in roles):
        found = [roles[case, shape, dtype] for dtype in dtypes]
        cells = [f"{ours(pair):.1f}, {ours(pair) / theirs(pair):.2f}" for pair in found]
        reads = ", ".join(reads_of(found[0][role]) for role in ("fused", "best"))
        lines.append(f"| {case} | {shape} | {' | '.join(cells)} | {reads} |")
    first = rows[0]
    lines += [
        "",
        f"Medians on {first['threads']} cores ({first['cpu']}, {first['isa']}), torch {first['torch']}, "
        f"commit {first['commit']}, {first['date'][:10]}.",
    ]
    return "\n".join(lines)


def ours(pair: dict[str, files.Row]) -> float:
    """Microseconds a step of our scheduler."""
    return float(pair["fused"]["us_p50"])


def theirs(pair: dict[str, files.Row]) -> float:
    """Microseconds a step of diffusers'."""
    return float(pair["best"]["us_p50"])


def reads_of(row: files.Row) -> str:
    """How often a step makes the host wait, which stands in the variant."""
    return f"{float(row['variant'].split(', ')[1].split()[0]):g}"


def main() -> None:
    """Writes the table between the page's markers, or prints it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--into", type=Path, metavar="PAGE.md")
    options = parser.parse_args()
    found = table(files.read(options.csv))
    if options.into is None:
        print(found)
        return
    page = options.into.read_text(encoding="utf-8")
    options.into.write_text(files.between(page, BEGIN, END, found), encoding="utf-8")


if __name__ == "__main__":
    main()
