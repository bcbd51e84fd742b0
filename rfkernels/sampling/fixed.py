"""The loop over a given grid, and the one-step rules euler, midpoint, heun and rk4.

With v(x, t) the velocity and h = t_{i+1} - t_i (negative when inverting), every stage of every solver
is one kernel call. Orders are those of the global error. Solvers are stateless and can be shared; NFE
is per step, doubled by guidance.

======== ===== === ===================================================
solver   order NFE step
======== ===== === ===================================================
euler    1     1   x + h v
midpoint 2     2   x + h v(x + h/2 v, t + h/2)
heun     2     2   x + h/2 (v + v(x + h v, t + h))
rk4      4     4   the classical Runge-Kutta rule
======== ===== === ===================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from rfkernels.sampling.field import Evaluation, Field, State
from rfkernels.sampling.run import Run, Solution, joined


@dataclass(frozen=True)
class Step:
    """One step of the grid, from ``start`` to ``end``.

    Attributes:
        start, end: times.
        previous_dt: the step before; None in the first.
        index: of the step, from 0.
        left: steps from this one to the end, itself included.

    Steps that guidance leaves out (CFG-Zero*) do not count.
    """

    start: float
    end: float
    previous_dt: float | None
    index: int
    left: int

    @property
    def dt(self) -> float:
        """end - start; negative when inverting."""
        return self.end - self.start


class FixedStepSolver:
    """A rule for one step, walked along the grid of the run.

    Subclasses define ``name`` and :meth:`step`, and what differs of ``evaluations``, how many
    velocities one update sums, ``tensors``, how many other tensors besides x, and the cost of N steps,
    ``per_step`` N + ``besides`` calls of the velocity, twice that under guidance.
    """

    name: ClassVar[str]
    adaptive: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False
    evaluations: int = 1
    tensors: int = 0
    per_step: int = 1  # calls of the velocity without guidance, and those besides in a run
    besides: int = 0

    def begin(self, field: Field, state: State, times: Sequence[float], run: Run) -> list[Any]:
        """What the solver keeps from step to step, as it is before the first one.

        ``times`` are those of the steps to come: ``run.times`` but for steps that guidance leaves out.
        """
        return []

    def step(self, field: Field, state: State, interval: Step, history: list[Any]) -> State:
        """The state after the interval.

        Args:
            field: where to evaluate and how to move.
            state: the state at ``interval.start``.
            interval: the step.
            history: what :meth:`begin` returned, owned by the run.
        """
        raise NotImplementedError

    def integrate(self, field: Field, x0: Tensor, run: Run) -> Solution:
        """Walk ``run.times`` from x0; see :class:`rfkernels.sampling.run.Solver`."""
        field.reserve(self.evaluations, self.tensors)
        state = field.start(x0)
        kept = [x0]
        moving, count = field.moving(run.times), len(run.times) - 1
        history = self.begin(field, state, run.times[moving.start : moving.stop + 1], run)
        previous_dt = None
        for index, (start, end) in enumerate(pairwise(run.times)):
            if index in moving:
                interval = Step(start, end, previous_dt, index - moving.start, moving.stop - index)
                state = self.step(field, state, interval, history)
                previous_dt = end - start
            if run.keep_trajectory:
                kept.append(state.model_input)
            if run.callback is not None:
                run.report(index, field.time(end, state), state.model_input)
            run.progress((index + 1) / count)
        trajectory = joined(torch.stack, kept) if run.keep_trajectory else None
        return Solution(state.model_input if moving else x0.clone(), field.calls, trajectory)


@dataclass(frozen=True)
class Euler(FixedStepSolver):
    """First order, one evaluation a step; exact in one step when the flow is straight.

    Args:
        original_eps: for comparison with the original rectified-flow code, which evaluates the
            network at eps + t (1 - eps), eps = 1e-3, and still steps by h: the times span 1 - eps,
            the displacements 1. 0 evaluates where the state is.
    """

    name: ClassVar[str] = "euler"
    original_eps: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.original_eps < 1:
            raise ValueError(f"Euler: original_eps must lie in [0, 1); got {self.original_eps!r}")

    def step(self, field: Field, state: State, interval: Step, history: list[Any]) -> State:
        """x + h v(x, t)."""
        t = self.original_eps + interval.start * (1 - self.original_eps)
        return field.advance(state.x, [(interval.dt, field(state, t))])


def midpoint_step(field: Field, state: State, interval: Step, first: Evaluation) -> State:
    """x + h v(x + h/2 v, t + h/2), with ``first`` the velocity at the start."""
    half = interval.dt / 2
    middle = field.advance(state.x, [(half, first)])
    return field.advance(state.x, [(interval.dt, field(middle, interval.start + half))])


@dataclass(frozen=True)
class Midpoint(FixedStepSolver):
    """The explicit midpoint rule: second order, two evaluations a step."""

    name: ClassVar[str] = "midpoint"
    per_step: ClassVar[int] = 2

    def step(self, field: Field, state: State, interval: Step, history: list[Any]) -> State:
        """x + h v(x + h/2 v, t + h/2)."""
        return midpoint_step(field, state, interval, field(state, interval.start))


@dataclass(frozen=True)
class Heun(FixedStepSolver):
    """Heun's trapezoidal rule: second order, two evaluations a step, the last one at the end of the
    grid itself."""

    name: ClassVar[str] = "heun"
    evaluations: ClassVar[int] = 2
    per_step: ClassVar[int] = 2

    def step(self, field: Field, state: State, interval: Step, history: list[Any]) -> State:
        """x + h/2 (v1 + v2), v2 at the Euler step's end."""
        dt = interval.dt
        first = field(state, interval.start)
        predicted = field.advance(state.x, [(dt, first)])
        second = field(predicted, interval.end)
        return field.advance(state.x, [(dt / 2, first), (dt / 2, second)])


@dataclass(frozen=True)
class RK4(FixedStepSolver):
    """The classical Runge-Kutta rule: fourth order, four evaluations a step."""

    name: ClassVar[str] = "rk4"
    evaluations: ClassVar[int] = 4
    per_step: ClassVar[int] = 4

    def step(self, field: Field, state: State, interval: Step, history: list[Any]) -> State:
        """x + h/6 (k1 + 2 k2 + 2 k3 + k4)."""
        start, dt, x = interval.start, interval.dt, state.x
        k1 = field(state, start)
        k2 = field(field.advance(x, [(dt / 2, k1)]), start + dt / 2)
        k3 = field(field.advance(x, [(dt / 2, k2)]), start + dt / 2)
        k4 = field(field.advance(x, [(dt, k3)]), interval.end)
        return field.advance(x, [(dt / 6, k1), (dt / 3, k2), (dt / 3, k3), (dt / 6, k4)])
