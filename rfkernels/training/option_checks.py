"""Checks of single options, whose errors read `option: rule; got what`."""

from __future__ import annotations

import math

__all__ = ["number", "require", "whole"]


def require(condition: bool, name: str, rule: str, got: object) -> None:
    """Refuses an option that breaks a rule.

    Raises:
        ValueError: the condition is false.
    """
    if not condition:
        raise ValueError(f"{name}: {rule}; got {got!r}")


def whole(name: str, value: object, least: int) -> None:
    """Refuses what is no whole number from `least` on.

    Raises:
        TypeError: it is no int. ValueError: it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: must be a whole number; got {value!r}")
    require(value >= least, name, f"must be at least {least}", value)


def number(name: str, value: object) -> float:
    """A finite number as a float.

    Raises:
        TypeError: it is neither an int nor a float. ValueError: it is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: must be a number; got {value!r}")
    require(math.isfinite(value), name, "must be finite", value)
    return float(value)
