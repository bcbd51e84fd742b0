"""SageAttention's functions on `rf.attention`, so that code written for it switches by one import.

    from rfkernels import sageattn            # instead of: from sageattention import sageattn

The signature and the meaning are SageAttention's: "HND" is (batch, heads, length, head_dim), "NHD"
(batch, length, heads, head_dim); the output has the dtype of q; the log-sum-exp is natural, float32
and (batch, heads, length). What it does more: masks, any head_dim up to 256, value rows of another
size than the keys', gradients. What it refuses: keywords that it does not know, which SageAttention
ignores (a mask among them).
"""

from __future__ import annotations

import torch

import rfkernels

__all__ = ["sageattn", "sageattn_varlen"]

_LAYOUTS = {"HND": "bhsd", "NHD": "bshd"}


def _layout(op: str, tensor_layout: object) -> str:
    if not isinstance(tensor_layout, str) or tensor_layout not in _LAYOUTS:
        raise ValueError(f"{op}: tensor_layout must be HND or NHD; got {tensor_layout!r}")
    return _LAYOUTS[tensor_layout]


def _check_smooth_k(op: str, smooth_k: object) -> None:
    if not isinstance(smooth_k, bool):
        raise TypeError(f"{op}: smooth_k must be a bool; got {type(smooth_k).__name__}")


def sageattn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    *,
    attn_mask: torch.Tensor | None = None,
    smooth_k: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(sm_scale q k^T + attn_mask) v in `rf.attention`'s precision "int8".

    Args:
        q, k, v: (B, H, S, D) for "HND", (B, S, H, D) for "NHD"; the heads of q may be a multiple of
            those of k and v.
        tensor_layout: "HND" or "NHD".
        is_causal: query i sees the keys j <= i (top-left, also where the lengths differ).
        sm_scale: 1 / sqrt(D) unless given.
        return_lse: also the natural log-sum-exp of every row, float32 (B, H, S).
        attn_mask: bool (True may attend) or added to the scores; broadcasts to (B, H, Sq, Sk).
        smooth_k: accepted either way. The mean of K is always taken out, which changes the output
            by rounding only.

    Raises:
        TypeError, ValueError: as `rf.attention`; an unknown keyword is a TypeError.
    """
    _check_smooth_k("sageattn", smooth_k)
    layout = _layout("sageattn", tensor_layout)
    heads = 1 if layout == "bhsd" else 2
    return rfkernels.attention(
        q,
        k,
        v,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=sm_scale,
        enable_gqa=q.shape[heads] != k.shape[heads],
        layout=layout,
        return_lse=return_lse,
    )


def sageattn_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
) -> torch.Tensor:
    """`sageattn` of packed sequences of different lengths, by `rf.attention_varlen`.

    Args:
        q, k, v: (total length, heads, D); the heads of q may be a multiple of those of k and v.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) offsets of the sequences, from 0 to the total.
        max_seqlen_q, max_seqlen_k: at least the longest sequence; only checked to be integers, as
            the offsets say all there is to know.
        is_causal, sm_scale, smooth_k: as in `sageattn`, sequence by sequence.

    Raises:
        TypeError, ValueError: as `rf.attention_varlen`; an unknown keyword is a TypeError.
    """
    _check_smooth_k("sageattn_varlen", smooth_k)
    for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(
                f"sageattn_varlen: {name} must be an integer; got {type(value).__name__}"
            )
    return rfkernels.attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        is_causal=is_causal,
        scale=sm_scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
