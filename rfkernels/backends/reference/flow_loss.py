"""Per-sample flow-matching losses and their gradient in eager torch; formulas in ``rfkernels.ops.flow_loss``."""

from __future__ import annotations

import math

import torch

from rfkernels.backends.reference.interpolate import source
from rfkernels.backends.reference.precision import compute_dtype, scalar_like, to_compute


def residual(prediction, target, x0, x1, seed, offset) -> torch.Tensor:
    """prediction - target in the compute type; the target is given or x1 - x0."""
    compute = compute_dtype(prediction)
    if target is None:
        target = to_compute(x1, compute) - to_compute(source(x1, x0, seed, offset), compute)
    return to_compute(prediction, compute) - to_compute(target, compute)


def sample_losses(r: torch.Tensor, kind: str, huber_c: float) -> torch.Tensor:
    """(B,) unweighted losses of residuals (B, ...)."""
    elements = math.prod(r.shape[1:])
    rows = r.reshape(r.shape[0], elements)
    if kind == "mse":
        return (rows * rows).sum(1) / elements
    if kind == "pseudo_huber":
        return (torch.sqrt((rows * rows).sum(1) + huber_c**2) - huber_c) / elements
    return (torch.sqrt(rows * rows + huber_c**2) - huber_c).sum(1) / elements


def sample_gradients(r: torch.Tensor, kind: str, huber_c: float) -> torch.Tensor:
    """d loss_b / d prediction, shape of ``r``."""
    elements = max(math.prod(r.shape[1:]), 1)
    if kind == "mse":
        return r * (2.0 / elements)
    if kind == "pseudo_huber":
        total = (r * r).reshape(r.shape[0], math.prod(r.shape[1:])).sum(1)
        return r * scalar_like(1.0 / (elements * torch.sqrt(total + huber_c**2)), r)
    return r / torch.sqrt(r * r + huber_c**2) / elements


def flow_loss(
    prediction, target, x0, x1, seed, offset, weight, kind, huber_c, grad_scale, losses, grad
) -> None:
    """See ``rfkernels.ops.flow_loss.flow_loss``; writes ``losses`` (B,) unweighted and, where given, ``grad``, the
    gradient of sum_b weight_b loss_b grad_scale."""
    r = residual(prediction, target, x0, x1, seed, offset)
    losses.copy_(sample_losses(r, kind, huber_c))
    if grad is not None:
        gradient = sample_gradients(r, kind, huber_c) * grad_scale
        grad.copy_(gradient if weight is None else gradient * scalar_like(weight, r))
