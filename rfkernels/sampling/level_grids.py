"""Grids that are spaced on the noise level s = 1 - t: resolution-dependent shift, Karras, exponential,
beta, and the stretch of any grid to a given last noise level.

The levels of Karras and exponential grids form a (root of a) geometric sequence, which never gets to 0.
Where the run ends at t = 1, they go down to ``smallest`` in steps - 1 steps, and the last step does the
rest, as in diffusers and k-diffusion; where it ends before, they go to its end in all steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rfkernels.sampling.constant import constant
from rfkernels.sampling.grids import ShiftedGrid, get_grid

__all__ = [
    "BetaGrid",
    "ExponentialGrid",
    "KarrasGrid",
    "ResolutionShiftedGrid",
    "StretchedGrid",
    "resolution_shift",
]


def resolution_shift(
    tokens: float,
    *,
    base_tokens: float = 256,
    max_tokens: float = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """The time shift e^mu of FLUX for an image of this many tokens, for ``grid=``.

    mu runs linearly from ``base_shift`` at ``base_tokens`` to ``max_shift`` at ``max_tokens``, and on
    beyond. A token of FLUX is 16 x 16 pixels, so 1024 x 1024 are 4096 tokens and a shift of 3.16. SD3
    (Esser et al. 2024, section 5.3.2) takes sqrt(n / n0) for n pixels instead of n0.

    Raises:
        ValueError: tokens that are not positive, or two equal sizes.
    """
    if not (math.isfinite(tokens) and tokens > 0):
        raise ValueError(f"resolution_shift: tokens must be positive; got {tokens}")
    if base_tokens == max_tokens:
        raise ValueError(
            f"resolution_shift: base_tokens and max_tokens must differ; got {base_tokens} twice"
        )
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return math.exp(base_shift + slope * (tokens - base_tokens))


@dataclass(frozen=True)
class ResolutionShiftedGrid:
    """The shifted grid whose shift follows the image size; arguments of :func:`resolution_shift`."""

    tokens: float
    base_tokens: float = 256
    max_tokens: float = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    @property
    def shift(self) -> float:
        """The shift at this size."""
        return resolution_shift(
            self.tokens,
            base_tokens=self.base_tokens,
            max_tokens=self.max_tokens,
            base_shift=self.base_shift,
            max_shift=self.max_shift,
        )

    def times(self, steps: int | None, t_start: float, t_end: float) -> list[float]:
        """The ``steps + 1`` times."""
        return ShiftedGrid(self.shift).times(steps, t_start, t_end)


def _down_to(
    owner: str,
    steps: int | None,
    t_start: float,
    t_end: float,
    smallest: float,
    level: Callable[[float, float, float], float],
) -> list[float]:
    """Times of the levels ``level(fraction, from, to)``."""
    if steps is None:
        raise ValueError(f"{owner}: steps must be given; got None")
    first, last, smallest = 1 - t_start, 1 - t_end, constant(smallest)
    if last > 0:
        inner = [1 - level(i / steps, first, last) for i in range(1, steps)]
        return [t_start, *inner, t_end]
    if steps == 1:
        return [t_start, t_end]
    if smallest >= first:
        raise ValueError(
            f"{owner}: smallest must be below the first noise level, {first:g}; got {smallest:g}"
        )
    inner = [1 - level(i / (steps - 1), first, smallest) for i in range(1, steps)]
    return [t_start, *inner, t_end]


def _check_smallest(owner: str, smallest: float) -> None:
    if not 0 < smallest < 1:
        raise ValueError(f"{owner}: smallest must be in (0, 1); got {smallest}")


@dataclass(frozen=True)
class KarrasGrid:
    """Levels whose rho-th roots are evenly spaced (Karras et al. 2022, equation 5), on s.

    Args:
        rho: 1 is even, larger spends more steps near the data; the paper's is 7.
        smallest: the last level before 0; 1e-3, as diffusers' flow schedulers.
    """

    rho: float = 7.0
    smallest: float = 1e-3

    def __post_init__(self) -> None:
        if not (math.isfinite(constant(self.rho)) and self.rho > 0):
            raise ValueError(f"KarrasGrid: rho must be positive and finite; got {self.rho}")
        _check_smallest("KarrasGrid", self.smallest)

    def times(self, steps: int | None, t_start: float, t_end: float) -> list[float]:
        """The ``steps + 1`` times."""
        rho = constant(self.rho)

        def level(fraction: float, first: float, last: float) -> float:
            a, b = first ** (1 / rho), last ** (1 / rho)
            return ((1 - fraction) * a + fraction * b) ** rho

        return _down_to("KarrasGrid", steps, t_start, t_end, self.smallest, level)


@dataclass(frozen=True)
class ExponentialGrid:
    """Levels in a geometric sequence; most steps are near the data.

    Args:
        smallest: the last level before 0.
    """

    smallest: float = 1e-3

    def __post_init__(self) -> None:
        _check_smallest("ExponentialGrid", self.smallest)

    def times(self, steps: int | None, t_start: float, t_end: float) -> list[float]:
        """The ``steps + 1`` times."""

        def level(fraction: float, first: float, last: float) -> float:
            return first * (last / first) ** fraction

        return _down_to("ExponentialGrid", steps, t_start, t_end, self.smallest, level)


@dataclass(frozen=True)
class BetaGrid:
    """Times at even quantiles of a beta distribution (Lee et al. 2024, "Beta sampling is all you need").

    Both ends get more steps than the middle when alpha and beta are below 1; 0.6 and 0.6 are those of
    diffusers and ComfyUI. Needs SciPy.

    Args:
        alpha, beta: of the distribution of t, positive; small alpha puts steps near t = 0.
    """

    alpha: float = 0.6
    beta: float = 0.6

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"BetaGrid: {name} must be positive and finite; got {value}")

    def times(self, steps: int | None, t_start: float, t_end: float) -> list[float]:
        """The ``steps + 1`` times."""
        if steps is None:
            raise ValueError("BetaGrid: steps must be given; got None")
        try:
            from scipy import special
        except ImportError as error:
            raise ImportError(
                'BetaGrid: scipy is needed; install it with pip install "rfkernels[train]"'
            ) from error
        inner = [
            t_start
            + (t_end - t_start) * float(special.betaincinv(self.alpha, self.beta, i / steps))
            for i in range(1, steps)
        ]
        return [t_start, *inner, t_end]


@dataclass(frozen=True)
class StretchedGrid:
    """Another grid, stretched so that its last step begins at noise level ``terminal``.

    t_i' = t_start + (t_i - t_start) (1 - terminal - t_start) / (t_{N-1} - t_start) for all but the
    last time, as diffusers' ``shift_terminal`` (LTX-Video takes 0.1).

    Args:
        grid: what ``grid=`` takes.
        terminal: the noise level, between those of the ends of the run.
    """

    grid: Any = None
    terminal: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", get_grid(self.grid))
        if not 0 < self.terminal < 1:
            raise ValueError(f"StretchedGrid: terminal must be in (0, 1); got {self.terminal}")

    def times(self, steps: int | None, t_start: float, t_end: float) -> Iterable[float]:
        """The ``steps + 1`` times; one step alone has nothing to stretch."""
        times = list(self.grid.times(steps, t_start, t_end))
        if len(times) < 3:
            return times
        if not times[0] < 1 - self.terminal < times[-1]:
            raise ValueError(
                f"StretchedGrid: terminal must be between the noise levels {1 - times[-1]:g} and "
                f"{1 - times[0]:g} of the run's ends; got {self.terminal}"
            )
        gain = (1 - self.terminal - times[0]) / (times[-2] - times[0])
        return [*(times[0] + (t - times[0]) * gain for t in times[:-1]), times[-1]]
