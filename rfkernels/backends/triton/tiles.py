"""Device functions every kernel shares: where a tile lies, its addresses, and the scalars of its samples."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(program, rows, tiles, R: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr):
    """(row numbers (R, 1) int64, first column) of a program's tile. Rows past the end are cut off by ``columns``."""
    row = (program // tiles).to(tl.int64) * R + tl.arange(0, R)[:, None]
    first = program % tiles
    if WIDE:
        first = first.to(tl.int64)
    return row, first * C


@triton.jit
def columns(row, first, rows, cols, C: tl.constexpr, SHIFT: tl.constexpr):
    """(columns, mask) of the tile that starts at column ``first``.

    SHIFT moves every row left by the position of its first element in its quad of noise, so that quads stay whole.
    """
    col = first + tl.arange(0, C)[None, :]
    if SHIFT:
        col = col - ((row * cols) & 3).to(tl.int32)
        return col, (row < rows) & (col >= 0) & (col < cols)
    return col, (row < rows) & (col < cols)


@triton.jit
def quads(row, first, cols, C: tl.constexpr, NOISE: tl.constexpr):
    """Counters (element index // 4) of the tile's quads of noise, int64 (R, C / 4) or (1, C / 4)."""
    quad = (first // 4).to(tl.int64) + tl.arange(0, C // 4)[None, :]
    if NOISE == 1:  # one element index for the call: the row starts inside it
        quad += (row * cols) >> 2
    return quad


@triton.jit
def addresses(pointer, row, col, sizes, strides, V: tl.constexpr):
    """Addresses (R, C) of the tile's elements in one tensor."""
    at = pointer + row * strides[0]
    rest = col
    for i in tl.static_range(len(sizes) - 1):
        at += rest % sizes[len(sizes) - 1 - i] * strides[len(sizes) - i]
        rest = rest // sizes[len(sizes) - 1 - i]
    at += rest * strides[1]
    if V > 1:  # said only of unit strides: keeps V elements in a thread for every dtype of the call
        at = tl.max_contiguous(at, (1, V))
    return at


@triton.jit
def read(
    pointer,
    row,
    col,
    mask,
    sizes,
    strides,
    COMPUTE: tl.constexpr,
    V: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The tile of one tensor in the compute type; what the mask hides is undefined."""
    at = addresses(pointer, row, col, sizes, strides, V)
    if MASKED:
        return tl.load(at, mask).to(COMPUTE)
    else:
        return tl.load(at).to(COMPUTE)


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """One rounding to a storage type; float64 reaches the 16-bit types through float32, as in torch."""
    if value.dtype == tl.float64 and DTYPE.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(DTYPE)


@triton.jit
def write(pointer, value, row, col, mask, sizes, strides, V: tl.constexpr, MASKED: tl.constexpr):
    """Store a tile in the tensor's type."""
    at = addresses(pointer, row, col, sizes, strides, V)
    value = tl.broadcast_to(rounded(value, pointer.dtype.element_ty), at.shape)
    if MASKED:
        tl.store(at, value, mask)
    else:
        tl.store(at, value)


@triton.jit
def unpack(words):
    """(low, high) 32 bits of a (low, middle, high) tuple of 24, 24 and 16 bits."""
    middle = tl.cast(words[1], tl.uint32)  # the interpreter hands over Python floats
    low = tl.cast(words[0], tl.uint32) | (middle << 24)
    return low, (middle >> 8) | (tl.cast(words[2], tl.uint32) << 16)


@triton.jit
def scalar(argument, row, COMPUTE: tl.constexpr):
    """A scalar argument of ``launch.number`` in the compute type, (R, 1) where it differs between samples."""
    if len(argument) == 1:
        return tl.cast(argument[0], COMPUTE)
    elif len(argument) == 2:
        return tl.load(argument[0] + row * argument[1]).to(COMPUTE)
    else:
        low, high = unpack(argument)
        bits = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
        return bits.to(tl.float64, bitcast=True).to(COMPUTE)


@triton.jit
def counter(argument, row):
    """(low, high) words of a seed or an offset, uint32."""
    if len(argument) == 2:
        value = tl.load(argument[0] + row * argument[1])
        return value.to(tl.uint32), (value >> 32).to(tl.uint32)
    else:
        return unpack(argument)
