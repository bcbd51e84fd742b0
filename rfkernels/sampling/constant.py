"""Numbers of grids, guidance and solvers, for torch.compile."""

from __future__ import annotations

import torch

__all__ = ["constant"]


def constant(value: float) -> float:
    """The number itself where torch.compile put a symbol in its place.

    Kernel calls take constants, and what was computed from symbols may miss those by a rounding.
    """
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_scalar

        return guard_scalar(value)
    return value
