"""Gradients that a kernel computes itself have no derivative of their own; differentiating them again must not give zero."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class _Sealed(torch.autograd.Function):
    """Identity on a gradient that raises where it is differentiated again, rather than count as a constant."""

    @staticmethod
    def forward(ctx, grad, message):
        ctx.message = message
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(ctx.message)


def first_derivatives(
    grads: Iterable[torch.Tensor | None], message: str
) -> list[torch.Tensor | None]:
    """The gradients under ``create_graph=True``: a second derivative raises RuntimeError(message)."""
    return [
        None if g is None else _Sealed.apply(g.detach().requires_grad_(), message) for g in grads
    ]
