"""Noise mixed into a sample, sigma * noise + (1 - sigma) * sample, by one kernel call."""

from __future__ import annotations

import numpy as np
import torch

import rfkernels as rf


def mixed(
    sample: torch.Tensor, noise: torch.Tensor, level: float | torch.Tensor, *, bit_exact: bool
) -> torch.Tensor:
    """The sample at a noise level.

    Args:
        sample, noise: (B, ...), of one shape; the result has the wider dtype.
        level: sigma, a float that float32 holds or (B,) float32.
        bit_exact: sigma is rounded to the dtype of ``sample`` first, and each product and the sum are rounded, as in
            diffusers; else there is one rounding at the end. The same in float32.
    """
    dtype = torch.promote_types(sample.dtype, noise.dtype)
    if bit_exact and not sample.dtype == noise.dtype == torch.float32:
        level = torch.as_tensor(level, device=sample.device).to(sample.dtype)
        level = level.reshape(-1, *[1] * (sample.ndim - 1))
        return level * noise + (1.0 - level) * sample
    if isinstance(level, torch.Tensor):
        level = level.to(sample.device)
        kept = 1 - (level.double() if dtype == torch.float64 else level)
    else:
        kept = 1 - level if dtype == torch.float64 else float(np.float32(1) - np.float32(level))
    # The result has the dtype of the first tensor; the sum of two does not depend on their order.
    if sample.dtype == dtype:
        return rf.linear_step(sample, (noise,), (level,), x_coefficient=kept)
    return rf.linear_step(noise.to(dtype), (sample,), (kept,), x_coefficient=level)
