"""Checks of options that several recipes have: a distance, and a moment of the run."""

from __future__ import annotations

from rfkernels.training.config import Distance, OwnObject, TrainConfig, check_linear
from rfkernels.training.option_checks import require, whole

__all__ = ["check_distance", "check_moment", "moment", "refuse_named"]


def check_distance(distance: str | Distance | OwnObject, train: TrainConfig) -> None:
    """Refuses what is no distance of end points, and a path that one Euler step cannot follow."""
    if not callable(distance) and not isinstance(distance, OwnObject):
        require(distance == "l2", "distance", "must be 'l2' or a callable", distance)
    check_linear(train, "a student of Euler steps learns the linear path")


def refuse_named(**options: object) -> None:
    """Refuses objects that were read back from config.json, which only names them: a run would
    silently do without."""
    for name, value in options.items():
        if isinstance(value, OwnObject):
            raise ValueError(f"{name}: give the object itself; got the name of one, {value.name}")


def check_moment(name: str, value: int | float, least: int) -> None:
    """Refuses what is neither a number of steps, at least `least`, nor a fraction of a run."""
    if isinstance(value, float):
        require(0 < value < 1, name, "a fraction of the run must be in (0, 1)", value)
    else:
        whole(name, value, least)


def moment(value: int | float, steps: int) -> float:
    """The step that a number of steps, or a fraction of a run of `steps`, stands for."""
    return value * steps if isinstance(value, float) else float(value)
