"""Time grids: where a solver steps between the start and the end of an integration.

A grid turns ``(steps, t_start, t_end)`` into ``steps + 1`` ascending times in [0, 1], 0 = source, 1
= data. Sampling walks them upward, inversion walks the same times downward. Times are Python floats
(float64), so that a grid never waits for a device; a grid given as a device tensor is read once,
before the loop starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

from rfkernels.flow.times import time_shift
from rfkernels.sampling.constant import constant


@runtime_checkable
class Grid(Protocol):
    """Anything with this method can be passed as ``grid=``; ``sample`` checks what it returns."""

    def times(self, steps: int | None, t_start: float, t_end: float) -> Iterable[float]:
        """``steps + 1`` strictly ascending times; ``steps`` is None when the caller gave none."""
        ...


def _evenly(start: float, end: float, steps: int) -> list[float]:
    """steps + 1 even times with both ends exact."""
    return [start + (end - start) * (i / steps) for i in range(steps)] + [end]


def _required(steps: int | None) -> int:
    if steps is None:
        raise ValueError("sample: steps must be given with this grid; got None")
    return steps


@dataclass(frozen=True)
class UniformGrid:
    """Equal steps, t_i = t_start + (t_end - t_start) i / steps."""

    def times(self, steps: int | None, t_start: float, t_end: float) -> list[float]:
        """The ``steps + 1`` times."""
        return _evenly(t_start, t_end, _required(steps))


@dataclass(frozen=True)
class ShiftedGrid:
    """Equal steps, then a time shift toward the noisy end (Esser et al. 2024, section 5.3.2).

    With noise level s = 1 - t the shift by a is s' = a s / (1 + (a - 1) s), that is t' = t / (t + a
    (1 - t)). a > 1 spends more steps near t = 0, a = 1 is the uniform grid, a < 1 spends more near
    t = 1. The shift is applied once, to an even grid whose ends are chosen so that the shifted ones
    are t_start and t_end: a shorter interval keeps the density of steps of the whole one.

    Args:
        shift: a, positive and finite. 3.0 is SD3's value; FLUX's exp(mu) is the same parameter.
    """

    shift: float = 3.0

    def __post_init__(self) -> None:
        if not (math.isfinite(constant(self.shift)) and self.shift > 0):
            raise ValueError(f"ShiftedGrid: shift must be positive and finite; got {self.shift}")

    def times(self, steps: int | None, t_start: float, t_end: float) -> list[float]:
        """The ``steps + 1`` times."""
        even = _evenly(
            time_shift(t_start, 1 / self.shift), time_shift(t_end, 1 / self.shift), _required(steps)
        )
        inner = [time_shift(t, self.shift) for t in even[1:-1]]
        return [t_start, *inner, t_end]


@dataclass(frozen=True)
class CustomGrid:
    """Times given one by one: strictly ascending, at least two, within [0, 1].

    They say where the integration starts and ends. ``steps``, if given as well, must be their
    number minus one, and ``t_start``/``t_end`` must be left at their defaults or name the same
    ends.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(float(t) for t in self.values))
        check_times(self.values)

    def times(self, steps: int | None, t_start: float, t_end: float) -> tuple[float, ...]:
        """The given times."""
        if steps is not None and steps != len(self.values) - 1:
            raise ValueError(
                "CustomGrid: steps must be left out or be the number of intervals, "
                f"{len(self.values) - 1}; got {steps}"
            )
        ends = (self.values[0], self.values[-1])
        if (t_start, t_end) not in ((0.0, 1.0), ends):
            raise ValueError(
                "CustomGrid: t_start and t_end must be left out or be the ends of the grid, "
                f"{ends}; got {(t_start, t_end)}"
            )
        return self.values


def check_times(times: tuple[float, ...]) -> None:
    """Refuse times that are not at least two, finite, strictly ascending and within [0, 1]."""
    if len(times) < 2:
        raise ValueError(f"sample: grid must have at least two times; got {len(times)}")
    for index, t in enumerate(times):
        if not 0 <= t <= 1:
            raise ValueError(
                f"sample: grid times must lie in [0, 1], 0 = source, 1 = data; got {t} at index "
                f"{index}"
            )
    for index, (earlier, later) in enumerate(pairwise(times)):
        if not later > earlier:
            raise ValueError(
                "sample: grid times must ascend strictly, for invert too; "
                f"got {earlier} then {later} at index {index}"
            )


def _named() -> dict[str, type]:
    from rfkernels.sampling import level_grids  # which is built on this module

    return {
        "uniform": UniformGrid,
        "shifted": ShiftedGrid,
        "karras": level_grids.KarrasGrid,
        "exponential": level_grids.ExponentialGrid,
        "beta": level_grids.BetaGrid,
    }


def get_grid(grid: object) -> Grid:
    """The grid that a name, a number, a sequence or an object stands for.

    None and ``"uniform"`` are :class:`UniformGrid`; ``"shifted"`` is :class:`ShiftedGrid` with its
    default, ``"karras"``, ``"exponential"`` and ``"beta"`` are those of
    ``rfkernels.sampling.level_grids``; a number is the shift;
    a sequence, an array or a 1-D tensor is :class:`CustomGrid`; an object with a ``times`` method is taken as it is.

    Raises:
        TypeError, ValueError: anything else, another name, or numbers that the grid refuses.
    """
    if grid is None:
        return UniformGrid()
    if isinstance(grid, str):
        named = _named()
        if grid in named:
            return named[grid]()
        raise ValueError(f"get_grid: grid must be one of {', '.join(named)}; got {grid!r}")
    if isinstance(grid, Grid) and not isinstance(grid, type):
        return grid
    grid = _plain(grid)
    if _is_number(grid):
        return ShiftedGrid(float(grid))
    if isinstance(grid, Iterable):
        values = tuple(map(_plain, grid))
        if all(map(_is_number, values)):
            return CustomGrid(values)
    raise TypeError(
        "get_grid: grid must be a name, a number (the time shift), a 1-D sequence of times or an "
        f"object with a times method; got {type(grid).__name__}"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """Tensors, arrays and NumPy's numbers as Python's."""
    if _is_number(value):
        return constant(value)
    return value.tolist() if hasattr(value, "tolist") else value
