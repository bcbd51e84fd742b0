"""Which backend serves a call, and the guards that decide whether a call may take the short way.

A public function validates its arguments and then takes one of three routes:

* *direct*: plain tensors, nothing watching. The backend's function is called at once.
* *op*: torch.compile, fake tensors, dispatch modes, subclasses, or a gradient is needed. The call goes through
  ``torch.ops.rfkernels`` (``_registry.py``), which ends in the same backend function.
* *composite*: vmap, torch.func or forward-mode differentiation is active, or a scalar tensor requires grad. The reference
  formulas run as plain torch code, which every transform understands, with the same bits for elementwise ops.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType

import torch
from torch.autograd import forward_ad

from rfkernels._errors import BackendUnavailableError

OPS = (
    "ode_step",
    "interpolate",
    "flow_loss",
    "random",
    "quantize",
    "attention",
    "projected_update",
)
MAX_NATIVE_DIMS = 16  # RFK_MAX_DIMS; the reference has the same bits
BACKENDS = ("native", "triton", "reference")  # in the order of preference
# (op, backend, device): why that kernel does not exist.
_ABSENT = {
    (
        "attention",
        "native",
        "cuda",
    ): "there is no CUDA attention kernel; the Triton kernels serve it",
}

_forced: ContextVar[str | None] = ContextVar("rfkernels_backend", default=None)
_modules: dict[tuple[str, str], ModuleType] = {}

# Not peek_interpreter_stack: Dynamo hands that out as an object that is never None.
_is_compiling = torch.compiler.is_compiling
_functorch_level = torch._C._functorch.maybe_current_level
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_mode_depth = torch._C._len_torch_dispatch_stack
_function_mode_depth = torch._C._len_torch_function_stack
_tracing = torch._C._is_tracing
_increment_version = torch._C._increment_version
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def transforms_active() -> bool:
    """True under vmap, torch.func transforms or a forward-mode level; only torch code may run then."""
    return _functorch_level() is not None or forward_ad._current_level >= 0


def batched(*tensors: object) -> bool:
    """True in a backward for many gradients at once: under a transform, or by ``is_grads_batched``, which has no level."""
    return transforms_active() or any(
        isinstance(tensor, torch.Tensor) and _is_batched(tensor) for tensor in tensors
    )


def watched() -> bool:
    """True while compiling or tracing, under a mode or a transform."""
    return bool(
        _is_compiling()
        or _mode_depth()
        or _function_mode_depth()
        or _tracing()
        or _functorch_level() is not None
        or forward_ad._current_level >= 0
    )


def plain(*tensors: object) -> bool:
    """True when no mode, subclass or lazy bit of the given tensors (or None, floats, ints) matters to the call."""
    # is_compiling first: Dynamo cannot trace the others. jit.trace would not see a kernel that is called directly.
    if _is_compiling() or _mode_depth() or _function_mode_depth() or _tracing():
        return False
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and (
            type(tensor) not in _PLAIN
            or tensor.is_neg()
            or tensor.layout is not torch.strided
            or tensor.is_meta
        ):
            return False
    return True


def plain_alike(first: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """``plain`` for strided tensors of one device, in half the time."""
    if _is_compiling() or _mode_depth() or _function_mode_depth() or _tracing() or first.is_meta:
        return False
    if type(first) not in _PLAIN or first.is_neg():
        return False
    for tensor in others:  # noqa: SIM110  (a generator costs half a microsecond)
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_neg()):
            return False
    return True


def recorded(*tensors: object) -> bool:
    """True when autograd is to record the call."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                return True
    return False


def direct_allowed(*tensors: object) -> bool:
    """True when nothing but the numbers of the given tensors matters to the call."""
    return plain(*tensors) and not recorded(*tensors)


