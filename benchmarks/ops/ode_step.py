"""Solver steps: Euler, guided Euler, Taylor of order 2, the last stages of Heun and RK4, float32 and bfloat16 mixtures.

The best eager spellings need two passes where ours needs one, except plain Euler: ``torch.add(x, v, alpha=dt)`` is one pass
already, and there is nothing to win but the extra copy for the network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from registry import Built, Case, Setting, Variant, compiled, passes

import rfkernels as rf

DT, GUIDANCE = 0.02, 3.5
HALF = DT * DT / 2
RK4 = (DT / 6, DT / 3, DT / 3, DT / 6)
MIXED = ("float32+bfloat16",)


def _spellings(
    setting: Setting,
    tensors: tuple[torch.Tensor, ...],
    fused: Callable[..., torch.Tensor],
    formula: Callable[..., torch.Tensor],
    best: dict[str, Callable[..., torch.Tensor]],
    expected: Callable[..., torch.Tensor],
) -> Built:
    """The spellings of a step of x and ``tensors``.

    Args:
        fused: (x, *tensors, out or None).
        formula: (x, *tensors), the naive eager code and what is compiled.
        best: by memory; "new" (x, *tensors), "out" (x, *tensors, out, scratch), "inplace" (x, *tensors, scratch).
        expected: (x, *tensors) in float64.
    """
    x = setting.normal(0)
    out, scratch = setting.empty(), setting.empty(setting.velocity)

    def into_out(out, x, *tensors):
        return out.copy_(formula(x, *tensors))

    def into_x(x, *tensors):
        return x.copy_(formula(x, *tensors))

    whole, to_out, in_place = compiled(formula), compiled(into_out), compiled(into_x)
    a, b, c = x.clone(), x.clone(), x.clone()  # states of the in-place spellings
    variants = [
        Variant("fused", "fused", "new", lambda: fused(x, *tensors, None)),
        Variant("fused", "fused", "out", lambda: fused(x, *tensors, out)),
        Variant("fused", "fused", "inplace", lambda: fused(a, *tensors, a)),
        Variant("as written", "naive", "new", lambda: formula(x, *tensors)),
        Variant("torch.compile", "compile", "new", lambda: whole(x, *tensors)),
        Variant("torch.compile", "compile", "out", lambda: to_out(out, x, *tensors)),
        Variant("torch.compile", "compile", "inplace", lambda: in_place(c, *tensors)),
    ]
    calls = {
        "new": lambda: best["new"](x, *tensors),
        "out": lambda: best["out"](x, *tensors, out, scratch),
        "inplace": lambda: best["inplace"](b, *tensors, scratch),
    }
    variants += [Variant("best eager", "best", memory, calls[memory]) for memory in best]
    return Built(variants, lambda: (expected(x.double(), *(t.double() for t in tensors)),))


def _euler(setting: Setting) -> Built:
    return _spellings(
        setting,
        (setting.normal(1, setting.velocity),),
        fused=lambda x, v, out: rf.euler_step(x, v, DT, out=out),
        formula=lambda x, v: x + DT * v,
        best={
            "new": lambda x, v: torch.add(x, v, alpha=DT),
            "out": lambda x, v, out, _: torch.add(x, v, alpha=DT, out=out),
            "inplace": lambda x, v, _: x.add_(v, alpha=DT),
        },
        expected=lambda x, v: x + DT * v,
    )


def _guided_formula(x, v, u):
    return x + DT * (u + GUIDANCE * (v - u))


def _guided(setting: Setting) -> Built:
    return _spellings(
        setting,
        (setting.normal(1, setting.velocity), setting.normal(2, setting.velocity)),
        fused=lambda x, v, u, out: rf.euler_step(
            x, v, DT, v_uncond=u, guidance_scale=GUIDANCE, out=out
        ),
        formula=_guided_formula,
        best={
            "new": lambda x, v, u: torch.add(x, torch.lerp(u, v, GUIDANCE), alpha=DT),
            "out": lambda x, v, u, out, w: torch.add(
                x, torch.lerp(u, v, GUIDANCE, out=w), alpha=DT, out=out
            ),
            "inplace": lambda x, v, u, w: x.add_(torch.lerp(u, v, GUIDANCE, out=w), alpha=DT),
        },
        expected=_guided_formula,
    )


def _taylor(setting: Setting) -> Built:
    return _spellings(
        setting,
        (setting.normal(1), setting.normal(2)),
        fused=lambda x, v, dv, out: rf.taylor_step(x, (v, dv), DT, out=out),
        formula=lambda x, v, dv: x + DT * v + HALF * dv,
        best={
            "new": lambda x, v, dv: torch.add(x, v, alpha=DT).add_(dv, alpha=HALF),
            "out": lambda x, v, dv, out, _: torch.add(x, v, alpha=DT, out=out).add_(dv, alpha=HALF),
            "inplace": lambda x, v, dv, _: x.add_(v, alpha=DT).add_(dv, alpha=HALF),
        },
        expected=lambda x, v, dv: x + DT * v + HALF * dv,
    )


def _heun(setting: Setting) -> Built:
    return _spellings(
        setting,
        (setting.normal(1), setting.normal(2)),
        fused=lambda x, k1, k2, out: rf.linear_step(x, (k1, k2), (DT / 2, DT / 2), out=out),
        formula=lambda x, k1, k2: x + DT / 2 * (k1 + k2),
        best={
            "new": lambda x, k1, k2: torch.add(x, k1, alpha=DT / 2).add_(k2, alpha=DT / 2),
            "out": lambda x, k1, k2, out, _: torch.add(x, k1, alpha=DT / 2, out=out).add_(
                k2, alpha=DT / 2
            ),
            "inplace": lambda x, k1, k2, _: x.add_(k1, alpha=DT / 2).add_(k2, alpha=DT / 2),
        },
        expected=lambda x, k1, k2: x + DT / 2 * (k1 + k2),
    )


def _add_all(x, tensors):
    for tensor, coefficient in zip(tensors, RK4[1:], strict=True):
        x.add_(tensor, alpha=coefficient)
    return x


def _rk4_formula(x, k1, k2, k3, k4):
    return x + DT / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def _linear_4(setting: Setting) -> Built:
    return _spellings(
        setting,
        tuple(setting.normal(seed) for seed in range(1, 5)),
        fused=lambda x, *rest: rf.linear_step(x, rest[:4], RK4, out=rest[4]),
        formula=_rk4_formula,
        best={
            "new": lambda x, k1, *ks: _add_all(torch.add(x, k1, alpha=RK4[0]), ks),
            "out": lambda x, k1, k2, k3, k4, out, _: _add_all(
                torch.add(x, k1, alpha=RK4[0], out=out), (k2, k3, k4)
            ),
            "inplace": lambda x, k1, k2, k3, k4, _: _add_all(
                x.add_(k1, alpha=RK4[0]), (k2, k3, k4)
            ),
        },
        expected=_rk4_formula,
    )


def _with_copy(setting: Setting, guided: bool) -> Built:
    """A float32 state, bfloat16 velocities, and the bfloat16 copy of the new state that the network reads next."""
    x, v = setting.normal(0), setting.normal(1, setting.velocity)
    u = setting.normal(2, setting.velocity) if guided else None
    out, copy, w = setting.empty(), setting.empty(torch.bfloat16), setting.empty(torch.bfloat16)
    a, b, c = x.clone(), x.clone(), x.clone()
    g = GUIDANCE if guided else None

    def formula(x, v, u):
        velocity = v.float() if u is None else u.float() + GUIDANCE * (v.float() - u.float())
        new = x + DT * velocity
        return new, new.bfloat16()

    def eager(x, v, u, w, out, copy):
        velocity = v if u is None else torch.lerp(u, v, GUIDANCE, out=w)
        return torch.add(x, velocity, alpha=DT, out=out), copy.copy_(out)

    def eager_new(x, v, u):
        new = torch.add(x, v if u is None else torch.lerp(u, v, GUIDANCE), alpha=DT)
        return new, new.bfloat16()

    def into(out, copy, x, v, u):
        new, low = formula(x, v, u)
        return out.copy_(new), copy.copy_(low)

    def into_x(x, copy, v, u):
        new, low = formula(x, v, u)
        return x.copy_(new), copy.copy_(low)

    def step(x, out, copy):
        return rf.euler_step(x, v, DT, v_uncond=u, guidance_scale=g, out=out, cast=copy)

    def expected():
        wide = v.double() if u is None else u.double() + GUIDANCE * (v.double() - u.double())
        new = x.double() + DT * wide
        return new, new

    whole, to_out, in_place = compiled(formula), compiled(into), compiled(into_x)
    return Built(
        [
            Variant("fused", "fused", "new", lambda: step(x, None, torch.bfloat16)),
            Variant("fused", "fused", "out", lambda: step(x, out, copy)),
            Variant("fused", "fused", "inplace", lambda: step(a, a, copy)),
            Variant("as written", "naive", "new", lambda: formula(x, v, u)),
            Variant("best eager", "best", "new", lambda: eager_new(x, v, u)),
            Variant("best eager", "best", "out", lambda: eager(x, v, u, w, out, copy)),
            Variant("best eager", "best", "inplace", lambda: eager(b, v, u, w, b, copy)),
            Variant("torch.compile", "compile", "new", lambda: whole(x, v, u)),
            Variant("torch.compile", "compile", "out", lambda: to_out(out, copy, x, v, u)),
            Variant("torch.compile", "compile", "inplace", lambda: in_place(c, copy, v, u)),
        ],
        expected,
    )


def _reads(velocities: int) -> Callable[[Setting], int]:
    """Bytes of reading x and so many velocities and writing the new state."""
    return lambda s: s.n * (2 * s.state.itemsize + velocities * s.velocity.itemsize)


CASES = [
    Case("ode_step", "euler", _euler, _reads(1), lambda s: 2 * s.n, passes(5, 3)),
    Case("ode_step", "euler_guided", _guided, _reads(2), lambda s: 5 * s.n, passes(13, 6)),
    Case("ode_step", "taylor2", _taylor, _reads(2), lambda s: 4 * s.n, passes(10, 6)),
    Case("ode_step", "heun_final", _heun, _reads(2), lambda s: 4 * s.n, passes(8, 6)),
    Case("ode_step", "linear4", _linear_4, _reads(4), lambda s: 8 * s.n, passes(18, 12)),
    Case(
        "ode_step", "euler_copy", lambda s: _with_copy(s, False), lambda s: 12 * s.n, lambda s: 2 * s.n,
        lambda s: {"naive": 32 * s.n, "best": 16 * s.n}, dtypes=MIXED,
    ),
    Case(
        "ode_step", "euler_guided_copy", lambda s: _with_copy(s, True), lambda s: 14 * s.n, lambda s: 5 * s.n,
        lambda s: {"naive": 76 * s.n, "best": 22 * s.n}, dtypes=MIXED,
    ),
]  # fmt: skip
