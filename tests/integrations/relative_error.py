"""The distance of what an attention call gave to what is true."""

from __future__ import annotations

import torch


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|, in float64."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())
