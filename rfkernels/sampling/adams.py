"""Adams-Bashforth: past velocities instead of further evaluations, one evaluation a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from rfkernels.sampling import multistep
from rfkernels.sampling.field import Field, State
from rfkernels.sampling.fixed import FixedStepSolver, Step, midpoint_step

__all__ = ["AB2", "AB3"]


@dataclass(frozen=True)
class AB2(FixedStepSolver):
    """Two-step Adams-Bashforth with the coefficients of the grid at hand: second order, one
    evaluation a step.

    x + h (1 + r/2) v - h r/2 v_previous, r = h / h_previous. The first step has no past and is a
    midpoint step, so N steps cost N + 1 evaluations.
    """

    name: ClassVar[str] = "ab2"
    evaluations: ClassVar[int] = 2
    besides: ClassVar[int] = 1

    def step(self, field: Field, state: State, interval: Step, history: list[Any]) -> State:
        """x + c v + c_previous v_previous."""
        now = field(state, interval.start)
        if interval.previous_dt is None:
            result = midpoint_step(field, state, interval, now)
        else:
            weights = multistep.ab2(interval.dt, interval.previous_dt)
            result = field.advance(state.x, list(zip(weights, (now, history[0]), strict=True)))
        history[:] = [now]
        return result


@dataclass(frozen=True)
class AB3(FixedStepSolver):
    """Three-step Adams-Bashforth with the coefficients of the grid at hand: third order, one
    evaluation a step.

    The first step is a midpoint step and the second one of AB2, whose larger errors are made once, so
    that the order of the whole stays; N steps cost N + 1 evaluations. Its region of stability is a
    quarter of Euler's: of use when steps are many and the flow is smooth.
    """

    name: ClassVar[str] = "ab3"
    evaluations: ClassVar[int] = 3
    besides: ClassVar[int] = 1

    def step(self, field: Field, state: State, interval: Step, history: list[Any]) -> State:
        """x + c0 v + c1 v_previous + c2 v_before; history holds (velocity, its step), newest first."""
        now, dt = field(state, interval.start), interval.dt
        if not history:
            result = midpoint_step(field, state, interval, now)
        else:
            steps = [step for _, step in history]
            weights = multistep.ab2(dt, *steps) if len(steps) == 1 else multistep.ab3(dt, *steps)
            velocities = (now, *(velocity for velocity, _ in history))
            result = field.advance(state.x, list(zip(weights, velocities, strict=True)))
        history[:] = [(now, dt), *history][:2]
        return result
