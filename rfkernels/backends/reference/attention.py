"""Quantized attention in eager torch: the meaning of every scheme, its block sizes included, with float64 arithmetic.

The codes and scales are float32 bit for bit (``quantize``). The softmax runs over blocks of keys against a floating
reference: each block's own maximum, at most ``FLOOR`` log2 units below the running one, so that P always uses its whole
range. Scores are in log2 units. Heads with a NaN, an infinity or scores that float32 could not hold take PyTorch's
attention (``exact_attention``).
"""

from __future__ import annotations

import torch

from rfkernels.backends.attention_schemes import (
    FLOOR,
    LARGEST_SCORE,
    LOG2_E,
    MASKED,
    SCHEMES,
    Scheme,
    padded_dim,
)
from rfkernels.backends.reference.exact_attention import exact_heads
from rfkernels.backends.reference.quantize import (
    KV,
    collapsed,
    quantize_kv,
    quantize_q,
    valid_keys,
)


def score_factor(scheme: Scheme, scale: float, dim: int) -> torch.Tensor:
    """C, what turns products of unscaled codes into log2 units, as a 0-d float32 tensor."""
    length = padded_dim(dim) if scheme.rotated else 1
    return torch.tensor(scale * LOG2_E / length, dtype=torch.float32)


def unbounded_mask_heads(attn_mask: torch.Tensor) -> torch.Tensor:
    """(B, Hq) bool: heads whose float mask holds a NaN or a value above 1e30."""
    mask = collapsed(attn_mask)
    bad = ~(mask <= LARGEST_SCORE)
    return bad.flatten(2).any(-1).expand(attn_mask.shape[:2])


def _score_bound(q, q_scale, k_codes, k_scale, scheme: Scheme, factor: torch.Tensor):
    """(B, Hq) upper bound of the scores' magnitude."""
    group = q.shape[1] // k_codes.shape[1]
    if scheme.rotated:
        rows, keys = q_scale.amax(-1), k_scale.amax(-1)
        terms = scheme.code_max**2 * k_codes.shape[-1]
    else:
        rows, keys = q.abs().float().amax((-1, -2)), k_codes.abs().float().amax((-1, -2))
        terms = float(q.shape[-1])
    return rows * factor.abs() * keys.repeat_interleave(group, 1) * terms


def attention(q, k, v, kv, attn_mask, is_causal, scale, scheme, out, lse) -> int:
    """Write ``out`` (B, Hq, Sq, Dv) and, where given, ``lse`` (B, Hq, Sq); returns how many heads took the exact path.

    Args:
        q, k, v: (B, H, S, D) views of any strides; k and v None where ``kv`` is given.
        kv: what ``quantize_kv`` returned, or None.
        attn_mask: None or an expanded (B, Hq, Sq, Sk) view, bool or float.
        is_causal: key j is open to query i when j <= i, and the mask lets it.
        scale: a float. scheme: a name in ``SCHEMES``.
    """
    kind = SCHEMES[scheme]
    if kv is None:
        valid = valid_keys(attn_mask, is_causal, k.shape[1], q.shape[2], k.shape[2])
        kv = quantize_kv(k, v, scheme, valid)
    keys = kv.k_codes.shape[2]
    if not q.numel() or not keys:
        out.zero_()
        if lse is not None:
            lse.fill_(-torch.inf)
        return 0
    group = q.shape[1] // kv.k_codes.shape[1]
    q_codes, q_scale, q_finite = quantize_q(q, scheme)
    factor = score_factor(kind, scale, q.shape[-1]).to(q.device)
    bound = _score_bound(q, q_scale, kv.k_codes, kv.k_scale, kind, factor)
    exact = ~(q_finite & kv.finite.repeat_interleave(group, 1) & (bound <= LARGEST_SCORE))
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        exact = exact | unbounded_mask_heads(attn_mask)
    values, sums = _blocks(q_codes, q_scale, kv, attn_mask, is_causal, factor, kind)
    out.copy_(values)
    if lse is not None:
        lse.copy_(sums / LOG2_E + _mean_score(q, kv, group, scale))
    return exact_heads(q, k, v, attn_mask, is_causal, scale, exact, out, lse, kv.finite)


