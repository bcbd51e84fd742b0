"""Inputs that quantized attention finds hard, and the measures of its error. Needs torch alone.

Each generator returns float32 (q, k, v) of shape (seeds, 1, S, D): seed i is batch entry i, the same whatever the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _drawn(length: int, dim: int, seeds: int) -> tuple[list[torch.Generator], list[torch.Tensor]]:
    generators = [torch.Generator().manual_seed(1000 + seed) for seed in range(seeds)]
    each = [torch.randn((3, 1, length, dim), generator=g) for g in generators]
    return generators, list(torch.stack(each, 1))


def normal(length: int, dim: int, seeds: int = 8) -> Tensors:
    """Standard normals."""
    return tuple(_drawn(length, dim, seeds)[1])


def _each(generators: list[torch.Generator], *shape: int, draw=torch.randn) -> torch.Tensor:
    return torch.stack([draw(shape, generator=g) for g in generators])


def biased(length: int, dim: int, seeds: int = 8, outliers_in: str = "k") -> Tensors:
    """K with a bias per channel of 8 times its deviation, and 0.1 % of K (``outliers_in="qk"``: also of Q) times 10."""
    generators, (q, k, v) = _drawn(length, dim, seeds)

    def spiked(x: torch.Tensor) -> torch.Tensor:
        return torch.where(_each(generators, 1, length, dim, draw=torch.rand) < 1e-3, 10 * x, x)

    k = spiked(k) + 8 * _each(generators, 1, 1, dim)
    return (spiked(q) if "q" in outliers_in else q), k, v


def large_values(length: int, dim: int, seeds: int = 8) -> Tensors:
    """1 % of the tokens of V times 8."""
    generators, (q, k, v) = _drawn(length, dim, seeds)
    chosen = _each(generators, 1, length, 1, draw=torch.rand) < 0.01
    return q, k, torch.where(chosen, 8 * v, v)


def sinks(
    length: int, dim: int, seeds: int = 8, nats: float = 6.0, zero_value: bool = False
) -> Tensors:
    """A first key that every query scores about ``nats`` above the others; its value is ordinary, or zero."""
    generators, (q, k, v) = _drawn(length, dim, seeds)
    direction = torch.nn.functional.normalize(_each(generators, 1, 1, dim), dim=-1)
    q = q + 4 * direction
    k, v = k.clone(), v.clone()
    k[:, :, :1] = direction * (nats * dim**0.5 / 4)
    if zero_value:
        v[:, :, 0] = 0.0
    return q, k, v


GENERATORS: dict[str, Callable[..., Tensors]] = {
    "normal": normal,
    "biased K": biased,
    "biased K, outliers in Q and K": lambda *args, **kw: biased(*args, **kw, outliers_in="qk"),
    "large values": large_values,
    "sinks": sinks,
    "sinks without value": lambda *args, **kw: sinks(*args, **kw, zero_value=True),
}


def exact(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """PyTorch's attention in float64, grouped heads included."""
    q, k, v = q.double(), k.double(), v.double()
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.double()
    if is_causal:
        below = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        if attn_mask is None:
            attn_mask = below
        elif attn_mask.dtype == torch.bool:
            attn_mask = attn_mask & below
        else:
            attn_mask = attn_mask.masked_fill(~below, -torch.inf)
    group = q.shape[1] // max(k.shape[1], 1)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, scale=scale
    )


def decibels(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Signal to noise ratio of every batch entry."""
    found, truth = found.double().flatten(1), truth.double().flatten(1)
    return 10 * torch.log10(truth.square().sum(1) / (found - truth).square().sum(1))


def measures(found: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Medians over the batch: SQNR in dB, cosine, relative L1, root mean square error."""
    f, t = found.double().flatten(1), truth.double().flatten(1)
    return {
        "sqnr": float(decibels(found, truth).median()),
        "cosine": float(torch.nn.functional.cosine_similarity(f, t).median()),
        "relative_l1": float(((f - t).abs().sum(1) / t.abs().sum(1)).median()),
        "rmse": float((f - t).square().mean(1).sqrt().median()),
    }
