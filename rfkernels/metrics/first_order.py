"""How far a flow is from first-order: whether every number of steps gives the same sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["FirstOrderDefect", "first_order_defect"]


class FirstOrderDefect(NamedTuple):
    """What `first_order_defect` finds.

    Attributes:
        defect: the largest entry of ``by_steps``.
        by_steps: number of steps -> relative root mean square distance to the samples of the most
            steps.
    """

    defect: float
    by_steps: dict[int, float]


def first_order_defect(
    velocity: Callable[..., Tensor],
    x0: Tensor,
    *,
    steps: Sequence[int] = (1, 2, 4, 25),
    sampler: Callable[..., Any] | None = None,
    **options: Any,
) -> FirstOrderDefect:
    """Compare samples of the same noise made in different numbers of steps.

    A flow is first-order (Wang et al., "Rectified Diffusion", 2024) when one step of its first-order
    solver is exact, so that all numbers of steps agree. For a velocity field that solver is Euler,
    and first-order means straight; for a diffusion network it is DDIM, and paths are straight only
    after division by alpha, against sigma / alpha. With x_n the samples of n steps and m the largest,
    ``by_steps[n]`` is |x_n - x_m| / |x_m - mean x_m| over all samples and elements: 0 for a
    first-order flow, about 1 where x_n does not tell which sample it is.

    Args:
        velocity: a velocity field; one with an attribute ``schedule``
            (``rfkernels.models.NoisePrediction``) is sampled by ``rfkernels.sampling.ddim``.
        x0: (B, ...) draws of the source, at least 2.
        steps: at least two numbers of steps.
        sampler: called as ``sampler(velocity, x0, steps=n, **options)``; None for the above.
        options: for the sampler: condition, guidance_scale, grid ...

    Raises:
        ValueError: for fewer than two different numbers of steps or two samples.
    """
    counts = sorted(set(steps))
    if len(counts) < 2 or counts[0] < 1:
        raise ValueError(
            "first_order_defect: steps must be at least two different numbers of at least 1; got "
            f"{tuple(steps)}"
        )
    if len(x0) < 2:
        raise ValueError(f"first_order_defect: x0 must hold at least 2 samples; got {len(x0)}")
    if sampler is None:
        from rfkernels.sampling import sample
        from rfkernels.sampling.ddim import ddim

        sampler = ddim if hasattr(velocity, "schedule") else sample
    with torch.no_grad():
        ends = {n: sampler(velocity, x0, steps=n, **options).double() for n in counts}
    last = ends.pop(counts[-1])
    scale = (last - last.mean(0)).norm()
    by_steps = {n: float((end - last).norm() / scale) for n, end in ends.items()}
    return FirstOrderDefect(max(by_steps.values()), by_steps)
