"""Device functions of quantized attention: one tile of queries against all its keys, and the exact path of spoiled tiles.

The softmax runs in log2 units over blocks of keys against a floating reference: the block's own maximum, at most FLOOR below
the running one, so that P uses its whole range in every block. What two-level accumulation needs anyway, a rescaling of the
accumulator per block, is all that it costs. Scores of codes are multiplied by (row scale) * (scale of 64 keys) after the
maximum is taken, in the fma that subtracts the reference. Products and sums that are to be one instruction are written as
``tl.fma``: the launcher turns the compiler's own contraction off.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from rfkernels.backends import attention_schemes as schemes
from rfkernels.backends.triton.quantize_tiles import head_base

_LOG2_E = tl.constexpr(schemes.LOG2_E)
_LN_2 = tl.constexpr(math.log(2.0))
_FLOOR = tl.constexpr(schemes.FLOOR)
_MASKED = tl.constexpr(schemes.MASKED)
_LOWEST = tl.constexpr(-3.0e38)  # finite: a row that met no key yet has no infinities to subtract


@triton.jit
def visible(mask, strides, row, key, queries, keys, MASK: tl.constexpr, CAUSAL: tl.constexpr):
    """(what to add in log2 units, which scores count) of a tile. MASK: 0 none, 1 bool, 2 float, + 4 one row for all."""
    inside = (row < queries) & (key < keys)
    if CAUSAL:
        inside = inside & (key <= row)
    added = 0.0
    if MASK:
        at = mask + key.to(tl.int64) * strides[3]
        if MASK < 4:
            value = tl.load(at + row.to(tl.int64) * strides[2], inside, other=0)
        else:
            value = tl.load(at, key < keys, other=0)
        if MASK % 4 == 1:
            inside = inside & (value != 0)
        else:
            value = value.to(tl.float32)
            # a NaN is no closed key: it goes on into the scores
            inside = inside & ((value > _MASKED) | (value != value))
            added = value * _LOG2_E
    return added, inside


@triton.jit
def _operand(x, INTERPRETED: tl.constexpr):
    """The interpreter's products of bfloat16 and e4m3 are wrong; float16 holds the values that tests use."""
    if INTERPRETED and x.dtype != tl.int8:
        return x.to(tl.float16)
    else:
        return x


