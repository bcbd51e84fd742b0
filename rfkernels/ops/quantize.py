"""Quantize K and V once for many calls of attention, as cross-attention does over the steps of an ODE solver."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from rfkernels import _dispatch, _registry
from rfkernels._errors import BackendUnavailableError
from rfkernels.backends.attention_schemes import MAX_HEAD_DIM, SCHEMES
from rfkernels.backends.reference import quantize as reference
from rfkernels.ops import _attention_checks as checks
from rfkernels.ops import _attention_route as route


@dataclass(frozen=True, eq=False)
class QuantizedKV:
    """K and V as ``quantize`` left them, in the memory order of one backend. Pass it to ``attention`` in the place of k.

    Attributes:
        precision: what ``quantize`` was asked for. scheme: what that meant. backend: whose memory order it is.
        shape: (B, Hk, Sk, D) of K. value_dim: channels of V. dtype, device: of K and V.
        key_mask: (B, 1 or Hk, 1, Sk) bool or None; ``attention`` never attends to keys where it is False.
        tensors: the backend's own parts.
    """

    precision: str
    scheme: str
    backend: str
    shape: tuple[int, int, int, int]
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    key_mask: torch.Tensor | None = field(repr=False)
    tensors: tuple[torch.Tensor | None, ...] = field(repr=False)

    @property
    def k_mean(self) -> torch.Tensor | None:
        """(B, Hk, D) float32, the mean that was taken off K; None under ``bf16``."""
        module = _dispatch.load_backend(self.backend, "quantize")
        kv = module.KV(*self.tensors)
        return kv.k_mean if hasattr(kv, "k_mean") else module.k_mean(kv, self.scheme)


def quantize(
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    key_mask: torch.Tensor | None = None,
    layout: str = "bhsd",
    precision: str = "int8",
) -> QuantizedKV:
    """Quantized K and V for ``rfkernels.attention(q, kv)``; the formulas are in ``rfkernels.attention``.

    Args:
        k: (B, Hk, Sk, D), for ``layout="bshd"`` (B, Sk, Hk, D), any strides; float32, bfloat16 or float16. Never changed.
        v: (B, Hk, Sk, Dv) of the same dtype and device.
        key_mask: (B, Sk) or (B, Hk, Sk) bool, True for the keys that may be attended. The others count in no mean and no
            scale, and ``attention`` masks them.
        layout: ``bhsd`` or ``bshd``.
        precision: as ``rfkernels.attention``.

    Returns:
        A ``QuantizedKV``. A head of K or V that holds a NaN or an infinity gives NaN: the exact path needs the originals.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range; K or V that need a gradient or are
            mapped by vmap.
        BackendUnavailableError: no kernel for this precision on this device.
    """
    name = "quantize"
    k, v = checks.heads_first(name, layout, k=k, v=v)
    checks.keys_and_values(name, k, v)
    if k.dtype == torch.float64:
        raise TypeError(f"{name}: k must be float32, bfloat16 or float16; got torch.float64")
    for argument, tensor in (("k", k), ("v", v)):
        if tensor.shape[3] > MAX_HEAD_DIM:
            raise ValueError(
                f"{name}: {argument} must have at most {MAX_HEAD_DIM} channels; got {tensor.shape[3]}"
            )
    if _dispatch.transforms_active() or _dispatch.recorded(k, v):
        raise ValueError(
            f"{name}: k and v must not require a gradient or be mapped by vmap, which codes do not carry; pass them to "
            "attention itself"
        )
    valid = _valid(name, key_mask, k)
    scheme = route.scheme_of(name, precision, k)
    backend = _backend(k, scheme)
    if _dispatch.plain(k, v, key_mask):
        tensors = _parts(k, v, valid, scheme, backend)
    else:
        tensors = quantize_op(k, v, valid, scheme, backend)
    tensors = _with_gaps(tensors, scheme, backend)
    return QuantizedKV(
        precision, scheme, backend, tuple(k.shape), v.shape[3], k.dtype, k.device,
        None if key_mask is None else valid[:, : _mask_heads(key_mask), None], tensors,
    )  # fmt: skip


def _backend(k: torch.Tensor, scheme: str) -> str:
    """Whose kernels quantize; in a graph the choice that its kernels will find at run time."""
    if torch.compiler.is_compiling():
        return "native" if k.is_cpu else "triton"
    found = route.choose("quantize", scheme, k)
    if isinstance(found, str):
        raise BackendUnavailableError(f"quantize: {found}; rfkernels.use_backend('reference') can")
    return found[0]


def _parts(k, v, valid, scheme: str, backend: str) -> list[torch.Tensor]:
    """The backend's tensors, in memory of their own."""
    with torch.no_grad():
        parts = _dispatch.load_backend(backend, "quantize").quantize_kv(k, v, scheme, valid)
    inputs = {t.untyped_storage().data_ptr() for t in (k, v)}
    return [
        part.clone(memory_format=torch.contiguous_format)
        if part.untyped_storage().data_ptr() in inputs  # values that are bfloat16 already
        else part.contiguous()
        for part in parts
        if part is not None
    ]


def _with_gaps(parts: list[torch.Tensor], scheme: str, backend: str) -> tuple:
    """The parts with None where the scheme has none, as an op's list of tensors cannot say it."""
    if backend == "native":
        return tuple(parts)
    kind, rest = SCHEMES[scheme], iter(parts)
    there = (True, kind.rotated, kind.rotated, True, kind.pv == "u8", kind.pv != "bf16", True)
    return tuple(next(rest) if part else None for part in there)


def _fake(k, v, valid, scheme: str, backend: str) -> list[torch.Tensor]:
    if backend == "native":
        return _dispatch.load_backend(backend, "quantize").empty_kv(k, v, scheme)
    parts = reference.quantize_kv(k, v, scheme, valid)
    return [part.new_empty(part.shape) for part in parts if part is not None]


def _below_autograd(*args):
    """Gradients never reach the op: ``quantize`` refuses them with the reason."""
    with _registry.below_autograd():
        return quantize_op(*args)


quantize_op = _registry.register(
    "quantize",
    "(Tensor k, Tensor v, Tensor? valid, str scheme, str backend) -> Tensor[]",
    kernel=_parts,
    fake=_fake,
    autograd=_below_autograd,
)


def _mask_heads(key_mask: torch.Tensor) -> int | None:
    return 1 if key_mask.ndim == 2 else None


def _valid(op: str, key_mask: object, k: torch.Tensor) -> torch.Tensor | None:
    """The key mask as an expanded (B, Hk, Sk)."""
    if key_mask is None:
        return None
    batch, heads, keys = k.shape[:3]
    if not isinstance(key_mask, torch.Tensor) or key_mask.dtype != torch.bool:
        raise TypeError(f"{op}: key_mask must be a bool tensor; got {checks.describe(key_mask)}")
    if key_mask.shape not in ((batch, keys), (batch, heads, keys)):
        raise ValueError(
            f"{op}: key_mask must have shape {(batch, keys)} or {(batch, heads, keys)}; got {tuple(key_mask.shape)}"
        )
    if key_mask.device != k.device:
        raise ValueError(
            f"{op}: key_mask must be on the device of k, {k.device}; got {key_mask.device}"
        )
    return (key_mask[:, None] if key_mask.ndim == 2 else key_mask).expand(batch, heads, keys)
