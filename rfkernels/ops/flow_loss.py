"""Per-sample regression losses of flow matching with their gradient computed in the same pass.

The gradient is made in the forward while the data is in registers and only scaled in the backward: 12 bytes an element in
float32 against 40 for sub, square, mean and their backward.
"""

from __future__ import annotations

import torch

from rfkernels import _dispatch, _registry
from rfkernels.backends.reference import flow_loss as reference
from rfkernels.backends.reference.precision import compute_dtype
from rfkernels.ops import _checks
from rfkernels.ops._checks import Counter
from rfkernels.ops._scalars import join, split_counter
from rfkernels.ops._step_ops import linear_op

KINDS = ("mse", "pseudo_huber", "pseudo_huber_elementwise")
REDUCTIONS = ("mean", "sum", "none")


def flow_loss(
    prediction: torch.Tensor,
    target: torch.Tensor | None = None,
    *,
    x0: torch.Tensor | None = None,
    x1: torch.Tensor | None = None,
    seed: Counter | None = None,
    offset: Counter = 0,
    weight: torch.Tensor | None = None,
    kind: str = "mse",
    huber_c: float | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """Regression loss of a predicted velocity, per sample, with its gradient from the forward pass.

    With r = prediction - target in C (float64 when prediction is, else float32), S the sum of r^2 over one sample and d
    its number of elements, a sample's loss is

    * ``mse``: S / d;
    * ``pseudo_huber``: (sqrt(S + c^2) - c) / d, c = 0.00054 d unless given (Lee et al., "Improving the training of
      rectified flows", 2024: one norm per sample, not one per element);
    * ``pseudo_huber_elementwise``: mean of sqrt(r^2 + c^2) - c, c = 1e-3 unless given (Rectified Diffusion, Wang et al.,
      2024).

    Args:
        prediction: (B, ...), any strides.
        target: velocity to regress on; or give ``x1`` with ``x0`` or ``seed``, and it is rebuilt as x1 - x0, the target of
            the linear path, without being stored.
        x0: source, shape of prediction.
        x1: data, shape of prediction.
        seed: x0 is drawn as ``rfkernels.interpolate`` draws it from the same (seed, offset) and the same shape.
        offset: as there.
        weight: (B,) weights, multiplied into the sample losses.
        kind: ``mse``, ``pseudo_huber`` or ``pseudo_huber_elementwise``.
        huber_c: the constant c > 0 of the pseudo-Huber kinds.
        reduction: ``mean`` divides the sum over samples by B (not by the sum of weights), ``sum``, or ``none`` for (B,).

    Returns:
        A scalar, or (B,) for ``none``; float32 (float64 for float64 predictions). Differentiable once in prediction, target,
        x0, x1 and weight; a second derivative raises (under ``use_backend("reference")`` it works).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.
    """
    name = "flow_loss"
    _checks.tensor(name, "prediction", prediction)
    if prediction.ndim == 0:
        raise ValueError(f"{name}: prediction must have a batch dimension; got a 0-d tensor")
    for argument, value in (("target", target), ("x0", x0), ("x1", x1)):
        if value is not None:
            _checks.like(name, argument, value, prediction, "prediction")
    _check_sources(target, x0, x1, seed)
    if seed is not None:
        seed = _checks.counter(name, "seed", seed, prediction)
        offset = _checks.counter(name, "offset", offset, prediction)
    if weight is not None:
        if not isinstance(weight, torch.Tensor) or weight.shape != prediction.shape[:1]:
            raise ValueError(
                f"{name}: weight must be a ({prediction.shape[0]},) tensor; got {_checks.describe(weight)}"
            )
        weight = _checks.scalar(name, "weight", weight, prediction)
    if kind not in KINDS:
        raise ValueError(f"{name}: kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{name}: reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}"
        )
    if huber_c is None:
        huber_c = (
            1e-3
            if kind == "pseudo_huber_elementwise"
            else 0.00054 * max(_checks.elements_per_sample(prediction), 1)
        )
    elif kind == "mse":
        raise ValueError(
            f"{name}: huber_c must be given with a pseudo-Huber kind only; got {huber_c!r} with mse"
        )
    elif isinstance(huber_c, (bool, torch.Tensor)) or not huber_c > 0:
        raise ValueError(f"{name}: huber_c must be a positive float; got {huber_c!r}")

    tensors = (prediction, target, x0, x1, weight)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if _dispatch.transforms_active() or (recorded and _dispatch.forced_backend() == "reference"):
        r = reference.residual(prediction, target, x0, x1, seed, offset)
        losses = reference.sample_losses(r, kind, huber_c)
        return _reduce(losses, weight, reduction)
    if _dispatch.direct_allowed(*tensors, seed, offset):
        losses, _ = _run(
            prediction, target, x0, x1, seed, offset, weight, kind, huber_c, 1.0, False
        )
        return _reduce(losses, weight, reduction)
    value, _, _ = flow_loss_op(
        prediction, target, x0, x1, *split_counter(seed), *split_counter(offset), weight, kind, float(huber_c),
        reduction, recorded,
    )  # fmt: skip
    return value


def _check_sources(target, x0, x1, seed) -> None:
    given = ", ".join(
        n for n, v in (("target", target), ("x0", x0), ("x1", x1), ("seed", seed)) if v is not None
    )
    if given not in ("target", "x0, x1", "x1, seed"):
        raise ValueError(
            f"flow_loss: the target must be given as target, as x0 and x1, or as x1 and seed; got {given or 'none of them'}"
        )


def _reduce(losses: torch.Tensor, weight: torch.Tensor | None, reduction: str) -> torch.Tensor:
    if weight is not None:
        losses = losses * weight.to(losses.dtype)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / losses.shape[0]


def _run(prediction, target, x0, x1, seed, offset, weight, kind, huber_c, grad_scale, with_grad):
    """(losses (B,), gradient or None) from the backend; the gradient carries weight and grad_scale."""
    losses = torch.empty(
        prediction.shape[:1], dtype=compute_dtype(prediction), device=prediction.device
    )
    grad = torch.empty_like(prediction) if with_grad else None
    module = _dispatch.backend("flow_loss", prediction)
    module.flow_loss(
        prediction, target, x0, x1, seed, offset, weight, kind, huber_c, grad_scale, losses, grad
    )
    return losses, grad


def _loss_kernel(
    prediction, target, x0, x1, seed, seed_tensor, offset, offset_tensor, weight, kind, huber_c, reduction, with_grad
):  # fmt: skip
    keys = (
        (join(seed, seed_tensor), join(offset, offset_tensor))
        if x1 is not None and x0 is None
        else (None, None)
    )
    scale = 1.0 / max(prediction.shape[0], 1) if reduction == "mean" else 1.0
    losses, grad = _run(prediction, target, x0, x1, *keys, weight, kind, huber_c, scale, with_grad)
    value = _reduce(losses, weight, reduction)
    if value is losses:
        value = losses.clone()  # results of a registered op may not share memory
    return value, losses, prediction.new_empty(0) if grad is None else grad


def _loss_fake(prediction, target, x0, x1, *args):
    reduction, with_grad = args[-2:]
    losses = prediction.new_empty(prediction.shape[:1], dtype=compute_dtype(prediction))
    value = torch.empty_like(losses) if reduction == "none" else losses.new_empty(())
    return value, losses, torch.empty_like(prediction) if with_grad else prediction.new_empty(0)


class _FirstDerivative(torch.autograd.Function):
    """Identity on a gradient that raises where it is differentiated again, rather than count as a constant."""

    @staticmethod
    def forward(ctx, grad):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "flow_loss: the gradient comes from the forward pass and has no derivative of its own; for second derivatives "
            'compute the loss under rfkernels.use_backend("reference")'
        )


