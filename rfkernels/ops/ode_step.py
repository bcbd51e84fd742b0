"""One launch per ODE step: Euler (guided or not), Taylor, and a linear combination of up to eight tensors.

Every solver of this package is made of single calls of these. The docstrings are the specification: each product and each
sum is rounded separately in the compute type C (float64 when x is float64, else float32), tensors and scalars are converted
to C first, and the result is rounded once to the dtype of x. All backends agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.compiler import is_dynamo_compiling

from rfkernels import _dispatch
from rfkernels.backends.native import fast_step as _fast
from rfkernels.backends.reference import ode_step as reference
from rfkernels.ops import _checks
from rfkernels.ops._scalars import Counter, Noise, Scalar, split, split_counter, wants_grad
from rfkernels.ops._step_ops import euler_op, linear_op

Cast = torch.dtype | torch.Tensor
MAX_TERMS = 8
# Forms of `_fast`: the step by the native kernels where every argument is plainly right, else None and the checks say why.
_LINEAR, _EULER, _GUIDED_EULER, _TAYLOR = range(4)


def euler_step(
    x: torch.Tensor,
    v: torch.Tensor,
    dt: Scalar,
    *,
    v_uncond: torch.Tensor | None = None,
    guidance_scale: Scalar | None = None,
    out: torch.Tensor | None = None,
    cast: Cast | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """One Euler step, x + dt * v, with classifier-free guidance folded in where ``v_uncond`` is given.

    Formula (each operation rounded in C): unguided ``x + (dt * v)``; guided ``w = v_uncond + g * (v - v_uncond)``, then
    ``x + (dt * w)``. In float32 this is bit-equal to a diffusers Euler step. Guidance: Ho and Salimans, "Classifier-free
    diffusion guidance", 2022.

    Args:
        x: state (B, ...), float32, float64, bfloat16 or float16, any strides.
        v: velocity of the same shape; its dtype may differ (a float32 state with bfloat16 velocities).
        dt: step size; a float, a 0-d or a (B,) tensor. Negative steps integrate backwards.
        v_uncond: velocity without the condition, shape of x; needs ``guidance_scale``.
        guidance_scale: g; a float, a 0-d or a (B,) tensor. 1 gives v, 0 gives v_uncond.
        out: receives the new state; shape and dtype of x; may be x itself.
        cast: a dtype, or a tensor to write into, for an extra copy of the new state in that dtype.

    Returns:
        The new state in x's dtype; with ``cast`` the pair (state, copy).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or strides that do not fit; the message says which.
    """
    if not is_dynamo_compiling():
        if v_uncond is not None:
            state = _fast(_GUIDED_EULER, x, (v, v_uncond), (dt, guidance_scale), 1.0, out, cast)
        elif guidance_scale is None:
            state = _fast(_EULER, x, (v,), (dt,), 1.0, out, cast)
        else:
            state = None
        if state is not None:
            return state
    _checks.tensor("euler_step", "x", x)
    _checks.like("euler_step", "v", v, x)
    dt = _checks.scalar("euler_step", "dt", dt, x)
    if (v_uncond is None) != (guidance_scale is None):
        missing, given = (
            ("v_uncond", "guidance_scale") if v_uncond is None else ("guidance_scale", "v_uncond")
        )
        raise ValueError(
            f"euler_step: {missing} must be given together with {given}; got {given} alone"
        )
    if v_uncond is not None:
        _checks.like("euler_step", "v_uncond", v_uncond, x)
        guidance_scale = _checks.scalar("euler_step", "guidance_scale", guidance_scale, x)

    arguments = (x, v, v_uncond, dt, guidance_scale)
    read = (v, v_uncond), (dt, guidance_scale)
    return _run("euler_step", arguments, *read, out, cast, reference.euler, _registered_euler)


def taylor_step(
    x: torch.Tensor,
    derivatives: Sequence[torch.Tensor],
    dt: Scalar,
    *,
    out: torch.Tensor | None = None,
    cast: Cast | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """One Taylor step of order 1 to 3, x + dt v + (dt^2 / 2) dv/dt + (dt^3 / 6) d2v/dt2.

    Formula in C, left to right: ``((x + dt * d0) + c2 * d1) + c3 * d2`` with ``c2 = (dt * dt) * 0.5`` and
    ``c3 = ((dt * dt) * dt) * (1/6)``; the derivatives are total ones, along the trajectory. RF-Solver (Wang et al., "Taming
    rectified flow for inversion and editing", 2024) is order 2 with a finite difference for dv/dt.

    Args:
        x: state (B, ...).
        derivatives: (v,), (v, dv) or (v, dv, d2v), each of the shape of x.
        dt: step size; a float, a 0-d or a (B,) tensor.
        out: receives the new state; may be x itself.
        cast: dtype or tensor for an extra copy of the new state.

    Returns:
        The new state in x's dtype; with ``cast`` the pair (state, copy).

    Raises:
        TypeError, ValueError: as ``euler_step``; also for more than three derivatives or none.
    """
    if type(derivatives) is tuple and not is_dynamo_compiling():
        state = _fast(_TAYLOR, x, derivatives, (dt,), 1.0, out, cast)
        if state is not None:
            return state
    _checks.tensor("taylor_step", "x", x)
    if isinstance(derivatives, torch.Tensor) or not isinstance(derivatives, Sequence):
        raise TypeError(
            f"taylor_step: derivatives must be a tuple of tensors; got {type(derivatives).__name__}"
        )
    derivatives = tuple(derivatives)
    if not 1 <= len(derivatives) <= 3:
        raise ValueError(f"taylor_step: derivatives must be 1 to 3 tensors; got {len(derivatives)}")
    for i, d in enumerate(derivatives):
        _checks.like("taylor_step", f"derivatives[{i}]", d, x)
    dt = _checks.scalar("taylor_step", "dt", dt, x)

    return _run(
        "taylor_step", (x, derivatives, dt), derivatives, (dt,), out, cast, reference.taylor,
        _registered_taylor,
    )  # fmt: skip


def linear_step(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    coefficients: Sequence[Scalar],
    *,
    x_coefficient: Scalar = 1.0,
    noise_scale: Scalar | None = None,
    seed: Counter | None = None,
    offset: Counter = 0,
    out: torch.Tensor | None = None,
    cast: Cast | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """c0 x + c1 t1 + ... + cn tn (+ c_noise z): the general step of multi-stage, multi-step and stochastic solvers.

    Formula in C, left to right: ``(((c0 * x) + c1 * t1) + ...) + c_noise * z``, z the standard normal that
    ``rfkernels.randn`` draws for the element from (seed, offset), never stored. Guidance folds into the coefficients:
    dt (u + g (v - u)) = (dt g) v + dt (1 - g) u.

    Args:
        x: state (B, ...).
        tensors: up to 8 tensors of the shape of x (none is allowed: a scaling of x).
        coefficients: one per tensor; floats, 0-d or (B,) tensors.
        x_coefficient: c0.
        noise_scale: c_noise; needs ``seed``.
        seed: an int in [0, 2^63) or an int64 tensor, 0-d or (B,); per sample, sample b draws what it would draw alone.
        offset: counter offset, as seed.
        out: receives the new state; may be x or one of the tensors.
        cast: dtype or tensor for an extra copy of the new state.

    Returns:
        The new state in x's dtype; with ``cast`` the pair (state, copy).

    Raises:
        TypeError, ValueError: as ``euler_step``.
    """
    name = "linear_step"
    if (
        noise_scale is None
        and seed is None
        and type(tensors) is tuple
        and type(coefficients) is tuple
        and not is_dynamo_compiling()
    ):
        state = _fast(_LINEAR, x, tensors, coefficients, x_coefficient, out, cast)
        if state is not None:
            return state
    _checks.tensor(name, "x", x)
    if isinstance(tensors, torch.Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(
            f"{name}: tensors must be a sequence of tensors; got {type(tensors).__name__}"
        )
    if isinstance(coefficients, torch.Tensor) or not isinstance(coefficients, Sequence):
        raise TypeError(
            f"{name}: coefficients must be a sequence of scalars; got {type(coefficients).__name__}"
        )
    tensors, coefficients = tuple(tensors), tuple(coefficients)
    if len(tensors) > MAX_TERMS or len(tensors) != len(coefficients):
        raise ValueError(
            f"{name}: tensors and coefficients must be equally many, at most {MAX_TERMS}; "
            f"got {len(tensors)} tensors and {len(coefficients)} coefficients"
        )
    for i, t in enumerate(tensors):
        _checks.like(name, f"tensors[{i}]", t, x)
    coefficients = _checks.scalars(name, "coefficients", coefficients, x)
    x_coefficient = _checks.scalar(name, "x_coefficient", x_coefficient, x)
    if (noise_scale is None) != (seed is None):
        raise ValueError(f"{name}: noise_scale and seed must be given together; got one of them")
    noise: Noise | None = None
    if noise_scale is not None:
        noise = (
            _checks.scalar(name, "noise_scale", noise_scale, x),
            _checks.counter(name, "seed", seed, x),
            _checks.counter(name, "offset", offset, x),
        )

    arguments = (x, tensors, x_coefficient, coefficients, noise)
    scalars = (x_coefficient, *coefficients, *(noise or ()))
    return _run(name, arguments, tensors, scalars, out, cast, reference.linear, _registered_linear)


def _registered_euler(x, v, v_uncond, dt, guidance_scale):
    return euler_op(x, v, v_uncond, *split(dt), *split(guidance_scale))


def _registered_taylor(x, derivatives, dt):
    factors = reference.taylor_coefficients(x, dt)[: len(derivatives)]
    return _registered_linear(x, derivatives, 1.0, factors, None)


def _registered_linear(x, tensors, x_coefficient, coefficients, noise):
    """The linear op, its scalars split for the schema."""
    numbers, number_tensors = [], []
    for number, tensor in map(split, coefficients):
        numbers.append(number)
        number_tensors.append(tensor)
    scale, seed, offset = (None, None, None) if noise is None else noise
    return linear_op(
        x, list(tensors), *split(x_coefficient), numbers, number_tensors, *split(scale),
        *split_counter(seed), *split_counter(offset), noise is not None,
    )  # fmt: skip


def _run(name, arguments, tensors, scalars, out, cast, composite, registered):
    """Take one of the three routes of ``_dispatch`` and hand back the state, or (state, copy).

    No closures here or above: their cells would be made in every call, the fast ones too (0.1 us).

    Args:
        arguments: of the function ``name`` of a backend, of ``composite`` and of ``registered``; x first.
        tensors, scalars: what is read of them besides x.
    """
    x = arguments[0]
    if out is not None:
        _checks.output(name, "out", out, x, x.dtype)
    copy = cast if isinstance(cast, torch.Tensor) else None
    if copy is not None:
        _checks.tensor(name, "cast", copy)
        _checks.output(name, "cast", copy, x, copy.dtype)
    elif cast is not None and not (isinstance(cast, torch.dtype) and cast in _checks.FLOATS):
        raise TypeError(
            f"{name}: cast must be a floating point dtype or a tensor; got {_checks.describe(cast)}"
        )

    if _dispatch.transforms_active() or wants_grad(scalars):
        state = composite(*arguments).to(x.dtype)
    elif not _dispatch.direct_allowed(x, *tensors, *scalars, out, copy):
        state = registered(*arguments)
    elif _checks.needs_staging((out, copy), (x, *tensors, *scalars)):
        state = torch.empty_like(x)
        getattr(_dispatch.backend("ode_step", x), name)(*arguments, state, None)
    else:
        state = torch.empty_like(x) if out is None else out
        if cast is not None and copy is None:
            copy = torch.empty_like(x, dtype=cast)
        getattr(_dispatch.backend("ode_step", x), name)(*arguments, state, copy)
        _dispatch.mark_written(out, cast)
        return state if cast is None else (state, copy)
    if out is not None:
        state = out.copy_(state)
    if cast is None:
        return state
    return state, (state.to(cast) if copy is None else copy.copy_(state))
