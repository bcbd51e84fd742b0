"""A grid made for one model: steps short where its paths bend, long where they are straight.

A step of length h of a solver of order p makes an error of about h^(p+1) D(t), D the size of the p-th
derivative of the velocity along the flow. For a given number of steps the sum of the errors is least
where they are all equal: h proportional to D^(-1/(p+1)). One fine run of the model shows D.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfkernels._whole_file import write_json_whole
from rfkernels.sampling.adams import AB2
from rfkernels.sampling.arguments import check_callable, check_samples
from rfkernels.sampling.constant import constant
from rfkernels.sampling.guidance import Guidance
from rfkernels.sampling.sample import sample

__all__ = ["OptimisedGrid", "optimise_grid"]


@dataclass(frozen=True)
class OptimisedGrid:
    """Times that divide a density of steps evenly; pass it as ``grid=``, for any number of steps.

    Args:
        knots: ascending times, from 0 or the start of the run that found the density to its end.
        density: steps per unit of time between two knots, positive, one less than knots; only ratios
            matter.
    """

    knots: tuple[float, ...]
    density: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "knots", tuple(map(float, self.knots)))
        object.__setattr__(self, "density", tuple(map(float, self.density)))
        if len(self.knots) != len(self.density) + 1 or len(self.knots) < 2:
            raise ValueError(
                "OptimisedGrid: density must have one number less than knots; got "
                f"{len(self.density)} and {len(self.knots)}"
            )
        if not all(a < b for a, b in pairwise(self.knots)):
            raise ValueError(f"OptimisedGrid: knots must ascend; got {self.knots}")
        if not all(0 < d < math.inf for d in self.density):
            raise ValueError(f"OptimisedGrid: density must be positive; got {self.density}")

    def times(self, steps: int | None, t_start: float, t_end: float) -> list[float]:
        """The ``steps + 1`` times."""
        if steps is None:
            raise ValueError("OptimisedGrid: steps must be given; got None")
        knots, density = (tuple(map(constant, values)) for values in (self.knots, self.density))
        if not knots[0] <= t_start < t_end <= knots[-1]:
            raise ValueError(
                f"OptimisedGrid: t_start and t_end must be within the grid's [{knots[0]:g}, "
                f"{knots[-1]:g}]; got {t_start} and {t_end}"
            )
        widths = [b - a for a, b in pairwise(knots)]
        filled = [0.0, *accumulate(w * d for w, d in zip(widths, density, strict=True))]
        low, high = (
            _interpolate(t_start, knots, filled),
            _interpolate(t_end, knots, filled),
        )
        inner = [
            _interpolate(low + (high - low) * i / steps, filled, knots) for i in range(1, steps)
        ]
        return [t_start, *inner, t_end]

    def to_dict(self) -> dict[str, list[float]]:
        """Plain lists, for a JSON file beside the model."""
        return {"knots": list(self.knots), "density": list(self.density)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Sequence[float]]) -> OptimisedGrid:
        """The grid that :meth:`to_dict` described.

        Raises:
            ValueError: other keys, or values that are no grid.
        """
        if set(values) != {"knots", "density"}:
            raise ValueError(
                f"OptimisedGrid: must have the keys knots and density; got {', '.join(values)}"
            )
        return cls(tuple(values["knots"]), tuple(values["density"]))

    def save(
        self, path: str | os.PathLike[str], *, made_for: Mapping[str, Any] | None = None
    ) -> None:
        """Writes the grid as JSON, beside the model; a file of that name is replaced as a whole.

        Args:
            made_for: what the grid belongs to, JSON values, kept in the file for whoever reads it.

        Raises:
            OSError: it cannot be written.
        """
        told = {} if made_for is None else {"made_for": dict(made_for)}
        write_json_whole(Path(path), {**told, **self.to_dict()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> OptimisedGrid:
        """The grid that :meth:`save` wrote.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: it holds no grid.
        """
        try:
            values = dict(json.loads(Path(path).read_text(encoding="utf-8")))
            values.pop("made_for", None)
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:  # JSON's own error is a ValueError
            raise ValueError(f"OptimisedGrid: {path} must hold a saved grid: {error}") from error


def optimise_grid(
    velocity: Callable[..., Tensor],
    x0: Tensor,
    *,
    order: int = 1,
    evaluations: int = 48,
    least: float = 0.2,
    condition: Mapping[str, Any] | None = None,
    uncondition: Mapping[str, Any] | None = None,
    guidance_scale: float | Tensor | Guidance | None = None,
    t_start: float = 0.0,
    t_end: float = 1.0,
) -> OptimisedGrid:
    """The grid of equal local errors for this model, from one run of ``evaluations`` steps.

    Curvature below the rounding of x0's dtype is not seen: give float32, or float64 for orders above 1.

    Args:
        velocity, condition, uncondition, guidance_scale, t_start, t_end: as in ``sample``.
        x0: (B, ...) noise; a few dozen samples that are typical, with typical conditions.
        order: of the solver that the grid is for, 1 to 3: 1 for euler, 2 for midpoint, heun, ab2.
        evaluations: of the velocity, at least 8.
        least: a floor of the density, in [0, 1], as a fraction of its mean before the floor, against
            steps that become so long that what was measured on a fine grid no longer holds.

    Returns:
        :class:`OptimisedGrid`, to be given to ``sample`` and ``invert`` with any number of steps.

    Raises:
        ValueError, TypeError: arguments that do not fit, or a velocity that is not finite.
    """
    check_callable("optimise_grid", "velocity", velocity, "velocity(x, t, **condition)")
    check_samples("optimise_grid", "x0", x0)
    if not x0.numel():
        raise ValueError(f"optimise_grid: x0 must have samples; got shape {tuple(x0.shape)}")
    if order not in (1, 2, 3) or isinstance(order, (bool, float)):
        raise ValueError(f"optimise_grid: order must be 1, 2 or 3; got {order!r}")
    if isinstance(evaluations, bool) or not isinstance(evaluations, int) or evaluations < 8:
        raise ValueError(
            f"optimise_grid: evaluations must be a whole number of at least 8; got {evaluations!r}"
        )
    if not 0 <= least <= 1:
        raise ValueError(f"optimise_grid: least must be in [0, 1]; got {least}")
    steps = evaluations - 1  # ab2 takes one more
    with torch.no_grad():
        info = sample(
            velocity,
            x0.detach(),
            steps=steps,
            solver=AB2(),
            condition=condition,
            uncondition=uncondition,
            guidance_scale=guidance_scale,
            t_start=t_start,
            t_end=t_end,
            return_info=True,
        )
        # The increments of the path over h are the velocity at the middle of every step.
        path, h = info.trajectory.to(info.times.dtype), (t_end - t_start) / steps
        change = torch.diff(path, n=order + 1, dim=0) / h ** (order + 1)
        size = change.flatten(1).double().square().mean(1).sqrt()
        # Rounding of the path looks like curvature; below what it may be, nothing is known.
        reach = path.double().square().mean().sqrt() * torch.finfo(x0.dtype).eps
        size = size.clamp(min=reach * 2 ** (order + 1) / h ** (order + 1))
    values = size.tolist()
    if not all(map(math.isfinite, values)):
        raise ValueError("optimise_grid: velocity must be finite; got a path that is not")
    # values[j] is about the time of the difference's middle, start + (j + (order + 1) / 2) h.
    centres = [t_start + (j + (order + 1) / 2) * h for j in range(len(values))]
    knots = [t_start + (t_end - t_start) * i / steps for i in range(steps)] + [t_end]
    middles = [(a + b) / 2 for a, b in pairwise(knots)]
    density = [_interpolate(t, centres, values) ** (1 / (order + 1)) for t in middles]
    mean = sum(density) / len(density)
    if mean == 0:  # straight: every grid is as good
        return OptimisedGrid(tuple(knots), (1.0,) * steps)
    return OptimisedGrid(tuple(knots), tuple(max(d / mean, least, 1e-6) for d in density))


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Piecewise linear y at x, constant beyond the ends."""
    if x <= xs[0]:
        return ys[0]
    for i in range(1, len(xs)):
        if x <= xs[i]:
            share = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
            return ys[i - 1] + share * (ys[i] - ys[i - 1])
    return ys[-1]
