"""Philox4x32-10 words, uniforms and Box-Muller normals as device functions, bit for bit the reference's.

A quad of four elements shares one counter and is computed once. Every product and sum of the polynomials is rounded to
float32 (the launcher turns contraction off); they and the layout of the words are described in
``rfkernels.backends.reference.random``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rfkernels.backends.triton.tiles import counter


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds; uint32 in and out."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _words(key, quad, row):
    """The four words of every counter of a tile; key = (seed, offset) arguments."""
    k0, k1 = counter(key[0], row)
    c2, c3 = counter(key[1], row)
    return philox4x32(quad.to(tl.uint32), (quad >> 32).to(tl.uint32), c2, c3, k0, k1)


@triton.jit
def _radius(word):
    """sqrt(-2 ln u1), u1 = ((word >> 8) + 1) 2^-24 = 2^e (1 + f), 1 + f in [1/sqrt 2, sqrt 2)."""
    scaled = ((word >> 8) + 1).to(tl.int32).to(tl.float32)
    shifted = scaled.to(tl.uint32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    e = ((shifted >> 23).to(tl.int32) - (127 + 24)).to(tl.float32)
    f = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    ff = f * f
    p = f * -0.0763449967 + 0.127615824
    p = p * f + -0.13160184
    p = p * f + 0.142017573
    p = p * f + -0.166233569
    p = p * f + 0.200012267
    p = p * f + -0.250008196
    p = p * f + 0.333333313
    log_u = p * (ff * f) + e * -2.12194440e-4
    log_u = log_u - 0.5 * ff
    log_u = log_u + f
    log_u = log_u + e * 0.693359375
    return tl.sqrt_rn(-2.0 * log_u)


@triton.jit
def _turn(word):
    """(cos, sin) of 2 pi u2, u2 = (word >> 8) 2^-24; the quarter turn is taken off in integers."""
    k = (word >> 8).to(tl.int32)
    quarter = (k + 0x200000) >> 22
    a = (k - (quarter << 22)).to(tl.float32) * 3.74507039e-07
    aa = a * a
    s = aa * -1.95152815e-4 + 8.33216030e-3
    s = s * aa + -1.66666552e-1
    s = (s * aa) * a + a
    c = aa * 2.44331568e-5 + -1.38873165e-3
    c = c * aa + 4.16666456e-2
    c = (c * aa) * aa + (1.0 - 0.5 * aa)
    swap = (quarter & 1) != 0
    cosine = tl.where(swap, s, c).to(tl.int32, bitcast=True) ^ (((quarter + 1) & 2) << 30)
    sine = tl.where(swap, c, s).to(tl.int32, bitcast=True) ^ ((quarter & 2) << 30)
    return cosine.to(tl.float32, bitcast=True), sine.to(tl.float32, bitcast=True)


@triton.jit
def _lanes(a, b, c, d, R: tl.constexpr, C: tl.constexpr):
    """Four (rows, C / 4) lanes side by side: (R, C) with a quad in every four columns."""
    quad = tl.join(tl.join(a, c), tl.join(b, d))  # [..., i, j] holds lane 2 i + j
    return tl.broadcast_to(tl.reshape(quad, (a.shape[0], C)), (R, C))


@triton.jit
def normals(key, quad, row, R: tl.constexpr, C: tl.constexpr):
    """Standard normals (R, C), float32."""
    w0, w1, w2, w3 = _words(key, quad, row)
    r0 = _radius(w0)
    r2 = _radius(w2)
    c1, s1 = _turn(w1)
    c3, s3 = _turn(w3)
    return _lanes(r0 * c1, r0 * s1, r2 * c3, r2 * s3, R, C)


@triton.jit
def uniforms(key, quad, row, R: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr):
    """Uniforms in [0, 1) (R, C), float32, of the leading BITS bits."""
    w0, w1, w2, w3 = _words(key, quad, row)
    word = _lanes(w0, w1, w2, w3, R, C)
    return (word >> (32 - BITS)).to(tl.int32).to(tl.float32) * (1.0 / (1 << BITS))
