"""How a scalar argument (float, 0-d or (B,) tensor) travels through a torch.library schema, which knows no union types.

A scalar becomes the pair (number, optional tensor): the tensor counts where it is there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

Scalar = float | torch.Tensor
Counter = int | torch.Tensor
Noise = tuple[Scalar, Counter, Counter]  # scale, seed, offset


def split(value: Scalar | None) -> tuple[float, torch.Tensor | None]:
    """(number, tensor) of a scalar; an absent one is 0."""
    if isinstance(value, torch.Tensor):
        return 0.0, value
    return (0.0 if value is None else value), None


def split_counter(value: Counter | None) -> tuple[int, torch.Tensor | None]:
    """(int, tensor) of a seed or offset; an absent one is 0."""
    if isinstance(value, torch.Tensor):
        return 0, value
    return (0 if value is None else value), None


def join(number, tensor: torch.Tensor | None):
    """The inverse of ``split`` and ``split_counter``."""
    return number if tensor is None else tensor


def wants_grad(scalars: Iterable[object]) -> bool:
    """True when a gradient with respect to one of the scalars is to be recorded."""
    return torch.is_grad_enabled() and any(
        isinstance(s, torch.Tensor) and s.requires_grad for s in scalars
    )
