"""Log-likelihood of data under a flow: the change of variables, integrated along with the flow.

d log p(x_t) / dt = -div v(x_t, t) along a path (Chen et al. 2018; Grathwohl et al. 2019, "FFJORD"), so
with the path carried back from the data to the source

    log p1(x1) = log p0(x0) - integral of div v(x_t, t) dt from 0 to 1.

The integral is one more coordinate of every sample, whose velocity is the divergence; any deterministic
solver carries it with the state, and an adaptive one controls its error too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rfkernels._dispatch import transforms_active
from rfkernels.ops.random import derive_seed, rand, randn
from rfkernels.sampling.arguments import (
    check_callable,
    check_condition,
    check_samples,
    requires_grad,
)
from rfkernels.sampling.field import check_answer
from rfkernels.sampling.guidance import ClassifierFree, Guidance, Interval
from rfkernels.sampling.nested import map_leaves
from rfkernels.sampling.run import Solver
from rfkernels.sampling.sample import invert

__all__ = ["LogLikelihood", "log_likelihood"]

_PROBES = "divergence_probes"  # the keyword under which the probes of each sample travel


@dataclass(frozen=True)
class LogLikelihood:
    """What :func:`log_likelihood` found.

    Attributes:
        log_likelihood: (B,) natural logarithms of the density at x1.
        x0: (B, ...) where the paths through x1 begin.
        nfe: evaluations of the velocity per sample; each comes with its divergence, which costs
            ``trace``'s backward passes besides.
        bits_per_dim: (B,) -log2 p / d, of the data as they are; images scaled from 256 levels to
            [-1, 1] need 7 bits more to compare with published figures (dequantised, log2(256 / 2)).
    """

    log_likelihood: Tensor
    x0: Tensor
    nfe: int | Tensor
    bits_per_dim: Tensor


def log_likelihood(
    velocity: Callable[..., Tensor],
    x1: Tensor,
    *,
    solver: str | Solver = "dopri5",
    trace: str = "hutchinson",
    probes: int = 1,
    probe: str = "rademacher",
    seed: int | None = None,
    log_density: Callable[[Tensor], Tensor] | None = None,
    condition: Mapping[str, Any] | None = None,
    uncondition: Mapping[str, Any] | None = None,
    guidance_scale: float | Tensor | Guidance | None = None,
    **options: Any,
) -> LogLikelihood:
    """log p1(x1) of the flow's own distribution.

    Gradients are recorded as by ``sample``: when x1, a tensor of the conditions or the guidance scale
    requires grad, and then those of the velocity's parameters too (of an adaptive solver they ignore
    the choice of the steps). The derivatives that the divergence needs are taken in any grad mode and
    in inference mode.

    Args:
        velocity: velocity(x, t, **condition), differentiable in x, samples independent of each other
            (no batch statistics).
        x1: (B, ...) data at ``t_end``, float32 or float64.
        solver: deterministic; "dopri5" or a fixed-step one with ``steps``.
        trace: "exact", d backward passes an evaluation for d numbers a sample, for small d; or
            "hutchinson", eps^T J eps for random eps, unbiased, one backward pass a probe.
        probes: how many eps are averaged; the standard deviation falls with their square root. They
            stay the same along the path, so an adaptive solver sees a smooth field.
        probe: "rademacher", +-1, or "gaussian".
        seed: of the probes of "hutchinson", which needs it: sample i's are a function of (seed, i).
        log_density: log p0, (B, ...) -> (B,), of the source at ``t_start``; None is the standard normal.
        condition, uncondition, guidance_scale: as in ``sample``; guidance a scale, or an
            :class:`Interval` of one, since other kinds are not linear in the velocities.
        options: of ``invert``: steps, grid, t_start, t_end, rtol, atol, progress.

    Returns:
        :class:`LogLikelihood`.

    Raises:
        ValueError, TypeError: arguments that do not fit.
    """
    _check(velocity, x1, trace, probes, probe, seed, guidance_scale)
    condition = dict(check_condition("log_likelihood", "condition", condition))
    if uncondition is not None:
        uncondition = dict(check_condition("log_likelihood", "uncondition", uncondition))
    if torch.is_inference_mode_enabled():
        # Nothing can be differentiated there, nor what was made there.
        def plain(value: Any) -> Any:
            return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

        with torch.inference_mode(False), torch.no_grad():
            return log_likelihood(
                velocity,
                plain(x1),
                solver=solver,
                trace=trace,
                probes=probes,
                probe=probe,
                seed=seed,
                log_density=log_density,
                condition=map_leaves(plain, condition),
                uncondition=map_leaves(plain, uncondition),
                guidance_scale=guidance_scale,
                **options,
            )
    batch, shape = x1.shape[0], x1.shape[1:]
    size = math.prod(shape)
    extra: dict[str, Any] = {}
    if trace == "hutchinson":
        extra[_PROBES] = _draw(probe, (batch, probes, size), seed, x1)
    start = torch.cat([x1.reshape(batch, size), x1.new_zeros(batch, 1)], 1)
    scale = guidance_scale.scale if isinstance(guidance_scale, Guidance) else guidance_scale
    if torch.is_grad_enabled() and requires_grad(condition, uncondition, scale):
        start.requires_grad_()

    def augmented(y: Tensor, t: Tensor, **given: Any) -> Tensor:
        eps = given.pop(_PROBES, None)

        def flat(x: Tensor) -> Tensor:
            x = x.reshape(x.shape[0], *shape)
            v = velocity(x, t, **given)
            check_answer(v, x, x.dtype)
            return v.reshape(v.shape[0], size)

        if transforms_active():
            v, divergence = _transformed(flat, y[:, :-1], eps)
        else:
            v, divergence = _differentiated(flat, y[:, :-1], eps)
        return torch.cat([v.to(y.dtype), divergence[:, None].to(y.dtype)], 1)

    info = invert(
        augmented,
        start,
        solver=solver,
        condition={**condition, **extra},
        uncondition=None if uncondition is None else {**uncondition, **extra},
        guidance_scale=guidance_scale,
        return_info=True,
        **options,
    )
    x0 = info.x[:, :-1].reshape(x1.shape)
    log_p0 = _standard_normal(info.x[:, :-1]) if log_density is None else log_density(x0)
    if not isinstance(log_p0, Tensor) or log_p0.shape != (batch,):
        raise ValueError(
            f"log_likelihood: log_density must return shape ({batch},); got {log_p0!r}"
        )
    # Going back, the coordinate gathers minus the integral.
    value = log_p0 + info.x[:, -1]
    return LogLikelihood(value, x0, info.nfe, -value / (size * math.log(2)))


def _check(
    velocity: object,
    x1: object,
    trace: object,
    probes: object,
    probe: object,
    seed: object,
    guidance_scale: object,
) -> None:
    check_callable("log_likelihood", "velocity", velocity, "velocity(x, t, **condition)")
    check_samples("log_likelihood", "x1", x1)
    if x1.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"log_likelihood: x1 must be float32 or float64; got {x1.dtype}")
    if trace not in ("exact", "hutchinson"):
        raise ValueError(f"log_likelihood: trace must be 'exact' or 'hutchinson'; got {trace!r}")
    if probe not in ("rademacher", "gaussian"):
        raise ValueError(f"log_likelihood: probe must be 'rademacher' or 'gaussian'; got {probe!r}")
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ValueError(f"log_likelihood: probes must be at least 1; got {probes!r}")
    if (seed is None) == (trace == "hutchinson"):
        raise ValueError(
            "log_likelihood: seed must be given with trace='hutchinson', which draws probes, and "
            f"left out with 'exact'; got {seed!r} with {trace!r}"
        )
    inner = guidance_scale.guidance if isinstance(guidance_scale, Interval) else guidance_scale
    if isinstance(inner, Guidance) and not isinstance(inner, ClassifierFree):
        raise ValueError(
            f"log_likelihood: guidance_scale must be a scale or an Interval of one; got {inner!r}"
        )


def _draw(kind: str, shape: tuple[int, ...], seed: int, like: Tensor) -> Tensor:
    """Probes; the offsets are the samples' indices, so that each draws what it would draw alone."""
    key = derive_seed(seed, "divergence probes")
    rows = torch.arange(shape[0], device=like.device)
    draw = randn if kind == "gaussian" else rand
    values = draw(*shape, seed=key, offset=rows, device=like.device, dtype=like.dtype)
    return values if kind == "gaussian" else torch.where(values < 0.5, -1.0, 1.0).to(like.dtype)


