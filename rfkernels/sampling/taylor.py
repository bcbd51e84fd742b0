"""Taylor steps: the series of the solution along the flow, with derivatives of the velocity exact or
by differences (RF-Solver)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from rfkernels.sampling.field import Field, State
from rfkernels.sampling.fixed import FixedStepSolver, Step, midpoint_step

__all__ = ["Taylor"]


@dataclass(frozen=True)
class Taylor(FixedStepSolver):
    """x + h v + h^2/2 dv/dt (+ h^3/6 d2v/dt2), derivatives along the flow: order 2 or 3, 2 or 3
    evaluations a step.

    Args:
        order: the highest power of h, 2 or 3.
        derivative: ``"finite"`` takes dv/dt from a look ahead, (v(x + d v, t + d) - v) / d. With d =
            h/2 this is RF-Solver (Wang et al. 2024, their code), and inserting it leaves x + h v(x +
            h/2 v, t + h/2), the midpoint rule: so it is computed. Of order 3, looks ahead to h/3
            and 2h/3 leave Heun's rule of third order, x + h/4 v + 3h/4 v(x + 2h/3 v', t + 2h/3) with
            v' = v(x + h/3 v, t + h/3), in which h^2/2 dv/dt + h^3/6 d2v/dt2 is 3h/4 (v'' - v).
            ``"jvp"`` takes the exact derivatives by forward-mode calls (``torch.func.jvp``), which
            count as evaluations and which the velocity must support; a field that is compiled is
            called uncompiled for them.
        look_ahead: |d| of order 2, for comparison with RF-Solver's text, which fixes 0.01; None is
            half the step. With a fixed one the order drops to 1 once steps are not much longer than
            it (slopes 1.9, 1.5, 1.1, 1.0 for 64 to 512 steps). It is cut where t + d would leave
            [0, 1], and has the sign of the step.
    """

    name: ClassVar[str] = "taylor"
    evaluations: ClassVar[int] = 2
    order: int = 2
    derivative: str = "finite"
    look_ahead: float | None = None

    def __post_init__(self) -> None:
        if self.order not in (2, 3):
            raise ValueError(f"Taylor: order must be 2 or 3; got {self.order!r}")
        if self.derivative not in ("finite", "jvp"):
            raise ValueError(
                f"Taylor: derivative must be 'finite' or 'jvp'; got {self.derivative!r}"
            )
        if self.look_ahead is not None:
            if self.order != 2 or self.derivative != "finite":
                raise ValueError("Taylor: look_ahead is for order=2 with derivative='finite' alone")
            if not 0 < self.look_ahead <= 1:
                raise ValueError(f"Taylor: look_ahead must be in (0, 1]; got {self.look_ahead!r}")

    @property
    def per_step(self) -> int:
        """The order."""
        return self.order

    def step(self, field: Field, state: State, interval: Step, history: list[Any]) -> State:
        """x + h v + h^2/2 dv/dt (+ h^3/6 d2v/dt2)."""
        if self.derivative == "jvp":
            return self._exact(field, state, interval)
        first = field(state, interval.start)
        if self.order == 3:
            return _third_order(field, state, interval, first)
        if self.look_ahead is None:
            return midpoint_step(field, state, interval, first)
        dt = interval.dt
        room = 1 - interval.start if dt > 0 else interval.start
        ahead = math.copysign(min(self.look_ahead, room), dt)
        moved = field.advance(state.x, [(ahead, first)])
        second = field(moved, interval.start + ahead)
        weight = dt * dt / (2 * ahead)
        return field.advance(state.x, [(dt - weight, first), (weight, second)])

    def _exact(self, field: Field, state: State, interval: Step) -> State:
        now = field.combined(state, interval.start).conditional
        if self.order == 2:
            derivatives = (now, field.derivative(state, interval.start, now))
        else:
            derivatives = (now, *field.two_derivatives(state, interval.start, now))
        return field.taylor(state.x, derivatives, interval.dt)


def _third_order(field: Field, state: State, interval: Step, first: Any) -> State:
    """x + h/4 v + 3h/4 v(x + 2h/3 v', t + 2h/3), v' = v(x + h/3 v, t + h/3)."""
    dt, start, x = interval.dt, interval.start, state.x
    second = field(field.advance(x, [(dt / 3, first)]), start + dt / 3)
    third = field(field.advance(x, [(2 * dt / 3, second)]), start + 2 * dt / 3)
    return field.advance(x, [(dt / 4, first), (3 * dt / 4, third)])
