"""`rfkernels sample --compare`: the same noises under every solver at equal numbers of evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rfkernels.metrics.drawer import Drawer

__all__ = ["compared", "evaluation_counts"]

# curved-euler is of other paths, rf++ of reflowed models, flow-map of networks trained as one.
_ASKED_FOR_ONLY = ("curved-euler", "rf++", "flow-map")


def evaluation_counts(text: str) -> tuple[int, ...]:
    """The numbers of "4,8,16".

    Raises:
        ValueError: no whole numbers from 1.
    """
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"nfe: must be whole numbers with commas; got {text!r}") from None
    if min(counts) < 1:
        raise ValueError(f"nfe: must be at least 1; got {min(counts)}")
    return counts


def compared(
    drawer: Drawer,
    solvers: str | None,
    counts: Sequence[int],
    index: torch.Tensor,
    guidance: float | None,
    options: dict[str, Any],
) -> tuple[bytes, int]:
    """(a PNG table, how many solvers it shows): a row a solver, a column a number of evaluations.

    Args:
        drawer: the run.
        solvers: names with commas; None for all that fit the run.
        counts: evaluations of the network; every solver takes as many steps as that allows, and its
            place stays empty where not even one does. An adaptive solver takes what it needs.
        index: (n,) sample indices.
        guidance: the scale, which doubles the evaluations of a step.
        options: of `Drawer.draw`: seed, grid, batch.

    Raises:
        ValueError: a name that is no solver, or samples that are no pictures.
    """
    from rfkernels.cli.pictures import COLOURS, grid_table, is_image, require_pictures
    from rfkernels.cli.plots import cloud_table, frame_of
    from rfkernels.sampling import get_solver, steps_within

    picture = is_image(drawer.sample_shape)
    if not picture and drawer.sample_shape != (2,):
        raise ValueError(f"compare: samples of the shape {drawer.sample_shape} are no pictures")
    require_pictures()
    names = _names(drawer, solvers)
    each = 1 if guidance in (None, 1.0) else 2
    fixed = [name for name in names if not get_solver(name).adaptive]
    adaptive = [name for name in names if name not in fixed]
    cells: list[list[torch.Tensor | None]] = []
    for name in fixed:
        row: list[torch.Tensor | None] = []
        for count in counts:
            steps = steps_within(name, count // each)
            drawn = None
            if steps is not None:
                drawn, _ = drawer.draw(index, solver=name, steps=steps, **options)
            row.append(drawn)
        cells.append(row)
    rows = list(fixed)
    for name in adaptive:  # in the last column, under a label that says what it cost
        drawn, cost = drawer.draw(index, solver=name, steps=None, **{**options, "grid": None})
        cells.append([None] * (len(counts) - 1) + [drawn])
        rows.append(f"{name} ({cost:.0f})")
    columns = [
        (f"{count} evaluations", COLOURS[i % len(COLOURS)]) for i, count in enumerate(counts)
    ]
    if all(x is None for row in cells for x in row):
        raise ValueError(f"nfe: must allow a step of one of the solvers; got {counts}")
    if picture:
        return grid_table(columns, rows, cells, math.isqrt(len(index))), len(rows)
    everything = torch.cat([x for row in cells for x in row if x is not None])
    return cloud_table(columns, rows, cells, frame_of(everything)), len(rows)


def _names(drawer: Drawer, solvers: str | None) -> list[str]:
    """The solvers to show."""
    from rfkernels.sampling import SOLVERS, get_solver

    if solvers is not None:
        names = [name.strip() for name in solvers.split(",")]
        for name in names:
            get_solver(name)
        return list(dict.fromkeys(names))
    if drawer.default_solver == "flow-map":  # a network of average velocities knows no other
        return ["flow-map"]
    names = [name for name in SOLVERS if name not in _ASKED_FOR_ONLY]
    return list(dict.fromkeys([*names, drawer.default_solver]))
