"""Coefficients of multistep rules on uneven grids, as plain floats: Adams-Bashforth, DPM-Solver++, UniPC.

The noise level is s = 1 - t (1 noise, 0 data), which diffusers calls sigma. A rule is a tuple of
coefficients of tensors, the newest first; whoever uses it sums them in one kernel.

**Adams-Bashforth** extrapolates the slopes and may be given steps in t or in s, with slopes to match.

**DPM-Solver++ and UniPC** are exponential integrators in lambda = log((1 - s) / s) for the data
estimate m = x + s v, v = dx/dt. With h = lambda_end - lambda_now their first order is
x_end = (s_end / s) x + (1 - s_end / s) m, which is an Euler step, and differences of past m are added
to it. Where one is infinite (a step to or from s = 0) the first order is all there is; where one is zero,
the order that gets by without it. At s = 1 lambda is minus infinity, and above 1 - 1e-6 that of 1 - 1e-6 is taken, as
diffusers' UniPC does.

Sources: Lu et al., "DPM-Solver++", 2022 (2M and 3M); Zhao et al., "UniPC", 2023 (B1 and B2, data
prediction).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["FEW_STEPS", "ab2", "ab3", "dpm", "unipc", "unipc_correction", "unipc_predictor"]

FEW_STEPS = 15  # below this, lower_order_final of DPM-Solver++ lowers the order of the last steps

_NEAREST_NOISE = 1 - 1e-6


def ab2(step: float, previous: float | None) -> tuple[float, ...]:
    """(c, c_previous) of x + c v + c_previous v_previous; (step,) without a previous step.

    c = h (1 + r/2) and c_previous = -h r/2 with r = h / h_previous.
    """
    if previous is None or previous == 0:
        return (step,)
    half = step / previous / 2
    return step * (1 + half), -step * half


def ab3(step: float, previous: float, before: float) -> tuple[float, float, float]:
    """(c0, c1, c2) of x + c0 v + c1 v_previous + c2 v_before; h is the step, p and q the two before it.

    The parabola through the three slopes, at 0, -p and -p - q, is integrated from 0 to h::

        c1 = -h^2 (h/3 + (p + q)/2) / (p q)
        c2 =  h^2 (h/3 + p/2) / (q (p + q))
        c0 =  h - c1 - c2
    """
    square, both = step * step, previous + before
    c1 = -square * (step / 3 + both / 2) / (previous * before)
    c2 = square * (step / 3 + previous / 2) / (before * both)
    return step - c1 - c2, c1, c2


def dpm(levels: Sequence[float], order: int, kind: str = "midpoint") -> tuple[float, ...]:
    """(c_x, c_0, c_1, ...) of DPM-Solver++'s step x_end = c_x x + c_0 m_0 + c_1 m_1 + ...

    Args:
        levels: noise levels of the end, of the state, and of the past, newest first; order + 1 or more.
        order: 1 to 3.
        kind: of order 2, "midpoint" or "heun": which weight the difference of the two m has.
    """
    end, now = levels[0], levels[1]
    ratio = end / now if now else 1.0
    gain = 1 - ratio
    lam = _usable(levels, order)
    order = len(lam) - 1
    if order < 2:
        return ratio, gain
    h = lam[0] - lam[1]
    alpha = 1 - end
    slope = alpha - gain / h  # alpha ((e^-h - 1) / h + 1)
    r0 = (lam[1] - lam[2]) / h
    if order == 2:
        d1 = (gain / 2 if kind == "midpoint" else slope) / r0
        return ratio, gain + d1, -d1
    r1 = (lam[2] - lam[3]) / h
    curve = (alpha * h - gain) / (h * h) - alpha / 2  # alpha ((e^-h - 1 + h) / h^2 - 1/2)
    # D1 = p + r0 / (r0 + r1) (p - q) and D2 = (p - q) / (r0 + r1), with the divided differences
    # p = (m_0 - m_1) / r0 and q = (m_1 - m_2) / r1; x_end gets slope D1 - curve D2.
    total = r0 + r1
    p = slope * (1 + r0 / total) - curve / total
    q = -slope * r0 / total + curve / total
    return ratio, gain + p / r0, -p / r0 + q / r1, -q / r1


def unipc(
    levels: Sequence[float], order: int, kind: str = "bh2", *, predicted: int = 0
) -> tuple[float, ...]:
    """(c_x, c_0, c_1, ...) of a whole step of UniPC: UniC of the state, and from there UniP.

    Args:
        levels: as for :func:`dpm`.
        order: of the prediction.
        kind: "bh1" or "bh2".
        predicted: the order by which the state was predicted; 0 leaves it as it is.
    """
    of_state, *weights = unipc_predictor(levels, order, kind)
    if predicted:
        correction = unipc_correction(levels[1:], predicted, kind)
        weights += [0.0] * (len(correction) - len(weights))
        for index, change in enumerate(correction):
            weights[index] += of_state * change
    return of_state, *weights


def unipc_predictor(levels: Sequence[float], order: int, kind: str = "bh2") -> tuple[float, ...]:
    """(c_x, c_0, c_1, ...) of UniP of this order; ``levels`` as for :func:`dpm`, kind "bh1" or "bh2"."""
    end, now = levels[0], levels[1]
    ratio = end / now if now else 1.0
    weights, scale = _unipc_weights(levels, order, kind, corrector=False)
    past = [scale * w for w in weights]
    return ratio, 1 - ratio - sum(past), *past


def unipc_correction(levels: Sequence[float], order: int, kind: str = "bh2") -> tuple[float, ...]:
    """(d_now, d_0, d_1, ...): what UniC adds to a predicted state, d_now m_now + d_0 m_0 + ...

    m_now is the estimate at the predicted state, m_0, m_1, ... those that the prediction was made of.
    The corrected state is the same combination with one difference more, so the terms in x cancel.

    Args:
        levels: of the predicted state, of the state it was predicted from, and of the past before that.
        order: of the prediction.
        kind: "bh1" or "bh2".
    """
    predicted, _ = _unipc_weights(levels, order, kind, corrector=False)
    corrected, scale = _unipc_weights(levels, order, kind, corrector=True)
    now = scale * corrected[-1]
    past = [scale * (c - p) for c, p in zip(corrected[:-1], predicted, strict=True)]
    return now, -now - sum(past), *past


def _unipc_weights(
    levels: Sequence[float], order: int, kind: str, *, corrector: bool
) -> tuple[list[float], float]:
    """rho_i / r_i of the differences m_i - m_0, and their common factor -alpha_end B(h).

    r_i = (lambda_i - lambda_0) / h, and 1 for the corrector's own difference, which comes last. The
    rho solve sum_i rho_i r_i^k = b_{k+1}, b_k = k! phi_k(-h) / B(h); B(h) is e^-h - 1 (bh2) or -h
    (bh1).
    """
    lam = _usable(levels, order)
    unused = [0.0] * (order + 1 - max(len(lam), 2))
    if len(lam) < 2:
        return [0.0] * (order - 1 + corrector), 0.0
    h = lam[0] - lam[1]
    count = len(lam) - 2 + corrector
    ratio = levels[0] / levels[1]
    alpha = 1 - levels[0]
    growth = math.expm1(-h)
    scale, base = (1 - ratio, growth) if kind == "bh2" else (alpha * h, -h)
    if count == 0:
        return unused, scale
    r = [(other - lam[1]) / h for other in lam[2:]] + [1.0] * corrector
    if count == 1:
        # The authors' choice instead of solving the one equation: exact to this order, and the
        # equation is ill-behaved for small h.
        return _with_unused([0.5 / r[0]], unused, corrector), scale
    b, phi, factorial = [], growth / -h - 1, 1
    for k in range(1, count + 1):
        b.append(phi * factorial / base)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    weights = [rho / x for rho, x in zip(_moments(r, b), r, strict=True)]
    return _with_unused(weights, unused, corrector), scale


def _moments(nodes: Sequence[float], values: Sequence[float]) -> list[float]:
    """The rho of sum_i rho_i nodes_i^k = values_k (Bjorck and Pereyra 1970), in plain floats, which
    torch.compile takes as constants."""
    rho, count = list(values), len(nodes)
    for k in range(count - 1):
        for i in range(count - 1, k, -1):
            rho[i] -= nodes[k] * rho[i - 1]
    for k in range(count - 2, -1, -1):
        for i in range(k + 1, count):
            rho[i] /= nodes[i] - nodes[i - k - 1]
        for i in range(k, count - 1):
            rho[i] -= rho[i + 1]
    return rho


def _with_unused(weights: list[float], unused: list[float], corrector: bool) -> list[float]:
    """The weights of all differences; those left out are the oldest, the corrector's own is the last."""
    before = len(weights) - corrector
    return weights[:before] + unused + weights[before:]


def _log_ratio(level: float) -> float:
    """lambda = log((1 - s) / s)."""
    if level <= 0:
        return math.inf
    level = min(level, _NEAREST_NOISE)
    return math.log((1 - level) / level)


def _usable(levels: Sequence[float], order: int) -> list[float]:
    """lambda of the end, the state and the past, up to where a difference is zero; none where one is
    infinite."""
    found: list[float] = []
    for lam in map(_log_ratio, levels[: order + 1]):
        if math.isinf(lam):
            return []
        if lam in found:
            break
        found.append(lam)
    return found