def _differentiated(
    velocity: Callable[[Tensor], Tensor], x: Tensor, eps: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(B, d) velocities at x (B, d), and their divergence, by autograd."""
    recorded = torch.is_grad_enabled() and x.requires_grad
    with torch.enable_grad():
        if not recorded:
            x = x.detach().requires_grad_()
        v = velocity(x)
        if not v.requires_grad:  # it does not depend on x, or was computed without gradients
            with torch.no_grad():
                moved = velocity(x + 1)
            if not torch.equal(moved, v):
                raise ValueError(
                    "log_likelihood: velocity must be differentiable in x; got answers that depend on "
                    "x and do not require grad (computed under no_grad or inference_mode?)"
                )
            return v, v.new_zeros(v.shape[0])

        def pulled(weights: Tensor) -> Tensor:
            (found,) = torch.autograd.grad(
                v, x, weights, retain_graph=True, create_graph=recorded, allow_unused=True
            )
            return torch.zeros_like(x) if found is None else found

        divergence = _divergence(pulled, v, eps)
    return (v, divergence) if recorded else (v.detach(), divergence.detach())


def _transformed(
    velocity: Callable[[Tensor], Tensor], x: Tensor, eps: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same inside torch.func, which knows no autograd."""
    v, pull = torch.func.vjp(velocity, x)
    return v, _divergence(lambda weights: pull(weights)[0], v, eps)


def _divergence(pulled: Callable[[Tensor], Tensor], v: Tensor, eps: Tensor | None) -> Tensor:
    """(B,) sum of dv_i / dx_i, exact without eps (B, probes, d), else the mean of eps^T J eps;
    ``pulled`` multiplies by the transposed Jacobian."""
    total = v.new_zeros(v.shape[0])
    if eps is None:
        basis = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
        for i, row in enumerate(basis):
            total = total + pulled(row.expand_as(v))[:, i]
        return total
    for probe in eps.unbind(1):
        total = total + (pulled(probe.to(v.dtype)) * probe).sum(1)
    return total / eps.shape[1]


def _standard_normal(x: Tensor) -> Tensor:
    """(B,) of (B, d)."""
    return -0.5 * x.square().sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)
