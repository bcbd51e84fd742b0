"""Small calls on the CPU that PyTorch's attention serves, handed over before any check.

The checks and the rule cost more than PyTorch's attention of a few rows takes. Here one call into C++ packs what the rule
reads into a number, and one look-up by it decides. Whatever is unusual is left to the checks and their errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from rfkernels import _dispatch
from rfkernels.backends.native import handover_key
from rfkernels.backends.reference.exact_attention import torch_attention
from rfkernels.ops._attention_handover import FLOAT64, HEAD_SIZE, handover_reason
from rfkernels.ops._attention_stats import handover_counter

_PRECISIONS = ("int8", "int8_u8", "int8_bf16", "bf16")
_MOST = 1024  # decisions kept: a program has few shapes, or one for each length of a sequence

# What counts the hand-over of calls alike; None: a kernel may serve them.
_decisions: dict[tuple[int, str, int], Callable[[], object] | None] = {}

# Bound here: looking an attribute up costs as much as the call itself.
_is_dynamo = torch.compiler.is_dynamo_compiling
_threads = torch.get_num_threads
_forced = _dispatch._forced.get


def early_handover(q, k, v, attn_mask, is_causal, scale, precision) -> torch.Tensor | None:
    """PyTorch's attention of (B, H, S, D) tensors where the rule sends plain small calls; None: not such a call."""
    # Dynamo cannot trace the rest; what else compiles has a mode, which makes the key negative.
    if _is_dynamo() or _forced() is not None:
        return None
    key = handover_key(q, k, v, attn_mask, is_causal)
    if key < 0:
        return None
    try:
        count = _decisions[key, precision, _threads()]
    except (KeyError, TypeError):
        if precision.__class__ is not str or precision not in _PRECISIONS:
            return None
        count = _decide(key, precision, q, k, attn_mask, is_causal)
    if count is None:
        return None
    try:
        if scale is None and not is_causal:  # PyTorch takes 0.3 us to read a keyword
            out = torch_attention(q, k, v, attn_mask)
        elif scale is None or (scale.__class__ is float and math.isfinite(scale)):
            out = torch_attention(q, k, v, attn_mask, 0.0, is_causal, scale=scale)
        else:
            return None
    except RuntimeError:  # the checks word it
        return None
    count()
    return out


def _decide(key, precision, q, k, attn_mask, is_causal) -> Callable[[], object] | None:
    _, _, queries, dim = q.shape
    mask = "bool" if attn_mask is not None else "causal" if is_causal else "none"
    threads = _threads()
    scheme = "int8_u8" if precision == "int8" else precision
    reason = handover_reason(queries, k.shape[2], dim, dim, mask, q.dtype, "cpu", threads, scheme)
    if len(_decisions) >= _MOST:
        _decisions.clear()
    # Those two are no matter of microseconds, and the drop-ins name them otherwise.
    left = reason in (None, FLOAT64, HEAD_SIZE)
    count = None if left else handover_counter(precision, reason)
    _decisions[key, precision, threads] = count
    return count


def forget() -> None:
    """Ask the rule again, after a change of its table."""
    _decisions.clear()
