"""Optimizers with fused kernels: AdamP and SGDP for networks whose weights are followed by a normalisation."""

from __future__ import annotations

from rfkernels.optim.adamp import AdamP
from rfkernels.optim.sgdp import SGDP

__all__ = ["SGDP", "AdamP"]
