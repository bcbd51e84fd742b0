"""x_t and its regression target in one pass, the source noise drawn inside the kernel where it is not given.

Twelve bytes an element in float32 with drawn noise (read x1, write x_t and target) against 44 for the eager spelling.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch.compiler import is_compiling

from rfkernels import _dispatch, _registry
from rfkernels.backends.native import KERNEL_PATHS as _KERNEL_PATHS
from rfkernels.backends.native import fast_interpolate as _native_fast_interpolate
from rfkernels.backends.reference import interpolate as reference
from rfkernels.backends.reference.precision import compute_dtype, placed
from rfkernels.ops import _checks
from rfkernels.ops._scalars import Counter, Scalar, join, split, split_counter, wants_grad
from rfkernels.ops._step_ops import combined
from rfkernels.ops.random import randn

PATHS = ("linear", "trigonometric", "vp", "sub-vp")
_ALIASES = {"straight": "linear", "spherical": "trigonometric", "subvp": "sub-vp"}


class Interpolant(NamedTuple):
    """x_t, its target dx_t/dt, and the source x0 where it was asked for."""

    xt: torch.Tensor
    target: torch.Tensor
    x0: torch.Tensor | None = None


class Path(Protocol):
    """What ``interpolate`` needs of a path object."""

    def coefficients(
        self, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(alpha, sigma, dalpha/dt, dsigma/dt) at t, each of the shape of t."""


