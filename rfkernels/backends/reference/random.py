"""Philox4x32-10 uniforms and Box-Muller normals in torch integer and float32 arithmetic.

Key = (low, high word of seed), counter = (low, high word of index // 4, low, high word of offset), lane = index % 4
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The logarithm, sine and cosine are fixed
polynomials, each product and sum rounded to float32, so that every backend draws the same bits.
"""

from __future__ import annotations

import math

import torch

from rfkernels.backends.reference.precision import placed

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF

LOG_TAIL = (
    -0.0763449967, 0.127615824, -0.13160184, 0.142017573, -0.166233569, 0.200012267, -0.250008196, 0.333333313,
)  # fmt: skip
SIN_TAIL = (-1.95152815e-4, 8.33216030e-3, -1.66666552e-1)
COS_TAIL = (2.44331568e-5, -1.38873165e-3, 4.16666456e-2)
TURN = 3.74507039e-07  # 2 pi 2^-24 in float32


def _multiply(constant: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of constant * word; int64 holds no 64-bit unsigned product, so in halves of 16 bits."""
    high_half, low_half = constant * (word >> 16), constant * (word & 0xFFFF)
    middle = high_half + (low_half >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low_half & 0xFFFF)


def philox4x32(
    counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Ten rounds; counter is four and key two int64 tensors holding 32-bit words. Returns the four output words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(M0, c0)
        high1, low1 = _multiply(M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return c0, c1, c2, c3


def _polynomial(coefficients: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _radius(word: torch.Tensor) -> torch.Tensor:
    """sqrt(-2 ln u1), u1 = ((word >> 8) + 1) 2^-24 = 2^e (1 + f) with 1 + f in [1/sqrt 2, sqrt 2)."""
    mantissa, exponent = torch.frexp(((word >> 8) + 1).double())  # mantissa in [0.5, 1)
    low = mantissa.float() < 0.70710677  # the bit pattern 0x3f3504f3
    f = torch.where(low, mantissa * 2, mantissa).float() - 1.0
    e = (exponent - low.to(exponent.dtype) - 24).float()
    ff = f * f
    log_u = _polynomial(LOG_TAIL, f) * (ff * f) + e * -2.12194440e-4
    log_u = log_u - 0.5 * ff
    log_u = log_u + f
    log_u = log_u + e * 0.693359375
    # torch's float32 sqrt is one ulp off in 0.6 % of values on the CPU; a rounded float64 root is the exact one.
    return (-2.0 * log_u).double().sqrt().float()


def _turn(word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) of 2 pi u2, u2 = (word >> 8) 2^-24; the quarter turn is taken off in integers."""
    k = word >> 8
    quarter = (k + 0x200000) >> 22
    a = (k - (quarter << 22)).float() * TURN
    aa = a * a
    sine = (_polynomial(SIN_TAIL, aa) * aa) * a + a
    cosine = (_polynomial(COS_TAIL, aa) * aa) * aa + (1.0 - 0.5 * aa)
    swap = (quarter & 1) == 1
    cosine, sine = torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)
    cosine = torch.where(((quarter + 1) & 2) == 2, -cosine, cosine)
    return cosine, torch.where((quarter & 2) == 2, -sine, sine)


def _counters(
    shape: torch.Size, seed: int | torch.Tensor, offset: int | torch.Tensor, device: torch.device
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor, int]:
    """Words of every counter the shape needs: (words, seeds per row, ..., elements per row). One row unless per sample."""
    per_sample = any(isinstance(v, torch.Tensor) and v.ndim == 1 for v in (seed, offset))
    rows = shape[0] if per_sample else 1
    elements = math.prod(shape[1:]) if per_sample else math.prod(shape)

    def column(value: int | torch.Tensor) -> torch.Tensor:
        return placed(value, torch.int64, device).reshape(-1, 1).expand(rows, 1)

    index = torch.arange((elements + 3) // 4, dtype=torch.int64, device=device).expand(rows, -1)
    seed, offset = column(seed), column(offset)
    counter = (
        index & MASK,
        index >> 32,
        (offset & MASK).expand_as(index),
        ((offset >> 32) & MASK).expand_as(index),
    )
    key = ((seed & MASK).expand_as(index), ((seed >> 32) & MASK).expand_as(index))
    return philox4x32(counter, key), elements


def normal(shape, seed, offset, device) -> torch.Tensor:
    """Float32 standard normals of the given shape."""
    (w0, w1, w2, w3), elements = _counters(shape, seed, offset, device)
    r0, r2 = _radius(w0), _radius(w2)
    (c1, s1), (c3, s3) = _turn(w1), _turn(w3)
    lanes = torch.stack((r0 * c1, r0 * s1, r2 * c3, r2 * s3), dim=-1)
    return lanes.flatten(1)[:, :elements].reshape(shape)


def uniform(shape, seed, offset, device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Uniforms in [0, 1): as many leading bits of the word as the dtype holds exactly (24, bfloat16 8, float16 11)."""
    words, elements = _counters(shape, seed, offset, device)
    bits = {torch.bfloat16: 8, torch.float16: 11}.get(dtype, 24)
    lanes = torch.stack(words, dim=-1) >> (32 - bits)
    values = lanes.to(torch.float32) * 2.0**-bits
    return values.flatten(1)[:, :elements].reshape(shape).to(dtype)


def random(out: torch.Tensor, seed, offset, distribution: str) -> None:
    """Fill ``out``; see ``rfkernels.ops.random``."""
    if distribution == "normal":
        out.copy_(normal(out.shape, seed, offset, out.device))
    else:
        out.copy_(uniform(out.shape, seed, offset, out.device, out.dtype))
