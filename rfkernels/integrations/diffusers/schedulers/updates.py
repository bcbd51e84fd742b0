"""One step of a state in diffusers' dtypes, by one kernel call: arithmetic in float32, the result in the output's dtype.

A pipeline's latents and its network's outputs may differ in dtype. As in diffusers, the new state has the dtype of the
network's output; the arithmetic is float32 (float64 where one of them is) and rounds once at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

import rfkernels as rf

Scalar = float | torch.Tensor


def euler(sample: torch.Tensor, output: torch.Tensor, step: float) -> torch.Tensor:
    """sample + step * output in the dtype of ``output``."""
    dtype = output.dtype
    if sample.dtype is dtype:
        return rf.euler_step(sample, output, step)
    wide = torch.promote_types(sample.dtype, dtype)
    if wide == dtype:
        return rf.euler_step(sample.to(wide), output, step)
    return rf.euler_step(sample.to(wide), output, step, cast=dtype)[1]


def euler_as_diffusers(sample: torch.Tensor, output: torch.Tensor, step: float) -> torch.Tensor:
    """The same with diffusers' roundings: the step and its product with ``output`` in the dtype of ``output``, a sum in at
    least float32, the result."""
    if sample.dtype is output.dtype is torch.float32:
        return rf.euler_step(sample, output, step)
    return (sample.float() + output * rounded(step, output.dtype)).to(output.dtype)


def rounded(number: float, dtype: torch.dtype) -> float:
    """As torch rounds a 0-d float32 tensor that meets a tensor of the dtype."""
    return torch.tensor(number, dtype=dtype, device="cpu").item()


def linear(
    sample: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    coefficients: Sequence[Scalar],
    x_coefficient: Scalar = 1.0,
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x_coefficient * sample + sum of coefficients * tensors, in ``dtype``."""
    wide = sample.dtype
    for other in (dtype, *(tensor.dtype for tensor in tensors)):
        if other != wide:
            wide = torch.promote_types(wide, other)
    state = rf.linear_step(
        sample.to(wide),
        tuple(tensors),
        tuple(coefficients),
        x_coefficient=x_coefficient,
        cast=None if wide == dtype else dtype,
    )
    return state if wide == dtype else state[1]
