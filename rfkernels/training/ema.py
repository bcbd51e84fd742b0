"""The exponential moving average of a network's weights, kept as a network of its own."""

from __future__ import annotations

import copy

import torch
from torch import nn

from rfkernels.training.parallel import is_sharded, local

__all__ = ["EMA"]


class EMA:
    """Averages `source` into `model`, a copy of it in evaluation mode.

    After update n (from 0) every floating-point parameter is e + (1 - d)(w - e), d = min(decay, (1
    + n) / (10 + n)): the ramp forgets the first, poor weights. Buffers are copied.
    """

    def __init__(self, source: nn.Module, decay: float) -> None:
        self.source, self.decay = source, decay
        self.model = copy.deepcopy(source).eval().requires_grad_(False)
        self.bind()

    def bind(self) -> None:
        """Looks the tensors up again, after both networks have been sharded."""
        targets = dict(self.model.named_parameters())
        pairs = [(targets[name], p) for name, p in self.source.named_parameters()]
        self._averaged = [e for e, w in pairs if w.is_floating_point() or w.is_complex()]
        self._weights = [w for _, w in pairs if w.is_floating_point() or w.is_complex()]
        kept = dict(self.model.named_buffers())
        self._sharded = is_sharded(self.model)
        self._buffers = [(kept[name], b) for name, b in self.source.named_buffers()]

    @torch.no_grad()
    def update(self, n: int) -> None:
        """Moves the average towards the source's weights; n counts the updates before this one."""
        decay = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(local(self._averaged), local(self._weights), 1.0 - decay)
        if self._sharded:
            # The outermost module keeps its whole weights for a backward pass, which an average has
            # not: it would go on with those of its first evaluation.
            self.model.reshard()
        for kept, buffer in self._buffers:
            kept.copy_(buffer)
