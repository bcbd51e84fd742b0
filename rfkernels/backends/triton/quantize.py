"""Attention's quantization in Triton: Q in one launch, K and V in three, with the reference's codes bit for bit.

K and V: partial sums of K and partial maxima of V, then the mean and the channel scales of every head, then the codes. From
bfloat16 that moves 3 bytes an element of Q and 5 of K and of e4m3 V; bfloat16 V is used as it lies. Nothing is counted or
checked on the host: a row or block with a NaN or an infinity gets a NaN scale, which reaches every output that it touches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rfkernels.backends.attention_schemes import KEY_BLOCK, SCHEMES, Scheme, padded_dim
from rfkernels.backends.reference.quantize import KV
from rfkernels.backends.triton import interpreted
from rfkernels.backends.triton.launch import launch
from rfkernels.backends.triton.quantize_tiles import (
    codes,
    encode,
    head_base,
    in_order,
    magnitude,
    rotated,
    scale_and_inverse,
    signed,
)

V_KEYS = 128  # keys of a tile of V codes, and what their count is padded to
V_CHANNELS = 64
V_CHUNK = 256  # keys whose largest magnitudes are one partial result
V_ROWS = 32
TILE = 8192  # elements of a tile of Q: 64 a thread, 4 warps; 128 a thread spill
UNROLLED = 16  # loads of K in flight in front of their additions


@triton.jit
def _places(pointer, strides, head, heads, row, channel):
    """Addresses of a tile of a (B, H, S, D) tensor; ``head`` counts through B and H."""
    return (
        head_base(pointer, strides, head, heads)
        + row.to(tl.int64) * strides[2]
        + channel * strides[3]
    )


@triton.jit
def _rows(pointer, strides, head, heads, row, channel, mask):
    """Float32 tile; what the mask hides is 0."""
    at = _places(pointer, strides, head, heads, row, channel)
    return tl.load(at, mask, other=0.0).to(tl.float32)


@triton.jit
def _open(valid, strides, head, heads, key, mask):
    """Which of the keys are valid."""
    at = head_base(valid, strides, head, heads) + key.to(tl.int64) * strides[2]
    return tl.load(at, mask, other=0) != 0


@triton.jit
def rows_kernel(
    q, q_codes, q_scale, strides, heads, queries, dim, tiles,
    R: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, LARGEST: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """R rows of Q of one head: rotated, one scale a row."""
    D: tl.constexpr = 2 ** (LOW + HIGH)
    head = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * R + tl.arange(0, R)
    channel = tl.arange(0, D)[None, :]
    inside = (row[:, None] < queries) & (channel < dim)
    x = _rows(q, strides, head, heads, row[:, None], channel, inside)
    # Padding is +0 after the signs, too: -0 would reach the codes of an all-zero row.
    x = tl.where(channel < dim, signed(x, channel, (D + 31) // 32), 0.0)
    y = rotated(x, R, LOW, HIGH)
    scale, inverse = scale_and_inverse(tl.max(magnitude(y, HIGH, magnitude), 1), LARGEST)
    code = in_order(codes(y, inverse[:, None], HIGH, LARGEST == 448, NATIVE, codes), R, LOW, HIGH)
    at = head.to(tl.int64) * queries + row
    tl.store(q_codes + at[:, None] * D + channel, code, row[:, None] < queries)
    tl.store(q_scale + at, scale, row < queries)


@triton.jit
def _key_sums(
    k, sums, counts, valid, k_strides, valid_strides, program, heads, keys, dim, blocks, tiles,
    G: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr, VALID: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Sums of G blocks of keys, each in key order from 0."""
    head = program // tiles
    block = program % tiles * G + tl.arange(0, G)
    channel = tl.arange(0, D)[None, :]
    places = _places(k, k_strides, head, heads, (block * KEYS)[:, None], channel)
    total = tl.zeros((G, D), tl.float32)
    count = tl.zeros((G,), tl.int32)
    for first in range(0, KEYS, UNROLL):
        for step in tl.static_range(UNROLL):
            key = block * KEYS + first + step
            mask = key < keys
            if VALID:
                mask = _open(valid, valid_strides, head, heads, key, mask)
                count += mask.to(tl.int32)
            # Adding the 0 of a masked load changes nothing: a sum from +0 is never -0.
            at = places + tl.cast(first + step, tl.int64) * k_strides[2]
            total += tl.load(at, mask[:, None] & (channel < dim), other=0.0).to(tl.float32)
    at = head.to(tl.int64) * blocks + block
    tl.store(sums + at[:, None] * dim + channel, total, (block[:, None] < blocks) & (channel < dim))
    if VALID:
        tl.store(counts + at, count, block < blocks)


