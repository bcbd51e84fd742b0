"""Quantized attention in Triton: quantization, one fused kernel, an exact pass over tiles that a NaN or infinity reached.

Everything is launched on the current stream, nothing is read back: the call may be captured in a CUDA graph. The attention
kernel notes per tile of queries whether its result is finite; the exact kernel that follows returns at once where it is.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import torch
import triton

from rfkernels.backends import native
from rfkernels.backends import triton as package
from rfkernels.backends.attention_schemes import (
    KEY_BLOCK,
    LOG2_E,
    SCHEMES,
    Scheme,
    padded_dim,
)
from rfkernels.backends.triton import quantize as own_quantize
from rfkernels.backends.triton.attention_kernels import attention_kernel, exact_kernel, valid_kernel
from rfkernels.backends.triton.launch import launch

EXACT_ROWS = 4
EXACT_TILE = 2048  # keys x channels of the exact kernel's tiles
FARTHEST = 2**22  # elements between neighbours: 127 keys and 255 channels stay within 2^31
BOOL, FLOAT, ONE_ROW = 1, 2, 4  # kinds of mask


class Tile(NamedTuple):
    """How a program is cut."""

    queries: int
    warps: int
    stages: int


def tile_for(scheme: Scheme, dim: int, v_dim: int, capability: tuple[int, int]) -> Tile:
    """The tile by padded head sizes and architecture.

    128 queries in 8 warps hold 64 scores and up to 64 (head size 128) accumulators a thread, 170 to 255 registers. Above
    a head size of 128 the accumulator alone would take 128, hence 64 queries. Loads run ahead as far as shared memory
    holds the blocks of K and V: 99 KiB on 8.6, 8.9 and 12.x, 163 KiB on 8.0, 227 KiB on 9.0 and 10.x. 9.0 and later data
    centre parts keep a block for every stage, the others (mma.sync) one fewer.
    """
    large = max(dim, v_dim)
    queries = 128 if large <= 128 else 64
    wgmma = capability[0] in (9, 10)
    kilobytes = 227 if wgmma else 163 if capability in ((8, 0), (8, 7)) else 99
    q_bytes = 2 if scheme.qk == "bf16" else 1
    v_bytes = 2 if scheme.pv == "bf16" else 1
    block = scheme.softmax_block * (dim * q_bytes + v_dim * v_bytes) / 1024
    if block > 96 and kilobytes < 100:  # 16-bit tiles of head size 256: Q has to be small
        return Tile(32, 4, 1)
    fixed = queries * dim * q_bytes / 1024 + 3  # Q, and what reductions exchange
    stages = int((kilobytes - fixed) // block) + (0 if wgmma else 1)
    return Tile(queries, 8, max(1, min(3, stages)))


def _mask_kind(mask: torch.Tensor | None) -> int:
    if mask is None:
        return 0
    return (BOOL if mask.dtype == torch.bool else FLOAT) + (0 if mask.stride(2) else ONE_ROW)


def _bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def valid_keys(
    attn_mask: torch.Tensor | None, is_causal: bool, like: torch.Tensor, queries: int
) -> torch.Tensor | None:
    """(B, Hk, Sk) bool, possibly expanded: see ``rfkernels.backends.reference.quantize.valid_keys``; ``like`` is K."""
    batch, kv_heads, keys = like.shape[:3]
    if attn_mask is None and (not is_causal or queries >= keys):
        return None
    if not queries:
        return torch.zeros((batch, kv_heads, keys), dtype=torch.bool, device=like.device)
    batches, heads, group = 1, 1, 1
    strides = (0, 0, 0, 0)
    if attn_mask is not None:
        strides = attn_mask.stride()
        batches = batch if strides[0] else 1
        if strides[1]:
            heads, group = kv_heads, attn_mask.shape[1] // kv_heads
    valid = torch.empty((batches, heads, keys), dtype=torch.bool, device=like.device)
    tiles = triton.cdiv(keys, 128)
    launch(
        "attention", valid_kernel, batches * heads * tiles, like.device,
        _bytes(attn_mask), valid.view(torch.uint8), strides, heads, group, queries, keys, tiles,
        R=32, BN=128, MASK=_mask_kind(attn_mask), CAUSAL=is_causal,
    )  # fmt: skip
    return valid.expand(batch, kv_heads, keys)


def _near(codes: torch.Tensor) -> torch.Tensor:
    """K or V with the elements of a block less than 2^31 apart: the kernel adds 32-bit offsets to a block's base."""
    return codes if max(codes.stride()[2:]) <= FARTHEST else codes.contiguous()


