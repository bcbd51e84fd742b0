"""x_t and its target in eager torch; formulas in ``rfkernels.ops.interpolate``."""

from __future__ import annotations

import math

import torch

from rfkernels.backends.reference.precision import compute_dtype, placed, scalar_like, to_compute
from rfkernels.backends.reference.random import normal

VP_SLOPE, VP_FLOOR = 19.9, 0.1  # a = beta_max - beta_min and b = beta_min of the VP schedule


def path_coefficients(path: str, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(alpha, sigma, dalpha/dt, dsigma/dt) of a named path, computed in float64 and rounded to the type of ``t``.

    x_t = alpha x1 + sigma x0. linear: t, 1 - t. trigonometric: sin, cos of pi t / 2. vp: log alpha = -(a/4)(1-t)^2 -
    (b/2)(1-t), sigma = sqrt(1 - alpha^2). sub-vp: the same alpha, sigma = 1 - alpha^2.
    """
    s = t.double()
    one = torch.ones_like(s)
    if path == "linear":
        coefficients = (s, 1.0 - s, one, -one)
    elif path == "trigonometric":
        half_pi = 0.5 * math.pi
        sine, cosine = torch.sin(half_pi * s), torch.cos(half_pi * s)
        coefficients = (sine, cosine, half_pi * cosine, -half_pi * sine)
    else:
        r = 1.0 - s
        alpha = torch.exp(-0.25 * VP_SLOPE * r * r - 0.5 * VP_FLOOR * r)
        dalpha = alpha * (0.5 * VP_SLOPE * r + 0.5 * VP_FLOOR)
        variance = 1.0 - alpha * alpha
        if path == "vp":
            sigma = variance.sqrt()
            coefficients = (alpha, sigma, dalpha, -alpha * dalpha / sigma)
        else:
            coefficients = (alpha, variance, dalpha, -2.0 * alpha * dalpha)
    return tuple(c.to(t.dtype) for c in coefficients)


def point_and_target(x1, x0, t, path) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_t, target) in the compute type; path is a name or the four coefficients themselves."""
    compute = compute_dtype(x1)
    x1, x0 = to_compute(x1, compute), to_compute(x0, compute)
    if isinstance(path, str):
        t = placed(t, compute, x1.device)
        path = path_coefficients(path, t)
    alpha, sigma, dalpha, dsigma = (scalar_like(c, x1) for c in path)
    return sigma * x0 + alpha * x1, dsigma * x0 + dalpha * x1


def source(x1, x0, seed, offset) -> torch.Tensor:
    """x0 as given, or drawn in float32 from (seed, offset)."""
    return normal(x1.shape, seed, offset, x1.device) if x0 is None else x0


def interpolate(x1, x0, t, path, seed, offset, xt, target, x0_out) -> None:
    """See ``rfkernels.ops.interpolate.interpolate``; writes ``xt``, ``target`` and, where given, ``x0_out``."""
    x0 = source(x1, x0, seed, offset)
    point, direction = point_and_target(x1, x0, t, path)
    xt.copy_(point)
    target.copy_(direction)
    if x0_out is not None:
        x0_out.copy_(x0)
