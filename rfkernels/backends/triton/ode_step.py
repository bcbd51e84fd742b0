"""Euler, Taylor and linear-combination steps in Triton: one launch, each input read once, each output written once.

All three are one kernel whose formula is chosen at compile time. ``out`` may be one of the inputs: an element is read and
written by the same thread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rfkernels.backends.reference.precision import compute_dtype
from rfkernels.backends.triton.geometry import GLOBAL, NONE, PER_SAMPLE, plan
from rfkernels.backends.triton.launch import any_varies, counter, launch, number
from rfkernels.backends.triton.philox import normals
from rfkernels.backends.triton.tiles import columns, locate, quads, read, rounded, scalar, write

EULER, GUIDED, TAYLOR, LINEAR = 0, 1, 2, 3


@triton.jit
def _step(
    inputs, outputs, scalars, key, row, first, rows, cols, sizes, strides,
    FORM: tl.constexpr, NOISE: tl.constexpr, COMPUTE: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, V: tl.constexpr, SHIFT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    col, mask = columns(row, first, rows, cols, C, SHIFT)
    sample = tl.minimum(row, rows - 1)  # a scalar of a row past the end is read from the last one
    x = read(inputs[0], row, col, mask, sizes, strides[0], COMPUTE, V, MASKED)
    if FORM == 0:  # x + dt * v
        v = read(inputs[1], row, col, mask, sizes, strides[1 % len(strides)], COMPUTE, V, MASKED)
        total = x + scalar(scalars[0], sample, COMPUTE) * v
    elif FORM == 1:  # w = u + g * (v - u), x + dt * w
        v = read(inputs[1], row, col, mask, sizes, strides[1 % len(strides)], COMPUTE, V, MASKED)
        u = read(inputs[2], row, col, mask, sizes, strides[2 % len(strides)], COMPUTE, V, MASKED)
        w = u + scalar(scalars[1], sample, COMPUTE) * (v - u)
        total = x + scalar(scalars[0], sample, COMPUTE) * w
    elif FORM == 2:  # ((x + dt * d0) + c2 * d1) + c3 * d2
        dt = scalar(scalars[0], sample, COMPUTE)
        factor = dt
        total = x
        for i in tl.static_range(1, len(inputs)):
            d = read(
                inputs[i], row, col, mask, sizes, strides[i % len(strides)], COMPUTE, V, MASKED
            )
            if i == 2:
                factor = (dt * dt) * 0.5
            if i == 3:
                factor = ((dt * dt) * dt) * (1.0 / 6.0)
            total = total + factor * d
    else:  # ((c0 * x + c1 * t1) + ... + cn * tn) + cnoise * z
        total = scalar(scalars[0], sample, COMPUTE) * x
        for i in tl.static_range(1, len(inputs)):
            t = read(
                inputs[i], row, col, mask, sizes, strides[i % len(strides)], COMPUTE, V, MASKED
            )
            total = total + scalar(scalars[i], sample, COMPUTE) * t
        if NOISE:
            z = normals(key, quads(row, first, cols, C, NOISE), sample, R, C).to(COMPUTE)
            total = total + scalar(scalars[len(inputs)], sample, COMPUTE) * z
    # The second output is a copy of the state as it was stored.
    state = rounded(total, outputs[0].dtype.element_ty)
    for i in tl.static_range(len(outputs)):
        write(
            outputs[i],
            state,
            row,
            col,
            mask,
            sizes,
            strides[(len(inputs) + i) % len(strides)],
            V,
            MASKED,
        )


@triton.jit
def step_kernel(
    inputs, outputs, scalars, key, rows, cols, tiles, sizes, strides,
    FORM: tl.constexpr, NOISE: tl.constexpr, COMPUTE: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, V: tl.constexpr, WIDE: tl.constexpr, SHIFT: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One tile of a step; FORM picks the formula."""
    row, first = locate(tl.program_id(0), rows, tiles, R, C, WIDE)
    if RAGGED:
        if first + C <= cols:
            _step(
                inputs, outputs, scalars, key, row, first, rows, cols, sizes, strides,
                FORM, NOISE, COMPUTE, R, C, V, SHIFT, False,
            )  # fmt: skip
        else:
            _step(
                inputs, outputs, scalars, key, row, first, rows, cols, sizes, strides,
                FORM, NOISE, COMPUTE, R, C, V, SHIFT, True,
            )  # fmt: skip
    else:
        _step(
            inputs, outputs, scalars, key, row, first, rows, cols, sizes, strides,
            FORM, NOISE, COMPUTE, R, C, V, SHIFT, True,
        )  # fmt: skip


def _run(form: int, x, tensors, scalars, noise, out, cast) -> None:
    if x.numel() == 0:
        return
    compute = compute_dtype(x)
    inputs, outputs = (x, *tensors), (out,) if cast is None else (out, cast)
    drawn, key = NONE, None
    if noise is not None:
        scale, seed, offset = noise
        scalars = (*scalars, scale)
        key = (counter(seed), counter(offset))
        drawn = PER_SAMPLE if any_varies((seed, offset)) else GLOBAL
    by_sample = drawn == PER_SAMPLE or any_varies(scalars)
    table = plan((*inputs, *outputs), len(inputs), by_sample=by_sample, noise=drawn)
    launch(
        "ode_step", step_kernel, table.programs, x.device,
        inputs, outputs, tuple(number(s, compute) for s in scalars), key, *table.arguments,
        FORM=form, NOISE=drawn, COMPUTE=tl.float64 if compute is torch.float64 else tl.float32, **table.constants,
    )  # fmt: skip


def euler_step(x, v, v_uncond, dt, guidance_scale, out, cast) -> None:
    """See ``rfkernels.ops.ode_step.euler_step``; writes ``out`` and, where given, ``cast``."""
    if v_uncond is None:
        _run(EULER, x, (v,), (dt,), None, out, cast)
    else:
        _run(GUIDED, x, (v, v_uncond), (dt, guidance_scale), None, out, cast)


def taylor_step(x, derivatives, dt, out, cast) -> None:
    """See ``rfkernels.ops.ode_step.taylor_step``."""
    _run(TAYLOR, x, derivatives, (dt,), None, out, cast)


def linear_step(x, tensors, x_coefficient, coefficients, noise, out, cast) -> None:
    """See ``rfkernels.ops.ode_step.linear_step``."""
    _run(LINEAR, x, tensors, (x_coefficient, *coefficients), noise, out, cast)
