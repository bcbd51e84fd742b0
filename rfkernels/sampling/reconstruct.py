"""Round trips: data to noise and back, and how much of the data survives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rfkernels.sampling.grids import get_grid
from rfkernels.sampling.run import Solver
from rfkernels.sampling.sample import invert, sample
from rfkernels.sampling.solvers import get_solver

__all__ = ["Reconstruction", "reconstruct"]


@dataclass(frozen=True)
class Reconstruction:
    """What :func:`reconstruct` found.

    Attributes:
        x: (B, ...) the data after the round trip.
        x0: (B, ...) where the inversion arrived.
        error: (B,) root mean square over a sample's elements of x - x1.
        nfe: evaluations per sample of both ways together; (B,) for adaptive solvers.
    """

    x: Tensor
    x0: Tensor
    error: Tensor
    nfe: int | Tensor


def reconstruct(
    velocity: Callable[..., Tensor],
    x1: Tensor,
    *,
    solver: str | Solver = "fireflow",
    sample_solver: str | Solver | None = None,
    **options: Any,
) -> Reconstruction:
    """Invert x1 and sample from what was found, on the same grid.

    Args:
        velocity: velocity(x, t, **condition).
        x1: (B, ...) data, at ``t_end``.
        solver: of the inversion.
        sample_solver: of the way back; None is the same. "uni-inv" belongs with "euler".
        options: of ``sample`` and ``invert``, for both ways: steps, grid, guidance_scale, condition,
            uncondition, t_start, t_end, rtol, atol, compile, progress.

    Returns:
        :class:`Reconstruction`. For errors of images in [-1, 1], PSNR is 20 log10(2 / error).

    Raises:
        ValueError, TypeError: as ``sample`` and ``invert``.
    """
    for name in ("seed", "callback", "return_info"):
        if name in options:
            raise TypeError(f"reconstruct: {name} must be left out; got {options[name]!r}")
    back = get_solver(solver if sample_solver is None else sample_solver)
    if getattr(back, "stochastic", False):
        raise ValueError(
            f"reconstruct: sample_solver must be deterministic; got {back.name!r}, which draws noise"
        )
    if options.get("grid") is not None:
        options["grid"] = get_grid(options["grid"])  # which an iterator would give only once
    there = invert(velocity, x1, solver=solver, return_info=True, **options)
    again = sample(velocity, there.x, solver=back, return_info=True, **options)
    wide = torch.float64 if x1.dtype == torch.float64 else torch.float32
    difference = again.x.to(wide) - x1.to(wide)
    difference = difference.flatten(1) if x1.ndim > 1 else difference[:, None]
    error = difference.square().mean(1).sqrt()
    return Reconstruction(again.x, there.x, error, there.nfe + again.nfe)
