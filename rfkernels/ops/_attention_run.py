"""One forward pass of attention on checked (B, H, S, D) tensors: hand-over or kernel, outputs, counters."""

from __future__ import annotations

import torch

from rfkernels import _dispatch
from rfkernels._errors import BackendUnavailableError
from rfkernels.ops import _attention_route as route
from rfkernels.ops._attention_handover import FLOAT64, HEAD_SIZE, handover_reason
from rfkernels.ops._attention_sdpa import exact_logsumexp, sdpa
from rfkernels.ops._attention_stats import count_call, count_handover


def new_output(q: torch.Tensor, channels: int) -> torch.Tensor:
    """An empty (B, Hq, Sq, Dv) output in the memory order of q, as PyTorch's: heads inside the length, or outside."""
    batch, heads, length = q.shape[:3]
    if q.stride(1) < q.stride(2):
        return q.new_empty((batch, length, heads, channels)).transpose(1, 2)
    return q.new_empty((batch, heads, length, channels))


def new_lse(q: torch.Tensor, wanted: bool) -> torch.Tensor:
    """An empty (B, Hq, Sq) float32 tensor, or one without elements."""
    return q.new_empty(q.shape[:3] if wanted else (0,), dtype=torch.float32)


def reason_for(q, k, v, attn_mask, is_causal: bool, scheme: str) -> str | None:
    """Why PyTorch's attention is to serve the call; None for a kernel. A forced backend is never left."""
    if attn_mask is not None:
        mask = "bool" if attn_mask.dtype == torch.bool else "float"
    else:
        mask = "causal" if is_causal else "none"
    device = "cpu" if q.is_cpu else q.device.type
    _, _, queries, head_dim = q.shape
    _, _, keys, value_dim = v.shape
    reason = handover_reason(
        queries, keys, head_dim, value_dim, mask, q.dtype, device, torch.get_num_threads(), scheme
    )
    forced = _dispatch.forced_backend()
    if forced is None:
        return reason
    if reason in (FLOAT64, HEAD_SIZE):
        raise BackendUnavailableError(
            f"attention: backend {forced!r} cannot serve this call: {reason}; leave use_backend to take PyTorch's"
        )
    return None


def hand_over(q, k, v, attn_mask, is_causal, scale, enable_gqa, precision, reason) -> torch.Tensor:
    """PyTorch's attention, counted."""
    count_handover(precision, reason)
    return sdpa(q, k, v, attn_mask, is_causal, scale, enable_gqa)


def run(q, k, v, attn_mask, is_causal, scale, precision, scheme, return_lse):
    """(out, lse) with fresh memory, no gradient; ``lse`` has no elements unless wanted."""
    reason = reason_for(q, k, v, attn_mask, is_causal, scheme)
    found = route.choose("attention", scheme, q) if reason is None else reason
    if isinstance(found, str):
        values = hand_over(q, k, v, attn_mask, is_causal, scale, True, precision, found)
        out = new_output(q, v.shape[3]).copy_(values)
        lse = new_lse(q, return_lse)
        if return_lse:
            lse.copy_(exact_logsumexp(q, k, attn_mask, is_causal, scale))
        return out, lse
    name, module = found
    out, lse = new_output(q, v.shape[3]), new_lse(q, return_lse)
    mask = None if attn_mask is None else expanded(attn_mask, q, k.shape[2])
    exact = module.attention(
        q, k, v, None, mask, is_causal, scale, scheme, out, lse if return_lse else None
    )
    count_call(precision, scheme, name, exact)
    return out, lse


def expanded(attn_mask: torch.Tensor, q: torch.Tensor, keys: int) -> torch.Tensor:
    """The mask as a (B, Hq, Sq, Sk) view; float64 masks as float32."""
    if attn_mask.dtype == torch.float64:
        attn_mask = attn_mask.float()
    return attn_mask.expand(*q.shape[:3], keys)
