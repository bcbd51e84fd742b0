"""Solvers that walk a given grid: euler, midpoint, heun, rk4, ab2 and taylor.

With v(x, t) the velocity and h = t_{i+1} - t_i (negative when inverting), every stage below is one
kernel call. Orders are those of the global error. Solvers are stateless and can be shared; NFE is
per step, doubled by guidance.

======== ===== =================== ===================================================
solver   order NFE                 step
======== ===== =================== ===================================================
euler    1     1                   x + h v
midpoint 2     2                   x + h v(x + h/2 v, t + h/2)
heun     2     2                   x + h/2 (v + v(x + h v, t + h))
rk4      4     4                   the classical Runge-Kutta rule
ab2      2     1 (+1 in all)       x + h (1 + r/2) v - h r/2 v_previous, r = h / h_previous
taylor   2     2                   x + h v + h^2/2 dv/dt
======== ===== =================== ===================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from rfkernels.sampling.field import Evaluation, Field, State
from rfkernels.sampling.run import Run, Solution


@dataclass(frozen=True)
class Interval:
    """One step of the grid, from ``start`` to ``end``; ``previous_dt`` is None in the first."""

    start: float
    end: float
    previous_dt: float | None

    @property
    def dt(self) -> float:
        """end - start; negative when inverting."""
        return self.end - self.start


class FixedStepSolver:
    """A rule for one step, walked along the grid of the run. Subclasses define ``name`` and
    :meth:`step`."""

    name: ClassVar[str]
    adaptive: ClassVar[bool] = False

    def step(
        self, field: Field, state: State, interval: Interval, history: list[Evaluation]
    ) -> State:
        """The state after the interval.

        Args:
            field: where to evaluate and how to move.
            state: the state at ``interval.start``.
            interval: the step.
            history: evaluations the solver keeps from step to step; empty at first, owned by the
                run.
        """
        raise NotImplementedError

    def integrate(self, field: Field, x0: Tensor, run: Run) -> Solution:
        """Walk ``run.times`` from x0; see :class:`rfkernels.sampling.run.Solver`."""
        state = field.start(x0)
        kept = [x0]
        history: list[Evaluation] = []
        count = len(run.times) - 1
        previous_dt = None
        for index, (start, end) in enumerate(pairwise(run.times)):
            state = self.step(field, state, Interval(start, end, previous_dt), history)
            previous_dt = end - start
            if run.keep_trajectory:
                kept.append(state.model_input)
            if run.callback is not None:
                run.callback(index, field.time(end, state), state.model_input)
            run.progress((index + 1) / count)
        trajectory = torch.stack(kept) if run.keep_trajectory else None
        return Solution(state.model_input, field.calls, trajectory)


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

    def step(
        self, field: Field, state: State, interval: Interval, history: list[Evaluation]
    ) -> State:
        """x + h v(x, t)."""
        t = self.original_eps + interval.start * (1 - self.original_eps)
        return field.advance(state.x, [(interval.dt, field(state, field.time(t, state)))])


def _midpoint(field: Field, state: State, interval: Interval, first: Evaluation) -> State:
    """x + h v(x + h/2 v, t + h/2), with ``first`` the velocity at the start."""
    half = interval.dt / 2
    middle = field.advance(state.x, [(half, first)])
    return field.advance(
        state.x, [(interval.dt, field(middle, field.time(interval.start + half, state)))]
    )


@dataclass(frozen=True)
class Midpoint(FixedStepSolver):
    """The explicit midpoint rule: second order, two evaluations a step."""

    name: ClassVar[str] = "midpoint"

    def step(
        self, field: Field, state: State, interval: Interval, history: list[Evaluation]
    ) -> State:
        """x + h v(x + h/2 v, t + h/2)."""
        return _midpoint(field, state, interval, field(state, field.time(interval.start, state)))


@dataclass(frozen=True)
class Heun(FixedStepSolver):
    """Heun's trapezoidal rule: second order, two evaluations a step, the last one at the end of the
    grid itself."""

    name: ClassVar[str] = "heun"

    def step(
        self, field: Field, state: State, interval: Interval, history: list[Evaluation]
    ) -> State:
        """x + h/2 (v1 + v2), v2 at the Euler step's end."""
        dt = interval.dt
        first = field(state, field.time(interval.start, state))
        predicted = field.advance(state.x, [(dt, first)])
        second = field(predicted, field.time(interval.end, state))
        return field.advance(state.x, [(dt / 2, first), (dt / 2, second)])


