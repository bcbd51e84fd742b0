"""Quantization of Q, K and V for attention in eager torch, float32 operation by operation; kernels match its bits.

K: the mean over the valid keys is subtracted, then Q and K are multiplied by fixed signs and Hadamard transformed (padded
with zeros to a power of two, not normalised), then Q is scaled per row and K per block of 64 keys. V has a scale per
channel, for ``u8`` also one per key. Layouts: Q, K and V codes (B, H, S, D); e4m3 V codes (B, H, D, S rounded up to 128).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rfkernels.backends.attention_schemes import (
    KEY_BLOCK,
    KEY_SCALE_MIN,
    MASKED,
    SCHEMES,
    TINY,
    Scheme,
    padded_dim,
    sign_vector,
)

V_TILE = 128  # the length of e4m3 V is padded to a multiple of it
_TYPES = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}


class KV(NamedTuple):
    """Quantized keys and values; None where a scheme has no such part."""

    k_codes: torch.Tensor  # (B, Hk, Sk, Dp) int8 or e4m3; (B, Hk, Sk, D) bfloat16
    k_scale: torch.Tensor | None  # (B, Hk, blocks of 64 keys)
    k_mean: torch.Tensor | None  # (B, Hk, D)
    v_codes: torch.Tensor  # (B, Hk, Sk, Dv) int8 or bfloat16; (B, Hk, Dv, padded Sk) e4m3
    v_key_scale: torch.Tensor | None  # (B, Hk, Sk), u8 only
    v_scale: torch.Tensor | None  # (B, Hk, Dv), what a unit of V's codes is worth
    finite: torch.Tensor  # (B, Hk) bool: no NaN or infinity was met


def collapsed(mask: torch.Tensor) -> torch.Tensor:
    """The mask with its expanded dimensions shrunk to length 1."""
    for dim, stride in enumerate(mask.stride()):
        if stride == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask


def allowed(mask: torch.Tensor) -> torch.Tensor:
    """True where a bool or float mask lets a key be attended; a NaN does."""
    return mask if mask.dtype == torch.bool else ~(mask <= MASKED)


def valid_keys(
    attn_mask: torch.Tensor | None, is_causal: bool, kv_heads: int, queries: int, keys: int
) -> torch.Tensor | None:
    """(B, Hk, Sk) bool: the keys that some query of some head of the group may attend; None for all of them."""
    if attn_mask is None:
        if not is_causal or queries >= keys:
            return None
        valid = torch.arange(keys) < queries
        return valid.expand(1, kv_heads, keys)
    batch, heads = attn_mask.shape[:2]
    open_ = allowed(collapsed(attn_mask))
    if is_causal:
        open_ = open_.expand(-1, -1, queries, keys).tril()
    by_head = open_.any(2) if queries else open_.new_zeros((*open_.shape[:2], open_.shape[3]))
    if by_head.shape[1] == heads != kv_heads:
        by_head = by_head.unflatten(1, (kv_heads, heads // kv_heads)).any(2)
    return by_head.expand(batch, kv_heads, keys)


def _hadamard(y: torch.Tensor) -> torch.Tensor:
    """Fast Walsh-Hadamard transform of the last dimension, butterflies of span 1, 2, 4, ..."""
    size, span = y.shape[-1], 1
    while span < size:
        a, b = y.unflatten(-1, (size // (2 * span), 2, span)).unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        span *= 2
    return y


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Signs and Hadamard transform of float32 rows (..., D) -> (..., Dp)."""
    dim = x.shape[-1]
    signs = torch.tensor(sign_vector(dim), device=x.device)
    return _hadamard(torch.nn.functional.pad(x * signs, (0, padded_dim(dim) - dim)))


def _inverse(numerator: float, magnitude: torch.Tensor) -> torch.Tensor:
    """numerator / magnitude, 0 where the magnitude is tiny or not a number."""
    usable = magnitude >= TINY
    # number / tensor in torch is number * reciprocal, which rounds twice
    quotient = torch.full_like(magnitude, numerator) / torch.where(usable, magnitude, 1.0)
    return torch.where(usable, quotient, 0.0)


