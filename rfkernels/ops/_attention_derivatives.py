"""Derivatives of attention.

Those of quantized attention are those of exact attention at the same inputs (straight-through). ``recomputed``
takes them from PyTorch's kernels; ``gradients`` and ``tangents`` are the same formulas in plain torch, which every transform
understands: with P = softmax(S), O = P V and S = scale Q K^T + mask,

    dS = P * (dP - rowsum(dP * P)),  dP = dO V^T (+ d lse),  dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO,
    O' = (P * (S' - rowsum(P * S'))) V + P V',  lse' = rowsum(P * S').
"""

from __future__ import annotations

import torch

from rfkernels.backends.reference.exact_attention import (
    dead_rows,
    grouped,
    logsumexp,
    scores_of,
    sdpa,
)
from rfkernels.backends.reference.precision import compute_dtype


def recomputed(q, k, v, attn_mask, is_causal, scale, wanted, grad, grad_lse):
    """Gradients for (q, k, v, attn_mask) where wanted, from PyTorch's attention run again on the same inputs."""
    with torch.enable_grad():
        tensors = [
            None if t is None else t.detach().requires_grad_(want)
            for t, want in zip((q, k, v, attn_mask), wanted, strict=True)
        ]
        options = (is_causal, scale)
        outputs, grads = [], []
        if grad is not None:
            outputs.append(sdpa(*tensors, *options, True))
            grads.append(grad)
        if grad_lse is not None:
            outputs.append(logsumexp(tensors[0], tensors[1], tensors[3], *options))
            grads.append(grad_lse)
    leaves = [t for t, want in zip(tensors, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(outputs, leaves, grads, allow_unused=True))
    return [next(found) if want else None for want in wanted]


def _probabilities(q, k, attn_mask, is_causal, scale):
    """P (B, Hk, group, Sq, Sk) in the compute type, 0 in rows without an open key."""
    scores = scores_of(q, k, attn_mask, is_causal, scale, compute_dtype(q))
    dead = dead_rows(scores)
    p = scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
    return grouped(p, k.shape[1])


def gradients(q, k, v, attn_mask, is_causal, scale, wanted, grad, grad_lse):
    """As ``recomputed``, in plain torch."""
    compute, kv_heads = compute_dtype(q), k.shape[1]
    p = _probabilities(q, k, attn_mask, is_causal, scale)
    d_scores, d_v = torch.zeros_like(p), None
    if grad is not None:
        g = grouped(grad.to(compute), kv_heads)
        d_v = (p.mT @ g).sum(2)
        d_p = g @ v.to(compute).unsqueeze(2).mT
        d_scores = p * (d_p - (d_p * p).sum(-1, keepdim=True))
    if grad_lse is not None:
        d_scores = d_scores + p * grouped(grad_lse.to(compute), kv_heads).unsqueeze(-1)
    d_q = (d_scores @ k.to(compute).unsqueeze(2)).flatten(1, 2) * scale
    d_k = (d_scores.mT @ grouped(q.to(compute), kv_heads)).sum(2) * scale
    d_mask = None
    if wanted[3]:
        d_mask = d_scores.flatten(1, 2).sum_to_size(attn_mask.shape).to(attn_mask.dtype)
    d_q, d_k, d_v = (None if d is None else d.to(q.dtype) for d in (d_q, d_k, d_v))
    return [d if want else None for d, want in zip((d_q, d_k, d_v, d_mask), wanted, strict=True)]


def tangents(q, k, v, attn_mask, is_causal, scale, q_t, k_t, v_t, mask_t):
    """(out', lse'): directional derivatives along tangents, any of them None."""
    compute, kv_heads = compute_dtype(q), k.shape[1]
    p = _probabilities(q, k, attn_mask, is_causal, scale)
    s_t = torch.zeros_like(p)
    if q_t is not None:
        s_t = s_t + grouped(q_t.to(compute), kv_heads) @ k.to(compute).unsqueeze(2).mT * scale
    if k_t is not None:
        s_t = s_t + grouped(q.to(compute), kv_heads) @ k_t.to(compute).unsqueeze(2).mT * scale
    if mask_t is not None:
        s_t = s_t + grouped(mask_t.to(compute).expand(*q.shape[:3], k.shape[2]), kv_heads)
    lse_t = (p * s_t).sum(-1, keepdim=True)
    out_t = (p * (s_t - lse_t)) @ v.to(compute).unsqueeze(2)
    if v_t is not None:
        out_t = out_t + p @ v_t.to(compute).unsqueeze(2)
    return out_t.flatten(1, 2).to(q.dtype), lse_t[..., 0].flatten(1, 2).float()
