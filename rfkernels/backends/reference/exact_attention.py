"""PyTorch's attention under this package's rules for masks, and the logsumexp that it does not return.

Calls are handed over to it, gradients come from it, and every backend's heads with a NaN, an infinity or overflowing scores
take it on the CPU.
"""

from __future__ import annotations

import torch

from rfkernels.backends.attention_schemes import MASKED

# Bound here: a program may put this package's attention in its place.
torch_attention = torch.nn.functional.scaled_dot_product_attention


def torch_mask(
    attn_mask: torch.Tensor | None, is_causal: bool, q: torch.Tensor, keys: int
) -> tuple[torch.Tensor | None, bool]:
    """(mask, causal) that PyTorch takes: values up to -1e30 are -inf, and causal is part of a mask where there is one."""
    if attn_mask is None:
        return None, is_causal
    is_bool = attn_mask.dtype == torch.bool
    if not is_bool:
        if attn_mask.dtype != q.dtype:
            # PyTorch takes float32 masks with 16-bit inputs; with float64 ones it reads them wrongly (seen in 2.13).
            attn_mask = attn_mask.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        attn_mask = attn_mask.masked_fill(attn_mask <= MASKED, -torch.inf)
    if is_causal:
        below = _below(q, keys)
        attn_mask = attn_mask & below if is_bool else attn_mask.masked_fill(~below, -torch.inf)
    return attn_mask, False


def _below(q: torch.Tensor, keys: int) -> torch.Tensor:
    return torch.ones((q.shape[2], keys), dtype=torch.bool, device=q.device).tril()


def sdpa(q, k, v, attn_mask, is_causal, scale, enable_gqa) -> torch.Tensor:
    """PyTorch's attention of (B, H, S, D) tensors, differentiable."""
    if attn_mask is not None:
        attn_mask, is_causal = torch_mask(attn_mask, is_causal, q, k.shape[2])
    return torch_attention(q, k, v, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)


def scores_of(q, k, attn_mask, is_causal, scale, dtype) -> torch.Tensor:
    """(B, Hq, Sq, Sk) scores in natural-log units; K with its own heads."""
    kv_heads, keys = k.shape[1:3]
    k = k.to(dtype).unsqueeze(2)
    scores = (grouped(q.to(dtype), kv_heads) @ k.mT).flatten(1, 2) * scale
    attn_mask, is_causal = torch_mask(attn_mask, is_causal, q, keys)
    if is_causal:
        scores = scores.masked_fill(~_below(q, keys), -torch.inf)
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.to(dtype)
    return scores


def grouped(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(B, Hq, ...) as (B, Hk, group, ...)."""
    return x.unflatten(1, (kv_heads, x.shape[1] // max(kv_heads, 1)))


def dead_rows(scores: torch.Tensor) -> torch.Tensor:
    """(B, Hq, Sq, 1) bool: rows without an open key."""
    return (scores == -torch.inf).all(-1, keepdim=True)


def logsumexp(q, k, attn_mask, is_causal, scale) -> torch.Tensor:
    """(B, Hq, Sq) float32 logarithms of the softmax denominators, from float64 scores; differentiable."""
    scores = scores_of(q, k, attn_mask, is_causal, scale, torch.float64)
    dead = dead_rows(scores)
    sums = scores.masked_fill(dead, 0.0).logsumexp(-1)
    return sums.masked_fill(dead[..., 0], -torch.inf).float()


def exact_heads(q, k, v, attn_mask, is_causal, scale, heads, out, lse, kv_finite=None) -> int:
    """Overwrite ``out`` and ``lse`` for the query heads marked in ``heads`` (B, Hq) bool; returns how many there were.

    Every backend uses it on the CPU. ``k`` None: only quantized keys are left, with the flags ``kv_finite`` (B, Hk). Then
    rows of q that are not finite become NaN, and the whole head where it is marked for another reason.
    """
    marked = heads.nonzero().tolist()
    group = q.shape[1] // max((kv_finite if k is None else k).shape[1], 1)
    for b, h in marked:
        if k is None:
            rows = ~q[b, h].isfinite().all(-1)
            if not kv_finite[b, h // group] or not rows.any():
                rows = torch.ones_like(rows)
            values, sums = torch.nan, torch.nan
        else:
            one, keys, values = (
                t[b : b + 1, i : i + 1] for t, i in ((q, h), (k, h // group), (v, h // group))
            )
            mask = None if attn_mask is None else attn_mask[b : b + 1, h : h + 1]
            rows = slice(None)
            values = sdpa(one, keys, values, mask, is_causal, scale, False)[0, 0]
            sums = logsumexp(one, keys, mask, is_causal, scale)[0, 0] if lse is not None else None
        out[b, h, rows] = values
        if lse is not None:
            lse[b, h, rows] = sums
    return len(marked)
