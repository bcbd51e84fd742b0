"""The solver of flow maps: networks that give the average velocity over an interval instead of the
velocity at its start.

With u(x, t, span=h) the average velocity over [t, t + h] along the flow through x at t, one step is
x + h u(x, t, span=h), exact for an exact u however long the interval, so a step a sample is enough
(MeanFlow, Geng et al. 2025; shortcut models, Frans et al. 2024). As for every solver it is one
fused kernel call, guidance included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from rfkernels.sampling.field import Field, State
from rfkernels.sampling.fixed import FixedStepSolver, Step

__all__ = ["FlowMap"]


@dataclass(frozen=True)
class FlowMap(FixedStepSolver):
    """x + h u(x, t, span=h) with the whole interval as h: one evaluation a step, doubled by
    guidance.

    The velocity is called with the keyword `span` besides the condition, (B,) in the times' dtype.
    It must be a flow map, such as ``models.build(..., flow_map=True)`` trained by a recipe of flow
    maps; any other one refuses the keyword.

    Args:
        negative_spans: whether the network was trained for h < 0, which ``invert`` asks for. None
            of the recipes here does that, and a network that was not answers nonsense, so that
            ``invert`` is refused by default; invert with the velocity at span 0, ``euler`` or
            ``heun``, instead.
    """

    name: ClassVar[str] = "flow-map"
    negative_spans: bool = False

    def step(self, field: Field, state: State, interval: Step, history: list[Any]) -> State:
        """x + h u(x, t, span=h)."""
        dt = interval.dt
        if dt < 0 and not self.negative_spans:
            raise ValueError(
                "solver: 'flow-map' goes backwards only with a network trained for it, "
                f"FlowMap(negative_spans=True); got a step of {dt:g}"
            )
        span = field.time(dt, state)
        asked = dataclasses.replace(
            field,
            condition=_with_span("condition", field.condition, span),
            uncondition=_with_span("uncondition", field.uncondition, span),
        )
        average = asked(state, interval.start)
        field.calls = asked.calls
        return field.advance(state.x, [(dt, average)])


def _with_span(name: str, condition: Mapping[str, Any], span: Tensor) -> Mapping[str, Any]:
    if "span" in condition:
        raise ValueError(
            f"{name}: span is given by the solver 'flow-map', one per step; leave it out"
        )
    # A fresh tensor per call, like the times: a network may scale it in place.
    return {**condition, "span": span.clone()}
