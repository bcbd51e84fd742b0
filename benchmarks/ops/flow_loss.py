"""Losses forward and backward: the loss and its gradient for the prediction, by autograd and written out by hand.

Every autograd spelling ends in ``torch.autograd.grad``, which allocates the gradient: none has an ``out=``. The spellings by
hand record nothing and return the same two numbers; ours goes through autograd like any loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from registry import Built, Case, Setting, Variant, compiled, passes

import rfkernels as rf

C_FACTOR = 0.00054  # pseudo-Huber constant a dimension, Lee et al. 2024


def _square(prediction, target):
    return ((prediction - target) ** 2).mean()


def _square_pair(prediction, x0, x1):
    return ((prediction - (x1 - x0)) ** 2).mean()


def _huber(prediction, target):
    """As written: the per-sample norm by square and sum."""
    d = prediction[0].numel()
    s = (prediction - target).float().square().flatten(1).sum(1)
    c = C_FACTOR * d
    return ((torch.sqrt(s + c * c) - c) / d).mean()


def _huber_best(prediction, target):
    """vector_norm stores no squares."""
    d = prediction[0].numel()
    norm = torch.linalg.vector_norm((prediction - target).flatten(1), dim=1, dtype=torch.float32)
    c = C_FACTOR * d
    return ((torch.hypot(norm, norm.new_full((), c)) - c) / d).mean()


def _square_by_hand(prediction, target, residual):
    torch.sub(prediction, target, out=residual)
    flat, n = residual.flatten(), residual.numel()
    return torch.dot(flat, flat) / n, residual.mul_(2 / n)


def _square_pair_by_hand(prediction, x0, x1, residual):
    torch.sub(prediction, x1, out=residual).add_(x0)
    flat, n = residual.flatten(), residual.numel()
    return torch.dot(flat, flat) / n, residual.mul_(2 / n)


def _square_compiled_by_hand(prediction, target):
    residual = prediction - target
    return (residual * residual).mean(), residual * (2 / residual.numel())


def _spellings(
    setting: Setting,
    sources: tuple[torch.Tensor, ...],
    fused: Callable[..., torch.Tensor],
    formula: Callable[..., torch.Tensor],
    best: tuple[str, Callable[..., torch.Tensor]],
    by_hand: list[Variant],
) -> Built:
    """All spellings by autograd of a loss of the prediction and ``sources``, and the given ones by hand."""
    prediction = setting.normal(0).requires_grad_()

    def through_autograd(loss: Callable[..., torch.Tensor]):
        def call():
            value = loss(prediction, *sources)
            return value, torch.autograd.grad(value, prediction)[0]

        return call

    def expected():
        wide = prediction.detach().double().requires_grad_()
        value = formula_in_double(wide, *(s.double() for s in sources))
        return value.detach(), torch.autograd.grad(value, wide)[0]

    def formula_in_double(wide, *doubles):
        if formula is not _huber:
            return formula(wide, *doubles)
        d = wide[0].numel()
        s = (wide - doubles[0]).square().flatten(1).sum(1)
        return ((torch.sqrt(s + (C_FACTOR * d) ** 2) - C_FACTOR * d) / d).mean()

    name, quickest = best
    return Built(
        [
            Variant("fused", "fused", "new", through_autograd(fused)),
            Variant("as written", "naive", "new", through_autograd(formula)),
            Variant(name, "best", "new", through_autograd(quickest)),
            Variant("torch.compile", "compile", "new", through_autograd(compiled(formula))),
            *by_hand,
        ],
        expected,
    )


def _mse(setting: Setting) -> Built:
    target, residual = setting.normal(1), setting.empty()
    plain = setting.normal(0)  # the prediction's numbers, outside autograd
    by_hand = compiled(_square_compiled_by_hand)
    return _spellings(
        setting,
        (target,),
        fused=rf.flow_loss,
        formula=_square,
        best=("mse_loss", torch.nn.functional.mse_loss),
        by_hand=[
            Variant(
                "sub, dot, mul_", "manual", "out", lambda: _square_by_hand(plain, target, residual)
            ),
            Variant("torch.compile, by hand", "manual", "new", lambda: by_hand(plain, target)),
        ],
    )


def _mse_pair(setting: Setting) -> Built:
    x0, x1, residual = setting.normal(1), setting.normal(2), setting.empty()
    plain = setting.normal(0)
    return _spellings(
        setting,
        (x0, x1),
        fused=lambda prediction, x0, x1: rf.flow_loss(prediction, x0=x0, x1=x1),
        formula=_square_pair,
        best=("sub, mse_loss", lambda p, x0, x1: torch.nn.functional.mse_loss(p, x1 - x0)),
        by_hand=[
            Variant(
                "sub, add_, dot, mul_",
                "manual",
                "out",
                lambda: _square_pair_by_hand(plain, x0, x1, residual),
            )
        ],
    )


def _pseudo_huber(setting: Setting) -> Built:
    return _spellings(
        setting,
        (setting.normal(1),),
        fused=lambda prediction, target: rf.flow_loss(prediction, target, kind="pseudo_huber"),
        formula=_huber,
        best=("vector_norm, hypot", _huber_best),
        by_hand=[],
    )


def _reads(sources: int) -> Callable[[Setting], int]:
    """Bytes of reading the prediction and so many sources and writing the gradient."""
    return lambda s: (2 + sources) * s.n * s.state.itemsize


CASES = [
    Case("flow_loss", "loss_mse", _mse, _reads(1), lambda s: 4 * s.n, passes(10, 7), gradient=True),
    Case(
        "flow_loss",
        "loss_mse_pair",
        _mse_pair,
        _reads(2),
        lambda s: 5 * s.n,
        passes(13, 10),
        gradient=True,
    ),
    # The gradient needs the sample's norm first: the inputs are read a second time, from the cache where they fit.
    Case(
        "flow_loss", "loss_pseudo_huber", _pseudo_huber, _reads(1), lambda s: 4 * s.n, gradient=True
    ),
]
