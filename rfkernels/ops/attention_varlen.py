"""Attention over packed sequences of different lengths."""

from __future__ import annotations

import torch

from rfkernels.ops import _attention_checks as checks
from rfkernels.ops.attention import attention


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    precision: str = "int8",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``rfkernels.attention`` of every sequence of a packed batch by itself, in flash-attention's convention.

    Sequence i is rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] of q and the like of k and v. Each has its own mean and scales
    of K and V, so no sequence depends on its neighbours. Sequences of one length run as one batch, others one by one. The
    offsets are read by the host once a call, which on CUDA waits for the device; so neither CUDA graphs nor
    ``torch.compile(fullgraph=True)`` take it.

    Args:
        q: (total q, Hq, D). k: (total k, Hk, D). v: (total k, Hk, Dv).
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) int32 or int64, from 0 to the total, not falling; a sequence may be
            empty. Rows of q without keys are 0.
        is_causal: query i of a sequence attends its keys j <= i (top-left).
        scale, enable_gqa, precision: as ``rfkernels.attention``.
        return_lse: also return (total q, Hq) float32.

    Returns:
        (total q, Hq, Dv), differentiable as ``rfkernels.attention``.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as ``rfkernels.attention``; offsets that do not fit.
    """
    name = "attention_varlen"
    for argument, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: {argument} must be a tensor; got {type(tensor).__name__}")
        if tensor.ndim != 3:
            raise ValueError(
                f"{name}: {argument} must have 3 dimensions (total, heads, channels); got shape {tuple(tensor.shape)}"
            )
    if k.shape[0] != v.shape[0]:
        raise ValueError(f"{name}: v must have the length of k, {k.shape[0]}; got {v.shape[0]}")
    rows = _offsets(name, "cu_seqlens_q", cu_seqlens_q, q.shape[0])
    keys = _offsets(name, "cu_seqlens_k", cu_seqlens_k, k.shape[0])
    if len(rows) != len(keys):
        raise ValueError(
            f"{name}: cu_seqlens_k must have the length of cu_seqlens_q, {len(rows)}; got {len(keys)}"
        )
    options = {
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
        "precision": precision,
        "return_lse": return_lse,
    }
    sequences = len(rows) - 1
    lengths = {(rows[i + 1] - rows[i], keys[i + 1] - keys[i]) for i in range(sequences)}
    parts = []
    if len(lengths) <= 1:
        count, (length, width) = (sequences, lengths.pop()) if lengths else (1, (0, 0))
        shapes = ((q, count, length), (k, count, width), (v, count, width))
        batched = (t.unflatten(0, (b, s)).transpose(1, 2) for t, b, s in shapes)
        parts.append(attention(*batched, **options))
    else:
        for i in range(sequences):
            spans = (slice(rows[i], rows[i + 1]), *[slice(keys[i], keys[i + 1])] * 2)
            one = (t[s].transpose(0, 1)[None] for t, s in zip((q, k, v), spans, strict=True))
            parts.append(attention(*one, **options))
    if not return_lse:
        return _packed([p.transpose(1, 2) for p in parts])
    return (
        _packed([p[0].transpose(1, 2) for p in parts]),
        _packed([p[1].transpose(1, 2) for p in parts]),
    )


def _packed(parts: list[torch.Tensor]) -> torch.Tensor:
    """(B, S, ...) results one after the other."""
    flat = [part.flatten(0, 1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _offsets(op: str, name: str, value: object, total: int) -> list[int]:
    """The offsets as ints of the host."""
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{op}: {name} must be an int32 or int64 tensor; got {checks.describe(value)}"
        )
    if value.ndim != 1 or not len(value):
        raise ValueError(f"{op}: {name} must have shape (sequences + 1,); got {tuple(value.shape)}")
    found = value.tolist()
    if found[0] != 0 or found[-1] != total or found != sorted(found):
        raise ValueError(f"{op}: {name} must rise from 0 to {total}; got {found[:8]}")
    return found