def interpolate(
    x1: torch.Tensor,
    t: Scalar,
    *,
    x0: torch.Tensor | None = None,
    seed: Counter | None = None,
    offset: Counter = 0,
    path: str | Path = "linear",
    return_x0: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Interpolant:
    """The point x_t of the path from x0 (t = 0) to x1 (t = 1) and its velocity, the target of the regression.

    Formula in C (float64 when x1 is, else float32), every product and sum rounded: ``xt = (sigma * x0) + (alpha * x1)``,
    ``target = (dsigma * x0) + (dalpha * x1)``. The coefficients are functions of t, rounded to C, computed in float64:

    * ``linear`` (``straight``): alpha = t, sigma = 1 - t; target = x1 - x0. Liu et al., "Flow straight and fast", 2022.
    * ``trigonometric`` (``spherical``): alpha = sin(pi t / 2), sigma = cos(pi t / 2).
    * ``vp``: log alpha = -(a/4)(1-t)^2 - (b/2)(1-t) with a = 19.9, b = 0.1, sigma = sqrt(1 - alpha^2); the target is
      infinite at t = 1. Song et al., "Score-based generative modeling through SDEs", 2021.
    * ``sub-vp``: the same alpha, sigma = 1 - alpha^2.
    * any object with ``coefficients(t)``, see ``rfkernels.flow``.

    Args:
        x1: data (B, ...), any strides; float32, float64, bfloat16 or float16.
        t: time in [0, 1]; a float, a 0-d or a (B,) tensor.
        x0: source of the shape of x1 (another data set, stored pairs). Exactly one of x0 and seed is given.
        seed: x0 is the standard normal that ``rfkernels.randn`` draws from (seed, offset), in float32, never stored; an
            int in [0, 2^63) or an int64 tensor, 0-d or (B,).
        offset: counter offset of the draw, as seed.
        path: the name of a path, or an object.
        return_x0: also return x0 in x1's dtype.
        out: a pair of tensors like x1 that receive x_t and target; either may be x1 or x0 itself.

    Returns:
        ``Interpolant(xt, target, x0)``, in x1's dtype; x0 is None unless ``return_x0``. Differentiable in x1 and x0.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.
    """
    if not return_x0 and type(path) is str and path in _KERNEL_PATHS and not is_compiling():
        fast = _fast(x1, t, x0, _KERNEL_PATHS[path], seed, offset, out)
        if fast is not None:
            return fast
    name = "interpolate"
    _checks.tensor(name, "x1", x1)
    t = _checks.scalar(name, "t", t, x1)
    if (x0 is None) == (seed is None):
        got = "neither" if x0 is None else "both"
        raise ValueError(f"{name}: exactly one of x0 and seed must be given; got {got}")
    if x0 is not None:
        _checks.like(name, "x0", x0, x1, "x1")
    else:
        seed = _checks.counter(name, "seed", seed, x1)
        offset = _checks.counter(name, "offset", offset, x1)
    path = _resolve(path, t, x1)
    if out is not None:
        if not isinstance(out, (tuple, list)) or len(out) != 2:
            raise TypeError(
                f"{name}: out must be a pair of tensors (xt, target); got {type(out).__name__}"
            )
        for i, o in enumerate(out):
            _checks.output(name, f"out[{i}]", o, x1, x1.dtype)
        if out[0] is out[1]:
            raise ValueError(f"{name}: out must be two tensors; got one of them twice")

    scalars = (t, *(path if isinstance(path, tuple) else ()))
    inputs = (x1, x0, *scalars, seed, offset)
    if _dispatch.transforms_active() or wants_grad(scalars):
        source = reference.source(x1, x0, seed, offset)
        xt, target = (v.to(x1.dtype) for v in reference.point_and_target(x1, source, t, path))
    elif not _dispatch.direct_allowed(*inputs, *(out or ())):
        names, custom = (path, []) if isinstance(path, str) else ("custom", list(path))
        xt, target = interpolate_op(
            x1, x0, *split(t), names, custom, *split_counter(seed), *split_counter(offset)
        )
        source = x0
    else:
        in_place = out is not None and not _checks.needs_staging(out, inputs)
        xt, target = out if in_place else (torch.empty_like(x1), torch.empty_like(x1))
        source = torch.empty_like(x1) if return_x0 else None
        _dispatch.backend(name, x1).interpolate(x1, x0, t, path, seed, offset, xt, target, source)
        if in_place:
            _dispatch.mark_written(xt, target)
            return Interpolant(xt, target, source)
    if out is not None:
        xt, target = (o.copy_(v) for o, v in zip(out, (xt, target), strict=True))
    if not return_x0:
        return Interpolant(xt, target, None)
    if source is None:
        source = randn(x1.shape, seed=seed, offset=offset, device=x1.device)
    return Interpolant(xt, target, source.to(x1.dtype))


def _fast(x1, t, x0, path, seed, offset, out) -> Interpolant | None:
    """By the native kernels where every argument is plainly right, else None: the checks then say why."""
    if out is None:
        if type(x1) is not torch.Tensor or not x1.is_cpu:
            return None
        out = torch.empty_like(x1), torch.empty_like(x1)
    elif type(out) is not tuple or len(out) != 2:
        return None
    if not _native_fast_interpolate(x1, x0, t, path, seed, offset, *out):
        return None
    return Interpolant(*out)


def _resolve(path, t, x1) -> str | tuple[torch.Tensor, ...]:
    """A path's name, or its four coefficients at t."""
    if isinstance(path, str):
        path = _ALIASES.get(path, path)
        if path not in PATHS:
            raise ValueError(
                f"interpolate: path must be one of {', '.join(PATHS)} or an object; got {path!r}"
            )
        return path
    if not callable(getattr(path, "coefficients", None)):
        raise TypeError(
            f"interpolate: path must be a name or have coefficients(t); got {type(path).__name__}"
        )
    known = getattr(path, "kernel_path", None)
    if known is not None:
        return _resolve(known, t, x1)
    compute = compute_dtype(x1)
    coefficients = path.coefficients(placed(t, compute, x1.device))
    if len(coefficients) != 4:
        raise ValueError(
            f"interpolate: path.coefficients must return 4 values; got {len(coefficients)}"
        )
    return tuple(
        _checks.scalar(
            "interpolate",
            f"path.coefficients[{i}]",
            torch.as_tensor(c, dtype=compute, device=x1.device),
            x1,
        )
        for i, c in enumerate(coefficients)
    )


def _interpolate_kernel(
    x1, x0, t, t_tensor, path, custom, seed, seed_tensor, offset, offset_tensor
):
    xt, target = torch.empty_like(x1), torch.empty_like(x1)
    kind = tuple(custom) if path == "custom" else path
    keys = (
        (None, None) if x0 is not None else (join(seed, seed_tensor), join(offset, offset_tensor))
    )
    _dispatch.backend("interpolate", x1).interpolate(
        x1, x0, join(t, t_tensor), kind, *keys, xt, target, None
    )
    return xt, target


class _Interpolate(torch.autograd.Function):
    """Called as apply(x1, x0, t, t_tensor, path, *custom, ...): see _step_ops._Linear."""

    @staticmethod
    def forward(x1, x0, t, t_tensor, path, count, *args):
        with _registry.below_autograd():
            return interpolate_op(x1, x0, t, t_tensor, path, list(args[:count]), *args[count:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        x1, x0, t, t_tensor, path, count, *args = inputs
        ctx.t, ctx.path, ctx.rest = t, path, len(args)
        ctx.compute = compute_dtype(x1)
        # An output that nothing used sends None, not zeros: at t = 1 zero times the infinite slope of vp is no number.
        ctx.set_materialize_grads(False)
        ctx.dtypes = (x1.dtype, None if x0 is None else x0.dtype)
        ctx.save_for_backward(t_tensor, *args[:count])

    @staticmethod
    def backward(ctx, grad_xt, grad_target):
        t_tensor, *custom = ctx.saved_tensors
        arrived = [i for i, g in enumerate((grad_xt, grad_target)) if g is not None]
        if not arrived:
            return (None,) * (6 + ctx.rest)
        sent = [(grad_xt, grad_target)[i] for i in arrived]
        if ctx.path != "custom":
            t = placed(join(ctx.t, t_tensor), ctx.compute, sent[0].device)
            custom = reference.path_coefficients(ctx.path, t)
        alpha, sigma, dalpha, dsigma = custom
        pairs = ((alpha, dalpha), (sigma, dsigma))
        grads = [
            combined(sent, [pair[i] for i in arrived], dtype) if need else None
            for need, dtype, pair in zip(ctx.needs_input_grad[:2], ctx.dtypes, pairs, strict=True)
        ]
        return *grads, *(None,) * (4 + ctx.rest)


def _interpolate_autograd(x1, x0, t, t_tensor, path, custom, *rest):
    return _Interpolate.apply(x1, x0, t, t_tensor, path, len(custom), *custom, *rest)


interpolate_op = _registry.register(
    "interpolate",
    "(Tensor x1, Tensor? x0, float t, Tensor? t_tensor, str path, Tensor[] custom, SymInt seed, Tensor? seed_tensor, "
    "SymInt offset, Tensor? offset_tensor) -> (Tensor, Tensor)",
    kernel=_interpolate_kernel,
    fake=lambda x1, *_: (torch.empty_like(x1), torch.empty_like(x1)),
    autograd=_interpolate_autograd,
)
