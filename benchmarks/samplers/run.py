"""Error against evaluations of the velocity for every solver, on a flow known exactly and on trained runs.

    python benchmarks/samplers/run.py --out benchmarks/results/samplers.csv
    python benchmarks/samplers/run.py --run runs/digits --out benchmarks/results/samplers.csv
    python benchmarks/samplers/run.py --run runs/mnist-dit --samples 64 --out benchmarks/results/samplers.csv
    python benchmarks/samplers/tables.py benchmarks/results/samplers.csv --into docs/samplers.md --plot docs/samplers.png

The commands that train the two runs are in ``benchmarks/README.md``.

``error`` is the root mean square distance per element of the end points to those of a fine run from the
same noise, and ``round_trip`` that of the data after inverting and sampling on the same grid, which costs
twice the evaluations and is measured where the tables show it; both are empty for samplers with noise.
``energy`` is the energy distance of the samples to data that were held out (on the ring to fresh draws),
which every sampler has. Numbers do not depend on the load of the machine.

With ``--run`` the rows of that run, under its folder's name, are added to the file, or replace those it has.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rows as files
import torch
from machine import environment
from torch import Tensor

import rfkernels as rf
from rfkernels.flow.closed_form import GaussianMixtureFlow
from rfkernels.metrics import energy_distance
from rfkernels.sampling import SOLVERS, get_solver, invert, optimise_grid, sample, steps_within

COLUMNS = (
    *("field", "solver", "grid", "steps", "nfe", "error", "round_trip", "energy", "samples"),
    *("rfkernels", "torch", "commit", "date"),
)
# curved-euler is Euler on the straight path; rf++ and flow-map are of other networks.
SHOWN = tuple(name for name in SOLVERS if name not in ("curved-euler", "rf++", "flow-map"))
COUNTS = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
TABLED = (4, 8, 16, 32, 64)  # with round trips, and under other grids
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
# Solvers whose grids are compared, with their order.
ON_GRIDS = {"euler": 1, "heun": 2, "ab2": 2}
GRIDS: dict[str, Any] = {
    "shift 3": 3.0,
    "karras": "karras",
    "exponential": "exponential",
    "beta": "beta",
}


@dataclass
class Flow:
    """A velocity field with what it is measured on.

    Attributes:
        name: in the file.
        velocity: velocity(x, t, **condition).
        noise: (n, ...) where samples begin.
        data: (m, ...) of the target distribution.
        condition: of the noise, row by row.
        exact: the solver and steps of the fine run that errors are measured against.
    """

    name: str
    velocity: Callable[..., Tensor]
    noise: Tensor
    data: Tensor
    condition: dict[str, Tensor]
    exact: tuple[str, int]


def ring(count: int) -> Flow:
    """Eight Gaussians on a circle, whose velocity is known, in float64."""
    flow = GaussianMixtureFlow.ring()
    noise = rf.randn(count, 2, seed=rf.derive_seed(0, "samplers"), dtype=torch.float64)
    data = flow.sample(count, seed=1, dtype=torch.float64)
    return Flow("ring", flow, noise, data, {}, ("rk4", 400))


def trained(folder: Path, count: int) -> Flow:
    """A run that starts from noise, with its own held-out data."""
    from rfkernels.metrics.drawer import Drawer
    from rfkernels.metrics.real_data import real_data
    from rfkernels.training import load

    run = load(folder, device="cpu")
    drawer = Drawer(run)
    index = torch.arange(count)
    labels = drawer.labels(index)
    condition = {} if labels is None else {"y": labels}
    data = real_data([run]).held_out
    # Not rk4, which evaluates at t = 1, next to which a network may bend its paths without end.
    exact = ("fireflow", 1600)
    return Flow(folder.name, drawer.velocity, drawer.noise(index, 0), data, condition, exact)


def root_mean_square(a: Tensor, b: Tensor) -> float:
    return (a - b).double().square().mean().sqrt().item()


def measure(flow: Flow) -> list[dict[str, Any]]:
    """The rows of every solver, and of some on other grids."""
    given = {"condition": flow.condition}
    lines = []
    with torch.no_grad():
        solver, steps = flow.exact
        truth = sample(flow.velocity, flow.noise, steps=steps, solver=solver, **given)
        half = sample(flow.velocity, flow.noise, steps=steps // 2, solver=solver, **given)
        print(f"{solver}, {steps} steps: {root_mean_square(half, truth):.2g} from half of them")
        for name in SHOWN:
            if get_solver(name).adaptive:
                lines += [one(flow, truth, name, rtol=tol, atol=tol) for tol in TOLERANCES]
                continue
            tabled = _steps(name, TABLED)
            for steps in _steps(name, COUNTS):
                lines.append(one(flow, truth, name, steps=steps, back=steps in tabled))
        few = slice(0, 64)
        for name, order in ON_GRIDS.items():
            cut = {key: value[few] for key, value in flow.condition.items()}
            optimised = optimise_grid(flow.velocity, flow.noise[few], order=order, condition=cut)
            for label, grid in {**GRIDS, "optimised": optimised}.items():
                for steps in _steps(name, TABLED):
                    lines.append(one(flow, truth, name, label, steps=steps, grid=grid, back=False))
    return lines


def _steps(name: str, counts: tuple[int, ...]) -> list[int]:
    """The numbers of steps, each once, that these numbers of evaluations allow."""
    return list(dict.fromkeys(s for n in counts if (s := steps_within(name, n)) is not None))


def one(
    flow: Flow,
    truth: Tensor,
    solver: str,
    label: str = "uniform",
    *,
    back: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """One row, with the round trip where there is a way ``back`` to measure."""
    noisy = getattr(get_solver(solver), "stochastic", False)
    seed = {"seed": 2} if noisy else {}
    options = {"solver": solver, "condition": flow.condition, **options}
    info = sample(flow.velocity, flow.noise, return_info=True, **seed, **options)
    line = {
        "field": flow.name,
        "solver": solver,
        "grid": label,
        "steps": options.get("steps", ""),
        "nfe": f"{torch.as_tensor(info.nfe).double().mean().item():g}",
        "energy": f"{energy_distance(info.x.float(), flow.data.float()):.4g}",
        "samples": len(flow.noise),
    }
    if not noisy:
        line["error"] = f"{root_mean_square(info.x, truth):.4g}"
    if back and not noisy:
        x0 = invert(flow.velocity, truth, **options)
        again = sample(flow.velocity, x0, **options)
        line["round_trip"] = f"{root_mean_square(again, truth):.4g}"
    print(*line.values(), flush=True)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a run's folder; else the ring")
    parser.add_argument("--out", type=Path, required=True, help="the CSV file")
    parser.add_argument("--samples", type=int, help="noises; 1024 on the ring, 256 of a run")
    options = parser.parse_args()
    if options.run is None:
        flow = ring(options.samples or 1024)
    else:
        flow = trained(options.run, options.samples or 256)
    lines: list[dict[str, Any]] = []
    if options.out.is_file():
        with options.out.open(newline="") as stream:
            lines = [row for row in csv.DictReader(stream) if row["field"] != flow.name]
    machine = environment("cpu")
    stamp = {key: machine[key] for key in COLUMNS if key in machine}
    rows = lines + [{**line, **stamp} for line in measure(flow)]
    files.write(options.out, rows, COLUMNS)


if __name__ == "__main__":
    main()
