"""Quality against the number of evaluations, for any set of runs, solvers and numbers of steps: what
`rfkernels eval` and `rfkernels compare` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfkernels.metrics.drawer import Drawer
from rfkernels.metrics.features import load_features
from rfkernels.metrics.real_data import RealData, real_data
from rfkernels.metrics.transport import transport_cost
from rfkernels.metrics.yardstick import DEFAULT_METRICS, METRICS, Features, Yardstick
from rfkernels.sampling.solvers import evaluations, get_solver

__all__ = ["FLOW_METRICS", "Evaluation", "EvaluationRow", "evaluate"]

# Of the flow rather than of its samples.
FLOW_METRICS = ("straightness", "transport-cost")
_STRAIGHTNESS_SAMPLES = 1000


@dataclass(frozen=True)
class EvaluationRow:
    """One point: a run, a solver, a number of steps (None for an adaptive solver).

    Attributes:
        nfe: evaluations of the network per sample, the mean over samples.
        values: the measures by column, such as ``frechet_distance``.
    """

    run: str
    solver: str
    steps: int | None
    nfe: float
    values: dict[str, float]


@dataclass
class Evaluation:
    """What `evaluate` finds.

    Attributes:
        rows: in the order of runs, solvers, steps.
        real: the measures of real data, where they have one.
        gaussian: those of a Gaussian fitted to the training data's features.
        settings: data, features, numbers of samples and the seed, as JSON values.
        samples: (run, solver, steps) -> the first samples, (keep, ...).
    """

    rows: list[EvaluationRow]
    real: dict[str, float]
    gaussian: dict[str, float]
    settings: dict[str, Any]
    samples: dict[tuple[str, str, int | None], Tensor] = field(default_factory=dict)

    def table(self) -> list[dict[str, Any]]:
        """One flat dict a row, for CSV and JSON, all with the same keys; None for a measure that a row
        lacks or that is not finite."""
        blank = dict.fromkeys(key for row in self.rows for key in row.values)
        return [
            {"model": r.run, "solver": r.solver, "steps": r.steps, "nfe": round(r.nfe, 2)}
            | blank
            | finite(r.values)
            for r in self.rows
        ]


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """The values to 7 digits, None for one that is not finite."""
    return {
        name: float(f"{value:.7g}") if abs(value) < float("inf") else None
        for name, value in values.items()
    }


def evaluate(
    runs: Mapping[str, Any] | Sequence[str | Path],
    data: RealData | str | Path | None = None,
    *,
    steps: Sequence[int] = (1, 2, 4, 8),
    solvers: Sequence[str] | None = None,
    features: str | Features = "pixels",
    metrics: Sequence[str] = DEFAULT_METRICS,
    draws: int = 5,
    guidance: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    cache: str | Path | None = None,
    keep: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Samples every run with every solver at every number of steps, from the same noises, and measures.

    Each point takes ``draws`` times as many samples as there are held-out ones. Beside every measure
    stands memorisation: ``nearest_training_distance``, its ratio to that of held-out data, and the
    share of samples closer to training data than the closest 5 % of held-out data.

    Args:
        runs: name -> ``rf.load(folder)`` or a result of training; or folders, named by themselves.
        data: `RealData`; a data set's name or path; None for what the first run was trained on.
        steps: numbers of steps, each at least 1; an adaptive solver takes none and is one point.
        solvers: names of solvers; None for each run's own.
        features: what samples are compared by, see `load_features`.
        metrics: of `METRICS` and `FLOW_METRICS`. ``straightness`` is of the run's flow by 32 Euler
            steps, equal in all its rows, and left out for flow maps.
        draws: sets of samples, at least 1.
        guidance: classifier-free guidance scale, for conditional runs.
        seed: of the noise, the same for all, and of the features where they take one.
        device: where folders are loaded and the features computed.
        cache: folder of the trained feature network, see `load_features`.
        keep: how many samples of each point to return.
        progress: show a bar with the time to go.

    Raises:
        ValueError: for no runs, a bad option, or runs of other shapes than the data.

    Example:
        >>> rows = rf.metrics.evaluate({"a": rf.load("runs/digits")}, steps=(1, 4)).rows  # doctest: +SKIP
    """
    _check(steps, metrics, draws, seed)
    if not isinstance(runs, Mapping):
        from rfkernels.training import load

        runs = {name: load(run, device=device) for name, run in named(runs).items()}
    if not runs:
        raise ValueError("runs: must be at least one; got none")
    drawers = {name: Drawer(run, guidance=guidance) for name, run in runs.items()}
    real = data if isinstance(data, RealData) else real_data(list(runs.values()), data)
    for name, drawer in drawers.items():
        if drawer.sample_shape != tuple(real.train.shape[1:]):
            raise ValueError(
                f"runs: {name} makes samples of the shape {drawer.sample_shape}; the data has "
                f"{tuple(real.train.shape[1:])}"
            )
    points = [
        (name, solver, count)
        for name, drawer in drawers.items()
        for solver in solvers or (drawer.default_solver,)
        for count in ((None,) if get_solver(solver).adaptive else sorted(set(steps)))
    ]
    network = load_features(
        features, images=real.train, labels=real.labels, seed=seed, cache=cache, device=device
    )
    yardstick = Yardstick(
        real.train,
        real.held_out,
        draws,
        features=network,
        metrics=[m for m in metrics if m not in FLOW_METRICS],
        seed=seed,
    )
    found = _measure(points, drawers, yardstick, metrics, seed, keep, progress)
    found.settings = {
        "data": real.name,
        "features": _described(features, real.train),
        "training_samples": len(real.train),
        "held_out_samples": len(real.held_out),
        "samples": yardstick.count,
        "guidance": guidance,
        "seed": seed,
    }
    return found


