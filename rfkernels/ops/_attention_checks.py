"""Argument checks of attention and quantize. The common case costs a few comparisons; refusals look for the rule broken."""

from __future__ import annotations

import math

import torch

from rfkernels.ops import _checks
from rfkernels.ops._checks import FLOATS, describe

LAYOUTS = ("bhsd", "bshd")


def heads_first(op: str, layout: str, **tensors: object) -> tuple[torch.Tensor, ...]:
    """The tensors as (B, H, S, D) views."""
    if layout not in LAYOUTS:
        raise ValueError(f"{op}: layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    if layout == "bhsd":
        return tuple(tensors.values())
    for name, tensor in tensors.items():
        four(op, name, tensor)
    return tuple(tensor.transpose(1, 2) for tensor in tensors.values())


def four(op: str, name: str, value: object) -> None:
    """A tensor of 4 dimensions."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor; got {type(value).__name__}")
    if value.ndim != 4:
        raise ValueError(
            f"{op}: {name} must have 4 dimensions (batch, heads, length, channels); got shape {tuple(value.shape)}"
        )


def _same(op: str, name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    _checks.tensor(op, name, value)
    if value.dtype != other.dtype:
        raise TypeError(
            f"{op}: {name} must have the dtype of {other_name}, {other.dtype}; got {value.dtype}"
        )
    if value.device != other.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {other_name}, {other.device}; got {value.device}"
        )


def keys_and_values(op: str, k: object, v: object) -> None:
    """K (B, Hk, Sk, D) and V (B, Hk, Sk, Dv) of one dtype and device."""
    four(op, "k", k)
    four(op, "v", v)
    _checks.tensor(op, "k", k)
    _same(op, "v", v, "k", k)
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"{op}: v must have the batch, heads and length of k, {tuple(k.shape[:3])}; got {tuple(v.shape[:3])}"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[3] < 1:
            raise ValueError(f"{op}: {name} must have at least one channel; got {describe(tensor)}")


def inputs(op: str, q: object, k: object, v: object, enable_gqa: bool) -> None:
    """q, k and v that attention takes."""
    if (
        isinstance(q, torch.Tensor)
        and isinstance(k, torch.Tensor)
        and isinstance(v, torch.Tensor)
        and q.ndim == k.ndim == v.ndim == 4
    ):
        (b, h, _, d), (kb, kh, ks, kd), (vb, vh, vs, vd) = q.shape, k.shape, v.shape
        dtype = q.dtype
        if (
            b == kb == vb
            and h == kh == vh
            and ks == vs
            and d == kd > 0
            and vd > 0
            and dtype in FLOATS
            and k.dtype is dtype
            and v.dtype is dtype
            and ((q.is_cpu and k.is_cpu and v.is_cpu) or q.device == k.device == v.device)
            and q.layout is k.layout is v.layout is torch.strided
        ):
            return
    four(op, "q", q)
    keys_and_values(op, k, v)
    _same(op, "q", q, "k", k)
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"{op}: k must have the batch size of q, {q.shape[0]}; got {k.shape[0]}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"{op}: k must have the head size of q, {q.shape[3]}; got {k.shape[3]}")
    groups(op, q.shape[1], k.shape[1], enable_gqa)


def groups(op: str, heads: int, kv_heads: int, enable_gqa: bool) -> None:
    """Query heads that share the heads of K and V."""
    if heads == kv_heads:
        return
    if not enable_gqa:
        raise ValueError(
            f"{op}: k must have the heads of q, {heads}, unless enable_gqa is True; got {kv_heads}"
        )
    if not kv_heads or heads % kv_heads:
        raise ValueError(
            f"{op}: the heads of q must be a multiple of those of k, {kv_heads}; got {heads}"
        )


def mask(
    op: str,
    value: object,
    q: torch.Tensor,
    shape: tuple[int, int, int, int],
    name: str = "attn_mask",
) -> None:
    """A bool or float mask of 2 to 4 dimensions that broadcasts to (B, Hq, Sq, Sk)."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor; got {type(value).__name__}")
    if value.dtype != torch.bool and value.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be bool or floating point; got {value.dtype}")
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a strided tensor; got layout {value.layout}")
    if value.device != q.device:
        raise ValueError(f"{op}: {name} must be on the device of q, {q.device}; got {value.device}")
    sizes = value.shape
    if not 2 <= len(sizes) <= 4 or any(
        size not in (1, full) for size, full in zip(sizes, shape[-len(sizes) :], strict=True)
    ):
        raise ValueError(
            f"{op}: {name} must have 2 to 4 dimensions that broadcast to {tuple(shape)}; got {tuple(sizes)}"
        )


def scale(op: str, value: object, head_dim: int) -> float:
    """The factor on the scores, 1 / sqrt(D) by default."""
    if value is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(value, (bool, torch.Tensor)) or not hasattr(value, "__float__"):
        raise TypeError(f"{op}: scale must be a float; got {type(value).__name__}")
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{op}: scale must be finite; got {value}")
    return value


def autocasts(q: object) -> bool:
    """True where autocast is on for the device of q."""
    if not isinstance(q, torch.Tensor):
        return False
    if q.is_cpu:
        return torch.is_autocast_enabled("cpu")
    return not q.is_meta and torch.is_autocast_enabled(q.device.type)


def autocast(*tensors: object) -> tuple[object, ...]:
    """The tensors as autocast hands them to PyTorch's attention: floating ones but float64 in its dtype."""
    first = tensors[0]
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        t.to(dtype)
        if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    )


def flags(op: str, **values: object) -> None:
    """True or False, nothing that only looks like it."""
    for name, value in values.items():
        if value is not True and value is not False:
            raise TypeError(f"{op}: {name} must be True or False; got {value!r}")