def _mean_score(q, kv: KV, group: int, scale: float) -> torch.Tensor | float:
    """scale q . mu, which the smoothing took off every score of a row."""
    if kv.k_mean is None:
        return 0.0
    return (
        scale * (q.double() @ kv.k_mean.repeat_interleave(group, 1).double().unsqueeze(-1))[..., 0]
    )


def _blocks(q_codes, q_scale, kv: KV, attn_mask, is_causal, factor, scheme: Scheme):
    """Softmax over blocks of keys: (values (B, Hq, Sq, Dv), log2 of the denominators (B, Hq, Sq)), float64."""
    batch, heads, queries = q_codes.shape[:3]
    kv_heads, keys = kv.k_codes.shape[1:3]
    group = heads // kv_heads
    rows = q_codes.double()
    v_codes = kv.v_codes.mT[:, :, :keys] if scheme.pv == "e4m3" else kv.v_codes
    accumulator = rows.new_zeros(batch, heads, queries, v_codes.shape[-1])
    total = rows.new_zeros(batch, heads, queries)
    reference = torch.full_like(total, -torch.inf)
    running = torch.full_like(total, -torch.inf)
    for first in range(0, keys, scheme.softmax_block):
        last = min(first + scheme.softmax_block, keys)
        k = kv.k_codes[:, :, first:last].double().repeat_interleave(group, 1)
        y = rows @ k.mT
        if scheme.rotated:
            scale = kv.k_scale.repeat_interleave(scheme.key_block, -1)[..., first:last]
            scale = scale.repeat_interleave(group, 1).unsqueeze(2)
            y = y * ((q_scale * factor).unsqueeze(-1) * scale).double()
        else:
            y = y * factor.double()
        if attn_mask is not None:
            y = _masked(y, attn_mask[..., first:last])
        if is_causal:
            y = y.masked_fill(
                ~y.new_ones(queries, last - first, dtype=torch.bool).tril(-first), -torch.inf
            )
        key_scale = None
        if kv.v_key_scale is not None:
            key_scale = (
                kv.v_key_scale[..., first:last].double().repeat_interleave(group, 1).unsqueeze(2)
            )
            y = y + key_scale.log2()
        highest = y.amax(-1)
        running = torch.maximum(running, highest)
        follows = highest > -torch.inf
        new = torch.where(follows, torch.maximum(highest, running - FLOOR), reference)
        factor_old = torch.where(follows, (reference - new).clamp(min=-126.0).exp2(), 1.0)
        p = torch.where(follows.unsqueeze(-1), (y - new.unsqueeze(-1)).exp2(), 0.0)
        weight = p if key_scale is None else p / key_scale
        total = total * factor_old + weight.sum(-1)
        v = v_codes[:, :, first:last].double().repeat_interleave(group, 1)
        accumulator = accumulator * factor_old.unsqueeze(-1) + _stored(p, scheme) @ v
        reference = new
    values = accumulator / (scheme.p_scale * total).unsqueeze(-1)
    if kv.v_scale is not None:
        values = values * kv.v_scale.double().repeat_interleave(group, 1).unsqueeze(2)
    empty = total == 0.0
    values = torch.where(empty.unsqueeze(-1), 0.0, values)
    return values, torch.where(empty, -torch.inf, reference + total.log2())


def _masked(y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Scores in log2 units under a bool or float mask."""
    if mask.dtype == torch.bool:
        return y.masked_fill(~mask, -torch.inf)
    return (y + mask.double() * LOG2_E).masked_fill(mask <= MASKED, -torch.inf)


def _stored(p: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """P as the scheme stores it, in float64."""
    if scheme.pv == "u8":
        return (p * scheme.p_scale).round()
    if scheme.pv == "e4m3":
        return (p * scheme.p_scale).float().to(torch.float8_e4m3fn).double()
    return p.to(torch.bfloat16).double()
