"""x_t and its target in Triton: one launch, x0 read or drawn in registers, never stored unless asked for."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rfkernels.backends.reference.interpolate import path_coefficients
from rfkernels.backends.reference.precision import compute_dtype
from rfkernels.backends.triton.geometry import GLOBAL, NONE, PER_SAMPLE, plan
from rfkernels.backends.triton.launch import any_varies, counter, launch, number
from rfkernels.backends.triton.philox import normals
from rfkernels.backends.triton.tiles import columns, locate, quads, read, scalar, write

PATHS = {"linear": 0, "trigonometric": 1, "vp": 2, "sub-vp": 3}
CUSTOM = 4


@triton.jit
def _sine_cosine(t):
    """(sin, cos) of pi t / 2 in float64: whole quarter turns are taken off exactly, Taylor series on [-pi/4, pi/4].

    The terms left out are below 1e-18. tl.sin and tl.cos would bring a slow path through local memory.
    """
    whole = tl.floor(t + 0.5)
    a = (t - whole) * 1.5707963267948966
    aa = a * a
    s = aa * (1.0 / 355687428096000.0) + (-1.0 / 1307674368000.0)
    s = s * aa + 1.0 / 6227020800.0
    s = s * aa + -1.0 / 39916800.0
    s = s * aa + 1.0 / 362880.0
    s = s * aa + -1.0 / 5040.0
    s = s * aa + 1.0 / 120.0
    s = s * aa + -1.0 / 6.0
    s = (s * aa) * a + a
    c = aa * (-1.0 / 6402373705728000.0) + 1.0 / 20922789888000.0
    c = c * aa + -1.0 / 87178291200.0
    c = c * aa + 1.0 / 479001600.0
    c = c * aa + -1.0 / 3628800.0
    c = c * aa + 1.0 / 40320.0
    c = c * aa + -1.0 / 720.0
    c = c * aa + 1.0 / 24.0
    c = (c * aa) * aa + (1.0 - 0.5 * aa)
    quarter = whole.to(tl.int64)
    odd = (quarter & 1) != 0
    sine = tl.where(odd, c, s)
    cosine = tl.where(odd, s, c)
    sine = tl.where((quarter & 2) != 0, -sine, sine)
    cosine = tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)
    return sine, cosine


@triton.jit
def _coefficients(scalars, sample, PATH: tl.constexpr, COMPUTE: tl.constexpr):
    """(alpha, sigma, dalpha, dsigma) in the compute type; see ``path_coefficients`` of the reference."""
    if PATH == 4:
        alpha = scalar(scalars[0], sample, COMPUTE)
        sigma = scalar(scalars[1], sample, COMPUTE)
        dalpha = scalar(scalars[2], sample, COMPUTE)
        dsigma = scalar(scalars[3], sample, COMPUTE)
    else:
        t = scalar(scalars[0], sample, COMPUTE).to(tl.float64)
        if PATH == 0:
            alpha = t
            sigma = 1.0 - t
            dalpha = tl.full((1, 1), 1.0, tl.float64)
            dsigma = tl.full((1, 1), -1.0, tl.float64)
        elif PATH == 1:
            alpha, sigma = _sine_cosine(t)
            dalpha = 1.5707963267948966 * sigma
            dsigma = -1.5707963267948966 * alpha
        else:
            r = 1.0 - t
            alpha = tl.exp((-0.25 * 19.9) * r * r - (0.5 * 0.1) * r)
            dalpha = alpha * ((0.5 * 19.9) * r + 0.5 * 0.1)
            variance = 1.0 - alpha * alpha
            if PATH == 2:
                sigma = tl.sqrt(variance)
                dsigma = -alpha * dalpha / sigma
            else:
                sigma = variance
                dsigma = -2.0 * alpha * dalpha
        alpha = alpha.to(COMPUTE)
        sigma = sigma.to(COMPUTE)
        dalpha = dalpha.to(COMPUTE)
        dsigma = dsigma.to(COMPUTE)
    return alpha, sigma, dalpha, dsigma


@triton.jit
def _interpolate(
    inputs, outputs, scalars, key, row, first, rows, cols, sizes, strides,
    PATH: tl.constexpr, NOISE: tl.constexpr, COMPUTE: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, V: tl.constexpr, SHIFT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    col, mask = columns(row, first, rows, cols, C, SHIFT)
    sample = tl.minimum(row, rows - 1)
    x1 = read(inputs[0], row, col, mask, sizes, strides[0], COMPUTE, V, MASKED)
    if NOISE:
        x0 = normals(key, quads(row, first, cols, C, NOISE), sample, R, C).to(COMPUTE)
    else:
        x0 = read(inputs[1], row, col, mask, sizes, strides[1 % len(strides)], COMPUTE, V, MASKED)
    alpha, sigma, dalpha, dsigma = _coefficients(scalars, sample, PATH, COMPUTE)
    xt = sigma * x0 + alpha * x1
    target = dsigma * x0 + dalpha * x1
    write(outputs[0], xt, row, col, mask, sizes, strides[len(inputs) % len(strides)], V, MASKED)
    write(
        outputs[1],
        target,
        row,
        col,
        mask,
        sizes,
        strides[(len(inputs) + 1) % len(strides)],
        V,
        MASKED,
    )
    if len(outputs) == 3:
        write(
            outputs[2],
            x0,
            row,
            col,
            mask,
            sizes,
            strides[(len(inputs) + 2) % len(strides)],
            V,
            MASKED,
        )


@triton.jit
def interpolate_kernel(
    inputs, outputs, scalars, key, rows, cols, tiles, sizes, strides,
    PATH: tl.constexpr, NOISE: tl.constexpr, COMPUTE: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, V: tl.constexpr, WIDE: tl.constexpr, SHIFT: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One tile of x_t, target and, with three outputs, x0."""
    row, first = locate(tl.program_id(0), rows, tiles, R, C, WIDE)
    if RAGGED:
        if first + C <= cols:
            _interpolate(
                inputs, outputs, scalars, key, row, first, rows, cols, sizes, strides,
                PATH, NOISE, COMPUTE, R, C, V, SHIFT, False,
            )  # fmt: skip
        else:
            _interpolate(
                inputs, outputs, scalars, key, row, first, rows, cols, sizes, strides,
                PATH, NOISE, COMPUTE, R, C, V, SHIFT, True,
            )  # fmt: skip
    else:
        _interpolate(
            inputs, outputs, scalars, key, row, first, rows, cols, sizes, strides,
            PATH, NOISE, COMPUTE, R, C, V, SHIFT, True,
        )  # fmt: skip


