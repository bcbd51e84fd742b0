"""Where the two-stage solvers call the network, from the grid's levels."""

from __future__ import annotations

import numpy as np

_ROUNDING = 1e-5  # of the largest time: what float32 leaves between a time and its level


def midpoints(levels: np.ndarray, times: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(N) levels and times half-way between the N + 1 levels of the grid.

    Halves the levels, not t or the log-SNR: the solvers step in sigma. A time that is sigma * count stays so; times that
    the user gave apart from the levels are halved themselves.

    Args:
        levels: (N + 1) float32.
        times: (N), of the levels but the last.
        count: num_train_timesteps.
    """
    level = (levels[:-1] + levels[1:]) / np.float32(2)
    # Integers are cut off.
    apart = 1 if np.issubdtype(times.dtype, np.integer) else _ROUNDING * count
    if np.allclose(times, levels[:-1] * count, rtol=0, atol=apart):
        return level, (level * np.float32(count)).astype(times.dtype)
    ends = np.append(times[1:], levels[-1] * count)
    return level, ((times + ends) / 2).astype(times.dtype)


def with_midpoints(
    levels: np.ndarray, times: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """[s0, m0, s1, m1, ..., end] and the times of its 2 N first entries."""
    middle, middle_times = midpoints(levels, times, count)
    return np.append(_alternating(levels[:-1], middle), levels[-1]), _alternating(
        times, middle_times
    )


def _alternating(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.stack([first, second], axis=1).reshape(-1)