class _FlowLoss(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        with _registry.below_autograd():
            return flow_loss_op(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        prediction, target, x0, x1 = inputs[:4]
        weight, reduction = inputs[8], inputs[11]
        _, losses, grad = output
        ctx.mark_non_differentiable(losses, grad)
        ctx.dtypes = [t.dtype if t is not None else None for t in (prediction, target, x0, x1)]
        ctx.weight_dtype = None if weight is None else weight.dtype
        ctx.scale = 1.0 / max(prediction.shape[0], 1) if reduction == "mean" else 1.0
        ctx.save_for_backward(grad, losses)

    @staticmethod
    def backward(ctx, grad_value, *_):
        with torch.no_grad():
            grads = _FlowLoss.first_backward(ctx, grad_value)
        if torch.is_grad_enabled():  # create_graph=True
            grads = [g if g is None else _FirstDerivative.apply(g.detach().requires_grad_()) for g in grads]
        return tuple(grads)

    @staticmethod
    def first_backward(ctx, grad_value):
        grad, losses = ctx.saved_tensors
        result = [None] * 13
        unit = (
            grad_value.is_cpu
            and grad_value.ndim == 0
            and _dispatch.direct_allowed(grad_value)
            and grad_value == 1.0
        )
        # d r / d(prediction, target, x0, x1)
        for i, sign in enumerate((1.0, -1.0, 1.0, -1.0)):
            if ctx.needs_input_grad[i]:
                if unit and sign == 1.0:
                    result[i] = grad.to(ctx.dtypes[i])
                else:
                    factor = grad_value * sign
                    scaled = linear_op(
                        grad, [], 0.0, factor, [], [], 0.0, None, 0, None, 0, None, False
                    )
                    result[i] = scaled.to(ctx.dtypes[i])
        if ctx.needs_input_grad[8]:
            result[8] = (losses * grad_value * ctx.scale).to(ctx.weight_dtype)
        return result


flow_loss_op = _registry.register(
    "flow_loss",
    "(Tensor prediction, Tensor? target, Tensor? x0, Tensor? x1, SymInt seed, Tensor? seed_tensor, SymInt offset, "
    "Tensor? offset_tensor, Tensor? weight, str kind, float huber_c, str reduction, bool with_grad) "
    "-> (Tensor, Tensor, Tensor)",
    kernel=_loss_kernel,
    fake=_loss_fake,
    autograd=_FlowLoss.apply,
)
