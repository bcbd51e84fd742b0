"""Interpolation of the straight path: x_t = (1 - t) x0 + t x1 and its target x1 - x0, x0 given or drawn.

The compiled rival of a drawn x0 is eager ``randn`` followed by compiled arithmetic: inductor's own random numbers on the CPU
are several times slower than eager's. The fully compiled spelling is measured too.
"""

from __future__ import annotations

import math

import torch
from ops.random import prefix_normals
from registry import (
    EAGER_TOLERANCE,
    Built,
    Case,
    Setting,
    Variant,
    as_tuple,
    compiled,
    passes,
    relative_error,
)

import rfkernels as rf

SEED = 1234


def _formula(x1, x0, t):
    return (1 - t) * x0 + t * x1, x1 - x0


def _formula_into(xt, target, x1, x0, t):
    point, direction = _formula(x1, x0, t)
    return xt.copy_(point), target.copy_(direction)


def _drawing_formula(x1, t):
    return _formula(x1, torch.randn_like(x1), t)


def _lerp(x1, x0, t):
    return torch.lerp(x0, x1, t), x1 - x0


def _lerp_into(xt, target, x1, x0, t):
    return torch.lerp(x0, x1, t, out=xt), torch.sub(x1, x0, out=target)


def _addcmul_into(xt, target, x1, x0, t):
    torch.sub(x1, x0, out=target)
    return torch.addcmul(x0, target, t, out=xt), target


class _Inputs:
    """x1, the times and the outputs of one setting; eager code gets t in x1's dtype and broadcastable, made beforehand."""

    def __init__(self, setting: Setting) -> None:
        self.x1 = setting.normal(0)
        batch = setting.shape[0]
        # Multiples of 1/128 are exact in bfloat16, so that every spelling has the same times.
        self.t = (torch.arange(batch, device=setting.device) * 97 % 127 + 1) / 128
        self.t_eager = self.t.to(setting.state).reshape(-1, *[1] * (len(setting.shape) - 1))
        self.xt, self.target = setting.empty(), setting.empty()

    def expected(self, x0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The float64 outputs for that x0."""
        return _formula(self.x1.double(), x0.double(), self.t_eager.double())


def _given(setting: Setting) -> Built:
    data, x0 = _Inputs(setting), setting.normal(1)
    x1, t, te, out = data.x1, data.t, data.t_eager, (data.xt, data.target)
    whole, into = compiled(_formula), compiled(_formula_into)
    return Built(
        [
            Variant("fused", "fused", "new", lambda: rf.interpolate(x1, t, x0=x0)[:2]),
            Variant("fused", "fused", "out", lambda: rf.interpolate(x1, t, x0=x0, out=out)[:2]),
            Variant("as written", "naive", "new", lambda: _formula(x1, x0, te)),
            Variant("lerp, sub", "best", "new", lambda: _lerp(x1, x0, te)),
            Variant("lerp, sub", "best", "out", lambda: _lerp_into(*out, x1, x0, te)),
            Variant("sub, addcmul", "best", "out", lambda: _addcmul_into(*out, x1, x0, te)),
            Variant("torch.compile", "compile", "new", lambda: whole(x1, x0, te)),
            Variant("torch.compile", "compile", "out", lambda: into(*out, x1, x0, te)),
        ],
        lambda: data.expected(x0),
    )


def _drawn(setting: Setting) -> Built:
    data, x0 = _Inputs(setting), setting.empty()
    x1, t, te, out = data.x1, data.t, data.t_eager, (data.xt, data.target)
    whole, arithmetic, into = (
        compiled(_drawing_formula),
        compiled(_formula),
        compiled(_formula_into),
    )

    def consistent(outputs) -> float:
        """x1 - target must be standard normal, and x_t its interpolation; for spellings with other random numbers."""
        xt, target = as_tuple(outputs)
        drawn = x1.double() - target.double()
        spread = 6 / math.sqrt(setting.n)  # six standard errors of the mean, eight of the deviation
        if not (abs(drawn.mean().item()) < spread and abs(drawn.std().item() - 1) < spread):
            return math.inf
        return relative_error((xt, target), data.expected(drawn))

    def exact(outputs) -> float:
        """The leading elements against the float64 truth, the others by consistency."""
        noise = prefix_normals(setting.n, SEED, setting.device)
        lead = slice(len(noise))
        x1_lead, t_lead = (v.double().flatten()[lead] for v in (x1, te.expand_as(x1)))
        error = relative_error(
            tuple(o.flatten()[lead] for o in as_tuple(outputs)), _formula(x1_lead, noise, t_lead)
        )
        if len(noise) < setting.n and not consistent(outputs) <= EAGER_TOLERANCE[setting.dtype]:
            return math.inf
        return error

    def eager():
        return _formula(x1, torch.randn_like(x1), te)

    return Built(
        [
            Variant("fused", "fused", "new", lambda: rf.interpolate(x1, t, seed=SEED)[:2], exact),
            Variant(
                "fused",
                "fused",
                "out",
                lambda: rf.interpolate(x1, t, seed=SEED, out=out)[:2],
                exact,
            ),
            Variant("randn, as written", "naive", "new", eager, consistent),
            Variant(
                "randn, lerp, sub",
                "best",
                "new",
                lambda: _lerp(x1, torch.randn_like(x1), te),
                consistent,
            ),
            Variant(
                "normal_, lerp, sub",
                "best",
                "out",
                lambda: _lerp_into(*out, x1, x0.normal_(), te),
                consistent,
            ),
            Variant(
                "normal_, sub, addcmul",
                "best",
                "out",
                lambda: _addcmul_into(*out, x1, x0.normal_(), te),
                consistent,
            ),
            Variant(
                "randn + compiled",
                "compile",
                "new",
                lambda: arithmetic(x1, torch.randn_like(x1), te),
                consistent,
            ),
            Variant(
                "randn + compiled",
                "compile",
                "out",
                lambda: into(*out, x1, x0.normal_(), te),
                consistent,
            ),
            Variant("torch.compile", "compile", "new", lambda: whole(x1, te), consistent),
        ],
        tuple,
    )


CASES = [
    Case(
        "interpolate", "interpolate_given", _given, lambda s: 4 * s.n * s.state.itemsize, lambda s: 4 * s.n,
        passes(10, 6),
    ),
    Case(
        "interpolate", "interpolate_drawn", _drawn, lambda s: 3 * s.n * s.state.itemsize, lambda s: 4 * s.n,
        passes(11, 7),
    ),
]  # fmt: skip
