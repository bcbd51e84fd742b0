"""How the launchers hand scalars, seeds and tensors to a kernel, and the launch itself.

Triton types a Python float as float32 and compiles anew for an integer that is 1 or a multiple of 16 or does not fit 32
bits. A scalar therefore travels as one of three tuples, told apart by length in ``tiles.scalar`` and ``tiles.counter``, and
no value of a step size or seed compiles anything:

* ``(value,)``: a float, for float32 arithmetic;
* ``(pointer, stride)``: a tensor, read as ``pointer[sample * stride]``; stride 0 is one value for all;
* ``(low, middle, high)``: 64 bits (of a float64 or of an integer) as 24 + 24 + 16 bits, each exact in a float32.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable

import torch

from rfkernels.backends import triton as package

Argument = tuple


def words(bits: int) -> tuple[float, float, float]:
    """64 bits in three floats of 24, 24 and 16 bits."""
    return float(bits & 0xFFFFFF), float(bits >> 24 & 0xFFFFFF), float(bits >> 48 & 0xFFFF)


def double_words(value: float) -> tuple[float, float, float]:
    """The bits of a float64 in three floats."""
    return words(struct.unpack("<Q", struct.pack("<d", value))[0])


def _pointer(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    return tensor, tensor.stride(0) if varies(tensor) else 0


def number(value: float | torch.Tensor, compute: torch.dtype) -> Argument:
    """A float, 0-d or (B,) scalar for arithmetic in ``compute``."""
    if isinstance(value, torch.Tensor):
        return _pointer(value)
    return double_words(value) if compute is torch.float64 else (float(value),)


def counter(value: int | torch.Tensor) -> Argument:
    """A seed or an offset."""
    return _pointer(value) if isinstance(value, torch.Tensor) else words(value)


def varies(value: object) -> bool:
    """True for a scalar that has a value of its own in every sample."""
    return isinstance(value, torch.Tensor) and value.ndim == 1 and value.shape[0] > 1


def any_varies(values: Iterable[object]) -> bool:
    """True when one of the scalars has a value of its own in every sample."""
    return any(varies(value) for value in values)


def launch(
    op: str,
    kernel,
    programs: int,
    device: torch.device,
    *arguments,
    num_warps: int = 4,
    **constants,
) -> None:
    """Start ``programs`` programs of a kernel on the tensors' device and its current stream, and count the launch."""
    package.launches[op] += 1
    guard = contextlib.nullcontext()
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        guard = torch.cuda.device(device)
    with guard:
        # fp fusion off: every product and every sum is rounded, as the op's formula says.
        kernel[(programs,)](*arguments, **constants, num_warps=num_warps, enable_fp_fusion=False)
