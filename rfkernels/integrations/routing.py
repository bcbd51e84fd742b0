"""One call of scaled_dot_product_attention, taken by `rf.attention` where it may be, and the count
of where it may not.

Every drop-in of this room ends here. A call that the quantized kernel must not take goes to the
function that was there before, with the arguments as they came, and the reason is counted: numbers
never change without a trace. The rules, in the order in which they are asked:

* a tensor subclass with a meaning of its own (nested, DTensor, ...);
* dropout; a device other than CPU and CUDA; dtypes that differ or that are not float32, bfloat16 or
  float16;
* shapes: 3 or 4 dimensions, head_dim of the keys and of the values 1..256, equal batches, heads
  equal or (with `enable_gqa`) the query's a multiple;
* a gradient or a forward-mode derivative is needed, unless `training=True`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import rfkernels
from rfkernels._dispatch import recorded, transforms_active
from rfkernels.backends.attention_schemes import MAX_HEAD_DIM, PRECISIONS
from rfkernels.ops._attention_early import early_handover
from rfkernels.ops._attention_stats import Tally

__all__ = ["TORCH_SDPA", "RouteCounts", "check_precision", "refusal", "route"]

# The function itself, whatever torch.nn.functional's name points at now.
TORCH_SDPA = torch._C._nn.scaled_dot_product_attention
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_any_autocast = torch._C._is_any_autocast_enabled
_lock = threading.Lock()


class RouteCounts:
    """How many calls came, how many `rf.attention` took, and why the others went to the original.

    Calls are counted where Python runs them: inside a compiled graph, whose Python ran once while
    it was traced, nothing is counted here (`rf.attention_stats()` counts those, at run time).
    """

    def __init__(self) -> None:
        self._routed = Tally()
        self._fallbacks: dict[str, Tally] = {}
        # One call that `rf.attention` takes, outside of graphs.
        self.count_routed = self._routed.add

    def count(self, reason: str | None) -> None:
        """Add one call; `reason` is None when `rf.attention` takes it."""
        if torch.compiler.is_compiling():
            return
        if reason is None:
            self.count_routed()
            return
        tally = self._fallbacks.get(reason)
        if tally is None:
            tally = self._fallbacks.setdefault(reason, Tally())
        tally.add()

    def as_dict(self, reset: bool = False) -> dict[str, Any]:
        """{"calls": int, "routed": int, "fallbacks": {reason: int}}, a copy; `reset` counts on from zero."""
        with _lock:
            routed = self._routed.read(reset)
            found = {reason: tally.read(reset) for reason, tally in list(self._fallbacks.items())}
        fallbacks = {reason: calls for reason, calls in found.items() if calls}
        return {
            "calls": routed + sum(fallbacks.values()),
            "routed": routed,
            "fallbacks": fallbacks,
        }


def check_precision(where: str, precision: object) -> str:
    """The precision, if `rf.attention` knows it.

    Raises:
        TypeError: not a string.
        ValueError: an unknown name.
    """
    if not isinstance(precision, str):
        raise TypeError(f"{where}: precision must be a string; got {type(precision).__name__}")
    if precision not in PRECISIONS:
        raise ValueError(
            f"{where}: precision must be one of {', '.join(PRECISIONS)}; got {precision!r}"
        )
    return precision


def _autocast(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The cast that torch.autocast applies to the arguments of torch's own function."""
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return query, key, value, attn_mask
    dtype = torch.get_autocast_dtype(device)

    def cast(t: torch.Tensor) -> torch.Tensor:
        return t.to(dtype) if t.dtype in _DTYPES else t

    mask = None if attn_mask is None else cast(attn_mask)
    return cast(query), cast(key), cast(value), mask


