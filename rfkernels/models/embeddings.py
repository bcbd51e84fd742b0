"""Embeddings of the time and of the condition, shared by the reference networks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["ConditionEmbedding", "SpanEmbedding", "TimeFeatures"]


class TimeFeatures(nn.Module):
    """Sines and cosines of the time: (B,) in [0, 1] -> (B, 2 * frequencies), in the dtype asked
    for.

    The frequencies are geometric from pi to `highest` radians per unit of time. The lowest one is
    monotone over [0, 1], so every time has features of its own. (The form follows the positional
    code of Vaswani et al., 2017.) The angles are float32 (float64 for float64 times or networks)
    whatever the network's dtype: in bfloat16 an angle of 64 pi would be off by half a radian.
    """

    frequency: torch.Tensor

    def __init__(self, frequencies: int = 32, highest: float = 64 * math.pi) -> None:
        super().__init__()
        low, high = math.log(math.pi), math.log(highest)
        values = [
            math.exp(low + (high - low) * i / max(frequencies - 1, 1)) for i in range(frequencies)
        ]
        self._values = values
        # A constant of the architecture, not a weight: it stays out of the state dict.
        self.register_buffer("frequency", torch.tensor(values), persistent=False)
        self.size = 2 * frequencies

    def _apply(self, fn: Any, recurse: bool = True) -> TimeFeatures:
        """What `model.to(torch.bfloat16)` calls: the frequencies keep their digits."""
        super()._apply(fn, recurse)
        if self.frequency.dtype not in (torch.float32, torch.float64):
            self.frequency = torch.tensor(self._values, device=self.frequency.device)
        return self

    def forward(self, t: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """dtype: that of the layer that reads the features; None leaves them as computed."""
        angle = t.to(torch.promote_types(t.dtype, self.frequency.dtype))[:, None] * self.frequency
        features = torch.cat((angle.sin(), angle.cos()), dim=1)
        return features if dtype is None else features.to(dtype)


class SpanEmbedding(nn.Module):
    """What a flow map adds to the code of the time: (B,) spans -> (B, width).

    Its last layer starts at zero, so that a new flow map gives every span the same velocity.
    """

    def __init__(self, width: int, frequencies: int) -> None:
        super().__init__()
        self.features = time_features(frequencies, flow_map=True)
        self.enter = nn.Linear(self.features.size, width)
        self.leave = nn.Linear(width, width)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, span: torch.Tensor | None, t: torch.Tensor) -> torch.Tensor:
        """span: (B,) like t (B,); None for zeros, the instantaneous velocity."""
        if span is None:
            span = torch.zeros_like(t)
        elif span.shape != t.shape:
            raise ValueError(
                f"span: must have the shape of t, {tuple(t.shape)}; got {tuple(span.shape)}"
            )
        return self.leave(F.silu(self.enter(self.features(span, self.enter.weight.dtype))))


class ConditionEmbedding(nn.Module):
    """Embeds a class label or a condition vector; knows what "no condition" is.

    With `num_classes`, y is an int64 tensor (B,) in [0, num_classes]; `num_classes` itself is the
    null label. With `condition_dim`, y is (B, condition_dim) floats and the null condition is the
    zero vector. `y=None` stands for the null condition everywhere. `null_label` is the value that
    label dropout writes over a dropped row.
    """

    def __init__(self, width: int, num_classes: int | None, condition_dim: int | None) -> None:
        super().__init__()
        if num_classes is not None and condition_dim is not None:
            raise ValueError(
                "num_classes: give either num_classes or condition_dim, not both; "
                f"got {num_classes} and {condition_dim}"
            )
        self.num_classes, self.condition_dim = num_classes, condition_dim
        self.null_label: int | float
        self.table: nn.Module
        if num_classes is not None:
            self.null_label = num_classes
            self.table = nn.Embedding(num_classes + 1, width)
            nn.init.normal_(self.table.weight, std=0.02)
        else:
            self.null_label = 0.0
            self.table = nn.Linear(condition_dim or 1, width)

    def forward(self, y: torch.Tensor | None, batch: int, device: torch.device) -> torch.Tensor:
        if self.num_classes is not None:
            if y is None:
                y = torch.full((batch,), self.num_classes, dtype=torch.int64, device=device)
            elif y.dtype.is_floating_point or y.shape != (batch,):
                raise ValueError(
                    f"y: must be integer class labels of shape ({batch},); got {y.dtype} "
                    f"{tuple(y.shape)}"
                )
            return self.table(y)
        if y is None:
            y = torch.zeros(batch, self.condition_dim or 1, device=device)
        elif y.shape != (batch, self.condition_dim):
            raise ValueError(
                f"y: must be condition vectors of shape ({batch}, {self.condition_dim}); got "
                f"{tuple(y.shape)}"
            )
        return self.table(y.to(self.table.weight.dtype))


def condition_embedding(
    width: int, num_classes: int | None, condition_dim: int | None = None
) -> ConditionEmbedding | None:
    """The embedding for a conditional network, None for an unconditional one."""
    if num_classes is None and condition_dim is None:
        return None
    return ConditionEmbedding(width, num_classes, condition_dim)


# Highest frequency of the times of a flow map, radians per unit of time. Their training needs d/dt of
# the network, whose rounding and curvature grow with it. Measured with MeanFlow on a ring of eight
# Gaussians (MLP of width 128, 1500 steps), energy distance of one step to the data: 64 pi 0.448,
# 16 pi 0.384, 4 pi 0.044. The span's own frequencies hardly matter (64 pi there, 4 pi here: 0.041 at
# width 96, 1200 steps).
_FLOW_MAP_HIGHEST = 4 * math.pi


def time_features(frequencies: int, flow_map: bool) -> TimeFeatures:
    """The features of a network's time."""
    return TimeFeatures(frequencies, _FLOW_MAP_HIGHEST) if flow_map else TimeFeatures(frequencies)


def span_embedding(flow_map: bool, width: int, frequencies: int) -> SpanEmbedding | None:
    """The embedding for a flow map; None for a velocity."""
    return SpanEmbedding(width, frequencies) if flow_map else None


def refuse_span(span: torch.Tensor | None, name: str) -> None:
    """A velocity network knows nothing of spans, so it must not be asked for an average."""
    if span is not None:
        raise ValueError(
            f"span: {name} was built without flow_map=True, so it is a velocity and no flow map; "
            f"got {tuple(span.shape)}"
        )


def refuse_condition(y: torch.Tensor | None, name: str) -> None:
    """An unconditional network that is handed a condition is a mistake of the caller."""
    if y is not None:
        raise ValueError(
            f"y: {name} was built without num_classes or condition_dim; got {tuple(y.shape)}"
        )