@triton.jit
def _weights(p, like, P_BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """P in the type of V. The interpreter truncates to bfloat16 and is up to 11 % off in e4m3: there, rounded by hand."""
    if INTERPRETED:
        drop: tl.constexpr = 20 if P_BITS else 16
        bits = p.to(tl.int32, bitcast=True)
        bits += (1 << (drop - 1)) - 1 + ((bits >> drop) & 1)
        return ((bits >> drop) << drop).to(tl.float32, bitcast=True).to(like.dtype)
    else:
        return p.to(like.dtype)


@triton.jit
def _block(
    accumulator, total, reference, running, q, row_factor,
    k, k_scale, v, mask, k_strides, v_strides, mask_strides,
    first, row, queries, keys, dim, v_dim,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, KEYS: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, CLOSED: tl.constexpr, PADDED: tl.constexpr,
    TRANSPOSED: tl.constexpr, NEGATIVE: tl.constexpr, P_BITS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One block of keys. CLOSED: some scores may not count. Returns (accumulator, sum, reference, running maximum)."""
    within = tl.arange(0, BN)
    key = first + within
    channel = tl.arange(0, D)
    v_channel = tl.arange(0, DV)

    # One 64-bit base a block and 32-bit offsets in it: half the address registers.
    k_base = k + tl.cast(first, tl.int64) * k_strides[2]
    if KEYS and not PADDED & 1:  # dense codes: the distances of a thread's rows are immediates
        k_at = k_base + (within[None, :] * D + channel[:, None])
    else:
        k_at = k_base + (within[None, :] * k_strides[2] + channel[:, None] * k_strides[3])
    k_mask = channel[:, None] < dim
    if CLOSED:
        k_mask = k_mask & (key[None, :] < keys)
    if PADDED & 1 or CLOSED:
        k_tile = tl.load(k_at, k_mask, other=0.0)
    else:
        k_tile = tl.load(k_at)
    product = tl.dot(q, _operand(k_tile, INTERPRETED))
    product = product.to(tl.float32)
    if NEGATIVE:
        product = -product
    if KEYS:
        groups = first // KEYS + tl.arange(0, BN // KEYS)
        scale = tl.load(k_scale + groups, groups * KEYS < keys, other=0.0)
        factor = row_factor[:, None] * scale[None, :]
        grouped = tl.reshape(product, (BM, BN // KEYS, KEYS))
    else:
        factor = row_factor[:, None]
        grouped = tl.reshape(product, (BM, 1, BN))
    factors = tl.broadcast_to(factor[:, :, None], grouped.shape)

    if CLOSED:
        scores = tl.reshape(grouped * factors, (BM, BN))
        added, open_ = visible(
            mask, mask_strides, row[:, None], key[None, :], queries, keys, MASK, CAUSAL
        )
        scores = tl.where(open_, scores + added, float("-inf"))
        highest = tl.max(scores, 1)
    else:  # factors are not negative: the maximum may be taken before they are applied
        highest = tl.max(tl.max(grouped, 2) * factor, 1)
    running = tl.maximum(running, highest)
    new = tl.maximum(highest, running - _FLOOR)
    fade = tl.math.exp2(tl.maximum(reference - new, -126.0))
    shift = P_BITS - new  # P is stored times 2^P_BITS
    if CLOSED:
        p = tl.math.exp2(scores + shift[:, None])
    else:
        shifts = tl.broadcast_to(shift[:, None, None], grouped.shape)
        p = tl.reshape(tl.math.exp2(tl.fma(grouped, factors, shifts)), (BM, BN))
    total = tl.fma(total, fade, tl.sum(p, 1))

    if TRANSPOSED:  # (channels, keys padded to whole blocks with zeros)
        v_at = v + first + (v_channel[:, None] * v_strides[2] + within[None, :])
        if PADDED & 2:
            v_tile = tl.trans(tl.load(v_at, v_channel[:, None] < v_dim, other=0.0))
        else:
            v_tile = tl.trans(tl.load(v_at))
    else:
        v_base = v + tl.cast(first, tl.int64) * v_strides[2]
        v_at = v_base + (within[:, None] * v_strides[2] + v_channel[None, :] * v_strides[3])
        v_mask = v_channel[None, :] < v_dim
        if CLOSED:
            v_mask = v_mask & (key[:, None] < keys)
        if PADDED & 2 or CLOSED:
            v_tile = tl.load(v_at, v_mask, other=0.0)
        else:
            v_tile = tl.load(v_at)
    v_tile = _operand(v_tile, INTERPRETED)
    weights = _weights(p, v_tile, P_BITS, INTERPRETED)
    fades = tl.broadcast_to(fade[:, None], accumulator.shape)
    if TRANSPOSED:  # fp8 tensor cores keep 13 bits of a sum: one block's at most, then float32
        accumulator = tl.fma(accumulator, fades, tl.dot(weights, v_tile, max_num_imprecise_acc=BN))
    else:
        accumulator = tl.dot(weights, v_tile, accumulator * fades)
    return accumulator, total, new, running


@triton.jit
def attention_kernel(
    q, q_scale, k, k_scale, v, v_scale, mask, out, lse, spoiled, raw_q, k_mean,
    q_strides, k_strides, v_strides, mask_strides, out_strides, lse_strides, raw_strides,
    heads, group, queries, keys, dim, v_dim, raw_dim, tiles, score_factor, softmax_scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, KEYS: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, RAGGED: tl.constexpr, PADDED: tl.constexpr,
    TRANSPOSED: tl.constexpr, NEGATIVE: tl.constexpr, P_BITS: tl.constexpr, LSE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """BM queries of one head. ``spoiled`` gets a 1 for every tile with a value that is not finite.

    KEYS: keys that share a scale, 0 for 16-bit Q and K. score_factor = |scale| log2(e) / (length of the rotation).
    TRANSPOSED: V is (channels, keys). PADDED: bit 0, D > dim; bit 1, DV > v_dim. RAGGED: a last block of fewer keys.
    """
    head = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    if CAUSAL:  # the longest first, so that the last programs to start are short
        tile = tiles - 1 - tile
    batch = head // heads
    kv_heads = heads // group
    kv_head = batch * kv_heads + (head - batch * heads) // group
    start = tile * BM
    row = start + tl.arange(0, BM)
    channel = tl.arange(0, D)

    q_base = head_base(q, q_strides, head, heads)
    q_at = q_base + row.to(tl.int64)[:, None] * q_strides[2] + channel[None, :] * q_strides[3]
    q_tile = tl.load(q_at, (row[:, None] < queries) & (channel[None, :] < dim), other=0.0)
    q_tile = _operand(q_tile, INTERPRETED)
    row_factor = tl.zeros((BM,), tl.float32) + score_factor
    if KEYS:
        at = head.to(tl.int64) * queries + row
        row_factor = tl.load(q_scale + at, row < queries, other=0.0) * score_factor
    k_base = head_base(k, k_strides, kv_head, kv_heads)
    v_base = head_base(v, v_strides, kv_head, kv_heads)
    scales = k_scale
    if KEYS:
        scales = k_scale + kv_head.to(tl.int64) * tl.cdiv(keys, KEYS)
    masks = mask
    if MASK:
        masks = head_base(mask, mask_strides, head, heads)

    end = keys
    if CAUSAL:
        end = tl.minimum(keys, start + BM)
    whole = end // BN * BN  # keys in blocks in which every score counts
    if CAUSAL:
        whole = tl.minimum(start + 1, keys) // BN * BN
    if MASK:
        whole = 0
    accumulator = tl.zeros((BM, DV), tl.float32)
    lowest = tl.full((BM,), _LOWEST, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    reference = lowest
    running = lowest
    if not MASK:
        for first in range(0, whole, BN):
            accumulator, total, reference, running = _block(
                accumulator, total, reference, running, q_tile, row_factor,
                k_base, scales, v_base, masks, k_strides, v_strides, mask_strides,
                first, row, queries, keys, dim, v_dim, BM, BN, D, DV, KEYS, 0, False, False, PADDED,
                TRANSPOSED, NEGATIVE, P_BITS, INTERPRETED,
            )  # fmt: skip
    if MASK or CAUSAL or RAGGED:
        for first in range(whole, end, BN):
            accumulator, total, reference, running = _block(
                accumulator, total, reference, running, q_tile, row_factor,
                k_base, scales, v_base, masks, k_strides, v_strides, mask_strides,
                first, row, queries, keys, dim, v_dim, BM, BN, D, DV, KEYS, MASK, CAUSAL, True, PADDED,
                TRANSPOSED, NEGATIVE, P_BITS, INTERPRETED,
            )  # fmt: skip

    v_channel = tl.arange(0, DV)
    empty = total == 0.0
    inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    result = accumulator * inverse[:, None]
    if TRANSPOSED:
        at = v_scale + kv_head.to(tl.int64) * v_dim + v_channel
        result = result * tl.load(at, v_channel < v_dim, other=0.0)[None, :]
    bits = result.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    worst = tl.max(tl.max(bits, 1), 0)
    tl.store(spoiled + head * tiles + tile, (worst >= 0x7F800000).to(tl.int32))
    out_base = head_base(out, out_strides, head, heads)
    at = out_base + row.to(tl.int64)[:, None] * out_strides[2] + v_channel[None, :] * out_strides[3]
    inside = (row[:, None] < queries) & (v_channel[None, :] < v_dim)
    tl.store(at, result.to(out.dtype.element_ty), inside)
    if LSE:
        sums = (reference - P_BITS + tl.math.log2(tl.where(empty, 1.0, total))) * _LN_2
        if KEYS:  # what the smoothing of K took off every score of the row
            base = head_base(raw_q, raw_strides, head, heads)
            at = (
                base
                + row.to(tl.int64)[:, None] * raw_strides[2]
                + channel[None, :] * raw_strides[3]
            )
            x = tl.load(at, (row[:, None] < queries) & (channel[None, :] < raw_dim), other=0.0)
            mean = tl.load(
                k_mean + kv_head.to(tl.int64) * raw_dim + channel, channel < raw_dim, other=0.0
            )
            sums += softmax_scale * tl.sum(x.to(tl.float32) * mean[None, :], 1)
        sums = tl.where(empty, float("-inf"), sums)
        base = head_base(lse, lse_strides, head, heads)
        tl.store(base + row.to(tl.int64) * lse_strides[2], sums, row < queries)


@triton.jit
def exact_kernel(
    q, k, v, mask, out, lse, spoiled,
    q_strides, k_strides, v_strides, mask_strides, out_strides, lse_strides,
    heads, group, queries, keys, dim, v_dim, tiles, score_factor,
    BM: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Overwrites the spoiled tiles of ``attention_kernel`` with float32 attention on q, k and v themselves, R rows each.

    Everything is multiplied and summed by ordinary arithmetic: a NaN or an infinity spoils the rows that it reaches.
    score_factor = scale log2(e), of either sign.
    """
    if tl.load(spoiled + tl.program_id(0)) == 0:
        return
    head = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    batch = head // heads
    kv_heads = heads // group
    kv_head = batch * kv_heads + (head - batch * heads) // group
    k_base = head_base(k, k_strides, kv_head, kv_heads)
    v_base = head_base(v, v_strides, kv_head, kv_heads)
    masks = mask
    if MASK:
        masks = head_base(mask, mask_strides, head, heads)
    channel = tl.arange(0, D)
    v_channel = tl.arange(0, DV)
    for start in range(tile * BM, tl.minimum(tile * BM + BM, queries), R):
        row = start + tl.arange(0, R)
        q_at = head_base(q, q_strides, head, heads) + row.to(tl.int64)[:, None] * q_strides[2]
        x = tl.load(
            q_at + channel[None, :] * q_strides[3],
            (row[:, None] < queries) & (channel[None, :] < dim), other=0.0,
        ).to(tl.float32)  # fmt: skip
        accumulator = tl.zeros((R, DV), tl.float32)
        total = tl.zeros((R,), tl.float32)
        running = tl.full((R,), float("-inf"), tl.float32)
        end = keys
        if CAUSAL:
            end = tl.minimum(keys, start + R)
        for first in range(0, end, BN):
            key = first + tl.arange(0, BN)
            k_at = (
                k_base + key.to(tl.int64)[:, None] * k_strides[2] + channel[None, :] * k_strides[3]
            )
            y = tl.load(k_at, (key[:, None] < keys) & (channel[None, :] < dim), other=0.0)
            scores = tl.sum(x[:, None, :] * y.to(tl.float32)[None, :, :], 2) * score_factor
            added, open_ = visible(
                masks, mask_strides, row[:, None], key[None, :], queries, keys, MASK, CAUSAL
            )
            scores = tl.where(open_, scores + added, float("-inf"))
            highest = tl.maximum(running, tl.max(scores, 1))
            # a row that met no key yet; a maximum of +inf or NaN makes every difference NaN, as in torch
            safe = tl.where(highest == float("-inf"), 0.0, highest)
            fade = tl.math.exp2(running - safe)
            p = tl.math.exp2(scores - safe[:, None])
            total = total * fade + tl.sum(p, 1)
            v_at = (
                v_base
                + key.to(tl.int64)[:, None] * v_strides[2]
                + v_channel[None, :] * v_strides[3]
            )
            z = tl.load(v_at, (key[:, None] < keys) & (v_channel[None, :] < v_dim), other=0.0)
            products = tl.sum(p[:, :, None] * z.to(tl.float32)[None, :, :], 1)
            accumulator = accumulator * fade[:, None] + products
            running = highest
        empty = total == 0.0
        result = tl.where(empty[:, None], 0.0, accumulator / tl.where(empty, 1.0, total)[:, None])
        out_at = (
            head_base(out, out_strides, head, heads) + row.to(tl.int64)[:, None] * out_strides[2]
        )
        inside = (row[:, None] < queries) & (v_channel[None, :] < v_dim)
        tl.store(
            out_at + v_channel[None, :] * out_strides[3], result.to(out.dtype.element_ty), inside
        )
        if LSE:
            sums = (running + tl.math.log2(tl.where(empty, 1.0, total))) * _LN_2
            sums = tl.where(empty, float("-inf"), sums)
            base = head_base(lse, lse_strides, head, heads)
            tl.store(base + row.to(tl.int64) * lse_strides[2], sums, row < queries)


@triton.jit
def valid_kernel(
    mask, valid, mask_strides, kv_heads, group, queries, keys, tiles,
    R: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Which keys some query of some head of the group may attend, uint8 (B, Hk, Sk)."""
    kv_head = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BN
    key = first + tl.arange(0, BN)
    found = tl.zeros((BN,), tl.int32)
    start = 0
    if CAUSAL:
        start = first // R * R
    if MASK >= 4:  # one row for all queries, the last of which sees the most
        start = queries - 1
    for member in range(group):
        masks = mask
        if MASK:
            masks = head_base(mask, mask_strides, kv_head * group + member, kv_heads * group)
        for top in range(start, queries, R):
            row = top + tl.arange(0, R)
            _, open_ = visible(
                masks, mask_strides, row[:, None], key[None, :], queries, keys, MASK, CAUSAL
            )
            found = tl.maximum(found, tl.max(open_.to(tl.int32), 0))
    tl.store(valid + kv_head.to(tl.int64) * keys + key, found.to(tl.uint8), key < keys)
