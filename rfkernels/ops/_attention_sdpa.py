"""PyTorch's attention under this package's rules for masks: what calls are handed over to, and what gradients come from."""

from __future__ import annotations

import torch

from rfkernels.backends.attention_schemes import MASKED
from rfkernels.backends.reference.attention import logsumexp

_sdpa = torch.nn.functional.scaled_dot_product_attention


def torch_mask(
    attn_mask: torch.Tensor | None, is_causal: bool, q: torch.Tensor, keys: int
) -> tuple[torch.Tensor | None, bool]:
    """(mask, causal) that PyTorch takes: values up to -1e30 are -inf, and causal is part of a mask where there is one."""
    if attn_mask is None:
        return None, is_causal
    is_bool = attn_mask.dtype == torch.bool
    if not is_bool:
        if attn_mask.dtype not in (q.dtype, torch.float32):
            attn_mask = attn_mask.to(torch.float32 if q.dtype != torch.float64 else q.dtype)
        attn_mask = attn_mask.masked_fill(attn_mask <= MASKED, -torch.inf)
    if is_causal:
        below = torch.ones((q.shape[2], keys), dtype=torch.bool, device=q.device).tril()
        attn_mask = attn_mask & below if is_bool else attn_mask.masked_fill(~below, -torch.inf)
    return attn_mask, False


def sdpa(q, k, v, attn_mask, is_causal, scale, enable_gqa) -> torch.Tensor:
    """PyTorch's attention of (B, H, S, D) tensors, differentiable."""
    if attn_mask is not None:
        attn_mask, is_causal = torch_mask(attn_mask, is_causal, q, k.shape[2])
    return _sdpa(q, k, v, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)


def exact_logsumexp(q, k, attn_mask, is_causal, scale) -> torch.Tensor:
    """(B, Hq, Sq) float32 logsumexp of the scores that ``sdpa`` takes the softmax of."""
    attn_mask, is_causal = torch_mask(attn_mask, is_causal, q, k.shape[2])
    k = k.repeat_interleave(q.shape[1] // max(k.shape[1], 1), 1)
    return logsumexp(q, k, attn_mask, is_causal, scale)