def _quantizer(q: torch.Tensor) -> ModuleType:
    """The compiled CUDA kernels where this build has them, else Triton's; the codes are the same."""
    if q.is_cuda and native.unavailable_reason("cuda") is None:
        from rfkernels.backends.native import quantize_cuda

        return quantize_cuda
    return own_quantize


def attention(q, k, v, kv, attn_mask, is_causal, scale, scheme, out, lse) -> int:
    """See ``rfkernels.backends.reference.attention.attention``. Returns 0: which tiles took the exact path only the device
    knows. Of keys that were quantized before, only the codes are left: their NaNs and infinities come out as NaN."""
    kind = SCHEMES[scheme]
    interpreted = package.interpreted()
    quantizer = _quantizer(q)
    batch, heads, queries, raw_dim = q.shape
    if not out.numel():
        return 0
    if kv is None:
        kv = quantizer.key_value_codes(k, v, kind, valid_keys(attn_mask, is_causal, k, queries))
    k_codes, v_codes = _near(kv.k_codes), _near(kv.v_codes)
    kv_heads, keys = k_codes.shape[1:3]
    q_codes, q_scale = quantizer.row_codes(q, kind)
    dim, v_dim = q_codes.shape[-1], out.shape[-1]
    length = padded_dim(raw_dim) if kind.rotated else 1
    # A dot needs 16 channels of 16-bit and 32 of 8-bit numbers.
    padded, v_padded = max(32, padded_dim(dim)), max(16, padded_dim(v_dim))
    tile = tile_for(kind, padded, v_padded, (9, 0) if interpreted else package._capability())
    tiles = triton.cdiv(queries, tile.queries)
    spoiled = torch.empty(batch * heads * tiles, dtype=torch.int32, device=q.device)
    mask, mask_kind = _bytes(attn_mask), _mask_kind(attn_mask)
    mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
    lse_strides = (0, 0, 0) if lse is None else lse.stride()
    transposed = kind.pv == "e4m3"
    launch(
        "attention", attention_kernel, batch * heads * tiles, q.device,
        q_codes, q_scale, k_codes, kv.k_scale, v_codes, kv.v_scale, mask, out, lse, spoiled,
        q if kind.rotated and lse is not None else None, kv.k_mean if lse is not None else None,
        q_codes.stride(), k_codes.stride(), v_codes.stride(), mask_strides, out.stride(), lse_strides,
        q.stride(), heads, heads // kv_heads, queries, keys, dim, v_dim, raw_dim, tiles,
        abs(scale) * LOG2_E / length, float(scale),
        BM=tile.queries, BN=kind.softmax_block, D=padded, DV=v_padded, KEYS=KEY_BLOCK if kind.rotated else 0,
        MASK=mask_kind, CAUSAL=is_causal, RAGGED=keys % kind.softmax_block != 0,
        PADDED=(padded != dim) + 2 * (v_padded != v_dim), TRANSPOSED=transposed, NEGATIVE=scale < 0.0,
        P_BITS=math.log2(kind.p_scale), LSE=lse is not None, INTERPRETED=interpreted,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if k is not None:
        sizes = {"D": padded_dim(raw_dim), "DV": padded_dim(v_dim)}
        launch(
            "attention", exact_kernel, batch * heads * tiles, q.device,
            q, k, v, mask, out, lse, spoiled,
            q.stride(), k.stride(), v.stride(), mask_strides, out.stride(), lse_strides,
            heads, heads // kv_heads, queries, keys, raw_dim, v_dim, tiles, scale * LOG2_E,
            BM=tile.queries, R=EXACT_ROWS, BN=min(64, EXACT_TILE // max(sizes.values())), **sizes,
            MASK=mask_kind, CAUSAL=is_causal, LSE=lse is not None,
        )  # fmt: skip
    return 0