def _measure(
    points: list[tuple[str, str, int | None]],
    drawers: dict[str, Drawer],
    yardstick: Yardstick,
    metrics: Sequence[str],
    seed: int,
    keep: int,
    progress: bool,
) -> Evaluation:
    from rfkernels.training.progress import Bar

    index = torch.arange(yardstick.count)
    straight: dict[str, float] = {}
    if "straightness" in metrics:
        straight = {
            name: drawer.straightness(index[:_STRAIGHTNESS_SAMPLES], seed=seed)
            for name, drawer in drawers.items()
            if drawer.default_solver != "flow-map"  # whose network gives mean velocities
        }
    gaussian = yardstick.measure_features(yardstick.gaussian(seed))
    found = Evaluation([], yardstick.real(), gaussian, {})
    # Time goes with the evaluations of the network, so the bar counts samples times steps.
    costs = [_guess(solver, count) for _, solver, count in points]
    with Bar("eval", sum(costs) * len(index), show=progress) as bar:
        for (name, solver, count), cost in zip(points, costs, strict=True):
            bar.note(f"{name}, {solver}" + ("" if count is None else f", {count} steps"))
            drawer = drawers[name]
            x, nfe = drawer.draw(
                index,
                seed=seed,
                steps=count,
                solver=solver,
                done=lambda n, c=cost: bar.advance(n * c),
            )
            values = yardstick.measure(x)
            if name in straight:
                values["straightness"] = straight[name]
            if "transport-cost" in metrics:
                values["transport_cost"] = transport_cost(drawer.noise(index, seed).cpu(), x)
            found.rows.append(EvaluationRow(name, solver, count, nfe, values))
            if keep:
                found.samples[name, solver, count] = x[:keep]
    return found


def named(runs: Sequence[str | Path]) -> dict[str, Path]:
    """Folders by what a table calls them: their own name, or the path where that is not enough.

    Raises:
        ValueError: a folder given twice.
    """
    paths = [Path(run) for run in runs]
    if len({p.resolve() for p in paths}) < len(paths):
        raise ValueError("runs: one of them is given twice")
    names = [p.resolve().name for p in paths]
    return {
        name if names.count(name) == 1 else str(path): path
        for name, path in zip(names, paths, strict=True)
    }


def _check(steps: Sequence[int], metrics: Sequence[str], draws: int, seed: int) -> None:
    if not steps or min(steps) < 1:
        got = min(steps) if steps else "none"
        raise ValueError(f"steps: must be at least 1; got {got}")
    known = (*METRICS, *FLOW_METRICS)
    for metric in metrics:
        if metric not in known:
            raise ValueError(f"metric: must be one of {', '.join(known)}; got {metric!r}")
    if draws < 1:
        raise ValueError(f"draws: must be at least 1; got {draws}")
    if seed < 0:
        raise ValueError(f"seed: must not be negative; got {seed}")


def _described(features: str | Features, train: Tensor) -> str:
    if not isinstance(features, str):
        return "callable"
    return "coordinates" if features == "pixels" and train.ndim == 2 else features


def _guess(solver: str, steps: int | None) -> int:
    """About how many evaluations a sample takes, for the bar."""
    known = None if steps is None else evaluations(solver, steps)
    return 60 if known is None else known
