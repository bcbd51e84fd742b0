"""Solvers by name, and what a number of steps costs."""

from __future__ import annotations

from rfkernels.sampling.adams import AB2, AB3
from rfkernels.sampling.curved import CurvedEuler
from rfkernels.sampling.dopri5 import Dopri5
from rfkernels.sampling.exponential import DPMSolver, UniPC
from rfkernels.sampling.fixed import RK4, Euler, Heun, Midpoint
from rfkernels.sampling.flow_map import FlowMap
from rfkernels.sampling.initial_noise import InitialNoise
from rfkernels.sampling.lagged import FireFlow, UniInv
from rfkernels.sampling.run import Solver
from rfkernels.sampling.stochastic import SDE, Ancestral, Renoise
from rfkernels.sampling.taylor import Taylor

SOLVERS: dict[str, type] = {
    cls.name: cls
    for cls in (
        *(Euler, Midpoint, Heun, RK4, AB2, Taylor, Dopri5, AB3, FireFlow, UniInv, DPMSolver, UniPC),
        *(Ancestral, SDE, Renoise, CurvedEuler, InitialNoise, FlowMap),
    )
}


def get_solver(solver: str | Solver) -> Solver:
    """The solver of that name with its defaults, or the object itself if it is a solver.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
        TypeError: for an object without ``name``, ``adaptive`` and ``integrate``.
    """
    if isinstance(solver, str):
        if solver not in SOLVERS:
            raise ValueError(
                f"get_solver: solver must be one of {', '.join(SOLVERS)}; got {solver!r}"
            )
        return SOLVERS[solver]()
    if isinstance(solver, type):
        raise TypeError(
            f"get_solver: solver must be a name or an instance such as {solver.__name__}(); "
            "got the class itself"
        )
    if not isinstance(solver, Solver):
        raise TypeError(
            "get_solver: solver must be a name or an object with name, adaptive and integrate; "
            f"got {type(solver).__name__}"
        )
    return solver


def evaluations(solver: str | Solver, steps: int) -> int | None:
    """Calls of the velocity in ``steps`` steps without guidance; None where only a run can tell."""
    solver = get_solver(solver)
    per_step = getattr(solver, "per_step", None)
    return None if per_step is None else per_step * steps + solver.besides


def steps_within(solver: str | Solver, nfe: int) -> int | None:
    """The most steps that cost at most ``nfe`` calls of the velocity; None if not even one does, or
    where only a run can tell."""
    solver = get_solver(solver)
    per_step = getattr(solver, "per_step", None)
    if per_step is None:
        return None
    return max(nfe - solver.besides, 0) // per_step or None
