"""The time grid of flows that are straight within equal windows of time, as PeRFlow trains them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["WindowGrid"]


@dataclass(frozen=True)
class WindowGrid:
    """Even steps inside each of ``windows`` equal windows of [0, 1]; pass it as ``grid=``.

    Every step stays within a window. ``steps`` below the number of windows are raised to it; what
    does not divide evenly goes to the noisiest windows, those next to t = 0, first (Yan et al.
    2024, PeRFlow). t_start and t_end must be 0 and 1.
    """

    windows: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.windows, bool) or not isinstance(self.windows, int):
            raise TypeError(f"WindowGrid: windows must be a whole number; got {self.windows!r}")
        if self.windows < 1:
            raise ValueError(f"WindowGrid: windows must be at least 1; got {self.windows}")

    def times(self, steps: int | None, t_start: float, t_end: float) -> list[float]:
        """max(steps, windows) + 1 times."""
        if steps is None:
            raise ValueError("WindowGrid: steps must be given; got None")
        if (t_start, t_end) != (0.0, 1.0):
            raise ValueError(
                f"WindowGrid: t_start and t_end must be 0 and 1; got {t_start} and {t_end}"
            )
        least, surplus = divmod(max(steps, self.windows), self.windows)
        times = []
        for window in range(self.windows):
            count = least + (window < surplus)
            times += [(window + i / count) / self.windows for i in range(count)]
        return [*times, 1.0]