def interpolate(x1, x0, t, path, seed, offset, xt, target, x0_out) -> None:
    """See ``rfkernels.ops.interpolate.interpolate``; writes ``xt``, ``target`` and, where given, ``x0_out``."""
    if x1.numel() == 0:
        return
    compute = compute_dtype(x1)
    if isinstance(path, str) and path != "linear" and not isinstance(t, torch.Tensor):
        time = torch.tensor(t, dtype=compute, device="cpu")
        path = tuple(c.item() for c in path_coefficients(path, time))
    scalars, form = ((t,), PATHS[path]) if isinstance(path, str) else (path, CUSTOM)
    drawn, key = NONE, None
    if x0 is None:
        key = (counter(seed), counter(offset))
        drawn = PER_SAMPLE if any_varies((seed, offset)) else GLOBAL
    inputs = (x1,) if x0 is None else (x1, x0)
    outputs = (xt, target) if x0_out is None else (xt, target, x0_out)
    by_sample = drawn == PER_SAMPLE or any_varies(scalars)
    table = plan((*inputs, *outputs), len(inputs), by_sample=by_sample, noise=drawn)
    launch(
        "interpolate", interpolate_kernel, table.programs, x1.device,
        inputs, outputs, tuple(number(s, compute) for s in scalars), key, *table.arguments,
        PATH=form, NOISE=drawn, COMPUTE=tl.float64 if compute is torch.float64 else tl.float32, **table.constants,
    )  # fmt: skip
