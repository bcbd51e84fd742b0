"""Euler's step along another path than the straight one, for velocity fields trained on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rfkernels.flow.paths import Path, get_path
from rfkernels.sampling.field import Field, State
from rfkernels.sampling.fixed import FixedStepSolver, Step
from rfkernels.sampling.run import Run

__all__ = ["CurvedEuler"]


@dataclass(frozen=True)
class CurvedEuler(FixedStepSolver):
    """One evaluation a step, first order, exact in one step where data and noise estimates are constant.

    For a velocity field of a path alpha x1 + sigma x0 (one trained with ``path="trigonometric"``, say).
    With the estimates x1^ and x0^ that the velocity gives at t, the step is alpha(t') x1^ + sigma(t')
    x0^, as in DDIM (Song et al. 2021); D = alpha dsigma - dalpha sigma::

        x' = (alpha' dsigma - sigma' dalpha) / D x + (alpha sigma' - alpha' sigma) / D v

    On the straight path that is Euler. On a curved one Euler would leave the path even for a single
    data point. Do not use it with a field of the straight path.

    Args:
        path: a name or object of ``rfkernels.flow``. Where its velocity is infinite, at the data end
            of "vp", only a step's end may lie.
    """

    name: ClassVar[str] = "curved-euler"
    path: str | Path = "trigonometric"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", get_path(self.path))

    def begin(self, field: Field, state: State, times: Sequence[float], run: Run) -> list[Any]:
        """(alpha, sigma, dalpha, dsigma) at every time of the grid, before the loop."""
        found = self.path.coefficients(torch.tensor(times, dtype=torch.float64, device="cpu"))
        rows = torch.stack(list(found), 1).tolist()
        for time, row in zip(times[:-1], rows, strict=False):
            if not all(map(math.isfinite, row)):
                raise ValueError(
                    f"curved-euler: the velocity of the path {self.path.name!r} must be finite where "
                    f"a step begins, at t <= {self.path.t_end}; got t = {time}"
                )
        return rows

    def step(self, field: Field, state: State, interval: Step, history: list[Any]) -> State:
        """alpha(t') x1^ + sigma(t') x0^."""
        alpha, sigma, dalpha, dsigma = history[interval.index]
        alpha_end, sigma_end, *_ = history[interval.index + 1]
        determinant = alpha * dsigma - dalpha * sigma
        of_state = (alpha_end * dsigma - sigma_end * dalpha) / determinant
        weight = (alpha * sigma_end - alpha_end * sigma) / determinant
        return field.combine(state.x, of_state, [(weight, field(state, interval.start))])
