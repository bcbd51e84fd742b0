"""Which backend runs a scheme of attention, and the error or the reason where none does."""

from __future__ import annotations

from types import ModuleType

import torch

from rfkernels import _dispatch
from rfkernels._errors import BackendUnavailableError
from rfkernels.backends.attention_schemes import PRECISIONS, resolve

# The schemes that each backend's kernels are written for.
SERVED = {
    ("native", "cpu"): ("int8_u8", "int8_bf16", "bf16"),
    ("triton", "cpu"): ("int8_bf16", "int8_fp8", "fp8", "bf16"),
    ("triton", "cuda"): ("int8_bf16", "int8_fp8", "fp8", "bf16"),
}
FP8_CAPABILITY = (8, 9)


_capabilities: dict[int | None, tuple[int, int]] = {}


def _capability(index: int | None) -> tuple[int, int]:
    """Compute capability of a CUDA device; asked of the driver once, as it costs microseconds."""
    if torch.compiler.is_compiling():
        return torch.cuda.get_device_capability(index)
    if index not in _capabilities:
        _capabilities[index] = torch.cuda.get_device_capability(index)
    return _capabilities[index]


def scheme_of(op: str, precision: str, q: torch.Tensor) -> str:
    """The concrete scheme that a precision means for tensors like ``q`` (..., D)."""
    if precision not in PRECISIONS:
        raise ValueError(
            f"{op}: precision must be one of {', '.join(PRECISIONS)}; got {precision!r}"
        )
    if precision != "int8":
        return precision
    if q.is_cpu:
        return "int8_u8"
    visible = q.is_cuda and torch.cuda.is_available()
    capability = _capability(q.device.index) if visible else None
    return resolve(precision, q.device.type, q.shape[-1], capability)


def _reason(name: str, scheme: str, device: str, index: int | None, op: str) -> str | None:
    """Why a backend does not run the scheme on that device."""
    if name == "reference":
        return None
    reason = _dispatch.unavailable_reason(name, device, op)
    if reason is not None:
        return reason
    served = SERVED.get((name, device), ())
    if scheme not in served:
        return f"its kernels serve {', '.join(served) or 'no scheme'} on {device}, not {scheme}"
    return _too_old(scheme, device, index)


def _too_old(scheme: str, device: str, index: int | None) -> str | None:
    """Why the device has no instructions for the scheme."""
    if device == "cuda" and "fp8" in scheme and _capability(index) < FP8_CAPABILITY:
        return f"{scheme} needs compute capability 8.9; this device has {'.'.join(map(str, _capability(index)))}"
    return None


_found: dict[tuple[str, str, str, int | None], tuple[str, ModuleType]] = {}


def choose(op: str, scheme: str, q: torch.Tensor) -> tuple[str, ModuleType] | str:
    """(name, module) of the backend that runs ``scheme`` on the device of ``q``; a string: why PyTorch has to.

    Raises:
        BackendUnavailableError: the forced backend cannot, or the scheme has no kernel for this device at all.
    """
    device, index = ("cpu", None) if q.is_cpu else (q.device.type, q.device.index)
    forced = _dispatch.forced_backend()
    if forced is not None:
        reason = _reason(forced, scheme, device, index, op)
        if reason is not None:
            raise BackendUnavailableError(
                f"{op}: backend {forced!r} cannot run {scheme} on {device}: {reason}"
            )
        return forced, _dispatch.load_backend(forced, op)
    key = (op, scheme, device, index)
    found = _found.get(key)
    if found is not None:
        return found
    reasons = {}
    for name in ("native", "triton"):
        if name == "triton" and device == "cpu":
            continue  # its interpreter: only by force
        reason = _reason(name, scheme, device, index, op)
        if reason is None:
            _found[key] = name, _dispatch.load_backend(name, op)
            return _found[key]
        reasons[name] = reason
    text = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    written = any(scheme in SERVED.get((name, device), ()) for name in reasons)
    if not written or _too_old(scheme, device, index):
        raise BackendUnavailableError(
            f"{op}: precision {scheme!r} has no kernel for {device} here ({text}); use precision='int8'"
        )
    return f"no kernel can run here ({text})"
