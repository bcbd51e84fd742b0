"""A pipeline's network, or its two for high and low noise, as one velocity; and features of it, for a while."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rfkernels.integrations.compiled import uncompiled
from rfkernels.integrations.diffusers.exchange import allow_exchange
from rfkernels.integrations.diffusers.velocity import DiffusersNetwork, DiffusersVelocity

__all__ = ["PipelineVelocity", "exchanging"]


class PipelineVelocity(nn.Module):
    """velocity(x, t, **condition) of a pipeline's networks; x and the answer in float32.

    The networks read x in their own dtype. Their modes and weights stay as they are.

    Args:
        networks: one; or two, of which the second is asked where noise is low.
        boundary: with two, the noise level 1 - t below which the second is asked. Reading it waits
            for the device once an evaluation.
    """

    def __init__(self, networks: Sequence[nn.Module], boundary: float | None = None) -> None:
        super().__init__()
        self.stages = nn.ModuleList(DiffusersVelocity(DiffusersNetwork(net)) for net in networks)
        self.boundary = boundary
        self.dtype: torch.dtype = networks[0].dtype

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """The velocity at x (B, ...) and t (B,), equal in all samples, 0 = noise."""
        low = self.boundary is not None and float(1 - t[0]) < self.boundary
        return self.stages[int(low)](x.to(self.dtype), t, **condition).to(x.dtype)


# Classes belong to all threads: what one gives back, another may be using.
_one_edit = threading.RLock()


@contextlib.contextmanager
def exchanging(networks: Sequence[nn.Module], layers: str | None) -> Iterator[None]:
    """Within it, attention layers of the networks exchange features; see `allow_exchange`. Afterwards
    every layer has the class that it had before. One thread at a time."""
    networks = [uncompiled(network) for network in networks]
    with _one_edit:
        classes = [(module, type(module)) for network in networks for module in network.modules()]
        try:
            for network in networks:
                allow_exchange(network, layers)
            yield
        finally:
            for module, cls in classes:
                if type(module) is not cls:
                    module.__class__ = cls
