"""RF-Inversion: inversion steered to typical noise, sampling steered back to the picture."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from rfkernels.editing.setting import Setting
from rfkernels.sampling.field import Field, State
from rfkernels.training.option_checks import number, require

__all__ = ["RFInversion"]


@dataclass(frozen=True)
class RFInversion:
    """Euler steps of two controlled equations (Rout et al. 2024, "Semantic image inversion and editing
    using rectified stochastic differential equations").

    With n normal noise drawn once, h > 0 a step's length, and v under the source's condition, from
    t = 1 down::

        y <- y - h [ (1 - gamma) v(y, t) + gamma (y - n) / t ]

    then under the target's condition, from t = 0 up::

        x <- x + h [ (1 - eta_i) v(x, t) + eta_i (x1 - x) / (1 - t) ]

    Each is one kernel call, in which n is drawn anew, the same at every step. gamma = 1 arrives at n
    and eta = 1 at x1 exactly; gamma = eta = 0 is the plain Euler round trip. On a grid that does not
    reach 0 and 1, its own ends stand in the denominators, so that this stays true. A step whose factor
    of v is 0 does not evaluate it.

    Args:
        gamma: in [0, 1], how strongly inversion is steered to n; published 0.5.
        eta: in [0, 1], how strongly sampling is steered to x1; published 0.9 to 1.0.
        start, stop: the part of the sampling steps with eta, as fractions of them: step i when
            round(start N) <= i < round(stop N). Published 0 and 0.25 (7 of 28 steps).
        decay: p, not negative; eta_i = eta (1 - i/N)^p. 0 keeps eta.

    The published stochastic sampler is not offered. For inversion without a prompt give
    ``source={}`` to ``edit``.
    """

    name: ClassVar[str] = "rf-inversion"
    shares_features: ClassVar[bool] = False
    gamma: float = 0.5
    eta: float = 0.9
    start: float = 0.0
    stop: float = 0.25
    decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("gamma", "eta", "start", "stop", "decay"):
            value = number(name, getattr(self, name))
            if name == "decay":
                require(value >= 0, name, "must not be negative", value)
            else:
                require(0 <= value <= 1, name, "must be in [0, 1]", value)
        if self.start > self.stop:
            raise ValueError(f"start: must not be after stop; got {self.start} and {self.stop}")

    def run(self, setting: Setting) -> Tensor:
        """The edited samples; see :class:`rfkernels.editing.Method`."""
        times, steps = setting.times, setting.steps
        field = setting.source_field()
        state = field.start(setting.x1)
        x1 = state.x
        for index, (t, end) in enumerate(pairwise(times[::-1])):
            pull = self.gamma * ((t - end) / (t - times[0]))
            noise = setting.noise(pull, 0) if pull else None
            weight = (end - t) * (1 - self.gamma)
            terms = _terms(field, state, t, weight)
            state = field.combine(state.x, 1 - pull, terms, noise=noise)
            setting.progress((index + 1) / (2 * steps))
        field = setting.target_field()
        for index, (t, end) in enumerate(pairwise(times)):
            eta = self._eta(index, steps)
            pull = eta * ((end - t) / (times[-1] - t))
            terms = _terms(field, state, t, (end - t) * (1 - eta))
            state = field.combine(state.x, 1 - pull, terms, [(pull, x1)] if pull else [])
            setting.progress((steps + index + 1) / (2 * steps))
        return state.model_input

    def _eta(self, index: int, steps: int) -> float:
        """The strength in that sampling step."""
        if not round(self.start * steps) <= index < round(self.stop * steps):
            return 0.0
        return self.eta * (1 - index / steps) ** self.decay


def _terms(field: Field, state: State, t: float, weight: float) -> list:
    """The velocity with its factor; nothing, and no evaluation, for the factor 0."""
    return [(weight, field(state, t))] if weight else []
