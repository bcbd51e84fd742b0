"""A small diffusion transformer (DiT with adaLN-zero; Peebles and Xie, 2023) as a velocity field
for images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from rfkernels.backends.attention_schemes import PRECISIONS
from rfkernels.models.embeddings import (
    condition_embedding,
    refuse_condition,
    refuse_span,
    span_embedding,
    time_features,
)
from rfkernels.ops.attention import attention as rf_attention

__all__ = ["ATTENTIONS", "DiT", "DiTBlock"]

ATTENTIONS = ("sdpa", *PRECISIONS)  # what the option `attention` may be


def _grid_code(width: int, rows: int, columns: int) -> torch.Tensor:
    """Fixed sine-cosine code of a 2-D patch grid: (rows * columns, width); one half codes the row,
    one the column."""
    quarter = width // 4
    frequency = torch.exp(-torch.arange(quarter) / quarter * torch.log(torch.tensor(10_000.0)))
    row = torch.arange(rows).repeat_interleave(columns)[:, None] * frequency
    column = torch.arange(columns).repeat(rows)[:, None] * frequency
    return torch.cat((row.sin(), row.cos(), column.sin(), column.cos()), dim=1)


def _modulated(h: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """LayerNorm without weights, then the sample's own scale and shift; h (B, S, D), shift and
    scale (B, D)."""
    return F.layer_norm(h, h.shape[-1:]) * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Attention and MLP, each between an adaptive norm and a gate; the gates start at zero
    (adaLN-zero). `attention` is read at every call and may be changed; so is `exchange`: called with
    (q, k, v), each (B, H, S, D), it returns what attention takes instead."""

    exchange: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, dropout: float, attention: str
    ) -> None:
        super().__init__()
        self.heads, self.dropout, self.attention = heads, dropout, attention
        self.qkv = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        inner = int(width * mlp_ratio)
        self.mlp = nn.Sequential(
            nn.Linear(width, inner),
            nn.GELU(approximate="tanh"),
            nn.Dropout(dropout),
            nn.Linear(inner, width),
        )
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(code).chunk(6, dim=1)
        batch, length, width = h.shape
        qkv = self.qkv(_modulated(h, shift_a, scale_a))
        q, k, v = qkv.reshape(batch, length, 3, self.heads, width // self.heads).permute(
            2, 0, 3, 1, 4
        )
        if self.exchange is not None:
            q, k, v = self.exchange(q, k, v)
        attended = self._attend(q, k, v)
        h = h + gate_a[:, None] * self.merge(attended.transpose(1, 2).reshape(batch, length, width))
        return h + gate_m[:, None] * self.mlp(_modulated(h, shift_m, scale_m))

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """(B, H, S, D) in and out."""
        dropout = self.dropout if self.training else 0.0
        if self.attention == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        if dropout:
            raise ValueError(
                f"dropout: must be 0 to train with attention={self.attention!r}; got {dropout}; use "
                'attention="sdpa"'
            )
        return rf_attention(q, k, v, precision=self.attention)


class DiT(nn.Module):
    """Diffusion transformer: velocity(x, t, y=None) for images x of shape (B, C, H, W).

    Args:
        sample_shape: (C, H, W); H and W must be multiples of `patch`.
        patch: side of a square patch.
        width: features of a token; a multiple of 4 and of `heads`.
        depth: transformer blocks.
        heads: attention heads.
        mlp_ratio: hidden width of the MLP over `width`.
        num_classes: class labels 0..num_classes-1, num_classes being the null label; or
        condition_dim: size of a condition vector, zero being the null condition; or neither.
        dropout: in attention and MLP.
        attention: "sdpa", PyTorch's; or a precision of `rf.attention`: "int8", "int8_u8",
            "int8_bf16", "int8_fp8", "fp8", "bf16". No parameter depends on it, so that a checkpoint
            serves under each. Training under a precision runs the quantized forward pass with
            PyTorch's gradient at the same inputs, and needs dropout = 0.
        flow_map: take `span` too, and be the average velocity over [t, t + span].

    `forward(x, t, y=None, span=None)`: t (B,) in [0, 1] (0 = source, 1 = data); y (B,) int64 or (B,
    condition_dim); span (B,) (None: zeros, the velocity at t). Forward derivatives
    (`torch.func.jvp`) need `sdpa_kernel(SDPBackend.MATH)` around them with "sdpa", whose fused
    kernels have none; those of a precision are exact attention's at the same inputs.
    """

    def __init__(
        self,
        sample_shape: Sequence[int],
        patch: int = 2,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        condition_dim: int | None = None,
        dropout: float = 0.0,
        attention: str = "sdpa",
        flow_map: bool = False,
    ) -> None:
        super().__init__()
        self.sample_shape = tuple(int(n) for n in sample_shape)
        if len(self.sample_shape) != 3:
            raise ValueError(
                f"sample_shape: DiT takes (channels, height, width); got {self.sample_shape}"
            )
        channels, height, column = self.sample_shape
        if height % patch or column % patch:
            raise ValueError(f"patch: must divide height {height} and width {column}; got {patch}")
        if heads < 1 or width % heads or width % 4:
            raise ValueError(f"width: must be a multiple of 4 and of heads ({heads}); got {width}")
        if attention not in ATTENTIONS:
            raise ValueError(
                f"attention: must be one of {', '.join(ATTENTIONS)}; got {attention!r}"
            )
        self.options = {
            "sample_shape": list(self.sample_shape),
            "patch": patch,
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_ratio": mlp_ratio,
            "num_classes": num_classes,
            "condition_dim": condition_dim,
            "dropout": dropout,
            "attention": attention,
            # Named only where it is set, so that runs of before the option resume.
            **({"flow_map": True} if flow_map else {}),
        }
        self.patch, self.grid = patch, (height // patch, column // patch)
        self.features = time_features(64, flow_map)
        self.time = nn.Sequential(
            nn.Linear(self.features.size, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.condition = condition_embedding(width, num_classes, condition_dim)
        self.null_label = None if self.condition is None else self.condition.null_label
        self.enter = nn.Linear(channels * patch * patch, width)
        self.register_buffer("place", _grid_code(width, *self.grid), persistent=False)
        self.blocks = nn.ModuleList(
            DiTBlock(width, heads, mlp_ratio, dropout, attention) for _ in range(depth)
        )
        self.modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, channels * patch * patch)
        for layer in (self.modulation, self.leave):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.span = span_embedding(flow_map, width, 64)

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
            refuse_condition(y, "this DiT")
        if self.span is not None:
            code = code + self.span(span, t)
        else:
            refuse_span(span, "this DiT")
        code = F.silu(code)
        h = self.enter(self._patches(x)) + self.place
        for block in self.blocks:
            h = block(h, code)
        shift, scale = self.modulation(code).chunk(2, dim=1)
        return self._image(self.leave(_modulated(h, shift, scale)))

    def _patches(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, patches, C * patch * patch)."""
        batch, channels = x.shape[:2]
        rows, columns = self.grid
        tiles = x.reshape(batch, channels, rows, self.patch, columns, self.patch)
        return tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)

    def _image(self, tokens: torch.Tensor) -> torch.Tensor:
        """The inverse of `_patches`."""
        rows, columns = self.grid
        tiles = tokens.reshape(len(tokens), rows, columns, -1, self.patch, self.patch)
        return tiles.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), *self.sample_shape)
