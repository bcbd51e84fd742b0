"""Embeddings of the time and of the condition, shared by the reference networks."""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = ["ConditionEmbedding", "TimeFeatures"]


class TimeFeatures(nn.Module):
    """Sines and cosines of the time: (B,) in [0, 1] -> (B, 2 * frequencies) float32.

    The frequencies are geometric from pi to `highest` radians per unit of time. The lowest one is
    monotone over [0, 1], so every time has features of its own. (The form follows the positional
    code of Vaswani et al., 2017.)
    """

    frequency: torch.Tensor

    def __init__(self, frequencies: int = 32, highest: float = 64 * math.pi) -> None:
        super().__init__()
        low, high = math.log(math.pi), math.log(highest)
        values = [
            math.exp(low + (high - low) * i / max(frequencies - 1, 1)) for i in range(frequencies)
        ]
        # A constant of the architecture, not a weight: it stays out of the state dict.
        self.register_buffer("frequency", torch.tensor(values), persistent=False)
        self.size = 2 * frequencies

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        angle = t.to(torch.float32)[:, None] * self.frequency
        return torch.cat((angle.sin(), angle.cos()), dim=1)


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


def refuse_condition(y: torch.Tensor | None, name: str) -> None:
    """An unconditional network that is handed a condition is a mistake of the caller."""
    if y is not None:
        raise ValueError(
            f"y: {name} was built without num_classes or condition_dim; got {tuple(y.shape)}"
        )