@dataclass(frozen=True)
class RK4(FixedStepSolver):
    """The classical Runge-Kutta rule: fourth order, four evaluations a step."""

    name: ClassVar[str] = "rk4"

    def step(
        self, field: Field, state: State, interval: Interval, history: list[Evaluation]
    ) -> State:
        """x + h/6 (k1 + 2 k2 + 2 k3 + k4)."""
        start, dt, x = interval.start, interval.dt, state.x
        k1 = field(state, field.time(start, state))
        k2 = field(field.advance(x, [(dt / 2, k1)]), field.time(start + dt / 2, state))
        k3 = field(field.advance(x, [(dt / 2, k2)]), field.time(start + dt / 2, state))
        k4 = field(field.advance(x, [(dt, k3)]), field.time(interval.end, state))
        return field.advance(x, [(dt / 6, k1), (dt / 3, k2), (dt / 3, k3), (dt / 6, k4)])


@dataclass(frozen=True)
class AB2(FixedStepSolver):
    """Two-step Adams-Bashforth with the coefficients of the grid at hand: second order, one
    evaluation a step.

    The first step has no past and is a midpoint step, so N steps cost N + 1 evaluations.
    """

    name: ClassVar[str] = "ab2"

    def step(
        self, field: Field, state: State, interval: Interval, history: list[Evaluation]
    ) -> State:
        """x + h (1 + r/2) v - h r/2 v_previous, r = h / h_previous."""
        dt = interval.dt
        now = field(state, field.time(interval.start, state))
        if interval.previous_dt is None:
            result = _midpoint(field, state, interval, now)
        else:
            half_ratio = dt / interval.previous_dt / 2
            result = field.advance(
                state.x, [(dt * (1 + half_ratio), now), (-dt * half_ratio, history[0])]
            )
        history[:] = [now]
        return result


@dataclass(frozen=True)
class Taylor(FixedStepSolver):
    """x + h v + h^2/2 dv/dt with the derivative along the flow: second order, two evaluations a
    step.

    Args:
        order: the highest power of h; 2.
        derivative: ``"finite"`` takes dv/dt from a half step of Euler, (v_half - v) / (h/2). This
            is RF-Solver (Wang et al. 2024); inserting it leaves x + h v_half, the midpoint rule,
            and so it is computed. ``"jvp"`` takes the exact dv/dt = J v + dv/dt by one forward-mode
            call (``torch.func.jvp``), which counts as one evaluation and which the velocity must
            support; a field that is compiled is called uncompiled for it.
    """

    name: ClassVar[str] = "taylor"
    order: int = 2
    derivative: str = "finite"

    def __post_init__(self) -> None:
        if self.order != 2:
            raise ValueError(f"Taylor: order must be 2; got {self.order!r}")
        if self.derivative not in ("finite", "jvp"):
            raise ValueError(
                f"Taylor: derivative must be 'finite' or 'jvp'; got {self.derivative!r}"
            )

    def step(
        self, field: Field, state: State, interval: Interval, history: list[Evaluation]
    ) -> State:
        """x + h v + h^2/2 dv/dt."""
        t = field.time(interval.start, state)
        if self.derivative == "finite":
            return _midpoint(field, state, interval, field(state, t))
        now = field.combined(state, t)
        change = field.derivative(state, field.time(interval.start, state), now.conditional)
        return field.taylor(state.x, now, change, interval.dt)
