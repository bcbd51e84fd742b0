"""Plots of measures: panels of curves against steps or evaluations, and clouds of points. All come back as PNG bytes.

Needs matplotlib; it is imported at first use.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from rfkernels.cli.pictures import COLOURS, FAINT, INK

if TYPE_CHECKING:
    from rfkernels.cli.quality import Quality
    from rfkernels.metrics.evaluate import Evaluation

__all__ = [
    "Curve",
    "Panel",
    "cloud_table",
    "curves_plot",
    "evaluation_plot",
    "frame_of",
    "point_cloud",
    "quality_plot",
]

_SOLVERS = {"euler": "Euler", "heun": "Heun", "rk4": "RK4", "ab2": "AB2", "taylor": "Taylor"}
_DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Curve:
    """A line of points (x, y, spread or None) in a colour; `style` counts dashes and markers."""

    label: str
    points: Sequence[tuple[float, float, float | None]]
    colour: str
    style: int = 0


@dataclass(frozen=True)
class Panel:
    """Curves under a title, with level lines (value, label, dotted or dashed) to compare with."""

    title: str
    curves: Sequence[Curve]
    log: bool = False
    levels: Sequence[tuple[float, str, str]] = field(default_factory=tuple)


def curves_plot(panels: Sequence[Panel], x_label: str) -> bytes:
    """Panels side by side, three in a row at most, over one logarithmic axis, with one legend below."""
    from matplotlib.figure import Figure

    columns = min(3, len(panels)) if len(panels) != 4 else 2
    rows = math.ceil(len(panels) / columns)
    width = 5.0 * columns if columns < 3 else 13.2
    figure = Figure(figsize=(width, 4.0 * rows + 0.35), dpi=150, layout="constrained")
    figure.get_layout_engine().set(hspace=0.06, wspace=0.05)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    entries: dict[str, Any] = {}
    for panel, ax in zip(panels, axes, strict=False):
        _draw(panel, ax, x_label)
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", frameon=False,
        ncols=min(len(entries), 2 * columns), fontsize=9.5, labelcolor=INK,
    )  # fmt: skip
    return _bytes(figure)


def _draw(panel: Panel, ax: Any, x_label: str) -> None:
    for curve in panel.curves:
        points = [p for p in curve.points if math.isfinite(p[1])]
        x, y = [p[0] for p in points], [p[1] for p in points]
        ax.plot(
            x, y, label=curve.label, color=curve.colour, linewidth=2, markersize=5,
            marker=_MARKERS[curve.style % len(_MARKERS)], linestyle=_DASHES[curve.style % len(_DASHES)],
        )  # fmt: skip
        spread = [p[2] or 0.0 for p in points]
        if any(spread):
            ax.errorbar(x, y, spread, fmt="none", linewidth=1, capsize=2.5, color=curve.colour)
    for value, label, dash in panel.levels:
        pattern = (0, (1, 2)) if dash == "dotted" else (0, (5, 4))
        ax.axhline(value, label=label, color=FAINT, linewidth=1.2, linestyle=pattern, zorder=0)
    if panel.log:
        _log_scale(panel, ax)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ticks = sorted({p[0] for curve in panel.curves for p in curve.points})
    ax.set_xscale("log", base=2)
    ax.set_xticks(*_labelled(ticks))
    ax.xaxis.minorticks_off()
    ax.set_xlabel(x_label, color=FAINT)
    ax.set_title(panel.title, fontsize=11.5, color=INK, fontweight="bold")
    ax.tick_params(colors=FAINT, which="both", length=3)
    ax.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#c4c9cf")


def _log_scale(panel: Panel, ax: Any) -> None:
    """A logarithmic axis; around 0 a linear one, where unbiased estimates fall below it."""
    from matplotlib.ticker import LogLocator

    points = [p for curve in panel.curves for p in curve.points if math.isfinite(p[1])]
    lowest = min((y - (spread or 0.0) for _, y, spread in points), default=1.0)
    if lowest <= 0:
        most = max(abs(y) for _, y, _ in points) or 1.0
        linear = 10 ** math.ceil(math.log10(max(most / 100, -lowest)))
        ax.set_yscale("symlog", linthresh=linear)
        return
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high / low < 200:  # too few powers of ten to read it by
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.minorticks_off()


def _labelled(ticks: Sequence[float]) -> tuple[list[float], list[str]]:
    """Ticks that do not crowd: each at least a third of a power of two from the last."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or tick >= kept[-1] * 2 ** (1 / 3):
            kept.append(tick)
    return kept, [f"{tick:.0f}" for tick in kept]


