"""Guidance: how the velocities with and without the condition become one.

``guidance_scale=`` of ``sample`` and ``invert`` takes a number, which is :class:`ClassifierFree`, or
an object: :class:`Interval`, or a kind of ``guidance_kinds.py``. All of them end as coefficients, a
float or (B,) each, of tensors that are there anyway, so that guidance stays inside the one kernel
call of the solver's update. What a kind reads besides is said where it is defined.

Negative prompts need no kind of their own: give them as ``uncondition``, and guidance moves away from
them instead of from no prompt.

c is the velocity with the condition, u the one without, both (B, ...); g is the scale, a float, a 0-d
or a (B,) tensor; sums and norms are per sample.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rfkernels.ops._checks import single
from rfkernels.sampling.constant import constant

__all__ = [
    "SLACK",
    "ClassifierFree",
    "Guidance",
    "Interval",
    "Part",
    "Scale",
    "check_number",
    "get_guidance",
]

Scale = float | Tensor
Part = tuple[Scale, Tensor]

SLACK = 1e-9  # of times: those of a grid are rounded, and an end of an interval belongs to it


class Guidance:
    """The kinds of guidance; each is a frozen dataclass with ``scale``.

    Attributes:
        scale: g, a float, a 0-d or a (B,) tensor.
        tensors: how many tensors a guided velocity is a sum of, at most.
        remembers: whether a guided velocity depends on those before it, which adaptive solvers and
            forward derivatives do not allow.
    """

    tensors: ClassVar[int] = 2
    remembers: bool = False

    def begin(self, times: Sequence[float]) -> Guidance:
        """The guidance of a run on this grid, given in either direction."""
        return self

    def guides_at(self, t: float) -> bool:
        """Whether the unconditional call is needed at this time of all samples."""
        return True

    def rests_at(self, t: float | Tensor) -> bool | Tensor:
        """Whether the velocity is 0 at this time, so that no call is needed; (B,) for (B,) times."""
        return False

    def rests_between(self, start: float, end: float) -> bool:
        """Whether nothing moves in a step between these times, in either direction."""
        return False

    def parts(
        self, c: Tensor, u: Tensor, x: Tensor, t: float | Tensor, memory: dict[str, Tensor]
    ) -> tuple[Part, ...] | None:
        """(coefficient, tensor) of the guided velocity, c's first; None is u + g (c - u).

        Args:
            c, u: the two velocities.
            x: the state they were evaluated at.
            t: its time, one number or (B,).
            memory: what the guidance keeps between the evaluations of a run.
        """
        raise NotImplementedError

    def per_sample(self, change: Callable[[Any], Any]) -> Guidance:
        """The guidance with ``change`` made to what may be per sample."""
        return dataclasses.replace(self, scale=change(self.scale))


def check_number(owner: str, name: str, value: object) -> None:
    """Refuse what is neither a finite number nor, for the scale, a tensor."""
    if isinstance(value, Tensor) and name == "scale":
        return
    if type(value) in (int, float):
        value = constant(value)
    elif isinstance(value, (bool, str, Tensor)) or not single(value, "__float__"):
        raise TypeError(f"{owner}: {name} must be a number; got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{owner}: {name} must be finite; got {value}")


@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """u + g (c - u); 1 is the condition alone, 0 the lack of it (Ho and Salimans 2022)."""

    scale: Scale

    def __post_init__(self) -> None:
        check_number("ClassifierFree", "scale", self.scale)

    def guides_at(self, t: float) -> bool:
        """False for the number 1, which is the condition alone; a tensor is not read."""
        return isinstance(self.scale, Tensor) or self.scale != 1

    def parts(
        self, c: Tensor, u: Tensor, x: Tensor, t: float | Tensor, memory: dict[str, Tensor]
    ) -> None:
        """None: the kernels know this one."""


@dataclass(frozen=True)
class Interval(Guidance):
    """Guidance within an interval of times, the condition alone outside of it.

    Kynkäänniemi et al. 2024, "Applying guidance in a limited interval improves sample and distribution
    quality": guidance does harm near the noise and little near the data. Outside the interval there is
    no unconditional call either, except under an adaptive solver, whose samples have times of their
    own.

    Args:
        guidance: a number, a tensor or one of the other kinds.
        start, end: the interval, both ends in it.
    """

    guidance: Any
    start: float
    end: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance", get_guidance(self.guidance))
        for name in ("start", "end"):
            check_number("Interval", name, getattr(self, name))
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                "Interval: start and end must satisfy 0 <= start < end <= 1; "
                f"got {self.start} and {self.end}"
            )

    @property
    def scale(self) -> Scale:
        """Of the guidance inside."""
        return self.guidance.scale

    @property
    def tensors(self) -> int:
        """Of the guidance inside."""
        return self.guidance.tensors

    @property
    def remembers(self) -> bool:
        """Of the guidance inside."""
        return self.guidance.remembers

    def begin(self, times: Sequence[float]) -> Interval:
        """With the guidance inside begun."""
        return dataclasses.replace(self, guidance=self.guidance.begin(times))

    def guides_at(self, t: float) -> bool:
        """True inside the interval."""
        return self.start - SLACK <= t <= self.end + SLACK and self.guidance.guides_at(t)

    def rests_at(self, t: float | Tensor) -> bool | Tensor:
        """As the guidance inside."""
        return self.guidance.rests_at(t)

    def rests_between(self, start: float, end: float) -> bool:
        """As the guidance inside."""
        return self.guidance.rests_between(start, end)

    def parts(
        self, c: Tensor, u: Tensor, x: Tensor, t: float | Tensor, memory: dict[str, Tensor]
    ) -> tuple[Part, ...] | None:
        """Those of the guidance inside, for samples whose time is inside; else c alone."""
        parts = self.guidance.parts(c, u, x, t, memory)
        if not isinstance(t, Tensor):
            return parts
        if parts is None:
            parts = ((self.scale, c), (1 - self.scale, u))
        inside = (t >= self.start - SLACK) & (t <= self.end + SLACK)
        resting = self.rests_at(t)
        first = 1 - resting.to(t.dtype) if isinstance(resting, Tensor) else torch.ones_like(t)
        alone = (first, *(torch.zeros_like(t),) * (len(parts) - 1))
        # Numbers in the precision of the times, not in the default one.
        return tuple(
            (torch.where(inside, torch.ones_like(t) * coefficient, other), tensor)
            for (coefficient, tensor), other in zip(parts, alone, strict=True)
        )

    def per_sample(self, change: Callable[[Any], Any]) -> Interval:
        """The same made to the guidance inside."""
        return dataclasses.replace(self, guidance=self.guidance.per_sample(change))


def get_guidance(value: object) -> Guidance:
    """A number or tensor as :class:`ClassifierFree`; an object as it is."""
    return value if isinstance(value, Guidance) else ClassifierFree(value)