@triton.jit
def _channel_maxima(
    v, maxima, valid, v_strides, valid_strides, program, heads, keys, dim, chunks,
    R: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, VALID: tl.constexpr,
):  # fmt: skip
    """Bits of the largest magnitudes of V's channels over a chunk of keys."""
    head = program // chunks
    channel = tl.arange(0, D)[None, :]
    largest = tl.zeros((R, D), tl.int32)
    for first in range(0, CHUNK, R):
        key = program % chunks * CHUNK + first + tl.arange(0, R)
        mask = key < keys
        if VALID:
            mask = _open(valid, valid_strides, head, heads, key, mask)
        x = _rows(v, v_strides, head, heads, key[:, None], channel, mask[:, None] & (channel < dim))
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    channel = tl.arange(0, D)
    at = program.to(tl.int64) * dim + channel
    tl.store(maxima + at, tl.max(largest, 0), channel < dim)


@triton.jit
def sums_kernel(
    k, sums, counts, v, maxima, valid, k_strides, v_strides, valid_strides,
    heads, keys, k_dim, blocks, tiles, k_programs, v_dim, chunks,
    G: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr, UNROLL: tl.constexpr,
    R: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, VALID: tl.constexpr,
):  # fmt: skip
    """Programs below k_programs add keys, the others look for V's largest magnitudes."""
    program = tl.program_id(0)
    if program < k_programs:
        _key_sums(
            k, sums, counts, valid, k_strides, valid_strides, program, heads, keys, k_dim, blocks, tiles,
            G, D, KEYS, VALID, UNROLL,
        )  # fmt: skip
    elif DV:
        _channel_maxima(
            v, maxima, valid, v_strides, valid_strides, program - k_programs, heads, keys, v_dim, chunks,
            R, DV, CHUNK, VALID,
        )  # fmt: skip


