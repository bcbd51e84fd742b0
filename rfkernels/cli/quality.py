"""How the measures are shown: their columns in tables, plots and reports; and the demo's fixed set of them.

What each measure sees is said in `rfkernels.metrics.yardstick`, which computes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import rfkernels.metrics as metrics
from rfkernels.metrics.evaluate import Evaluation, finite

__all__ = [
    "COLUMNS",
    "STEPS",
    "Column",
    "Quality",
    "Yardstick",
    "json_values",
    "measure_steps",
    "quality_rows",
    "shown_columns",
]

STEPS = (1, 2, 4, 8, 32)


@dataclass(frozen=True)
class Column:
    """One measure as tables and plots show it.

    Attributes:
        key: of `EvaluationRow.values`.
        title: a table's heading, a plot's title.
        form: how numbers are written.
        ideal: what the best samples have, None where a table need not say.
        log: whether its axis is logarithmic.
        spread: the key of its standard deviation or error.
    """

    key: str
    title: str
    form: str = ".4g"
    ideal: float | None = None
    log: bool = False
    spread: str | None = None

    def cell(self, values: dict[str, float]) -> str:
        """The number with its spread; empty where there is none."""
        value = values.get(self.key)
        if value is None:
            return ""
        spread = values.get(self.spread) if self.spread else None
        text = format(value, self.form)
        # A single draw has none: 0, or NaN.
        return (
            f"{text} ± {format(spread, self.form)}" if spread and not math.isnan(spread) else text
        )


COLUMNS = (
    Column("frechet_distance", "Fréchet", log=True),
    Column("one_nn_accuracy", "1-NN accuracy", ".3f", 0.5, spread="one_nn_accuracy_std"),
    Column("kernel_distance", "KID", ".3g", log=True, spread="kernel_distance_error"),
    Column("energy_distance", "energy", log=True),
    Column("precision", "precision", ".3f"),
    Column("recall", "recall", ".3f"),
    Column("density", "density", ".3f", 1.0),
    Column("coverage", "coverage", ".3f"),
    Column("straightness", "straightness", ".3g"),
    Column("transport_cost", "transport cost", ".4g"),
    Column("nearest_training_distance", "nearest train", ".3g"),
    Column("memorisation_ratio", "memorisation", ".3f", 1.0),
    Column("close_share", "close", ".3f", 0.05),
)


def shown_columns(evaluation: Evaluation) -> list[Column]:
    """The columns that an evaluation has."""
    keys = {key for row in evaluation.rows for key in row.values}
    return [column for column in COLUMNS if column.key in keys]


def json_values(evaluation: Evaluation) -> dict[str, object]:
    """Everything that was found, as JSON values."""
    return {
        "settings": evaluation.settings,
        "rows": evaluation.table(),
        "real_data": finite(evaluation.real),
        "fitted_gaussian": finite(evaluation.gaussian),
    }


@dataclass(frozen=True)
class Quality:
    """The demo's measures of one set of samples.

    Attributes:
        frechet: pixel Frechet distance to the training data, 0 at best; not meaningful for a handful of samples.
        one_nn: accuracy of the 1-nearest-neighbour test against the held-out data, the mean over several draws.
        one_nn_spread: its standard deviation over the draws.
        nearest: median distance to the nearest training sample.
        energy: energy distance to the held-out data, 0 at best.
    """

    frechet: float
    one_nn: float
    one_nn_spread: float
    nearest: float
    energy: float


class Yardstick:
    """The demo's real data, measured in pixels; takes what `rfkernels.metrics.Yardstick` takes."""

    def __init__(self, train: torch.Tensor, held_out: torch.Tensor, draws: int = 10) -> None:
        self._measures = metrics.Yardstick(train, held_out, draws)
        self.count = self._measures.count
        self.gaussian = self._measures.gaussian
        self.held_out_nearest = self._measures.held_out_nearest

    def measure(self, samples: torch.Tensor) -> Quality:
        """The quality of (count, ...) samples."""
        found = self._measures.measure(samples)
        return Quality(
            frechet=found["frechet_distance"],
            one_nn=found["one_nn_accuracy"],
            one_nn_spread=found["one_nn_accuracy_std"],
            nearest=found["nearest_training_distance"],
            energy=found["energy_distance"],
        )


def measure_steps(
    draw: Callable[[int], torch.Tensor],
    yardstick: Yardstick,
    steps: Sequence[int],
    done: Callable[[], object],
) -> tuple[dict[int, Quality], dict[int, torch.Tensor]]:
    """Quality at each number of steps, and the samples; `draw(n)` gives `yardstick.count` of them by n steps."""
    qualities, samples = {}, {}
    for n in steps:
        samples[n] = draw(n)
        qualities[n] = yardstick.measure(samples[n])
        done()
    return qualities, samples


def quality_rows(curves: dict[str, dict[int, Quality]]) -> list[dict[str, object]]:
    """One row per model and number of steps, for CSV and JSON."""
    return [
        {
            "model": name,
            "steps": n,
            "frechet_distance": round(q.frechet, 5),
            "one_nn_accuracy": round(q.one_nn, 5),
            "one_nn_accuracy_std": round(q.one_nn_spread, 5),
            "nearest_training_distance": round(q.nearest, 5),
            "energy_distance": round(q.energy, 6),
        }
        for name, curve in curves.items()
        for n, q in curve.items()
    ]
