"""DPM-Solver++ and UniPC for flows: multistep rules for the data estimate in log signal-to-noise time.

With s = 1 - t and m = x + s v the data estimate, a step is c_x x + c_0 m_0 + c_1 m_1 + ..., the m at
the state and at past ones, with the coefficients of ``rfkernels.sampling.multistep``; written out in
the states and velocities it is one kernel call. Times are exact and floats throughout: schedulers that
round them to whole numbers stop improving near an error of 1e-3.

The logarithm makes steps near t = 0 and t = 1 infinitely long, so a step that touches t = 1, and one
at t = 0 and the first after it nearly, are Euler steps. Within (0, 1) the orders are the nominal ones;
over all of [0, 1] what is left of them is close to 2. These rules shine with few steps and guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from rfkernels.sampling import multistep
from rfkernels.sampling.field import Evaluation, Field, State
from rfkernels.sampling.fixed import FixedStepSolver, Step

__all__ = ["DPMSolver", "UniPC"]


class _Past(NamedTuple):
    """An evaluation: its noise level, the state and the velocity there."""

    level: float
    x: Tensor
    velocity: Evaluation


def _check_order(owner: str, order: object) -> None:
    if order not in (1, 2, 3) or isinstance(order, (bool, float)):
        raise ValueError(f"{owner}: order must be 1, 2 or 3; got {order!r}")


def _move(
    field: Field, calls: Sequence[_Past], end: float, of_state: float, weights: Sequence[float]
) -> State:
    """of_state x + sum of weights m, the newest m at x itself, where of_state and weights sum to 1."""
    now, *past = calls
    if now.level == 0:  # the estimate is the state, whatever the velocity: an Euler step
        return field.advance(now.x, [(-end, now.velocity)])
    terms = [(now.level * weights[0], now.velocity)]
    tensors = []
    for call, weight in zip(past, weights[1:], strict=False):
        if weight != 0:
            terms.append((call.level * weight, call.velocity))
            tensors.append((weight, call.x))
    return field.combine(now.x, of_state + weights[0], terms, tensors)


@dataclass(frozen=True)
class DPMSolver(FixedStepSolver):
    """DPM-Solver++ multistep (Lu et al. 2022): 2M, or 3M of third order; one evaluation a step.

    Args:
        order: 1 (Euler), 2 or 3.
        kind: of order 2, "midpoint" or "heun".
        lower_order_final: the last steps of a run of less than 15 are of order 1 and 2, for stability.
    """

    name: ClassVar[str] = "dpm++"
    order: int = 2
    kind: str = "midpoint"
    lower_order_final: bool = True

    def __post_init__(self) -> None:
        _check_order("DPMSolver", self.order)
        if self.kind not in ("midpoint", "heun"):
            raise ValueError(f"DPMSolver: kind must be 'midpoint' or 'heun'; got {self.kind!r}")

    @property
    def evaluations(self) -> int:
        """The newest and the kept ones."""
        return self.order

    @property
    def tensors(self) -> int:
        """The states of the kept ones."""
        return self.order - 1

    def step(self, field: Field, state: State, interval: Step, history: list[Any]) -> State:
        """c_x x + c_0 m_0 + ..."""
        now = _Past(1 - interval.start, state.x, field(state, interval.start))
        calls, end = [now, *history], 1 - interval.end
        order = min(self.order, len(calls))
        if self.lower_order_final and interval.index + interval.left < multistep.FEW_STEPS:
            order = min(order, interval.left)
        of_state, *weights = multistep.dpm([end, *(call.level for call in calls)], order, self.kind)
        history[:] = calls[: self.order - 1]
        return _move(field, calls, end, of_state, weights)


@dataclass(frozen=True)
class UniPC(FixedStepSolver):
    """UniPC (Zhao et al. 2023): a predictor, and a corrector that costs no evaluation; one a step.

    The correction of a state uses the velocity at its prediction, which the next step needs anyway, and
    is part of that step's kernel call. The last state is the predicted one. Under guidance, order 3 puts
    the guidance into each velocity by a kernel call of its own.

    Args:
        order: of the predictor, 1 to 3; the corrector has one more.
        kind: B(h) of the paper, "bh2" or "bh1".
        lower_order_final: the last steps are of order 2 and 1, for stability, as in diffusers.
    """

    name: ClassVar[str] = "unipc"
    order: int = 2
    kind: str = "bh2"
    lower_order_final: bool = True

    def __post_init__(self) -> None:
        _check_order("UniPC", self.order)
        if self.kind not in ("bh1", "bh2"):
            raise ValueError(f"UniPC: kind must be 'bh2' or 'bh1'; got {self.kind!r}")

    @property
    def evaluations(self) -> int:
        """The newest and the kept ones."""
        return self.order + 1

    @property
    def tensors(self) -> int:
        """The states of the kept ones."""
        return self.order

    def step(self, field: Field, state: State, interval: Step, history: list[Any]) -> State:
        """The correction of the state and the prediction of the next in one sum; history holds the
        kept evaluations and, last, the order of the step before."""
        now = _Past(1 - interval.start, state.x, field(state, interval.start))
        *past, last_order = history or (0,)
        calls, end = [now, *past], 1 - interval.end
        levels = [call.level for call in calls]
        order = min(self.order, len(calls))
        if self.lower_order_final:
            order = min(order, interval.left)
        predicted = last_order if past and past[0].level > 0 else 0
        of_state, *weights = multistep.unipc([end, *levels], order, self.kind, predicted=predicted)
        history[:] = [*calls[: self.order], order]
        return _move(field, calls, end, of_state, weights)
