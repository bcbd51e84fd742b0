"""The compute type and how tensors and scalars enter it."""

from __future__ import annotations

import torch


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """float64 for float64 tensors, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def to_compute(tensor: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """The tensor in the compute type."""
    return tensor if tensor.dtype == compute else tensor.to(compute)


def placed(value: float | torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A number or tensor in that dtype on that device. A number is filled in there: the host would wait for its copy, which
    a CUDA graph cannot hold either."""
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype)
    try:
        return torch.full((), value, dtype=dtype, device=device)
    except (RuntimeError, OverflowError):  # full refuses what a conversion rounds to infinity
        return torch.full((), float(value), dtype=torch.float64, device=device).to(dtype)


def scalar_like(value: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A float, 0-d or (B,) scalar rounded to the compute type and shaped to broadcast over samples of ``x`` (B, ...)."""
    compute = compute_dtype(x)
    if not isinstance(value, torch.Tensor):
        return placed(value, compute, x.device)
    value = value.to(compute)
    return value if value.ndim == 0 else value.reshape(value.shape + (1,) * (x.ndim - 1))
