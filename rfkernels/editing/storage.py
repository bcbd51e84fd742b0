"""Where attention features wait between inversion and sampling, and what that costs in bytes and error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["STORES", "Stored", "keep"]

# The greatest number that each quantized kind holds.
_GREATEST = {"int8": 127.0, "fp8": 448.0}
STORES = ("device", "host", *_GREATEST)


@dataclass(frozen=True)
class Stored:
    """A kept tensor.

    Attributes:
        values: as stored.
        scale: (..., 1) float32 of each row, by which quantized values are multiplied; else None.
        device, dtype: of what was kept.
    """

    values: Tensor
    scale: Tensor | None
    device: torch.device
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def restored(self) -> Tensor:
        """The tensor on its device, in its dtype."""
        if self.scale is None:
            return self.values.to(self.device, non_blocking=self.values.is_pinned())
        return (self.values.float() * self.scale).to(self.dtype)


def keep(tensor: Tensor, store: str) -> Stored:
    """A copy of a (..., D) tensor that shares no memory with it.

    Args:
        tensor: what to keep.
        store: "device", a copy beside it; "host", in main memory, pinned and copied without waiting
            where the tensor is on a GPU; "int8" and "fp8" (e4m3), one byte a number and a float32
            scale for each row of D numbers, beside it: the row's greatest magnitude becomes 127 or
            448. Rows with NaN or infinities come back as NaN.
    """
    device, dtype = tensor.device, tensor.dtype
    if store == "device":
        return Stored(tensor.clone(memory_format=torch.contiguous_format), None, device, dtype)
    if store == "host":
        pinned = device.type == "cuda"
        values = torch.empty(tensor.shape, dtype=dtype, device="cpu", pin_memory=pinned)
        return Stored(values.copy_(tensor, non_blocking=pinned), None, device, dtype)
    wide = tensor.float()
    greatest = wide.abs().amax(-1, keepdim=True)
    scale = (greatest / _GREATEST[store]).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = wide / scale
    if store == "int8":
        values = scaled.round().clamp(-127, 127).to(torch.int8)
    else:
        # Rounding may push the greatest past what e4m3 holds, which it would turn to NaN.
        values = scaled.clamp(-448, 448).to(torch.float8_e4m3fn)
    return Stored(values, scale, device, dtype)
