"""Quantized scaled dot product attention."""

from __future__ import annotations

import torch

from rfkernels.ops import _attention_checks as checks
from rfkernels.ops import _attention_route as route
from rfkernels.ops._attention_run import run
from rfkernels.ops.quantize import QuantizedKV


def attention(
    q: torch.Tensor,
    k: torch.Tensor | QuantizedKV,
    v: torch.Tensor | None = None,
    *,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    layout: str = "bhsd",
    precision: str = "int8",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T + mask) v."""
    name = "attention"
    if layout != "bhsd":
        q, k, v = checks.heads_first(name, layout, q, k, v)
    checks.inputs(name, q, k, v, enable_gqa)
    scale = checks.scale(name, scale, q.shape[3])
    if attn_mask is not None:
        checks.mask(name, attn_mask, q, (*q.shape[:3], k.shape[2]))
    scheme = route.scheme_of(name, precision, q)
    out, lse = run(q, k, v, attn_mask, is_causal, scale, precision, scheme, return_lse)
    if layout != "bhsd":
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out
