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
from rfkernels.ops._first_derivative import first_derivatives
from rfkernels.ops._scalars import Counter, join, split_counter
from rfkernels.ops._step_ops import combined
from rfkernels.ops.ode_step import linear_step

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
        huber_c = 0.0  # the default: made from the shape where it is needed, so that no graph depends on it
    elif kind == "mse":
        raise ValueError(
            f"{name}: huber_c must be given with a pseudo-Huber kind only; got {huber_c!r} with mse"
        )
    elif isinstance(huber_c, (bool, torch.Tensor)) or not huber_c > 0:
        raise ValueError(f"{name}: huber_c must be a positive float; got {huber_c!r}")

    tensors = (prediction, target, x0, x1, weight)
    recorded = _dispatch.recorded(*tensors)
    if _dispatch.transforms_active() or (recorded and _dispatch.forced_backend() == "reference"):
        r = reference.residual(prediction, target, x0, x1, seed, offset)
        losses = reference.sample_losses(r, kind, _constant(kind, huber_c, prediction))
        return _reduce(losses, weight, reduction)
    huber_c = float(huber_c)
    if not _dispatch.plain(*tensors, seed, offset):
        keys = (*split_counter(seed), *split_counter(offset))
        options = (kind, huber_c, reduction, recorded)
        return flow_loss_op(prediction, target, x0, x1, *keys, weight, *options)[0]
    if recorded:
        return _EagerFlowLoss.apply(
            prediction, target, x0, x1, weight, seed, offset, kind, huber_c, reduction
        )
    losses, _ = _run(prediction, target, x0, x1, seed, offset, weight, 1.0, kind, huber_c, False)
    return _reduce(losses, weight, reduction)


def _check_sources(target, x0, x1, seed) -> None:
    if target is not None and x0 is None and x1 is None and seed is None:
        return
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
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if weight is None else losses.sum() / losses.shape[0]


def _constant(kind: str, huber_c: float, prediction: torch.Tensor) -> float:
    """c of the pseudo-Huber kinds; 0 stands for the default."""
    if huber_c or kind == "mse":
        return huber_c
    if kind == "pseudo_huber_elementwise":
        return 1e-3
    return 0.00054 * max(_checks.elements_per_sample(prediction), 1)


def _run(prediction, target, x0, x1, seed, offset, weight, grad_scale, kind, huber_c, with_grad):
    """(losses (B,), gradient or None) from the backend; the gradient carries weight and grad_scale."""
    losses = torch.empty(
        prediction.shape[:1], dtype=compute_dtype(prediction), device=prediction.device
    )
    grad = torch.empty_like(prediction) if with_grad else None
    huber_c = _constant(kind, huber_c, prediction)
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
    inside = _inside(prediction, weight, reduction)
    losses, grad = _run(prediction, target, x0, x1, *keys, *inside, kind, huber_c, with_grad)
    value = _reduce(losses, weight, reduction)
    if value is losses:
        value = losses.clone()  # results of a registered op may not share memory
    return value, losses, prediction.new_empty(0) if grad is None else grad


def _loss_fake(prediction, target, x0, x1, *args):
    reduction, with_grad = args[-2:]
    losses = prediction.new_empty(prediction.shape[:1], dtype=compute_dtype(prediction))
    value = torch.empty_like(losses) if reduction == "none" else losses.new_empty(())
    return value, losses, torch.empty_like(prediction) if with_grad else prediction.new_empty(0)


_NO_SECOND = (
    "flow_loss: the gradient comes from the forward pass and has no derivative of its own; for second derivatives "
    'compute the loss under rfkernels.use_backend("reference")'
)


def _scale(batch: int, reduction: str) -> float:
    """What the reduction puts on every sample's loss."""
    return 1.0 / max(batch, 1) if reduction == "mean" else 1.0


def _inside(prediction, weight, reduction) -> tuple[torch.Tensor | None, float]:
    """(weight, scale) of the gradient that the forward makes.

    A float16 gradient is kept at the size of the residual, and the backward puts weight and scale on it: 2 / (B d) of a
    residual is below what float16 holds, and a loss scale that comes with the backward would come too late.
    """
    if prediction.dtype == torch.float16:
        return None, 0.5 * _checks.elements_per_sample(prediction)
    return weight, _scale(prediction.shape[0], reduction)


