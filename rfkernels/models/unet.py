"""A small U-Net for images (in the manner of Ho et al., 2020), with adaptive group
normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from rfkernels.models.embeddings import (
    condition_embedding,
    refuse_condition,
    refuse_span,
    span_embedding,
    time_features,
)

__all__ = ["UNet"]


def _norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with the largest group count up to 8 that divides the channels."""
    groups = next(g for g in (8, 4, 2, 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


class _Residual(nn.Module):
    """Two 3x3 convolutions; the second norm takes its scale and shift from time and condition."""

    def __init__(self, inner: int, outer: int, code: int, dropout: float) -> None:
        super().__init__()
        self.norm_in, self.norm_out = _norm(inner), _norm(outer)
        self.first = nn.Conv2d(inner, outer, 3, padding=1)
        self.second = nn.Conv2d(outer, outer, 3, padding=1)
        self.modulate = nn.Linear(code, 2 * outer)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, h: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulate(code)[:, :, None, None].chunk(2, dim=1)
        inner = self.norm_out(self.first(F.silu(self.norm_in(h)))) * (1 + scale) + shift
        return self.skip(h) + self.second(self.dropout(F.silu(inner)))


class _Attention(nn.Module):
    """Self-attention over the pixels of the coarsest level."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm, self.heads = _norm(channels), heads
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.merge = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.merge.weight)
        nn.init.zeros_(self.merge.bias)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = h.shape
        qkv = self.qkv(self.norm(h)).reshape(
            batch, 3, self.heads, channels // self.heads, height * width
        )
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        return h + self.merge(attended.reshape(h.shape))


class UNet(nn.Module):
    """U-Net: velocity(x, t, y=None) for images x of shape (B, C, H, W).

    Args:
        sample_shape: (C, H, W); H and W must be multiples of 2 ** (len(multipliers) - 1).
        width: channels of the finest level; a multiple of 4.
        multipliers: channels of each level over `width`, finest first.
        blocks: residual blocks per level.
        heads: attention heads at the coarsest level; 0 for no attention.
        num_classes: class labels 0..num_classes-1, num_classes being the null label; None for
            unconditional.
        dropout: in the residual blocks.
        flow_map: take `span` too, and be the average velocity over [t, t + span].

    `forward(x, t, y=None, span=None)`: t (B,) in [0, 1] (0 = source, 1 = data); y (B,) int64; span
    (B,) (None: zeros, the velocity at t). The last layer starts at zero. Forward derivatives need
    `sdpa_kernel(SDPBackend.MATH)` around them: PyTorch's fused attention has none.
    """

    def __init__(
        self,
        sample_shape: Sequence[int],
        width: int = 32,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 1,
        heads: int = 4,
        num_classes: int | None = None,
        dropout: float = 0.0,
        flow_map: bool = False,
    ) -> None:
        super().__init__()
        self.sample_shape = tuple(int(n) for n in sample_shape)
        if len(self.sample_shape) != 3:
            raise ValueError(
                f"sample_shape: UNet takes (channels, height, width); got {self.sample_shape}"
            )
        channels, *sides = self.sample_shape
        factor = 2 ** (len(multipliers) - 1)
        if any(side % factor for side in sides):
            raise ValueError(
                f"sample_shape: height and width must be multiples of {factor} for "
                f"{len(multipliers)} levels; got {self.sample_shape}"
            )
        if heads and (width * multipliers[-1]) % heads:
            raise ValueError(
                f"heads: must divide the channels of the coarsest level, "
                f"{width * multipliers[-1]}; got {heads}"
            )
        self.options = {
            "sample_shape": list(self.sample_shape),
            "width": width,
            "multipliers": list(multipliers),
            "blocks": blocks,
            "heads": heads,
            "num_classes": num_classes,
            "dropout": dropout,
            # Named only where it is set, so that runs of before the option resume.
            **({"flow_map": True} if flow_map else {}),
        }
        code = 4 * width
        self.features = time_features(32, flow_map)
        self.time = nn.Sequential(
            nn.Linear(self.features.size, code), nn.SiLU(), nn.Linear(code, code)
        )
        self.condition = condition_embedding(code, num_classes)
        self.null_label = None if self.condition is None else self.condition.null_label
        self.enter = nn.Conv2d(channels, width, 3, padding=1)

        sizes = [width * m for m in multipliers]
        self.down, self.shrink, current, skips = nn.ModuleList(), nn.ModuleList(), width, [width]
        for level, size in enumerate(sizes):
            for _ in range(blocks):
                self.down.append(_Residual(current, size, code, dropout))
                current = size
                skips.append(size)
            if level < len(sizes) - 1:
                self.shrink.append(nn.Conv2d(size, size, 3, stride=2, padding=1))
                skips.append(size)
        self.middle = _Residual(current, current, code, dropout)
        self.attention = _Attention(current, heads) if heads else nn.Identity()
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for level, size in reversed(list(enumerate(sizes))):
            for _ in range(blocks + 1):
                self.up.append(_Residual(current + skips.pop(), size, code, dropout))
                current = size
            if level:
                self.grow.append(nn.Conv2d(size, size, 3, padding=1))
        self.norm = _norm(current)
        self.leave = nn.Conv2d(current, channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        self.levels, self.per_level = len(sizes), blocks
        self.span = span_embedding(flow_map, code, 32)

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor | None = None,
        span: torch.Tensor | None = None,
    ) -> torch.Tensor:
        code = self.time(self.features(t, x.dtype))
        if self.condition is not None:
            code = code + self.condition(y, x.shape[0], x.device)
        else:
            refuse_condition(y, "this UNet")
        if self.span is not None:
            code = code + self.span(span, t)
        else:
            refuse_span(span, "this UNet")
        code = F.silu(code)
        h = self.enter(x)
        skips, down, up = [h], iter(self.down), iter(self.up)
        for level in range(self.levels):
            for _ in range(self.per_level):
                h = next(down)(h, code)
                skips.append(h)
            if level < self.levels - 1:
                h = self.shrink[level](h)
                skips.append(h)
        h = self.attention(self.middle(h, code))
        for level in range(self.levels):
            for _ in range(self.per_level + 1):
                h = next(up)(torch.cat((h, skips.pop()), dim=1), code)
            if level < self.levels - 1:
                h = self.grow[level](F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.leave(F.silu(self.norm(h)))
