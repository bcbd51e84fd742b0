"""Tensors, scalars and hypothesis strategies for the op tests: every memory layout, dtype and kind of value."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from tolerances import BF16, DTYPES, F16, F32, F64

LAYOUTS = ("contiguous", "transposed", "sliced", "offset", "batch_last", "narrowed")
INPUT_LAYOUTS = (*LAYOUTS, "expanded", "expanded_batch")
SIZES = (0, 1, 2, 3, 5, 7, 13, 31, 33, 127, 129, 257, 1023, 1025)
SPECIAL = (
    0.0,
    -0.0,
    math.inf,
    -math.inf,
    math.nan,
    1e-40,
    -1e-45,
    6e-8,
    3.3e38,
    -3.3e38,
    65504.0,
    1.0,
)


def normal(
    *shape: int, dtype: torch.dtype = F32, key: int = 0, device: str = "cpu"
) -> torch.Tensor:
    """Repeatable normals."""
    generator = torch.Generator().manual_seed(7919 * key + sum(shape))
    return torch.randn(shape, generator=generator, dtype=F64).to(device, dtype)


def laid_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values (for the expanded layouts: some of them) in memory of another order, with gaps or zero strides."""
    if layout == "contiguous" or values.ndim == 0:
        return values
    if layout == "transposed":
        return (
            values.transpose(-1, -2).contiguous().transpose(-1, -2) if values.ndim > 1 else values
        )
    if layout == "sliced":
        wide = torch.full((*values.shape[:-1], 2 * values.shape[-1] + 1), 77.0, dtype=values.dtype)
        view = wide[..., 1::2]
    elif layout == "offset":
        flat = torch.full((values.numel() + 5,), 77.0, dtype=values.dtype)
        view = flat[3 : 3 + values.numel()].view(values.shape)
    elif layout == "batch_last":
        return values.movedim(0, -1).contiguous().movedim(-1, 0)
    elif layout == "narrowed":
        view = torch.full([n + 2 for n in values.shape], 77.0, dtype=values.dtype)
        for dim, size in enumerate(values.shape):
            view = view.narrow(dim, 1, size)
    elif layout == "expanded":
        return values if 0 in values.shape else values[..., :1].expand(values.shape)
    else:
        return values if 0 in values.shape else values[:1].expand(values.shape)
    view.copy_(values)
    return view


def scalar(kind: str, value: float, batch: int) -> float | torch.Tensor:
    """A step size as callers give it; per-sample kinds spread around ``value``."""
    spread = value + torch.linspace(-0.5, 0.5, max(batch, 1), dtype=F64)[:batch]
    return {
        "float": lambda: value,
        "int": lambda: round(value),
        "0-d": lambda: torch.tensor(value, dtype=F32),
        "0-d float64": lambda: torch.tensor(value, dtype=F64),
        "per sample": lambda: spread.float(),
        "per sample, strided": lambda: spread.float().repeat_interleave(3)[1::3],
        "per sample, float64": lambda: spread.clone(),
        "per sample, bfloat16": lambda: spread.bfloat16(),
        "one for all, (B,)": lambda: torch.tensor([value], dtype=F32).expand(batch),
    }[kind]()


SCALAR_KINDS = (
    "float", "int", "0-d", "0-d float64", "per sample", "per sample, strided", "per sample, float64",
    "per sample, bfloat16", "one for all, (B,)",
)  # fmt: skip


@st.composite
def shapes(draw: st.DrawFn, *, limit: int = 5000) -> tuple[int, ...]:
    """One to four dimensions of 0, 1, primes and 2^k +- 1, few elements in all."""
    shape: list[int] = []
    for _ in range(draw(st.integers(1, 4))):
        room = limit // max(math.prod(shape), 1)
        shape.append(draw(st.sampled_from([n for n in SIZES if n <= max(room, 1)])))
    return tuple(shape)


@st.composite
def operands(
    draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, *, special: bool = False
) -> torch.Tensor:
    """An input tensor of any layout."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    values = torch.randn(shape, generator=generator, dtype=F64)
    if special:
        chosen = torch.randint(0, len(SPECIAL), shape, generator=generator)
        values = torch.where(
            torch.rand(shape, generator=generator) < 0.5,
            torch.tensor(SPECIAL, dtype=F64)[chosen],
            values,
        )
    return laid_out(values.to(dtype), draw(st.sampled_from(INPUT_LAYOUTS)))


def partner_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Dtypes of the other tensors of a call whose state has ``dtype``."""
    return DTYPES if dtype == F64 else (F32, BF16, F16)


@st.composite
def scalars(draw: st.DrawFn, batch: int) -> float | torch.Tensor:
    """A step size of any kind."""
    return scalar(draw(st.sampled_from(SCALAR_KINDS)), draw(st.floats(-3.0, 3.0, width=32)), batch)


@st.composite
def seeds(draw: st.DrawFn, batch: int) -> int | torch.Tensor:
    """A seed or an offset of any kind and size."""
    value = draw(st.sampled_from((0, 1, 2**31, 2**32 - 1, 2**32, 2**62 + 5, 2**63 - 1)))
    kind = draw(st.sampled_from(("int", "0-d", "per sample", "per sample, strided")))
    if kind == "int":
        return value
    if kind == "0-d":
        return torch.tensor(value)
    table = torch.tensor([max(value - 3 * b, b) for b in range(batch)], dtype=torch.int64)
    return table if kind == "per sample" else torch.stack((table, table + 1), 1)[:, 0]