def _remember(ctx, prediction, target, x0, x1, weight, reduction, losses, grad) -> None:
    """Keep for the backward what ``_backward`` needs."""
    ctx.dtypes = [None if t is None else t.dtype for t in (prediction, target, x0, x1)]
    ctx.weight_dtype = None if weight is None else weight.dtype
    ctx.scale = _scale(prediction.shape[0], reduction)
    half = prediction.dtype == torch.float16
    # What _inside left out.
    ctx.rest = 2.0 * ctx.scale / max(_checks.elements_per_sample(prediction), 1) if half else 1.0
    ctx.save_for_backward(grad, losses, weight if half else None)


def _backward(ctx, grad_value, wanted) -> list[torch.Tensor | None]:
    """Gradients for (prediction, target, x0, x1, weight) where wanted: the forward's gradient, scaled."""
    grad, losses, weight = ctx.saved_tensors
    half = grad.dtype == torch.float16
    # The usual loss.backward() hands in 1, and on the CPU it costs nothing to see that.
    many = _dispatch.batched(grad_value)
    unit = (
        not half
        and grad_value.is_cpu
        and grad_value.ndim == 0
        and _dispatch.plain(grad_value)
        and not many
        and grad_value.item() == 1.0
    )
    if unit and wanted[0] and not any(wanted[1:]) and not torch.is_grad_enabled():
        return [grad, None, None, None, None]
    with torch.no_grad():
        factor = grad_value * ctx.rest if half else grad_value
        if weight is not None:
            factor = factor * weight.to(factor.dtype)
        grads: list[torch.Tensor | None] = []
        # d r / d(prediction, target, x0, x1) with r = prediction - target, target = x1 - x0
        for dtype, sign, want in zip(ctx.dtypes, (1.0, -1.0, 1.0, -1.0), wanted[:4], strict=True):
            if not want:
                grads.append(None)
            elif unit and sign == 1.0:
                grads.append(grad.to(dtype))
            elif many:
                grads.append(combined((grad,), (factor * sign,), dtype))
            else:
                # A wider gradient is not rounded to the narrow type on its way.
                wide = grad.to(torch.promote_types(grad.dtype, dtype))
                grads.append(linear_step(wide, (), (), x_coefficient=factor * sign).to(dtype))
        weighted = wanted[4]
        grads.append((losses * grad_value * ctx.scale).to(ctx.weight_dtype) if weighted else None)
    if torch.is_grad_enabled():  # create_graph=True
        grads = first_derivatives(grads, _NO_SECOND)
    return grads


class _EagerFlowLoss(torch.autograd.Function):
    """The eager way past the dispatcher: 15 microseconds a call less than the registered op (2-core CPU)."""

    @staticmethod
    def forward(ctx, prediction, target, x0, x1, weight, seed, offset, kind, huber_c, reduction):
        inside = _inside(prediction, weight, reduction)
        losses, grad = _run(prediction, target, x0, x1, seed, offset, *inside, kind, huber_c, True)
        _remember(ctx, prediction, target, x0, x1, weight, reduction, losses, grad)
        value = _reduce(losses, weight, reduction)
        return value.clone() if value is losses else value

    @staticmethod
    def backward(ctx, grad_value):
        return *_backward(ctx, grad_value, ctx.needs_input_grad[:5]), *(None,) * 5


class _FlowLoss(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        with _registry.below_autograd():
            return flow_loss_op(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, losses, grad = output
        ctx.mark_non_differentiable(losses, grad)
        _remember(ctx, *inputs[:4], inputs[8], inputs[11], losses, grad)

    @staticmethod
    def backward(ctx, grad_value, *_):
        wanted = (*ctx.needs_input_grad[:4], ctx.needs_input_grad[8])
        *tensors, weight = _backward(ctx, grad_value, wanted)
        return *tensors, *(None,) * 4, weight, *(None,) * 4


flow_loss_op = _registry.register(
    "flow_loss",
    "(Tensor prediction, Tensor? target, Tensor? x0, Tensor? x1, SymInt seed, Tensor? seed_tensor, SymInt offset, "
    "Tensor? offset_tensor, Tensor? weight, str kind, float huber_c, str reduction, bool with_grad) "
    "-> (Tensor, Tensor, Tensor)",
    kernel=_loss_kernel,
    fake=_loss_fake,
    autograd=_FlowLoss.apply,
)
