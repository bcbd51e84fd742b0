"""Argument checks shared by the ops; every message names the argument, the rule and what was received."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rfkernels.ops._scalars import Counter, Scalar

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(value: object) -> str:
    """What was received, in a few words."""
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return repr(value)


def single(value: object, conversion: str) -> bool:
    """Whether a value of another library is one number; arrays have ``conversion``, too, whatever they hold."""
    return hasattr(value, conversion) and not getattr(value, "shape", ())


def tensor(op: str, name: str, value: object) -> None:
    """A floating point tensor of a supported dtype."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor; got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} must be float32, float64, bfloat16 or float16; got {value.dtype}"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a strided tensor; got layout {value.layout}")


def like(op: str, name: str, value: object, x: torch.Tensor, x_name: str = "x") -> None:
    """A tensor of the shape and device of x, and of a dtype that x's compute type holds."""
    tensor(op, name, value)
    if value.shape != x.shape:
        raise ValueError(
            f"{op}: {name} must have the shape of {x_name}, {tuple(x.shape)}; got {tuple(value.shape)}"
        )
    if value.device != x.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {x_name}, {x.device}; got {value.device}"
        )
    if value.dtype == torch.float64 and x.dtype != torch.float64:
        raise TypeError(
            f"{op}: {name} may be float64 only if {x_name} is; got {x_name} in {x.dtype}"
        )


def scalar(op: str, name: str, value: object, x: torch.Tensor) -> Scalar:
    """A float, a 0-d or a (B,) tensor, B = len(x); returns it as float or tensor on x's device."""
    if isinstance(value, torch.Tensor):
        if value.dtype not in FLOATS:
            raise TypeError(
                f"{op}: {name} must be a float or a floating point tensor; got {describe(value)}"
            )
        if value.ndim > 1 or (value.ndim == 1 and (x.ndim == 0 or value.shape[0] != x.shape[0])):
            batch = f"({x.shape[0]},)" if x.ndim else "no batch"
            raise ValueError(
                f"{op}: {name} must be a float, 0-d or per sample, {batch}; got shape {tuple(value.shape)}"
            )
        if value.device != x.device:
            if value.ndim == 0 and value.device.type == "cpu":
                return value.item()
            raise ValueError(
                f"{op}: {name} must be on the device of x, {x.device}; got {value.device}"
            )
        return value
    if isinstance(value, (float, int, torch.SymFloat, torch.SymInt)) and not isinstance(
        value, bool
    ):
        return value
    if isinstance(value, (bool, str, bytes)) or not single(value, "__float__"):
        raise TypeError(
            f"{op}: {name} must be a float, a 0-d or a (B,) tensor; got {type(value).__name__}"
        )
    return float(value)  # NumPy's scalars and other numbers


def scalars(op: str, name: str, values: Sequence[object], x: torch.Tensor) -> tuple[Scalar, ...]:
    """``scalar`` of each."""
    return tuple(scalar(op, f"{name}[{i}]", value, x) for i, value in enumerate(values))


def counter(op: str, name: str, value: object, x: torch.Tensor | None) -> Counter:
    """An int in [0, 2^63), or an int64 tensor, 0-d or (B,), on x's device (None: not checked here)."""
    if isinstance(value, torch.Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{op}: {name} must be an int or an int64 tensor; got {value.dtype}")
        if x is not None:
            if value.ndim > 1 or (
                value.ndim == 1 and (x.ndim == 0 or value.shape[0] != x.shape[0])
            ):
                raise ValueError(
                    f"{op}: {name} must be an int, 0-d or per sample ({x.shape[0] if x.ndim else 'no batch'},); "
                    f"got shape {tuple(value.shape)}"
                )
            if value.device != x.device:
                if value.ndim == 0 and value.device.type == "cpu":
                    return int(value.item())
                raise ValueError(f"{op}: {name} must be on {x.device}; got {value.device}")
        return value
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        if isinstance(value, bool) or not single(value, "__index__"):
            raise TypeError(
                f"{op}: {name} must be an int or an int64 tensor; got {type(value).__name__}"
            )
        value = value.__index__()
    if not 0 <= value < 2**63:
        raise ValueError(f"{op}: {name} must lie in [0, 2^63); got {value}")
    return value


def _extent(t: torch.Tensor) -> tuple[int, int]:
    """First and one-past-last byte the tensor touches."""
    low = high = 0
    for size, stride in zip(t.shape, t.stride(), strict=True):
        reach = (size - 1) * stride
        low, high = (low + reach, high) if reach < 0 else (low, high + reach)
    start = t.data_ptr()
    return start + low * t.element_size(), start + (high + 1) * t.element_size()


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True when a and b are the same elements at the same places."""
    return (
        a.data_ptr() == b.data_ptr()
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a.shape == b.shape
    )


def overlaps(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True when the memory ranges of a and b meet (they may still interleave without touching)."""
    if a.numel() == 0 or b.numel() == 0:
        return False
    (a_low, a_high), (b_low, b_high) = _extent(a), _extent(b)
    return a_low < b_high and b_low < a_high


def self_overlapping(t: torch.Tensor) -> bool:
    """True when two indices may name one element: some stride is reached by the smaller dimensions together."""
    reach = 0
    for stride, size in sorted(
        (abs(s), n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1
    ):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def output(op: str, name: str, out: object, x: torch.Tensor, dtype: torch.dtype) -> None:
    """A writable tensor of x's shape and device and the given dtype, each element its own memory."""
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor; got {type(out).__name__}")
    if out.shape != x.shape or out.dtype != dtype or out.device != x.device:
        raise ValueError(
            f"{op}: {name} must be a {dtype} tensor of shape {tuple(x.shape)} on {x.device}; got {describe(out)}"
        )
    if torch.is_grad_enabled() and out.requires_grad:
        raise ValueError(
            f"{op}: {name} must not require grad while gradients are recorded; got a tensor that does"
        )
    # A compiled graph writes out by copy_, which makes this check itself.
    if not torch.compiler.is_compiling() and self_overlapping(out):
        raise ValueError(
            f"{op}: {name} must have memory of its own for every element; got strides {out.stride()}"
        )


def needs_staging(outputs: Sequence[torch.Tensor | None], inputs: Sequence[object]) -> bool:
    """True when an output's memory range meets an input's (or another output's) without being the very same elements.

    The kernels read and write element by element, so only identical memory is safe in place; anything else is computed
    into fresh memory and copied.
    """
    given = [o for o in outputs if o is not None]
    for i, out in enumerate(given):
        if any(
            isinstance(t, torch.Tensor) and overlaps(out, t) and not same_memory(out, t)
            for t in inputs
        ):
            return True
        if any(overlaps(out, other) for other in given[i + 1 :]):
            return True
    return False


def shape(op: str, sizes: Sequence[object]) -> torch.Size:
    """A shape given as ints or as one sequence of ints."""
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list, torch.Size)):
        sizes = sizes[0]
    for size in sizes:
        if isinstance(size, bool) or not (
            isinstance(size, (int, torch.SymInt)) or single(size, "__index__")
        ):
            raise TypeError(f"{op}: shape must be ints; got {size!r}")
        if size < 0:
            raise ValueError(f"{op}: shape must not be negative; got {tuple(sizes)}")
    return torch.Size(sizes)


def elements_per_sample(x: torch.Tensor) -> int:
    """Number of elements of one sample of (B, ...)."""
    return math.prod(x.shape[1:])
