"""The quantization schemes of other attention kernels, emulated in eager torch: what they store, not how fast they are.

Written from the published descriptions. Sums are exact here where the originals keep about 14 bits on some GPUs, and scales
and the mean are float32, so the emulations flatter them a little. Each takes (q, k, v) of shape (B, H, S, D), not causal.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

LOG2_E = math.log2(math.e)
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _grouped_int8(x: torch.Tensor, tile: int, inner: int, span: int) -> torch.Tensor:
    """Rows rounded to int8 with one scale a group, times that scale again.

    A group is the rows of a tile of ``tile`` rows that share (row mod ``inner``) // ``span``: what one thread of a matrix
    instruction holds.
    """
    length = x.shape[2]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -length % tile))
    groups = padded.unflatten(2, (-1, tile // inner, inner // span, span))
    scale = groups.abs().amax((3, 5, 6), keepdim=True).clamp(min=1e-30) / 127
    return ((groups / scale).round() * scale).flatten(2, 5)[:, :, :length]


def _e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def _online(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int, p_scale: float, last_first: bool
) -> torch.Tensor:
    """Softmax over blocks of keys against the running maximum, P stored as e4m3(p_scale 2^(x - maximum))."""
    keys, factor = k.shape[2], LOG2_E / math.sqrt(q.shape[3])
    total = q.new_zeros(q.shape[:3])
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    highest = torch.full_like(total, -torch.inf)
    starts = range(0, keys, block)
    for first in reversed(starts) if last_first else starts:
        x = (q @ k[:, :, first : first + block].mT) * factor
        new = torch.maximum(highest, x.amax(-1))
        p = (x - new.unsqueeze(-1)).exp2()
        decay = (highest - new).exp2()
        total = total * decay + p.sum(-1)
        stored = _e4m3(p * p_scale) @ v[:, :, first : first + block]
        out = out * decay.unsqueeze(-1) + stored
        highest = new
    return out / (p_scale * total).unsqueeze(-1)


def sage2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """SageAttention 2 (arXiv 2411.10958) as it runs on GPUs with fp8, 8-bit Q and K, K smoothed.

    Q: int8, a scale for the rows of a 32-row tile with the same row mod 8; K minus its mean: int8, a scale for the keys of
    a 64-key block with the same (key mod 8) // 2; V: e4m3 with a scale per channel; P: e4m3(448 p), running maximum.
    """
    q, k, v = q.float(), k.float(), v.float()
    k = k - k.mean(2, keepdim=True)
    channel = v.abs().amax(2, keepdim=True).clamp(min=1e-30) / 448
    q, k = _grouped_int8(q, 32, 8, 1), _grouped_int8(k, 64, 8, 2)
    return _online(q, k, _e4m3(v / channel), 64, 448.0, False) * channel


def fa3_fp8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """FlashAttention 3's fp8 (arXiv 2407.08608) as its interface offers it: Q, K and V e4m3 with one scale a head.

    P: e4m3(256 p) against the running maximum, keys from the last to the first in blocks of 128.
    """
    codes, scales = [], []
    for x in (q.float(), k.float(), v.float()):
        scale = x.abs().amax((2, 3), keepdim=True).clamp(min=1e-30) / 448
        codes.append(_e4m3(x / scale))
        scales.append(scale)
    out = _online(codes[0] * scales[0], codes[1] * scales[1], codes[2], 128, 256.0, True)
    return out * scales[2]


def sdpa_bf16(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """PyTorch's attention on inputs rounded to bfloat16; not an emulation."""
    half = (x.to(torch.bfloat16) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*half)


PEERS: dict[str, Attention] = {
    "SageAttention 2": sage2, "FlashAttention 3 fp8": fa3_fp8, "SDPA bfloat16": sdpa_bf16,
}  # fmt: skip
