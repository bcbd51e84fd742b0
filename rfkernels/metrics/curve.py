"""Quality against the number of steps, for several models from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rfkernels.metrics.frechet import frechet_distance

Velocity = Callable[..., Tensor]


class QualityRow(NamedTuple):
    """One point of the curve: nfe is the mean number of velocity evaluations per sample."""

    model: str
    steps: int
    nfe: float
    value: float


def quality_curve(
    velocities: Mapping[str, Velocity],
    x0: Tensor,
    reference: Tensor,
    *,
    steps: Sequence[int] = (1, 2, 4, 8, 32),
    metric: Callable[[Tensor, Tensor], float] = frechet_distance,
    sampler: Callable[..., Any] | None = None,
    **options: Any,
) -> list[QualityRow]:
    """Sample every model at every number of steps from x0 and measure against the reference.

    Args:
        velocities: name -> ``velocity(x, t, **condition)``.
        x0: (B, ...) draws of the source, the same for all rows.
        reference: (m, ...) data.
        steps: numbers of steps, each at least 1.
        metric: ``metric(samples, reference)``, a number.
        sampler: called as ``sampler(velocity, x0, steps=n, return_info=True, **options)``, returns
            an object with ``x`` and ``nfe``; ``rf.sample`` when None.
        options: for the sampler: solver, grid, guidance_scale, condition ...

    Returns:
        Rows in the order of models, then steps.

    Raises:
        ValueError: for no models, no steps, or a number of steps below 1.
    """
    if not velocities:
        raise ValueError("quality_curve: velocities must name at least one model; got none")
    if not steps or min(steps) < 1:
        raise ValueError(f"quality_curve: steps must be numbers of at least 1; got {tuple(steps)}")
    if sampler is None:
        from rfkernels.sampling import sample

        sampler = cast("Callable[..., Any]", sample)
    rows = []
    for name, velocity in velocities.items():
        for count in steps:
            with torch.no_grad():
                info = sampler(velocity, x0, steps=count, return_info=True, **options)
            nfe = torch.as_tensor(info.nfe, dtype=torch.float64).mean().item()
            rows.append(QualityRow(name, count, nfe, float(metric(info.x, reference))))
    return rows
