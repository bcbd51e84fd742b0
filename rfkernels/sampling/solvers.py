"""Solvers by name."""

from __future__ import annotations

from rfkernels.sampling.dopri5 import Dopri5
from rfkernels.sampling.fixed import AB2, RK4, Euler, Heun, Midpoint, Taylor
from rfkernels.sampling.flow_map import FlowMap
from rfkernels.sampling.initial_noise import InitialNoise
from rfkernels.sampling.run import Solver

SOLVERS: dict[str, type] = {
    cls.name: cls
    for cls in (Euler, Midpoint, Heun, RK4, AB2, Taylor, Dopri5, InitialNoise, FlowMap)
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
