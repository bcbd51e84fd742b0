"""Trains every method of ``methods.py`` at an equal budget and measures one-, two- and four-step samples.

    python benchmarks/recipes/run.py digits --runs FOLDER --out benchmarks/results/recipes_digits.csv
    python benchmarks/recipes/run.py mnist --runs FOLDER --out benchmarks/results/recipes_mnist.csv

Runs lie in FOLDER and are made once; a second call measures what is there and trains what is missing.
Samples of all methods come from the same noises. ``frechet`` and ``one_nn`` are of pixels;
``memorised`` is the mean distance to the nearest training image over that of held-out images.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rows as files
import torch
from machine import environment
from methods import BUDGETS, METHODS, Bench

from rfkernels import metrics, training

STEPS = (1, 2, 4)
# On MNIST: the flow, its reflow, the distilled one and the small student.
OF_MNIST = ("1-RF", "2-RF", "2-RF distilled", "SlimFlow, small", "2-RF distilled, small")
COLUMNS = (
    *("dataset", "method", "parameters", "seen", "teacher", "seconds", "solver", "steps", "nfe"),
    *("frechet", "one_nn", "energy", "memorised", "gaussian_frechet", "gaussian_one_nn"),
    *("rfkernels", "torch", "isa", "threads", "cpu", "commit", "date"),
)


def measure(bench: Bench, name: str, folder: Path, draws: int) -> list[dict[str, str]]:
    """The rows of one method."""
    run = training.load(folder)
    found = metrics.evaluate(
        {name: run}, bench.budget.dataset, steps=STEPS, draws=draws, progress=True
    )
    counts = bench.counts()
    machine = environment("cpu")
    lines = []
    for row in found.rows:
        value = row.values
        line = {
            "dataset": bench.budget.dataset,
            "method": name,
            "parameters": sum(p.numel() for p in run.model.parameters()),
            "seen": int(counts["seen"]),
            "teacher": int(counts["teacher"]),
            "seconds": round(counts["seconds"], 1),
            "solver": row.solver,
            "steps": row.steps,
            "nfe": row.nfe,
            "frechet": f"{value['frechet_distance']:.4g}",
            "one_nn": f"{value['one_nn_accuracy']:.4f}",
            "energy": f"{value['energy_distance']:.4g}",
            "memorised": f"{value['memorisation_ratio']:.3f}",
            "gaussian_frechet": f"{found.gaussian['frechet_distance']:.4g}",
            "gaussian_one_nn": f"{found.gaussian['one_nn_accuracy']:.4f}",
        }
        lines.append({key: str(line.get(key, machine.get(key, ""))) for key in COLUMNS})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("budget", choices=sorted(BUDGETS))
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--out", type=Path, required=True, help="the CSV file")
    parser.add_argument("--only", nargs="*", help="methods by name; others keep their rows")
    parser.add_argument("--draws", type=int, default=5, help="sets of samples")
    options = parser.parse_args()
    names = options.only or (OF_MNIST if options.budget == "mnist" else tuple(METHODS))
    lines: list[dict[str, str]] = []
    if options.out.is_file():
        with options.out.open(newline="") as stream:
            lines = [row for row in csv.DictReader(stream) if row["method"] not in names]
    torch.manual_seed(0)
    for name in names:
        bench = Bench(BUDGETS[options.budget], options.runs)
        folder = METHODS[name](bench)
        lines += measure(bench, name, folder, options.draws)
        files.write(options.out, lines, COLUMNS)


if __name__ == "__main__":
    main()
