"""Device functions of attention's quantization: signs, the Hadamard transform in registers, largest magnitudes, codes.

The transform of a row goes through two groups of butterflies. The low bits of the channel number are split off into
tensors of their own (``tl.split``), so that their butterflies are additions inside a thread; then the tile is turned once
and the high bits take their place. Compiled for sm_90 that is 21 to 25 machine instructions an element with everything
else, against 38 to 43 when every stage reshapes the tile. The additions come in the reference's order: spans 1, 2, 4, ...

A function that goes on along the next dimension is handed itself as AGAIN: Triton 3.4 does not end when it follows the names
of a function that calls itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rfkernels.backends import attention_schemes as schemes

_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, ties to even
_TINY = tl.constexpr(schemes.TINY)
_INFINITY = tl.constexpr(0x7F800000)
_SIGNS = tl.constexpr(  # as signed integers: a literal above 2^31 would be 64 bits wide
    tuple(word - (1 << 32) if word >> 31 else word for word in schemes.SIGN_WORDS)
)


@triton.jit
def head_base(pointer, strides, head, heads):
    """Address of the first element of one head of a (B, H, ...) tensor; ``head`` counts through B and H."""
    batch = head // heads
    return (
        pointer + batch.to(tl.int64) * strides[0] + (head - batch * heads).to(tl.int64) * strides[1]
    )


@triton.jit
def signed(x, channel, WORDS: tl.constexpr):
    """x with the fixed signs of its channels; ``channel`` broadcasts against x, WORDS = padded channels / 32."""
    word = tl.zeros_like(channel) + _SIGNS[0]
    for i in tl.static_range(1, WORDS):
        word = tl.where(channel >> 5 == i, _SIGNS[i], word)
    return tl.where((word >> (channel & 31)) & 1 != 0, -x, x)


@triton.jit
def unfold(x, R: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """x as (R, M, 2, ..., 2) with N twos."""
    tl.static_assert(N <= 5)
    if N == 0:
        return tl.reshape(x, (R, M))
    elif N == 1:
        return tl.reshape(x, (R, M, 2))
    elif N == 2:
        return tl.reshape(x, (R, M, 2, 2))
    elif N == 3:
        return tl.reshape(x, (R, M, 2, 2, 2))
    elif N == 4:
        return tl.reshape(x, (R, M, 2, 2, 2, 2))
    else:
        return tl.reshape(x, (R, M, 2, 2, 2, 2, 2))


@triton.jit
def walsh(y, N: tl.constexpr, AGAIN: tl.constexpr):
    """Hadamard transform over the N trailing dimensions of length 2, the last one first. AGAIN: this function."""
    if N == 0:
        return y
    else:
        even, odd = tl.split(y)
        return tl.join(AGAIN(even + odd, N - 1, AGAIN), AGAIN(even - odd, N - 1, AGAIN))


@triton.jit
def rotated(x, R: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Hadamard transform of the rows (R, 2^(LOW + HIGH)) of x, as (R, 2^LOW, 2, ..., 2): the low channel bits come first."""
    y = walsh(unfold(x, R, 2**HIGH, LOW), LOW, walsh)
    y = tl.permute(tl.reshape(y, (R, 2**HIGH, 2**LOW)), (0, 2, 1))
    return walsh(unfold(y, R, 2**LOW, HIGH), HIGH, walsh)


@triton.jit
def magnitude(y, N: tl.constexpr, AGAIN: tl.constexpr):
    """Bits of the largest magnitude over the N trailing dimensions. As integers NaN > infinity > every number."""
    if N == 0:
        return y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        even, odd = tl.split(y)
        return tl.maximum(AGAIN(even, N - 1, AGAIN), AGAIN(odd, N - 1, AGAIN))


@triton.jit
def scale_and_inverse(bits, LARGEST: tl.constexpr):
    """(a / LARGEST, LARGEST / a) of the magnitudes a: zeros below 2^-100; NaN and 0 where a is not finite."""
    a = bits.to(tl.float32, bitcast=True)
    usable = (a >= _TINY) & (bits < _INFINITY)
    safe = tl.where(usable, a, 1.0)
    largest = tl.full(safe.shape, LARGEST, tl.float32)
    zero = tl.where(bits < _INFINITY, 0.0, float("nan"))
    return tl.where(usable, tl.div_rn(safe, largest), zero), tl.where(
        usable, tl.div_rn(largest, safe), 0.0
    )


@triton.jit
def e4m3(x, NATIVE: tl.constexpr):
    """Bits of x, |x| <= 448, as e4m3, rounded to nearest, ties to even. NATIVE: by the hardware (8.9 and later)."""
    if NATIVE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        small = (tl.abs(x) * 512.0 + _MAGIC).to(tl.int32, bitcast=True) & 0xFF
        code = tl.where(tl.abs(x) < 0.015625, small, tl.minimum(normal, 0x7E))
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def encode(value, E4M3: tl.constexpr, NATIVE: tl.constexpr):
    """Scaled values as codes: uint8 bits of e4m3, or int8."""
    if E4M3:
        return e4m3(tl.where(value == value, value, 0.0), NATIVE)
    else:
        return (value + _MAGIC).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def codes(
    y, inverse, N: tl.constexpr, E4M3: tl.constexpr, NATIVE: tl.constexpr, AGAIN: tl.constexpr
):
    """Codes of y * inverse, taken apart along the N trailing dimensions as ``walsh`` left them in the threads."""
    if N == 0:
        return encode(y * inverse, E4M3, NATIVE)
    else:
        even, odd = tl.split(y)
        return tl.join(
            AGAIN(even, inverse, N - 1, E4M3, NATIVE, AGAIN),
            AGAIN(odd, inverse, N - 1, E4M3, NATIVE, AGAIN),
        )


@triton.jit
def in_order(y, R: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """(R, channels) of what ``rotated`` and ``codes`` left with the low channel bits first."""
    y = tl.permute(tl.reshape(y, (R, 2**LOW, 2**HIGH)), (0, 2, 1))
    return tl.reshape(y, (R, 2 ** (LOW + HIGH)))
