"""The tables of ``docs/recipes.md`` from the result files, and the picture beside them.

    python benchmarks/recipes/tables.py            the tables
    python benchmarks/recipes/tables.py --plots    docs/recipes.png as well (needs matplotlib)

They stand between ``<!-- table:recipes -->`` and ``<!-- /table:recipes -->``; a file that is not
there leaves its table out.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rows as files

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "recipes.md"
BEGIN, END = "<!-- table:recipes -->", "<!-- /table:recipes -->"
TITLES = {"digits": "8x8 digits", "mnist": "28x28 MNIST, 5000 images"}

Row = dict[str, str]


def read(dataset: str) -> list[Row]:
    """The rows of a data set; none without a file."""
    path = ROOT / "benchmarks" / "results" / f"recipes_{dataset}.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _count(value: str) -> str:
    return f"{float(value) / 1000:.0f}k"


def _cells(rows: Iterable[Row], key: str, digits: int) -> list[str]:
    return [f"{float(row[key]):.{digits}f}" for row in rows]


def table(rows: list[Row]) -> str:
    """One line a method: cost, then the Frechet distance, the nearest-neighbour test and memorisation
    of one, two and four steps."""
    first = rows[0]
    head = ["method", "weights", "own", "teacher", "seconds"]
    head += [f"FD, {n}" for n in (1, 2, 4)] + [f"1-NN, {n}" for n in (1, 2, 4)] + ["memorised, 1"]
    lines = [head, ["---", *["--:"] * (len(head) - 1)]]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = sorted((r for r in rows if r["method"] == method), key=lambda r: int(r["steps"]))
        cost = [_count(own[0][key]) for key in ("parameters", "seen", "teacher")]
        lines.append(
            [
                method,
                *cost,
                f"{float(own[0]['seconds']):.0f}",
                *_cells(own, "frechet", 2),
                *_cells(own, "one_nn", 3),
                f"{float(own[0]['memorised']):.2f}",
            ]
        )
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    gaussian = (
        f"A Gaussian fitted to the training images has FD {float(first['gaussian_frechet']):.2f} and 1-NN "
        f"{float(first['gaussian_one_nn']):.3f}. {first['cpu']}, {first['threads']} threads, torch "
        f"{first['torch']}, commit {first['commit']}, {first['date'][:10]}."
    )
    return f"**{TITLES[first['dataset']]}.** {gaussian}\n\n{text}"


LEGEND = """Measured (`benchmarks/recipes/run.py`), every method at an equal budget: images seen in
training plus evaluations of teachers, pairs and averaged networks included, over all stages.
FD: Frechet distance of pixels to the training images, lower is better. 1-NN: accuracy of telling
samples from held-out images, 0.5 is best. At 1, 2 and 4 steps from the same noises; students of one
step are not made for more. own, teacher: evaluations of the trained network, in which a recipe's second calls and forward
derivatives show, and of all others. memorised: distance to the nearest training image over that of held-out
images, below 1 means closer. seconds: of processor time, one thread."""


def write(page: str) -> str:
    """The page with its tables made anew."""
    parts = [table(rows) for dataset in TITLES if (rows := read(dataset))]
    if not parts:
        return page
    body = "\n\n".join([LEGEND, "![one-step quality](recipes.png)", *parts])
    return files.between(page, BEGIN, END, body)


def plot(target: Path) -> None:
    """One-step and four-step Frechet distance of every method, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sets = [(TITLES[name], rows) for name in TITLES if (rows := read(name))]
    heights = [len({r["method"] for r in rows}) for _, rows in sets]
    figure, axes = plt.subplots(
        len(sets),
        1,
        figsize=(8, 1.2 + 0.32 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, rows) in zip(axes[:, 0], sets, strict=True):
        methods = list(dict.fromkeys(r["method"] for r in rows))
        for steps, marker, colour in (
            ("1", "o", "#0072B2"),
            ("2", "s", "#009E73"),
            ("4", "^", "#D55E00"),
        ):
            values = {r["method"]: float(r["frechet"]) for r in rows if r["steps"] == steps}
            axis.scatter(
                [values[m] for m in methods],
                range(len(methods)),
                marker=marker,
                color=colour,
                label=f"{steps} step" + ("" if steps == "1" else "s"),
            )
        gaussian = float(rows[0]["gaussian_frechet"])
        axis.axvline(gaussian, color="0.6", linestyle=":", label="fitted Gaussian")
        axis.set_xscale("log")
        axis.set_yticks(range(len(methods)), methods)
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(f"{title}: Frechet distance of pixels", loc="left", fontsize=10)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(target, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plots", action="store_true", help="docs/recipes.png as well")
    options = parser.parse_args()
    files.replace_file(PAGE, write(PAGE.read_text()).encode())
    if options.plots:
        plot(ROOT / "docs" / "recipes.png")


if __name__ == "__main__":
    main()