def mark_written(*outputs: object) -> None:
    """Tell autograd that the given tensors were written in place, so that a backward through an old value fails."""
    for out in outputs:
        if isinstance(out, torch.Tensor) and not out.is_inference():
            _increment_version((out,))


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for the calls inside: ``"native"``, ``"triton"``, ``"reference"``, or ``"auto"`` to undo.

    A forced backend that cannot serve a call raises ``BackendUnavailableError``; nothing falls back silently.

    Example:
        >>> with rf.use_backend("reference"):
        ...     rf.euler_step(x, v, 0.1)
    """
    if name not in (*BACKENDS, "auto"):
        raise ValueError(
            f"use_backend: name must be one of {', '.join(BACKENDS)}, auto; got {name!r}"
        )
    token = _forced.set(None if name == "auto" else name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The backend forced by ``use_backend``, or None; while compiling None, as the kernels of a graph ask at run time."""
    return None if _is_compiling() else _forced.get()


def load_backend(backend: str, op: str) -> ModuleType:
    """The backend's module for the op."""
    key = (backend, op)
    if key not in _modules:
        _modules[key] = importlib.import_module(f"rfkernels.backends.{backend}.{op}")
    return _modules[key]


@functools.cache
def _unwritten(backend: str, op: str) -> str | None:
    """Why the backend has no module or compiled function for the op; None when it has."""
    if importlib.util.find_spec(f"rfkernels.backends.{backend}.{op}") is None:
        return f"the {backend} backend has no {op}"
    if backend == "native" and op in ("quantize", "attention", "projected_update"):
        extension = importlib.import_module("rfkernels._C")
        if not hasattr(extension, {"quantize": "quantize_keys"}.get(op, op)):
            return f"the compiled extension rfkernels._C is older than {op}; install again"
    return None


def unavailable_reason(backend: str, device_type: str, op: str | None = None) -> str | None:
    """Why the backend does not serve the op (without ``op``: any) on that device type here; None when it does."""
    if backend == "reference":
        return None
    package = importlib.import_module(f"rfkernels.backends.{backend}")
    reason = package.unavailable_reason(device_type)
    if reason is None and op is not None:
        reason = _ABSENT.get((op, backend, device_type)) or _unwritten(backend, op)
    return reason


def backend(op: str, tensor: torch.Tensor) -> ModuleType:
    """The module that serves ``op`` for a call on ``tensor``'s device."""
    device_type = "cpu" if tensor.is_cpu else tensor.device.type
    forced = _forced.get()
    if forced is not None:
        reason = unavailable_reason(forced, device_type, op)
        if reason is not None:
            raise BackendUnavailableError(
                f"{op}: backend {forced!r} cannot serve tensors on {device_type}: {reason}"
            )
        return load_backend(forced, op)
    for name in BACKENDS:
        if name == "native" and tensor.ndim > MAX_NATIVE_DIMS:
            continue
        # On the CPU, Triton means its interpreter: only by force.
        if (name != "triton" or device_type == "cuda") and unavailable_reason(
            name, device_type, op
        ) is None:
            return load_backend(name, op)
    raise BackendUnavailableError(f"{op}: no backend serves {device_type}")  # reference always does


def available_backends(op: str | None = None) -> tuple[str, ...] | dict[str, tuple[str, ...]]:
    """Backends that can serve an op on this machine, best first; without ``op``, a dict over all ops.

    Raises:
        ValueError: an unknown op.
    """
    if op is None:
        return {name: available_backends(name) for name in OPS}
    if op not in OPS:
        raise ValueError(f"available_backends: op must be one of {', '.join(OPS)}; got {op!r}")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return tuple(b for b in BACKENDS if any(unavailable_reason(b, d, op) is None for d in devices))


def backend_table() -> list[dict[str, object]]:
    """The op x backend x device table that ``rfkernels doctor`` prints: op, backend, device, available, reason."""
    rows: list[dict[str, object]] = []
    for op in OPS:
        for name, device in (
            ("native", "cpu"),
            ("native", "cuda"),
            ("triton", "cuda"),
            ("reference", "any"),
        ):
            reason = unavailable_reason(name, device, op)
            rows.append(
                {
                    "op": op,
                    "backend": name,
                    "device": device,
                    "available": reason is None,
                    "reason": reason or "",
                }
            )
    return rows