def evaluation_plot(evaluation: Evaluation) -> bytes:
    """Every measure against the evaluations of the network per sample, memorisation last.

    A run keeps its colour; solvers differ in dashes and markers.
    """
    from rfkernels.cli.quality import shown_columns

    rows = evaluation.rows
    runs = list(dict.fromkeys(r.run for r in rows))
    solvers = list(dict.fromkeys(r.solver for r in rows))
    lines = list(dict.fromkeys((r.run, r.solver) for r in rows))
    panels = []
    for column in shown_columns(evaluation):
        if column.key in ("nearest_training_distance", "close_share", "straightness"):
            continue  # the memorisation ratio shows the first two; the last is equal at all steps
        curves = [
            Curve(
                run if len(solvers) == 1 else f"{run}, {_SOLVERS.get(solver, solver)}",
                [
                    (r.nfe, r.values[column.key], r.values.get(column.spread or ""))
                    for r in rows
                    if (r.run, r.solver) == (run, solver) and column.key in r.values
                ],
                COLOURS[runs.index(run) % len(COLOURS)],
                solvers.index(solver) + runs.index(run) // len(COLOURS),
            )
            for run, solver in lines
        ]
        levels = []
        if column.key in evaluation.gaussian and column.key != "memorisation_ratio":
            value = evaluation.gaussian[column.key]
            if value > 0 or not column.log:
                levels.append((value, "a Gaussian fitted to the data", "dashed"))
        real = column.ideal if column.ideal is not None else evaluation.real.get(column.key)
        if real is not None and not column.log:
            levels.append((real, "real data", "dotted"))
        panels.append(Panel(_TITLES.get(column.key, column.title), curves, column.log, levels))
    return curves_plot(panels, "evaluations of the network per sample (NFE)")


_TITLES = {
    "frechet_distance": "Fréchet distance (0 is best)",
    "one_nn_accuracy": "1-NN accuracy (0.5 is best)",
    "kernel_distance": "Kernel distance, KID (0 is best)",
    "energy_distance": "Energy distance (0 is best)",
    "precision": "Precision: quality",
    "recall": "Recall: variety",
    "density": "Density: quality",
    "coverage": "Coverage: variety",
    "transport_cost": "Transport cost",
    "memorisation_ratio": "Memorisation (1 is new, 0 a copy)",
}


def quality_plot(
    curves: Mapping[str, Mapping[int, Quality]], *, gaussian: Quality | None = None
) -> bytes:
    """The demo's two panels against the number of Euler steps: Fréchet distance, and 1-NN accuracy.

    Args:
        curves: model -> steps -> quality.
        gaussian: drawn as a dashed line, for comparison.
    """

    def panel(title: str, name: str, log: bool, *levels: tuple[float, str, str]) -> Panel:
        drawn = [
            Curve(model, [(n, getattr(q, name), None) for n, q in sorted(curve.items())], colour)
            for (model, curve), colour in zip(curves.items(), COLOURS, strict=False)
        ]
        if gaussian is not None:
            levels = ((getattr(gaussian, name), "a Gaussian fitted to the data", "dashed"), *levels)
        return Panel(title, drawn, log, levels)

    even = (0.5, "cannot be told apart", "dotted")
    return curves_plot(
        [
            panel("Fréchet distance of the pixels", "frechet", True),
            panel("1-NN accuracy: telling samples from real data", "one_nn", False, even),
        ],
        "Euler steps per sample",
    )


Frame = tuple[tuple[float, float], tuple[float, float]]


def point_cloud(x: torch.Tensor, frame: Frame | None = None, colour: str = COLOURS[1]) -> bytes:
    """A scatter plot of points (N, 2), on axes of their own or those of `frame_of`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), dpi=150, layout="constrained")
    _scatter(figure.subplots(), x, colour, frame)
    return _bytes(figure)


def frame_of(x: torch.Tensor) -> Frame:
    """Square axes with the points (N, 2) in the middle and some room around them."""
    low, high = x.amin(0), x.amax(0)
    half = 0.65 * float((high - low).max())
    centre = ((low + high) / 2).tolist()
    return tuple((c - half, c + half) for c in centre)  # type: ignore[return-value]


def cloud_table(
    columns: Sequence[tuple[str, str]],
    rows: Sequence[str],
    cells: Sequence[Sequence[torch.Tensor | str | None]],
    frame: Frame,
) -> bytes:
    """Scatter plots of points (N, 2) in a table, all on the axes of `frame`.

    Args:
        columns: (title, colour) each.
        rows: their labels.
        cells: a row of points a row; words say why a place is empty, and None leaves it so.
    """
    from matplotlib.figure import Figure

    size = (2.6 * len(columns) + 0.6, 2.6 * len(rows) + 0.4)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for i, (label, members) in enumerate(zip(rows, cells, strict=True)):
        for j, ((title, colour), x) in enumerate(zip(columns, members, strict=True)):
            ax = axes[i, j]
            if i == 0:
                ax.set_title(title, fontsize=11, color=colour, fontweight="bold")
            if j == 0:
                ax.set_ylabel(label, color=INK)
            if isinstance(x, torch.Tensor):
                _scatter(ax, x, colour, frame)
                continue
            ax.set(xticks=(), yticks=(), frame_on=False)  # the label stays
            ax.text(0.5, 0.5, x or "", ha="center", va="center", color=FAINT, fontsize=9)
    return _bytes(figure)


def _scatter(ax: Any, x: torch.Tensor, colour: str, frame: Frame | None) -> None:
    size = max(2.0, min(20.0, 4000 / len(x)))
    ax.scatter(x[:, 0], x[:, 1], s=size, color=colour, alpha=0.6, linewidths=0)
    if frame is None:
        ax.set_aspect("equal", "datalim")
    else:
        ax.set(xlim=frame[0], ylim=frame[1], aspect="equal")
    ax.tick_params(colors=FAINT, length=3)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#c4c9cf")


def _bytes(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", facecolor="white")
    return stream.getvalue()
