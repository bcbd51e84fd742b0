"""AdamP and SGDP steps in eager torch; formulas in ``rfkernels.ops.projected_update``.

Sums are of products in the compute type, added in float64. The decision stays a tensor, so nothing waits for the device.
"""

from __future__ import annotations

import math

import torch

from rfkernels.backends.reference.precision import compute_dtype, to_compute


def cosine(gw, gg, ww, eps: float) -> torch.Tensor:
    """(g . w) / (max(|g|, eps) max(|w|, eps)) from sums in float64."""
    return gw / (gg.sqrt().clamp(min=eps) * ww.sqrt().clamp(min=eps))


def rate_of(o, device: torch.device) -> torch.Tensor:
    """The learning rate as a 0-d float64 tensor; filled in on the device, where a copy would make the host wait."""
    if isinstance(o.lr, torch.Tensor):
        return o.lr.double()
    return torch.full((), o.lr, dtype=torch.float64, device=device)


def advance(g, m, v, step, o) -> torch.Tensor:
    """Moves the moments in place and returns the update u."""
    c1 = 1.0 - (o.beta1 if o.rule == "adamp" else o.beta2)
    m.copy_(m * o.beta1 + g * c1)
    if o.rule == "sgdp":
        return g + m * o.beta1 if o.nesterov else m
    v.copy_(v * o.beta2 + (g * (1.0 - o.beta2)) * g)
    top = m * o.beta1 + g * c1 if o.nesterov else m
    correction = (1.0 / (1.0 - o.beta2 ** (step.double() + 1.0)).sqrt()).to(m.dtype)
    return top / (v.sqrt() * correction + o.eps)


def row_sums(g, w, u) -> torch.Tensor:
    """(4, rows) float64: sums of g w, g^2, w^2 and u w."""
    g, w, u = (t.reshape(t.shape[0], -1) for t in (g, w, u))
    return torch.stack(
        [(x * y).sum(1, dtype=torch.float64) for x, y in ((g, w), (g, g), (w, w), (u, w))]
    )


def summary_of(sums: torch.Tensor, eps: float) -> torch.Tensor:
    """(5,) greatest |cos| of a row, infinity for NaN, and the sums over rows."""
    worst = cosine(*sums[:3], eps).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    start = worst.new_zeros(1)
    return torch.cat([torch.cat([worst, start]).max().reshape(1), sums.sum(1)])


def projection(u, w, sums, summary, total: int, o) -> tuple[torch.Tensor, torch.Tensor]:
    """(u without its part along w where the tests pass, whether one passed)."""
    rows = w.shape[0]
    columns = w.numel() // max(rows, 1)
    channel = summary[0] < o.delta / math.sqrt(max(columns, 1))
    layer = cosine(*summary[1:4], o.eps).abs() < o.delta / math.sqrt(max(total, 1))
    in_rows = sums[3] / (sums[2].sqrt() + o.eps).square()
    whole = summary[4] / (summary[3].sqrt() + o.eps).square()
    factor = torch.where(channel, in_rows, whole).to(u.dtype).reshape(rows, *(1,) * (w.ndim - 1))
    found = channel | layer
    return torch.where(found, u - factor * w, u), found


def projected_update(
    weights, grads, first, second, steps, averages, projected, totals, options, reduce
) -> None:
    """See ``rfkernels.ops.projected_update.projected_update``."""
    o = options
    updates, sums, summary = [], [], []
    for k, w in enumerate(weights):
        compute = compute_dtype(w)
        g, v, step = to_compute(grads[k], compute), *(t[k] if t else None for t in (second, steps))
        updates.append(advance(g, first[k], v, step, o))
        if projected[k]:
            sums.append(row_sums(g, to_compute(w, compute), updates[k]))
            summary.append(summary_of(sums[k], o.eps))
        else:
            sums.append(None)
            summary.append(w.new_zeros(5, dtype=torch.float64))
    reduced = torch.stack(summary)
    if reduce is not None:
        reduce(reduced)
    for k, stored in enumerate(weights):
        w, u = to_compute(stored, compute_dtype(stored)), updates[k]
        lr = rate_of(o, w.device)
        decay, scale = lr * o.weight_decay, lr
        if projected[k]:
            u, found = projection(u, w, sums[k], reduced[k], totals[k] or w.numel(), o)
            decay = torch.where(found, decay * o.wd_ratio, decay)
            if o.rule == "sgdp" and not o.nesterov:
                first[k].copy_(u)
        if o.rule == "adamp":
            scale = lr / (1.0 - o.beta1 ** (steps[k].double() + 1.0))
            steps[k].add_(1.0)
        elif o.weight_decay:
            decay = decay / (1.0 - o.beta1)
        stored.copy_(w * (1.0 - decay).to(w.dtype) - scale.to(w.dtype) * u)
        if averages and averages[k] is not None:
            mean = averages[k].to(w.dtype)
            averages[k].copy_(mean + (stored.to(w.dtype) - mean) * (1.0 - o.average_decay))
