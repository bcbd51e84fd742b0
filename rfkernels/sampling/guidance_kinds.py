"""Kinds of guidance whose coefficients are found from sums over a sample: rescaled, CFG-Zero*, projected.

c, u and g are those of ``guidance.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rfkernels.ops.ode_step import linear_step
from rfkernels.sampling.guidance import SLACK, Guidance, Part, Scale, check_number
from rfkernels.sampling.row_sums import row_sums

__all__ = ["CFGZero", "Projected", "Rescaled"]


@dataclass(frozen=True)
class Rescaled(Guidance):
    """Classifier-free guidance brought back to the spread of the conditional velocity.

    With w = u + g (c - u), the result is (phi std(c) / std(w) + 1 - phi) w, std over the elements of
    a sample (Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed", there on
    the network's output, as here). It takes the overexposure out of large scales. std(w) follows from
    the moments of c and c - u, which are read once more for them.

    Args:
        scale: g.
        phi: 0 leaves the guidance as it is, 1 rescales in full; the paper's is 0.7.
    """

    scale: Scale
    phi: float = 0.7

    def __post_init__(self) -> None:
        check_number("Rescaled", "scale", self.scale)
        check_number("Rescaled", "phi", self.phi)
        if not 0 <= self.phi <= 1:
            raise ValueError(f"Rescaled: phi must be in [0, 1]; got {self.phi}")

    def parts(
        self, c: Tensor, u: Tensor, x: Tensor, t: float | Tensor, memory: dict[str, Tensor]
    ) -> tuple[Part, ...]:
        """f g of c and f (1 - g) of u with the factor f of each sample."""
        c_, u_ = _rows(c, x), _rows(u, x)
        size = c_.shape[1]
        d_ = c_ - u_  # first, since c and u are alike and g may be large
        c_, d_ = c_ - row_sums(c_)[:, None] / size, d_ - row_sums(d_)[:, None] / size
        g, more = self.scale, self.scale - 1
        own = row_sums(c_ * c_)
        guided = own + 2 * more * row_sums(c_ * d_) + more * more * row_sums(d_ * d_)
        factor = self.phi * _root(_ratio(own, guided, 1.0)) + (1 - self.phi)
        return (factor * g, c), (-factor * more, u)


@dataclass(frozen=True)
class CFGZero(Guidance):
    """CFG-Zero*: the unconditional velocity scaled to fit the conditional one, and a rest at the start.

    The result is s u + g (c - s u) with s = <c, u> / |u|^2, and 0 in the grid's first ``zero_steps``
    steps (Fan et al. 2025, "CFG-Zero*: improved classifier-free guidance for flow matching models").
    Nothing moves there, whichever the solver, which begins after them, or when inverting ends before
    them. The network is not called where the velocity is 0. c and u are read once more for s.

    Args:
        scale: g.
        zero_steps: steps of the grid at the noisy end in which nothing moves, less than all; the
            paper's are 1 or 2 of 28 and more, 0 keeps the scaling alone. The default is 0, since a
            step of a short run is not to be given away unasked.
        zero_until: the time before which nothing moves, in [0, 1]; None is that of ``zero_steps``.
            Adaptive solvers, whose grid is not their steps, are better told this.
    """

    scale: Scale
    zero_steps: int = 0
    zero_until: float | None = None

    def __post_init__(self) -> None:
        check_number("CFGZero", "scale", self.scale)
        if isinstance(self.zero_steps, bool) or not isinstance(self.zero_steps, int):
            raise TypeError(
                f"CFGZero: zero_steps must be an integer; got {type(self.zero_steps).__name__}"
            )
        if self.zero_steps < 0:
            raise ValueError(f"CFGZero: zero_steps must not be negative; got {self.zero_steps}")
        if self.zero_until is not None:
            check_number("CFGZero", "zero_until", self.zero_until)
            if not 0 <= self.zero_until <= 1:
                raise ValueError(f"CFGZero: zero_until must be in [0, 1]; got {self.zero_until}")

    def begin(self, times: Sequence[float]) -> CFGZero:
        """With the time that ``zero_steps`` means on this grid."""
        if self.zero_until is not None or self.zero_steps == 0:
            return self
        if self.zero_steps >= len(times) - 1:
            raise ValueError(
                f"CFGZero: zero_steps must be less than the steps of the grid, {len(times) - 1}; "
                f"got {self.zero_steps}"
            )
        return dataclasses.replace(self, zero_until=sorted(times)[self.zero_steps])

    def rests_at(self, t: float | Tensor) -> bool | Tensor:
        """True before ``zero_until``."""
        return self.zero_until is not None and t < self.zero_until - SLACK

    def rests_between(self, start: float, end: float) -> bool:
        """True for a step that ends, or when inverting begins, before or at ``zero_until``."""
        return self.zero_until is not None and max(start, end) <= self.zero_until + SLACK

    def parts(
        self, c: Tensor, u: Tensor, x: Tensor, t: float | Tensor, memory: dict[str, Tensor]
    ) -> tuple[Part, ...]:
        """g of c and (1 - g) s of u with the s of each sample."""
        c_, u_ = _rows(c, x), _rows(u, x)
        fit = _ratio(row_sums(c_ * u_), row_sums(u_ * u_), 1.0)
        first, second = self.scale, (1 - self.scale) * fit
        if isinstance(t, Tensor) and self.zero_until is not None:
            moving = 1 - self.rests_at(t).to(fit.dtype)
            first, second = moving * first, moving * second
        return (first, c), (second, u)


@dataclass(frozen=True)
class Projected(Guidance):
    """Adaptive projected guidance, APG: what guidance adds is limited, and kept off the direction of the estimate.

    On the data estimates m = x + (1 - t) v of both velocities (Sadat, Hilliges, Weber 2024,
    "Eliminating oversaturation and artifacts of high guidance scales in diffusion models")::

        d = (m_c - m_u) + momentum * d_previous
        d = d * min(1, norm_threshold / |d|)
        d = d - (1 - parallel) <d, m_c> / |m_c|^2 m_c
        m = m_c + (g - 1) d

    which as a velocity is a sum of c, u and x, and of the past d with momentum: one kernel call still,
    or two with momentum, which keeps d. c, u and x are read once more for the norms. At t = 1, where the
    estimates are the state whatever the velocities, the past d is left out: as a velocity it would be
    infinite.

    Args:
        scale: g.
        parallel: how much of d along m_c stays; the paper's 0 takes it out, since it is what
            saturates; 1 leaves it.
        norm_threshold: largest |d| of a sample, root of the sum of squares over its elements; None
            does not limit it. The paper's is 2.5 to 15, by model.
        momentum: of the evaluations before; the paper's is negative, -0.5 or -0.75. 0 remembers
            nothing; another value needs a solver of fixed steps, best one that evaluates at the
            start of each step alone, as euler: near t = 1 the past is large against the present.
    """

    scale: Scale
    parallel: float = 0.0
    norm_threshold: float | None = None
    momentum: float = 0.0

    def __post_init__(self) -> None:
        for name in ("scale", "parallel", "momentum"):
            check_number("Projected", name, getattr(self, name))
        if self.norm_threshold is not None:
            check_number("Projected", "norm_threshold", self.norm_threshold)
            if self.norm_threshold <= 0:
                raise ValueError(
                    f"Projected: norm_threshold must be positive or None; got {self.norm_threshold}"
                )

    @property
    def tensors(self) -> int:
        """c, u and x, and the past with momentum."""
        return 4 if self.remembers else 3

    @property
    def remembers(self) -> bool:
        """Whether there is momentum."""
        return self.momentum != 0

    def parts(
        self, c: Tensor, u: Tensor, x: Tensor, t: float | Tensor, memory: dict[str, Tensor]
    ) -> tuple[Part, ...]:
        """Coefficients of c, u, x and the remembered difference."""
        left = 1 - t
        column = left[:, None] if isinstance(t, Tensor) else left
        past = memory.get("difference")
        c_, x_ = _rows(c, x), _rows(x, x)
        # Everything over 1 - t, in units of the velocity.
        change = c_ - _rows(u, x)
        push = 0.0
        if past is not None:
            if isinstance(left, Tensor):
                push = torch.where(left > SLACK, self.momentum / left.clamp(min=SLACK), 0.0)
                change = change + push[:, None] * _rows(past, x)
            elif left > SLACK:
                push = self.momentum / left
                change = change + push * _rows(past, x)
        if self.remembers:
            kept = [(left, c), (-left, u)] + ([] if past is None else [(self.momentum, past)])
            memory["difference"] = linear_step(
                x, [tensor for _, tensor in kept], [k for k, _ in kept], x_coefficient=0.0
            )
        estimate = x_ + column * c_
        more = self.scale - 1
        if self.norm_threshold is not None:
            norm = left * _root(row_sums(change * change))
            more = more * (self.norm_threshold / norm.clamp(min=self.norm_threshold))
        along = _ratio(row_sums(change * estimate), row_sums(estimate * estimate), 0.0)
        off = more * (1 - self.parallel) * along  # of m_c = x + (1 - t) c
        parts = [(1 + more - off * left, c), (-more, u), (-off, x)]
        if past is not None:
            parts.append((more * push, past))
        return tuple(parts)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """(B, D) in the precision of the state."""
    return values.reshape(values.shape[0], -1).to(like.dtype)


def _ratio(top: Tensor, bottom: Tensor, otherwise: float) -> Tensor:
    """top / bottom, ``otherwise`` where bottom is 0, with gradients of 0 instead of NaN there."""
    there = bottom > 0
    bottom = torch.where(there, bottom, 1.0).clamp(min=torch.finfo(bottom.dtype).tiny)
    return torch.where(there, top / bottom, otherwise)


def _root(square: Tensor) -> Tensor:
    """Square roots, whose gradients are 0 instead of NaN at 0; NaN stays."""
    there = square != 0
    return torch.where(there, torch.where(there, square, 1.0).sqrt(), 0.0)
