"""`--grid optimised`: the time grid made for a run, kept as grid.json in its folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rfkernels.cli.output import say

if TYPE_CHECKING:
    from rfkernels.sampling import OptimisedGrid
    from rfkernels.training import LoadedRun

__all__ = ["OPTIMISED", "choose_grid"]

OPTIMISED = "optimised"
_SAMPLES, _EVALUATIONS = 64, 48
# One grid serves every solver: on the ring and on a run on the digits, at 4 to 32 evaluations, Euler's error
# with it was at most 7 % above that with the grid of order 1, and RK4's and AB3's 25 % above that of order 3.
_ORDER = 2


def choose_grid(
    run: LoadedRun,
    grid: str | None,
    shift: float | None,
    *,
    solver: str | None = None,
    guidance: float | None = None,
    quiet: bool = False,
) -> Any:
    """What `sample` takes as `grid` for the options --grid and --shift.

    Args:
        run: that is sampled.
        solver: it will be used with; None for several.
        guidance: the scale, which has a grid of its own.
        quiet: do not say that a grid was made.

    Raises:
        ValueError: both are given, or a grid is to be made for a solver that makes its own.
    """
    from rfkernels.sampling import get_grid, get_solver

    if shift is not None and grid is not None:
        raise ValueError(f"grid: give it or shift, not both; got {grid!r} and {shift}")
    if grid is None:
        return shift
    if grid != OPTIMISED:
        try:
            get_grid(grid)
        except ValueError as error:
            raise ValueError(f"{error}; or {OPTIMISED}, made for the run") from None
        return grid
    if solver is not None and get_solver(solver).adaptive:
        raise ValueError(f"grid: {solver} chooses its own times; leave --grid out")
    return _kept_grid(run, guidance, quiet)


def _kept_grid(run: LoadedRun, guidance: float | None, quiet: bool) -> OptimisedGrid:
    """The grid in the run's folder; made and put there where it is absent, damaged or of other
    weights or another scale."""
    from rfkernels._whole_file import read_json_kept
    from rfkernels.sampling import OptimisedGrid
    from rfkernels.training.files import read_json

    file = run.folder / "grid.json"
    checkpoint = run.folder / "checkpoints" / f"step-{run.step}"
    guidance = None if guidance == 1.0 else guidance
    made_for = {
        "checkpoint": checkpoint.name,
        "weights": run.which,
        "sha256": read_json(checkpoint / "state.json")["sha256"][f"{run.which}.safetensors"],
        "guidance": guidance,
    }
    kept = read_json_kept(file, "made_for", made_for)
    if kept is not None:
        try:
            return OptimisedGrid.from_dict({k: v for k, v in kept.items() if k != "made_for"})
        except (TypeError, ValueError):
            pass  # somebody's edit of the file; the grid can be made again
    grid, cost = _made(run, guidance)
    place = f"kept in {file}"
    try:
        grid.save(file, made_for=made_for)
    except OSError as error:  # a run that one may read and not write can still be sampled
        place = f"not kept: {file}: {error.strerror}"
    if not quiet:
        say(f"Optimised grid: {cost} network evaluations of {_SAMPLES} noises, {place}")
    return grid


def _made(run: LoadedRun, guidance: float | None) -> tuple[OptimisedGrid, int]:
    """(the grid of the run's velocity on noises and labels of all classes, evaluations of each)."""
    import torch

    from rfkernels.metrics.drawer import Drawer
    from rfkernels.ops.random import derive_seed
    from rfkernels.sampling import optimise_grid

    drawer = Drawer(run, guidance=guidance)
    index = torch.arange(_SAMPLES)
    noise = drawer.noise(index, derive_seed(0, "optimised grid"))
    grid = optimise_grid(
        drawer.velocity, noise, order=_ORDER, evaluations=_EVALUATIONS, **drawer.given(index)
    )
    return grid, _EVALUATIONS * drawer.calls