def _codes(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Scaled float32 values as codes, rounded to nearest, ties to even."""
    values = values.nan_to_num(0.0, 0.0, 0.0)  # such heads take the exact path
    return (values.round() if kind == "int8" else values).to(_TYPES[kind])


def _scale(magnitude: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    return torch.where(magnitude < TINY, 0.0, magnitude / scheme.code_max)


def quantize_q(
    q: torch.Tensor, scheme: str
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Codes (B, Hq, Sq, Dp), row scales (B, Hq, Sq) and finite flags (B, Hq); no scales for ``bf16``."""
    kind = SCHEMES[scheme]
    if not kind.rotated:
        codes = q.to(torch.bfloat16)
        return codes, None, codes.isfinite().all(-1).all(-1)
    y = rotate(q.float())
    magnitude = y.abs().amax(-1)
    codes = _codes(y * _inverse(kind.code_max, magnitude).unsqueeze(-1), kind.qk)
    finite = q.isfinite().all(-1) & magnitude.isfinite()
    return codes, _scale(magnitude, kind), finite.all(-1)


def key_mean(k: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """(B, Hk, D) mean over the valid keys: float32 sums of 64 keys in order, added in float64 in order."""
    pad = -k.shape[2] % KEY_BLOCK
    blocks = torch.nn.functional.pad(torch.where(valid.unsqueeze(-1), k, 0.0), (0, 0, 0, pad))
    blocks = blocks.unflatten(2, (-1, KEY_BLOCK))
    partial = torch.zeros_like(blocks[:, :, :, 0])
    for j in range(KEY_BLOCK):
        partial = partial + blocks[:, :, :, j]
    total = torch.zeros_like(partial[:, :, 0], dtype=torch.float64)
    for g in range(partial.shape[2]):
        total = total + partial[:, :, g].double()
    count = valid.sum(-1, dtype=torch.float64).unsqueeze(-1)
    return torch.where(count > 0, total / count.clamp(min=1.0), 0.0).float()


def _quantize_k(k: torch.Tensor, valid: torch.Tensor, scheme: Scheme):
    """(codes, scales, mean, finite) of K."""
    keys = k.shape[2]
    mean = key_mean(k, valid)
    y = torch.where(valid.unsqueeze(-1), rotate(k - mean.unsqueeze(2)), 0.0)
    pad = -keys % KEY_BLOCK
    rows = torch.nn.functional.pad(y.abs().amax(-1), (0, pad))
    magnitude = rows.unflatten(-1, (-1, KEY_BLOCK)).amax(-1)
    inverse = _inverse(scheme.code_max, magnitude).repeat_interleave(KEY_BLOCK, -1)[..., :keys]
    codes = _codes(y * inverse.unsqueeze(-1), scheme.qk)
    finite = mean.isfinite().all(-1) & magnitude.isfinite().all(-1)
    return codes, _scale(magnitude, scheme), mean, finite


def _quantize_v(v: torch.Tensor, valid: torch.Tensor, scheme: Scheme):
    """(codes, key scales or None, channel scales) of V."""
    w = torch.where(valid.unsqueeze(-1), v, 0.0)
    channel = w.abs().amax(2)
    if scheme.pv == "e4m3":
        codes = _codes(w * _inverse(scheme.v_max, channel).unsqueeze(2), "e4m3").mT
        padded = codes.new_zeros(
            (*codes.shape[:3], codes.shape[3] + -codes.shape[3] % V_TILE), dtype=codes.dtype
        )
        padded[..., : codes.shape[3]] = codes
        return padded, None, channel / scheme.v_max
    w = w * _inverse(1.0, channel).unsqueeze(2)
    key = torch.where(valid, w.abs().amax(-1).clamp(min=KEY_SCALE_MIN), 1.0)
    codes = _codes(w * (torch.full_like(key, scheme.v_max) / key).unsqueeze(-1), "int8")
    return codes, key, channel / scheme.v_max


def quantize_kv(k: torch.Tensor, v: torch.Tensor, scheme: str, valid: torch.Tensor | None) -> KV:
    """Quantized K (B, Hk, Sk, D) and V (B, Hk, Sk, Dv); ``valid`` as ``valid_keys`` returns it."""
    kind = SCHEMES[scheme]
    finite = k.isfinite().all(-1).all(-1) & v.isfinite().all(-1).all(-1)
    if valid is None:
        valid = torch.ones((), dtype=torch.bool, device=k.device)
    valid = valid.to(k.device).expand(k.shape[:3])
    if not k.shape[2]:
        return _empty(k, v, kind)
    if kind.rotated:
        k_codes, k_scale, k_mean, k_finite = _quantize_k(k.float(), valid, kind)
        finite = finite & k_finite
    else:
        k_codes, k_scale, k_mean = k.to(torch.bfloat16), None, None
        finite = finite & k_codes.isfinite().all(-1).all(-1)
    if kind.pv == "bf16":
        v_codes, v_key_scale, v_scale = v.to(torch.bfloat16), None, None
        finite = finite & v_codes.isfinite().all(-1).all(-1)
    else:
        v_codes, v_key_scale, v_scale = _quantize_v(v.float(), valid, kind)
    return KV(k_codes, k_scale, k_mean, v_codes, v_key_scale, v_scale, finite)


def _empty(k: torch.Tensor, v: torch.Tensor, scheme: Scheme) -> KV:
    """What no keys at all are quantized to."""
    (batch, heads, _, dim), channels = k.shape, v.shape[-1]

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros((batch, heads, *shape), dtype=dtype, device=k.device)

    rotated, bf16 = scheme.rotated, torch.bfloat16
    v_shape = (channels, 0) if scheme.pv == "e4m3" else (0, channels)
    return KV(
        zeros(0, padded_dim(dim), dtype=_TYPES[scheme.qk])
        if rotated
        else zeros(0, dim, dtype=bf16),
        zeros(0) if rotated else None,
        zeros(dim) if rotated else None,
        zeros(*v_shape, dtype={"u8": torch.int8, "e4m3": _TYPES["e4m3"], "bf16": bf16}[scheme.pv]),
        zeros(0) if scheme.pv == "u8" else None,
        None if scheme.pv == "bf16" else zeros(channels),
        torch.ones((batch, heads), dtype=torch.bool, device=k.device),
    )
