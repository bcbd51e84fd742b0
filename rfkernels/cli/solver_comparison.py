"""`rfkernels sample --compare`: the same noises under every solver at equal numbers of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rfkernels.cli.output import console, say

if TYPE_CHECKING:
    from rfkernels.metrics.drawer import Drawer

__all__ = ["Comparison", "compared", "evaluation_counts", "show_distances"]

# curved-euler is of other paths, rf++ of reflowed models, flow-map of networks trained as one.
_ASKED_FOR_ONLY = ("curved-euler", "rf++", "flow-map")
_ACROSS = 8  # images side by side


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


@dataclass(frozen=True)
class Comparison:
    """What `compared` found.

    Attributes:
        picture: PNG, a row a solver, a column a number of evaluations.
        solvers: how many.
        distances: solver -> for every number of evaluations the root mean square distance of its samples
            to those of `reference`, None where it makes no step; of the solvers without noise.
        reference: the adaptive solver among them; None without one, and then there are no distances.
    """

    picture: bytes
    solvers: int
    distances: dict[str, list[float | None]]
    reference: str | None


def compared(
    drawer: Drawer,
    solvers: str | None,
    counts: Sequence[int],
    index: torch.Tensor,
    options: dict[str, Any],
) -> Comparison:
    """The same noises under every solver.

    Args:
        drawer: the run, of samples that are pictures or points.
        solvers: names with commas; None for all that fit the run.
        counts: evaluations of the network; every solver takes as many steps as that allows, and its
            place says so where not even one does. An adaptive solver takes what it needs.
        index: (n,) sample indices.
        options: of `Drawer.draw`: seed, grid, batch.

    Raises:
        ValueError: a name that is no solver, or counts that allow none of them a step.
    """
    from rfkernels.cli.pictures import COLOURS, grid_table, is_image
    from rfkernels.cli.plots import cloud_table, frame_of
    from rfkernels.sampling import get_solver
    from rfkernels.sampling.run import TolerancesNotReachedError

    names = _names(drawer, solvers)
    fixed = [name for name in names if not get_solver(name).adaptive]
    cells = [[_drawn(drawer, name, count, index, options) for count in counts] for name in fixed]
    noisy = [name for name in fixed if getattr(get_solver(name), "stochastic", False)]
    rows = [f"{name}\nwith noise" if name in noisy else name for name in fixed]
    distances, reference = {}, None
    for name in (name for name in names if name not in fixed):
        try:
            exact, cost = drawer.draw(index, solver=name, steps=None, **{**options, "grid": None})
        except TolerancesNotReachedError:
            rows.append(name)
            cells.append([*[None] * (len(counts) - 1), "does not reach its tolerances"])
            continue
        # In the last column, under a label that says what it cost.
        rows.append(f"{name}\n{cost:.0f} evaluations")
        cells.append([*[None] * (len(counts) - 1), exact])
        reference = name
        distances = {
            other: [_distance(x, exact) for x in members]
            for other, members in zip(fixed, cells, strict=False)
            if other not in noisy
        }
    columns = [
        (f"{count} evaluations", COLOURS[i % len(COLOURS)]) for i, count in enumerate(counts)
    ]
    drawn = [x for members in cells for x in members if isinstance(x, torch.Tensor)]
    if not drawn:
        raise ValueError(f"nfe: must allow a step of one of the solvers; got {counts}")
    if is_image(drawer.sample_shape):
        png = grid_table(columns, rows, cells, min(len(index), _ACROSS))
    else:
        png = cloud_table(columns, rows, cells, frame_of(torch.cat(drawn)))
    return Comparison(png, len(rows), distances, reference)


def show_distances(found: Comparison, counts: Sequence[int]) -> None:
    """The table of `found.distances`, the nearest in every column in bold."""
    if not found.distances:
        return
    from rich.table import Table

    say(f"Distance to what {found.reference} draws (rms), by evaluations of the network:")
    table = Table()
    table.add_column("solver")
    for count in counts:
        table.add_column(str(count), justify="right")
    least = [
        min((x for x in column if x is not None), default=None)
        for column in zip(*found.distances.values(), strict=True)
    ]
    for name, row in found.distances.items():
        shown = ("" if x is None else f"{x:.2g}" for x in row)
        table.add_row(
            name,
            *(
                f"[bold]{text}[/]" if x is not None and x == best else text
                for text, x, best in zip(shown, row, least, strict=True)
            ),
        )
    console.print(table)


def _drawn(
    drawer: Drawer,
    name: str,
    count: int,
    index: torch.Tensor,
    options: dict[str, Any],
) -> torch.Tensor | str:
    """Samples by at most `count` evaluations; or why there are none."""
    from rfkernels.sampling import evaluations, steps_within

    each = drawer.calls  # evaluations for one call of the solver's
    steps = steps_within(name, count // each)
    if steps is None:
        return f"a step takes {evaluations(name, 1) * each}"
    return drawer.draw(index, solver=name, steps=steps, **options)[0]


def _distance(x: torch.Tensor | str | None, exact: torch.Tensor) -> float | None:
    return float((x - exact).square().mean().sqrt()) if isinstance(x, torch.Tensor) else None


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