def _overridden(*tensors: torch.Tensor | None) -> bool:
    """True when a tensor is of a kind that takes torch's functions into its own hands."""
    # Not torch.overrides.has_torch_function: under torch.set_default_device that is always true.
    for t in tensors:
        if t is None:
            continue
        if t.is_nested:  # those of the strided kind are plain tensors by type
            return True
        if type(t) in _PLAIN:
            continue
        if type(t).__torch_function__ is not torch._C._disabled_torch_function_impl:
            return True
        if is_traceable_wrapper_subclass(t):
            return True
    return False


def refusal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    enable_gqa: bool,
    training: bool,
) -> str | None:
    """Why `rf.attention` does not take this call, as a phrase; None when it does.

    Tensors are (..., heads, length, head_dim), as torch's function has them.
    """
    # Written out without loops: it runs before every call.
    if dropout_p > 0:
        return "dropout"
    if not (query.is_cpu or query.is_cuda):
        return "a device other than cpu and cuda"
    device, dtype = query.device, query.dtype
    if key.device != device or value.device != device:
        return "tensors on different devices"
    if dtype not in _DTYPES:
        return "a dtype other than float32, bfloat16 and float16"
    if key.dtype != dtype or value.dtype != dtype:
        return "query, key and value of different dtypes"
    if attn_mask is not None:
        if attn_mask.device != device:
            return "tensors on different devices"
        if attn_mask.dtype not in (torch.bool, torch.float32, dtype):
            return "a mask that is neither bool nor float32 nor of the query's dtype"
    reason = _shape_refusal(query.shape, key.shape, value.shape, enable_gqa)
    if reason is not None or training:
        return reason
    if recorded(query, key, value, attn_mask):
        return "a gradient is needed (training=True takes these calls)"
    if not torch.compiler.is_compiling() and transforms_active():
        return "a torch.func transform or forward-mode derivative (training=True takes these calls)"
    return None


def _shape_refusal(
    query: torch.Size, key: torch.Size, value: torch.Size, enable_gqa: bool
) -> str | None:
    dims = len(query)
    if dims not in (3, 4) or len(key) != dims or len(value) != dims:
        return "fewer than 3 or more than 4 dimensions"
    if not (1 <= query[-1] <= MAX_HEAD_DIM and 1 <= value[-1] <= MAX_HEAD_DIM):
        return f"a head_dim outside 1..{MAX_HEAD_DIM}"
    heads, kv_heads = query[-3], key[-3]
    grouped = enable_gqa and kv_heads > 0 and heads % kv_heads == 0
    fits = (
        key[-1] == query[-1]
        and value[-2] == key[-2]
        and value[-3] == kv_heads
        and (dims == 3 or query[0] == key[0] == value[0])
        and (heads == kv_heads or grouped)
    )
    return None if fits else "shapes that only torch can broadcast"


def route(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    original: Callable[..., torch.Tensor],
    precision: str,
    training: bool,
    counts: RouteCounts,
) -> torch.Tensor:
    """torch's function of these arguments: by `rf.attention` in `precision`, or by `original`.

    Args:
        query, key, value: (B, H, S, D), or (H, S, D) as one batch, as in torch's function; so are
            attn_mask, dropout_p, is_causal, scale and enable_gqa.
        original: what takes the calls that `refusal` names a reason for.
        precision: of `rf.attention`.
        training: take calls that need a gradient as well.
        counts: where the call is counted.
    """
    if dropout_p == 0.0 and (training or not recorded(query, key, value)) and not _any_autocast():
        # So small that `rf.attention` would give it back: every question below costs more.
        handed = early_handover(query, key, value, attn_mask, is_causal, scale, precision)
        if handed is not None:
            counts.count_routed()
            return handed
    reason: str | None
    if _overridden(query, key, value, attn_mask):
        reason = "a tensor subclass"
    else:
        q, k, v, mask = _autocast(query, key, value, attn_mask)
        reason = refusal(q, k, v, mask, dropout_p, enable_gqa, training)
    counts.count(reason)
    if reason is not None:
        return original(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    single = q.ndim == 3
    if single:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    out = rfkernels.attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        precision=precision,
    )
    return out.squeeze(0) if single else out
