"""Attention over K and V that ``rfkernels.quantize`` has quantized."""

from __future__ import annotations

import torch

from rfkernels import _dispatch, _registry
from rfkernels._errors import BackendUnavailableError
from rfkernels.ops import _attention_checks as checks
from rfkernels.ops._attention_run import expanded, new_lse, new_output
from rfkernels.ops._attention_stats import count_call
from rfkernels.ops.quantize import QuantizedKV


def attend_quantized(
    q, kv: QuantizedKV, v, attn_mask, is_causal, scale, enable_gqa, layout, precision, return_lse
):
    """See ``rfkernels.attention``; no gradient."""
    name = "attention"
    if v is not None:
        raise TypeError(f"{name}: v must be left out with a QuantizedKV; got {checks.describe(v)}")
    (q,) = checks.heads_first(name, layout, q=q)
    if checks.autocasts(q):
        q, attn_mask = checks.autocast(q, attn_mask)
    _check(q, kv, enable_gqa, precision)
    scale = checks.scale(name, scale, q.shape[3])
    keys = kv.shape[2]
    if attn_mask is not None:
        checks.mask(name, attn_mask, q, (*q.shape[:3], keys))
    checks.flags(name, is_causal=is_causal, return_lse=return_lse)
    if _dispatch.transforms_active() or _dispatch.recorded(q, attn_mask):
        raise ValueError(
            f"{name}: derivatives and vmap need the original k and v; got a QuantizedKV (torch.no_grad() drops the gradient)"
        )
    attn_mask = _with_key_mask(attn_mask, kv.key_mask, q.shape[1])
    tensors = kv.tensors
    args = (
        attn_mask, is_causal, scale, kv.precision, kv.scheme, kv.backend, keys, kv.value_dim, return_lse,
    )  # fmt: skip
    if _dispatch.plain(q, attn_mask):
        out, lse = _serve(q, tensors, *args)
    else:
        out, lse = attention_kv_op(q, list(tensors), *args)
    if layout != "bhsd":
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


def _check(q: object, kv: QuantizedKV, enable_gqa: bool, precision: object) -> None:
    name = "attention"
    checks.four(name, "q", q)
    if q.dtype != kv.dtype:
        raise TypeError(
            f"{name}: q must have the dtype of the QuantizedKV, {kv.dtype}; got {q.dtype}"
        )
    if q.device != kv.device:
        raise ValueError(
            f"{name}: q must be on the device of the QuantizedKV, {kv.device}; got {q.device}"
        )
    batch, heads, _, dim = kv.shape
    if q.shape[0] != batch or q.shape[3] != dim:
        raise ValueError(
            f"{name}: q must have the batch and head size of the QuantizedKV, {batch} and {dim}; "
            f"got {q.shape[0]} and {q.shape[3]}"
        )
    checks.groups(name, q.shape[1], heads, enable_gqa)
    if precision not in ("int8", kv.precision, kv.scheme):
        raise ValueError(
            f"{name}: precision must be that of the QuantizedKV, {kv.precision!r}; got {precision!r}"
        )


def _with_key_mask(attn_mask, key_mask, heads: int):
    """Both masks in one."""
    if key_mask is None:
        return attn_mask
    if key_mask.shape[1] not in (1, heads):
        key_mask = key_mask.repeat_interleave(heads // key_mask.shape[1], 1)
    if attn_mask is None:
        return key_mask
    if attn_mask.dtype == torch.bool:
        return attn_mask & key_mask
    return attn_mask.masked_fill(~key_mask, -torch.inf)


def _serve(
    q, tensors, attn_mask, is_causal, scale, precision, scheme, backend, keys, value_dim, return_lse
):
    """(out, lse) from the backend whose codes they are."""
    forced = _dispatch.forced_backend()
    if forced not in (None, backend):
        raise BackendUnavailableError(
            f"attention: backend {forced!r} cannot read a QuantizedKV of {backend!r}; quantize again under the same backend"
        )
    kv = _dispatch.load_backend(backend, "quantize").KV(*tensors)
    module = _dispatch.load_backend(backend, "attention")
    out, lse = new_output(q, value_dim), new_lse(q, return_lse)
    mask = None if attn_mask is None else expanded(attn_mask, q, keys)
    wanted = lse if return_lse else None
    exact = module.attention(q, None, None, kv, mask, is_causal, scale, scheme, out, wanted)
    count_call(precision, scheme, backend, exact)
    return out, lse


def _fake(q, tensors, *args):
    value_dim, return_lse = args[-2:]
    return new_output(q, value_dim), new_lse(q, return_lse)


def _refuse(q, tensors, attn_mask, *args):
    """Gradients never reach the op: ``attend_quantized`` refuses them with the reason."""
    with _registry.below_autograd():
        return attention_kv_op(q, tensors, attn_mask, *args)


attention_kv_op = _registry.register(
    "attention_kv",
    "(Tensor q, Tensor?[] tensors, Tensor? attn_mask, bool is_causal, float scale, str precision, str scheme, "
    "str backend, SymInt keys, SymInt value_dim, bool return_lse) -> (Tensor, Tensor)",
    kernel=_serve,
    fake=_fake,
    autograd=_refuse,
)
