"""Networks that were trained with another time input, called with t in [0, 1]."""

from __future__ import annotations

import math
from typing import Any

import torch

from rfkernels.models.denoisers import Network, NetworkWrapper

__all__ = ["TimeScaled"]


class TimeScaled(NetworkWrapper):
    """velocity(x, t, **condition) = network(x, offset + scale t, **condition).

    The original rectified flow and SlimFlow feed their networks 999 t (scale=999, the default);
    InstaFlow, whose velocity is dx/dt as here, 1000 (1 - t) (scale=-1000, offset=1000). A network
    that also predicts the opposite velocity, as those of diffusers do, needs
    `rfkernels.flow.velocity_from_diffusers` as well.

    Args:
        network: a velocity network with a time input of its own.
        scale, offset: finite numbers.
    """

    def __init__(self, network: Network, scale: float = 999.0, offset: float = 0.0) -> None:
        for name, value in (("scale", scale), ("offset", offset)):
            if not math.isfinite(value):
                raise ValueError(f"{name}: must be finite; got {value!r}")
        super().__init__(network, scale=scale, offset=offset)
        self.scale, self.offset = scale, offset

    def forward(self, x: torch.Tensor, t: torch.Tensor, **condition: Any) -> torch.Tensor:
        return self.network(x, self.offset + self.scale * t, **condition)