@triton.jit
def finish_kernel(
    sums, counts, k_mean, maxima, v_scale, v_inverse, keys, k_dim, blocks, v_dim, chunks,
    D: tl.constexpr, DV: tl.constexpr, VALID: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Mean of K, the blocks added in order in float64, and the channel scales of V, of one head."""
    head = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, D)
    total = tl.zeros((D,), tl.float64)
    count = tl.zeros((UNROLL,), tl.int32)
    for first in range(0, blocks, UNROLL):
        for step in tl.static_range(UNROLL):
            block = first + step + tl.zeros_like(channel)
            at = (head * blocks + block) * k_dim + channel
            mask = (block < blocks) & (channel < k_dim)
            total += tl.load(sums + at, mask, other=0.0).to(tl.float64)
        if VALID:
            block = first + tl.arange(0, UNROLL)
            count += tl.load(counts + head * blocks + block, block < blocks, other=0)
    divisor = keys.to(tl.float64)
    if VALID:
        divisor = tl.sum(count, 0).to(tl.float64)
    mean = tl.where(divisor > 0.0, total / tl.maximum(divisor, 1.0), 0.0).to(tl.float32)
    tl.store(k_mean + head * k_dim + channel, mean, channel < k_dim)
    if DV:
        v_channel = tl.arange(0, DV)
        largest = tl.zeros((DV,), tl.int32)
        for first in range(0, chunks, UNROLL):
            chunk = first + tl.arange(0, UNROLL)[:, None]
            at = (head * chunks + chunk) * v_dim + v_channel[None, :]
            part = tl.load(maxima + at, (chunk < chunks) & (v_channel[None, :] < v_dim), other=0)
            largest = tl.maximum(largest, tl.max(part, 0))
        _, inverse = scale_and_inverse(largest, 448)
        a = largest.to(tl.float32, bitcast=True)
        scale = tl.div_rn(a, tl.full((DV,), 448.0, tl.float32))
        scale = tl.where(largest < 0x7F800000, scale, float("nan"))
        tl.store(v_scale + head * v_dim + v_channel, scale, v_channel < v_dim)
        tl.store(v_inverse + head * v_dim + v_channel, inverse, v_channel < v_dim)


@triton.jit
def _key_codes(
    k, k_codes, k_scale, k_mean, valid, k_strides, valid_strides, program, heads, keys, dim, blocks,
    LOW: tl.constexpr, HIGH: tl.constexpr, KEYS: tl.constexpr, VALID: tl.constexpr,
    LARGEST: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """One block of keys: mean off, rotated, one scale."""
    D: tl.constexpr = 2 ** (LOW + HIGH)
    head = program // blocks
    key = program % blocks * KEYS + tl.arange(0, KEYS)
    channel = tl.arange(0, D)[None, :]
    mask = key < keys
    if VALID:
        mask = _open(valid, valid_strides, head, heads, key, mask)
    mask = mask[:, None]
    x = _rows(k, k_strides, head, heads, key[:, None], channel, mask & (channel < dim))
    mean = tl.load(k_mean + head.to(tl.int64) * dim + channel, channel < dim, other=0.0)
    x = tl.where(mask & (channel < dim), signed(x - mean, channel, (D + 31) // 32), 0.0)
    y = rotated(x, KEYS, LOW, HIGH)
    largest = tl.max(tl.max(magnitude(y, HIGH, magnitude), 1), 0)
    scale, inverse = scale_and_inverse(tl.broadcast_to(largest, (1, 1)), LARGEST)
    code = in_order(codes(y, inverse, HIGH, LARGEST == 448, NATIVE, codes), KEYS, LOW, HIGH)
    at = (head.to(tl.int64) * keys + key)[:, None] * D + channel
    tl.store(k_codes + at, code, key[:, None] < keys)
    tl.store(k_scale + program + tl.zeros((1, 1), tl.int32), scale)


@triton.jit
def _value_codes(
    v, v_codes, v_inverse, valid, v_strides, valid_strides, program, heads, keys, dim, tiles, channels,
    KEYS: tl.constexpr, CHANNELS: tl.constexpr, VALID: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """A tile of V, transposed; keys past the end and invalid ones are zeros."""
    head = program // (tiles * channels)
    rest = program % (tiles * channels)
    key = rest // channels * KEYS + tl.arange(0, KEYS)
    channel = rest % channels * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    mask = key < keys
    if VALID:
        mask = _open(valid, valid_strides, head, heads, key, mask)
    x = _rows(v, v_strides, head, heads, key[:, None], channel, mask[:, None] & (channel < dim))
    inverse = tl.load(v_inverse + head.to(tl.int64) * dim + channel, channel < dim, other=0.0)
    code = tl.trans(encode(x * inverse, True, NATIVE))
    row = head.to(tl.int64) * dim + tl.trans(channel)
    at = row * (tiles * KEYS) + key[None, :]
    tl.store(v_codes + at, code, tl.trans(channel) < dim)


@triton.jit
def codes_kernel(
    k, k_codes, k_scale, k_mean, v, v_codes, v_inverse, valid, k_strides, v_strides, valid_strides,
    heads, keys, k_dim, blocks, k_programs, v_dim, tiles, channels,
    LOW: tl.constexpr, HIGH: tl.constexpr, KEYS: tl.constexpr, LARGEST: tl.constexpr,
    V_KEYS: tl.constexpr, V_CHANNELS: tl.constexpr, VALID: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Programs below k_programs write K's codes, the others V's."""
    program = tl.program_id(0)
    if program < k_programs:
        _key_codes(
            k, k_codes, k_scale, k_mean, valid, k_strides, valid_strides, program, heads, keys, k_dim, blocks,
            LOW, HIGH, KEYS, VALID, LARGEST, NATIVE,
        )  # fmt: skip
    elif V_KEYS:
        _value_codes(
            v, v_codes, v_inverse, valid, v_strides, valid_strides, program - k_programs,
            heads, keys, v_dim, tiles, channels, V_KEYS, V_CHANNELS, VALID, NATIVE,
        )  # fmt: skip


def _bits(dim: int) -> dict[str, int]:
    """How the channel bits of a rotated row are shared between the two groups of butterflies."""
    bits = padded_dim(dim).bit_length() - 1
    return {"LOW": min(3, bits), "HIGH": bits - min(3, bits)}


def _new(like: torch.Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty((*like.shape[:2], *shape), dtype=dtype, device=like.device)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """e4m3 codes as the kernels write them."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def _code_type(scheme: Scheme) -> torch.dtype:
    return torch.float8_e4m3fn if scheme.qk == "e4m3" else torch.int8


def row_codes(q: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(codes, scales) of Q; rows with a NaN or an infinity have a NaN scale. ``bf16``: (bfloat16 q, None)."""
    if not scheme.rotated:
        return q.to(torch.bfloat16), None
    batch, heads, queries, dim = q.shape
    padded = padded_dim(dim)
    q_codes, q_scale = _new(q, queries, padded, dtype=_code_type(scheme)), _new(q, queries)
    rows = min(128, TILE // padded)
    tiles = triton.cdiv(queries, rows)
    if q_scale.numel():
        launch(
            "quantize", rows_kernel, batch * heads * tiles, q.device,
            q, _bytes(q_codes), q_scale, q.stride(), heads, queries, dim, tiles,
            R=rows, **_bits(dim), LARGEST=int(scheme.code_max), NATIVE=not interpreted(),
        )  # fmt: skip
    return q_codes, q_scale


def key_value_codes(
    k: torch.Tensor, v: torch.Tensor, scheme: Scheme, valid: torch.Tensor | None
) -> KV:
    """K and V quantized, ``finite`` None: NaN scales tell. bfloat16 tensors that are used as they are, are not copied."""
    e4m3_v = scheme.pv == "e4m3"
    if not scheme.rotated:
        return KV(k.to(torch.bfloat16), None, None, v.to(torch.bfloat16), None, None, None)
    batch, heads, keys, dim = k.shape
    v_dim, padded = v.shape[-1], padded_dim(dim)
    blocks, chunks = triton.cdiv(keys, KEY_BLOCK), triton.cdiv(keys, V_CHUNK)
    tiles, channels = triton.cdiv(keys, V_KEYS), triton.cdiv(v_dim, V_CHANNELS)
    k_codes = _new(k, keys, padded, dtype=_code_type(scheme))
    k_scale, k_mean = _new(k, blocks), _new(k, dim)
    sums, counts = _new(k, blocks, dim), None
    v_codes, v_scale, v_inverse, maxima = v, None, None, None
    if e4m3_v:
        v_codes = _new(v, v_dim, tiles * V_KEYS, dtype=torch.float8_e4m3fn)
        v_scale, v_inverse = _new(v, v_dim), _new(v, v_dim)
        maxima = _new(v, chunks, v_dim, dtype=torch.int32)
    else:
        v_codes = v.to(torch.bfloat16)
    result = KV(k_codes, k_scale, k_mean, v_codes, None, v_scale, None)
    pairs = batch * heads
    if not pairs:
        return result
    strides = (0, 0, 0)
    if valid is not None:
        counts = _new(k, blocks, dtype=torch.int32)
        valid = valid.expand(k.shape[:3]).view(torch.uint8)
        strides = valid.stride()
    wide = 16 if dim <= 64 else 1024 // padded
    key_tiles = triton.cdiv(blocks, wide)
    v_padded = triton.next_power_of_2(v_dim) if e4m3_v else 0
    launch(
        "quantize", sums_kernel, pairs * (key_tiles + (chunks if e4m3_v else 0)), k.device,
        k, sums, counts, v, maxima, valid, k.stride(), v.stride(), strides,
        heads, keys, dim, blocks, key_tiles, pairs * key_tiles, v_dim, chunks,
        G=wide, D=padded, KEYS=KEY_BLOCK, UNROLL=UNROLLED, R=V_ROWS, DV=v_padded, CHUNK=V_CHUNK,
        VALID=valid is not None,
    )  # fmt: skip
    launch(
        "quantize", finish_kernel, pairs, k.device,
        sums, counts, k_mean, maxima, v_scale, v_inverse, keys, dim, blocks, v_dim, chunks,
        D=padded, DV=v_padded, VALID=valid is not None, UNROLL=32,
    )  # fmt: skip
    launch(
        "quantize", codes_kernel, pairs * (blocks + (tiles * channels if e4m3_v else 0)), k.device,
        k, _bytes(k_codes), k_scale, k_mean, v, _bytes(v_codes) if e4m3_v else None, v_inverse, valid,
        k.stride(), v.stride(), strides, heads, keys, dim, blocks, pairs * blocks, v_dim, tiles, channels,
        **_bits(dim), KEYS=KEY_BLOCK, LARGEST=int(scheme.code_max), V_KEYS=V_KEYS if e4m3_v else 0,
        V_CHANNELS=V_CHANNELS, VALID=valid is not None, NATIVE=not interpreted(),
        num_warps=8 if padded > 128 else 4,
    )  # fmt: skip
    return result


def quantize_q(
    q: torch.Tensor, scheme: str
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """See ``rfkernels.backends.reference.quantize.quantize_q``."""
    q_codes, q_scale = row_codes(q, SCHEMES[scheme])
    checked = q_codes if q_scale is None else q_scale.unsqueeze(-1)
    return q_codes, q_scale, checked.isfinite().all(-1).all(-1)


def quantize_kv(k: torch.Tensor, v: torch.Tensor, scheme: str, valid: torch.Tensor | None) -> KV:
    """See ``rfkernels.backends.reference.quantize.quantize_kv``."""
    kv = key_value_codes(k, v, SCHEMES[scheme], valid)
    # What is kept must not change with the caller's tensors.
    k_codes = kv.k_codes.clone() if kv.k_codes is k else kv.k_codes
    v_codes = kv.v_codes.clone() if kv.v_codes is v else kv.v_codes
    values = v_codes.flatten(2) if kv.v_scale is None else kv.v_scale
    keys = k_codes.flatten(2) if kv.k_scale is None else kv.k_scale
    finite = values.isfinite().all(-1) & keys.isfinite().all(-1)
    return kv._replace(k_codes=k_codes, v_codes=v_codes, finite=finite)
