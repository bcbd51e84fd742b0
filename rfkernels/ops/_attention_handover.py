"""When attention is handed over to PyTorch's own: one rule, made of table rows, in the order in which they are asked.

A hand-over changes no meaning, only who computes, and every one is counted with the sentence below as its reason
(``rfkernels.attention_stats``). ``rfkernels.use_backend`` switches the rule off.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from rfkernels.backends.attention_schemes import MAX_HEAD_DIM

FLOAT64 = "float64 inputs ask for more precision than quantized attention has"
FLOAT16 = "float16 inputs lose 22 dB in the bf16 scheme"
HEAD_SIZE = f"head sizes above {MAX_HEAD_DIM} have no quantized kernel"


NO_TILES = "without AMX, products in bfloat16 are slower than PyTorch's attention"
PORTABLE = "the portable kernels are slower than PyTorch's attention"
FEW = "for few queries PyTorch's attention is quicker than quantizing K and V"


@dataclass(frozen=True)
class Small:
    """A measured region in which PyTorch is faster: calls of at most ``queries`` or at most ``scores`` queries * keys."""

    device: str
    scheme: str
    dtype: torch.dtype
    mask: str | None  # "none", "causal", "bool", "float"; None for all
    threads: tuple[int, int]  # from, to
    head_dim: tuple[int, int]  # from, to
    queries: int
    scores: int
    reason: str


def _small(scheme: str) -> tuple[Small, ...]:
    """Measured on two AMX cores (benchmarks/attention/handover.py), 1 and 2 threads, with and without masks."""
    halves = (torch.bfloat16, torch.float16)
    rows = [
        *(("cpu", scheme, dtype, None, (1, 1 << 20), (1, 64), 192, 0, FEW) for dtype in halves),
        *(("cpu", scheme, dtype, None, (1, 1 << 20), (65, 256), 256, 0, FEW) for dtype in halves),
        ("cpu", scheme, torch.float32, None, (1, 1 << 20), (1, 256), 32, 16384, FEW),
    ]
    return tuple(Small(*row) for row in rows)


_CPU_SCHEMES = ("int8_u8", "int8_bf16", "bf16")  # any other is an error there, never a hand-over

# By (device, scheme), so that a call outside every region pays one look-up.
SMALL: dict[tuple[str, str], tuple[Small, ...]] = {
    ("cpu", scheme): _small(scheme) for scheme in _CPU_SCHEMES
}


@functools.cache
def _cpu_level() -> str | None:
    """The instruction set level of the native attention kernels; None without them."""
    try:
        from rfkernels import _C
    except ImportError:
        return None
    return _C.attention_isa()


def _slow_level(scheme: str) -> str | None:
    level = _cpu_level()
    if level == "baseline":
        return PORTABLE
    return NO_TILES if scheme != "int8_u8" and level in ("avx2", "avx512") else None


def handover_reason(
    queries: int,
    keys: int,
    head_dim: int,
    value_dim: int,
    mask: str,
    dtype: torch.dtype,
    device: str,
    threads: int,
    scheme: str,
) -> str | None:
    """Why PyTorch's attention serves this call, or None when a quantized kernel does.

    Args:
        queries, keys: lengths. head_dim, value_dim: sizes of a row of Q and K, and of V.
        mask: ``none``, ``causal``, ``bool`` or ``float``.
        dtype: of the inputs. device: the device's type. threads: ``torch.get_num_threads()``.
        scheme: a concrete scheme.
    """
    if dtype is torch.float64:
        return FLOAT64
    if dtype is torch.float16 and scheme == "bf16":
        return FLOAT16
    if head_dim > MAX_HEAD_DIM or value_dim > MAX_HEAD_DIM:
        return HEAD_SIZE
    if device == "cpu" and scheme in _CPU_SCHEMES:
        slow = _slow_level(scheme)
        if slow is not None:
            return slow
    for row in SMALL.get((device, scheme), ()):
        if (
            (queries <= row.queries or queries * keys <= row.scores)
            and row.dtype is dtype
            and row.mask in (None, mask)
            and row.threads[0] <= threads <= row.threads[1]
            and row.head_dim[0] <= head_dim <= row.head_dim[1]
        ):
            return row.reason
    return None


def rules() -> list[str]:
    """Every reason of the rule as a sentence, for ``rfkernels doctor`` and the guide."""
    small = [row.reason for rows in SMALL.values() for row in rows]
    return [FLOAT64, FLOAT16, HEAD_SIZE, PORTABLE, NO_TILES, *dict.fromkeys(small)]
