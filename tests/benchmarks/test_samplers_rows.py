"""The committed rows of the samplers' benchmark are what the solvers do today: those on the ring, measured again."""

import csv
from pathlib import Path

import pytest
import torch

from rfkernels.sampling import sample

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (ROOT / "benchmarks", ROOT / "benchmarks" / "samplers")
MOST = 30  # evaluations; rows with more take longer and show no more


def test_the_rows_of_the_ring_are_those_of_the_solvers_as_they_are():
    """From the same noises, in float64: a hundredth is far more than rounding and less than another solver."""
    import run

    with (ROOT / "benchmarks" / "results" / "samplers.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["field"] == "ring"]
    flow = run.ring(int(rows[0]["samples"]))
    solver, steps = flow.exact
    truth = sample(flow.velocity, flow.noise, steps=steps, solver=solver)
    adaptive = [row for row in rows if row["solver"] == "dopri5"]
    for row, tolerance in zip(adaptive, run.TOLERANCES, strict=True):
        row["options"] = {"rtol": tolerance, "atol": tolerance}
    checked, stale = set(), []
    for row in rows:
        if row["grid"] != "uniform" or float(row["nfe"]) > MOST:
            continue
        options = row.get("options") or {"steps": int(row["steps"])}
        back = row["round_trip"] != ""
        with torch.no_grad():
            line = run.one(flow, truth, row["solver"], back=back, **options)
        for column in ("nfe", "error", "round_trip", "energy"):
            now, then = (float(value or 0) for value in (line.get(column), row[column]))
            if now != pytest.approx(then, rel=0.01):
                stale.append(f"{row['solver']} {row['nfe']} {column}: {then} is now {now}")
        checked.add(row["solver"])
    assert checked == set(run.SHOWN)
    assert not stale, "; ".join(stale)
