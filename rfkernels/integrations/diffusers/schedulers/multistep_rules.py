"""Coefficients of the multistep rules for flows: Adams-Bashforth 2, DPM-Solver++ and UniPC.

sigma is diffusers' time (1 noise, 0 data), alpha = 1 - sigma, lambda = log(alpha / sigma). With v = d x / d sigma the data
that the network expects is m = x - sigma v. The two diffusion solvers are exponential integrators in lambda: with
h = lambda_t - lambda_s their first order is x_t = (sigma_t / sigma_s) x + (1 - sigma_t / sigma_s) m, which is an Euler
step, and both add differences of past m. Where h is infinite (a step to sigma = 0) or zero that first order is all there
is. Everything here is Python floats.

Sources: Lu et al., "DPM-Solver++", 2022 (2M and 3M); Zhao et al., "UniPC", 2023 (B1 and B2, data prediction).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_NEAREST_NOISE = 1 - 1e-6  # lambda is -infinite at sigma = 1; UniPC in diffusers starts here


def _log_ratio(sigma: float) -> float:
    """lambda = log((1 - sigma) / sigma)."""
    if sigma <= 0:
        return math.inf
    sigma = min(sigma, _NEAREST_NOISE)
    return math.log((1 - sigma) / sigma)


def ab2(step: float, previous: float | None) -> tuple[float, ...]:
    """(c,) or (c, c_previous) of x + c v + c_previous v_previous; an Euler step without a previous one.

    h (1 + r/2) and -h r/2 with r = h / h_previous.
    """
    if previous is None or previous == 0:
        return (step,)
    half = step / previous / 2
    return step * (1 + half), -step * half


def dpm(sigmas: Sequence[float], order: int, kind: str) -> tuple[float, ...]:
    """(c_x, c_0, c_1, ...) of x_t = c_x x + c_0 m_0 + c_1 m_1 + ..., m_0 the newest.

    Args:
        sigmas: of the end, of the state, and of the past, newest first; at least order + 1.
        order: 1 to 3.
        kind: of order 2, "midpoint" or "heun"; which weight the difference of the two m has.
    """
    end, now = sigmas[0], sigmas[1]
    ratio = end / now if now else 1.0
    gain = 1 - ratio
    lam = [_log_ratio(s) for s in sigmas[: order + 1]]
    h = lam[0] - lam[1]
    if order == 1 or not _usable(h):
        return ratio, gain
    alpha = 1 - end
    slope = alpha - gain / h  # alpha ((e^-h - 1) / h + 1)
    r0 = (lam[1] - lam[2]) / h
    if order == 2:
        d1 = (gain / 2 if kind == "midpoint" else slope) / r0
        return ratio, gain + d1, -d1
    r1 = (lam[2] - lam[3]) / h
    curve = (alpha * h - gain) / (h * h) - alpha / 2  # alpha ((e^-h - 1 + h) / h^2 - 1/2)
    # D1 = p + r0 / (r0 + r1) (p - q) and D2 = (p - q) / (r0 + r1), p = (m0 - m1) / r0, q = (m1 - m2) / r1
    total = r0 + r1
    p = slope * (1 + r0 / total) - curve / total
    q = -slope * r0 / total + curve / total
    return ratio, gain + p / r0, -p / r0 + q / r1, -q / r1


def unipc_predictor(sigmas: Sequence[float], order: int, kind: str) -> tuple[float, ...]:
    """(c_x, c_0, c_1, ...) of UniP-p; arguments as for `dpm`, kind "bh1" or "bh2"."""
    end, now = sigmas[0], sigmas[1]
    ratio = end / now if now else 1.0
    weights, scale = _unipc_weights(sigmas, order, kind, corrector=False)
    past = [scale * w for w in weights]
    return ratio, 1 - ratio - sum(past), *past


def unipc_correction(sigmas: Sequence[float], order: int, kind: str) -> tuple[float, ...]:
    """(d_now, d_0, d_1, ...): what UniC adds to the predicted state, d_now m_now + d_0 m_0 + ...

    m_now is expected at the predicted state and m_0, m_1, ... are those that the prediction was made of; the corrected state
    is the same combination with one difference more, so the terms in x cancel.

    Args:
        sigmas: of the predicted state, of the state that it was predicted from, and of the past before that.
        order: of the prediction.
        kind: "bh1" or "bh2".
    """
    predicted, _ = _unipc_weights(sigmas, order, kind, corrector=False)
    corrected, scale = _unipc_weights(sigmas, order, kind, corrector=True)
    now = scale * corrected[-1]
    past = [scale * (c - p) for c, p in zip(corrected[:-1], predicted, strict=True)]
    return now, -now - sum(past), *past


def _unipc_weights(
    sigmas: Sequence[float], order: int, kind: str, *, corrector: bool
) -> tuple[list[float], float]:
    """rho_i / r_i for the differences m_i - m_0, and their common factor -alpha_t B(h).

    r_i = (lambda_i - lambda_0) / h, and 1 for the corrector's own difference, which comes last. The rho solve
    sum_i rho_i r_i^k = b_{k+1}, b_k = k! phi_k(-h) / B(h); B(h) is e^-h - 1 (bh2) or -h (bh1).
    """
    lam = [_log_ratio(s) for s in sigmas[: order + 1]]
    h = lam[0] - lam[1]
    count = order if corrector else order - 1
    if not _usable(h):
        return [0.0] * count, 0.0
    ratio = sigmas[0] / sigmas[1]
    alpha = 1 - sigmas[0]
    growth = math.expm1(-h)
    scale, base = (1 - ratio, growth) if kind == "bh2" else (alpha * h, -h)
    if count == 0:
        return [], scale
    r = [(other - lam[1]) / h for other in lam[2:]] + [1.0] * corrector
    if count == 1 and (corrector or order == 2):
        return (
            [0.5 / r[0]],
            scale,
        )  # as in the authors' code: exact to this order, and the equations would be ill-behaved
    b, phi, factorial = [], growth / -h - 1, 1
    for k in range(1, count + 1):
        b.append(phi * factorial / base)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    rho = np.linalg.solve(np.vander(r, count, increasing=True).T, b)
    return [float(w / x) for w, x in zip(rho, r, strict=True)], scale


def _usable(h: float) -> bool:
    return math.isfinite(h) and h != 0
