"""Euler, Taylor and linear-combination steps in eager torch; formulas in ``rfkernels.ops.ode_step``."""

from __future__ import annotations

import torch

from rfkernels.backends.reference.precision import compute_dtype, placed, scalar_like, to_compute
from rfkernels.backends.reference.random import normal


def euler(x, v, v_uncond, dt, guidance_scale) -> torch.Tensor:
    """x + dt * w in the compute type, w = v or v_uncond + g * (v - v_uncond)."""
    compute = compute_dtype(x)
    x, v = to_compute(x, compute), to_compute(v, compute)
    if v_uncond is not None:
        u = to_compute(v_uncond, compute)
        v = u + scalar_like(guidance_scale, x) * (v - u)
    return x + scalar_like(dt, x) * v


def taylor_coefficients(x, dt) -> tuple[torch.Tensor, ...]:
    """dt, (dt * dt) * 0.5 and ((dt * dt) * dt) * (1/6), each product rounded to the compute type of x."""
    dt = placed(dt, compute_dtype(x), x.device)
    sixth = placed(1.0 / 6.0, dt.dtype, x.device)
    return dt, (dt * dt) * 0.5, ((dt * dt) * dt) * sixth


def taylor(x, derivatives, dt) -> torch.Tensor:
    """x + dt d0 + (dt^2 / 2) d1 + (dt^3 / 6) d2, summed left to right in the compute type."""
    return linear(x, derivatives, 1.0, taylor_coefficients(x, dt)[: len(derivatives)], None)


def linear(x, tensors, x_coefficient, coefficients, noise) -> torch.Tensor:
    """c0 x + c1 t1 + ... + cn tn (+ c_noise z) left to right in the compute type; noise = (scale, seed, offset) or None."""
    compute = compute_dtype(x)
    x = to_compute(x, compute)
    total = scalar_like(x_coefficient, x) * x
    for tensor, coefficient in zip(tensors, coefficients, strict=True):
        total = total + scalar_like(coefficient, x) * to_compute(tensor, compute)
    if noise is not None:
        scale, seed, offset = noise
        z = normal(x.shape, seed, offset, x.device).to(compute)
        total = total + scalar_like(scale, x) * z
    return total


def _store(value: torch.Tensor, out: torch.Tensor, cast: torch.Tensor | None) -> None:
    out.copy_(value)
    if cast is not None:
        cast.copy_(out)


def euler_step(x, v, v_uncond, dt, guidance_scale, out, cast) -> None:
    """See ``rfkernels.ops.ode_step.euler_step``; writes ``out`` and, where given, ``cast``."""
    _store(euler(x, v, v_uncond, dt, guidance_scale), out, cast)


def taylor_step(x, derivatives, dt, out, cast) -> None:
    """See ``rfkernels.ops.ode_step.taylor_step``."""
    _store(taylor(x, derivatives, dt), out, cast)


def linear_step(x, tensors, x_coefficient, coefficients, noise, out, cast) -> None:
    """See ``rfkernels.ops.ode_step.linear_step``."""
    _store(linear(x, tensors, x_coefficient, coefficients, noise), out, cast)
