"""The registered ops behind ``ode_step``: rfkernels::euler_step and rfkernels::linear_step, with their gradients.

``taylor_step`` is the linear op with coefficients made from dt. Both ops are linear in their tensors, so a gradient is a
scaling of the incoming one: the linear op again, which makes them differentiable any number of times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rfkernels import _dispatch, _registry
from rfkernels.backends.reference import ode_step as reference
from rfkernels.backends.reference.precision import compute_dtype
from rfkernels.ops._scalars import Scalar, join, split


def combined(
    grads: Sequence[torch.Tensor], factors: Sequence[Scalar], dtype: torch.dtype
) -> torch.Tensor:
    """The sum of factor * grad in the given dtype, not rounded to a narrower one of the grads on its way."""
    wide, *others = grads
    wide = wide.to(torch.promote_types(wide.dtype, dtype))
    if _dispatch.batched(wide, *factors):
        return reference.linear(wide, others, factors[0], factors[1:], None).to(dtype)
    (number, *numbers), (tensor, *tensors) = zip(*map(split, factors), strict=True)
    total = linear_op(
        wide, others, number, tensor, numbers, tensors, 0.0, None, 0, None, 0, None, False
    )
    return total if total.dtype == dtype else total.to(dtype)


def _euler_kernel(x, v, v_uncond, dt, dt_tensor, guidance, guidance_tensor):
    out = torch.empty_like(x)
    g = join(guidance, guidance_tensor)
    _dispatch.backend("ode_step", x).euler_step(x, v, v_uncond, join(dt, dt_tensor), g, out, None)
    return out


class _Euler(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        with _registry.below_autograd():
            return euler_op(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, v, v_uncond, dt, dt_tensor, guidance, guidance_tensor = inputs
        ctx.dtypes = (x.dtype, v.dtype, None if v_uncond is None else v_uncond.dtype)
        ctx.compute = compute_dtype(x)
        ctx.numbers = dt, guidance
        ctx.save_for_backward(dt_tensor, guidance_tensor)

    @staticmethod
    def backward(ctx, grad):
        # In the compute type before they are multiplied, as in the forward.
        tensors = (None if t is None else t.to(ctx.compute) for t in ctx.saved_tensors)
        dt, g = map(join, ctx.numbers, tensors)
        x_dtype, v_dtype, u_dtype = ctx.dtypes
        v_factor, u_factor = (dt, None) if u_dtype is None else (dt * g, dt - dt * g)
        need_x, need_v, need_u, *_ = ctx.needs_input_grad
        return (
            grad.to(x_dtype) if need_x else None,
            combined((grad,), (v_factor,), v_dtype) if need_v else None,
            combined((grad,), (u_factor,), u_dtype) if need_u else None,
            *(None,) * 4,
        )


euler_op = _registry.register(
    "euler_step",
    "(Tensor x, Tensor v, Tensor? v_uncond, float dt, Tensor? dt_tensor, float guidance, Tensor? guidance_tensor) -> Tensor",
    kernel=_euler_kernel,
    fake=lambda x, *_: torch.empty_like(x),
    autograd=_Euler.apply,
)


def _linear_kernel(
    x, tensors, c0, c0_tensor, numbers, number_tensors, scale, scale_tensor, seed, seed_tensor, offset, offset_tensor, noisy
):  # fmt: skip
    out = torch.empty_like(x)
    # The dispatcher resolves the negative bit of a Tensor and of a Tensor[], not of a Tensor?[].
    number_tensors = [None if t is None else t.resolve_neg() for t in number_tensors]
    coefficients = tuple(map(join, numbers, number_tensors))
    noise = (
        (join(scale, scale_tensor), join(seed, seed_tensor), join(offset, offset_tensor))
        if noisy
        else None
    )
    module = _dispatch.backend("ode_step", x)
    module.linear_step(x, tuple(tensors), join(c0, c0_tensor), coefficients, noise, out, None)
    return out


class _Linear(torch.autograd.Function):
    """Called as apply(count, x, *tensors, *rest): a Function sees the tensors only outside a list."""

    @staticmethod
    def forward(count, x, *args):
        with _registry.below_autograd():
            return linear_op(x, list(args[:count]), *args[count:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        count, x, *args = inputs
        c0, c0_tensor, numbers, number_tensors = args[count : count + 4]
        ctx.dtypes = [x.dtype, *(t.dtype for t in args[:count])]
        ctx.numbers = [c0, *numbers]
        ctx.trailing = len(args) - count
        ctx.save_for_backward(c0_tensor, *number_tensors)

    @staticmethod
    def backward(ctx, grad):
        factors = map(join, ctx.numbers, ctx.saved_tensors)
        needed = ctx.needs_input_grad[1 : 1 + len(ctx.dtypes)]
        grads = [
            combined((grad,), (factor,), dtype) if need else None
            for factor, dtype, need in zip(factors, ctx.dtypes, needed, strict=True)
        ]
        return None, *grads, *(None,) * ctx.trailing


def _linear_autograd(x, tensors, *rest):
    return _Linear.apply(len(tensors), x, *tensors, *rest)


linear_op = _registry.register(
    "linear_step",
    "(Tensor x, Tensor[] tensors, float c0, Tensor? c0_tensor, float[] coefficients, Tensor?[] coefficient_tensors, "
    "float noise_scale, Tensor? noise_scale_tensor, SymInt seed, Tensor? seed_tensor, SymInt offset, "
    "Tensor? offset_tensor, bool noisy) -> Tensor",
    kernel=_linear_kernel,
    fake=lambda x, *_: torch.empty_like(x),
    autograd=_linear_autograd,
)
