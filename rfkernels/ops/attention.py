"""Quantized scaled dot product attention, with masks, causality, grouped heads and derivatives."""

from __future__ import annotations

import torch

from rfkernels import _dispatch
from rfkernels.ops import _attention_checks as checks
from rfkernels.ops._attention_early import early_handover
from rfkernels.ops._attention_kv import attend_quantized
from rfkernels.ops._attention_op import Attention, attention_op
from rfkernels.ops._attention_route import scheme_of
from rfkernels.ops._attention_run import decide, hand_over, serve
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
    """softmax(scale q k^T + mask) v with Q K^T and P V in 8-bit or 16-bit numbers.

    K is smoothed (its mean over the keys that may be attended is subtracted, which changes no softmax; SageAttention,
    arXiv 2410.02367), Q and K are rotated by fixed random signs and a Hadamard transform, and codes are

        Q  rint(y 127 / a), a = max |y| of a row;   K  the same, a = max |y| of 64 keys;   fp8: e4m3(y 448 / a)
        V  u8: per channel c and key s, rint(v / c 127 / s);   e4m3: e4m3(v 448 / c), c = max |v| of a channel.

    The softmax runs over blocks of 128 or 256 keys against a floating reference r: with x the scores in log2 units (for u8
    plus log2 s) and m their maximum in a block, r = max(m, running maximum - 40), P = 2^(x - r) is stored as rint(255 P),
    bf16(P) or e4m3(448 P), the sums so far are multiplied by 2^(r_before - r), and the denominator is summed from the
    unrounded P. ``rfkernels.backends.reference.attention`` is the specification.

    Args:
        q: (B, Hq, Sq, D), for ``layout="bshd"`` (B, Sq, Hq, D); any strides; float32, bfloat16 or float16, with the other
            two alike (under autocast all three are cast as PyTorch's attention casts them). Never changed.
        k: (B, Hk, Sk, D); or a ``QuantizedKV`` from ``rfkernels.quantize``, then without v.
        v: (B, Hk, Sk, Dv). D and Dv from 1 to 256, equal or not.
        attn_mask: bool (True: attend) or floating (added to the scores; values up to -1e30 mask), 2 to 4 dimensions that
            broadcast to (B, Hq, Sq, Sk), in this order of dimensions for either layout. A float mask may need a gradient.
        is_causal: query i attends keys j <= i only (top-left, as PyTorch); with a mask, both hold.
        scale: factor on the scores, 1 / sqrt(D) by default.
        enable_gqa: let Hq be a multiple of Hk; query head h reads head h // (Hq / Hk) of K and V.
        precision: a scheme: ``int8_u8`` (int8 Q K, unsigned 8-bit P, int8 V), ``int8_bf16`` (int8 Q K, bfloat16 P V),
            ``int8_fp8``, ``fp8`` (e4m3; Triton), ``bf16`` (both in bfloat16); or ``int8``: on the CPU ``int8_u8``, on CUDA
            ``int8_bf16`` for D <= 64 or before compute capability 8.9, else ``int8_fp8``. A
            ``QuantizedKV`` brings its own; ``int8`` stands for it.
        return_lse: also return the natural logarithm of the softmax denominators.

    Returns:
        (B, Hq, Sq, Dv) in the layout, dtype and memory order of q; with ``return_lse`` also (B, Hq, Sq) float32 over the
        scores with their mask and the mean of K. Rows without an open key are 0, their lse -inf.

        A (batch, head) with a NaN, an infinity, a mask value above 1e30 or scores that could pass 1e30 takes PyTorch's
        attention, so exactly the rows that it spoils are NaN. float64 inputs, float16 under ``bf16``, head sizes above 256
        and what no kernel here runs are handed over to PyTorch; ``rfkernels.attention_stats`` counts both.

        A ``QuantizedKV`` has no derivatives, and its heads with a NaN or an infinity give NaN.

        Differentiable once: the backward runs PyTorch's attention on the saved inputs (straight-through), also for lse and
        a float mask; a second derivative raises. Forward-mode derivatives are those of exact attention at the quantized
        value. vmap, torch.func and torch.compile(fullgraph=True) work.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.
        BackendUnavailableError: a scheme without a kernel for the device, or a forced backend that cannot serve the call.
    """
    name = "attention"
    if layout == "bhsd" and return_lse is False:
        handed = early_handover(q, k, v, attn_mask, is_causal, scale, precision)
        if handed is not None:
            return handed
    if isinstance(k, QuantizedKV):
        return attend_quantized(
            q, k, v, attn_mask, is_causal, scale, enable_gqa, layout, precision, return_lse
        )
    if layout != "bhsd":
        q, k, v = checks.heads_first(name, layout, q=q, k=k, v=v)
        if return_lse is False:
            handed = early_handover(q, k, v, attn_mask, is_causal, scale, precision)
            if handed is not None:
                return handed.transpose(1, 2)
    if checks.autocasts(q):
        q, k, v, attn_mask = checks.autocast(q, k, v, attn_mask)
    checks.inputs(name, q, k, v, enable_gqa)
    scale = checks.scale(name, scale, q.shape[3])
    if attn_mask is not None:
        checks.mask(name, attn_mask, q, (*q.shape[:3], k.shape[2]))
    if is_causal.__class__ is not bool or return_lse.__class__ is not bool:
        checks.flags(name, is_causal=is_causal, return_lse=return_lse)
    scheme = scheme_of(name, precision, q)
    args = (q, k, v, attn_mask, is_causal, scale, precision, scheme, return_lse)
    if _dispatch.transforms_active():
        out, lse = Attention.apply(*args)
    elif not _dispatch.plain_alike(q, k, v, attn_mask):
        out, lse = attention_op(*args)
    else:
        found = decide(q, k, v, attn_mask, is_causal, scheme)
        if isinstance(found, str):
            out, lse = hand_over(*args[:7], return_lse, found)
        elif _dispatch.recorded(q, k, v, attn_mask):
            out, lse = Attention.apply(*args)
        else:
            out, lse = serve(found, *args)
    if layout != "bhsd":
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out
