"""Where quantized attention runs: backend, instruction set level and scheme, with the proof that it ran there.

A test takes a ``cell`` (a backend, one scheme) from ``CELLS``; another backend joins by one line in ``_BACKENDS``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import pytest
import torch
from cells import active, level_reason

import rfkernels as rf
from rfkernels._dispatch import unavailable_reason
from rfkernels.backends.attention_schemes import SCHEMES

T = TypeVar("T")
GPU = torch.cuda.is_available()
ISA_LEVELS = ("baseline", "avx2", "avx512", "amx")

# (backend, device, level) -> schemes.
_NATIVE = ("int8_u8", "int8_bf16", "bf16")
_TRITON = ("int8_bf16", "int8_fp8", "fp8", "bf16")
_BACKENDS: dict[tuple[str, str, str | None], tuple[str, ...]] = {
    ("reference", "cpu", None): tuple(SCHEMES),
    **{("native", "cpu", isa): _NATIVE for isa in ISA_LEVELS},
    ("triton", "cuda", None): _TRITON,
}
# Least SQNR in dB on normals of any shape, against exact attention in float64 on float32 inputs. The medians at length
# 1024 are 36, 39, 28.7, 25.5 and 49.5; short lengths and small heads spread by some 4 dB.
LEAST = {"int8_u8": 31.0, "int8_bf16": 34.0, "int8_fp8": 24.0, "fp8": 20.0, "bf16": 42.0}


@dataclass(frozen=True)
class AttentionCell:
    """One scheme on one backend and device, the native one at one instruction set level."""

    backend: str
    device: str
    isa: str | None
    scheme: str

    def __str__(self) -> str:
        return "-".join(filter(None, (self.backend, self.isa, self.scheme)))

    @property
    def least(self) -> float:
        """The least SQNR on normals."""
        return LEAST[self.scheme]

    def reason(self) -> str | None:
        """Why this cell cannot run here; None when it can."""
        if self.device == "cuda" and not GPU:
            return "no CUDA device"
        fp8 = self.device == "cuda" and "fp8" in self.scheme
        if fp8 and torch.cuda.get_device_capability() < (8, 9):
            return "fp8 needs compute capability 8.9"
        reason = unavailable_reason(self.backend, self.device, "attention")
        if reason is None and self.isa is not None:
            reason = level_reason(self.isa)
        return reason

    def active(self) -> contextlib.AbstractContextManager[None]:
        """The backend and the level, without a proof."""
        return active(self.backend, self.isa)

    def run(self, call: Callable[[], T]) -> T:
        """The call's result, after the counters have shown that this scheme ran here and nothing was handed over."""
        rf.attention_stats(reset=True)
        with self.active():
            result = call()
        stats = rf.attention_stats(reset=True)
        assert set(stats.calls) == {(self.scheme, self.scheme, self.backend)}, stats
        assert not stats.handovers, stats
        return result

    def attention(self, *args, **options) -> torch.Tensor:
        """``rf.attention`` in this cell's scheme, run with the proof; CPU tensors in and out."""
        args = [a.to(self.device) if isinstance(a, torch.Tensor) else a for a in args]
        mask = options.pop("attn_mask", None)
        if mask is not None:
            mask = mask.to(self.device)
        found = self.run(
            lambda: rf.attention(*args, attn_mask=mask, precision=self.scheme, **options)
        )
        return tuple(t.cpu() for t in found) if isinstance(found, tuple) else found.cpu()


def _parameter(cell: AttentionCell) -> object:
    reason = cell.reason()
    marks = [] if reason is None else [pytest.mark.skip(reason=f"{cell}: {reason}")]
    return pytest.param(cell, id=str(cell), marks=marks)


ALL = [AttentionCell(*place, scheme) for place, names in _BACKENDS.items() for scheme in names]
CELLS = [_parameter(cell) for cell in ALL]


def every_cell(test: Callable) -> Callable:
    """Run a test once for every cell that can run here."""
    return pytest.mark.parametrize("cell", CELLS)(test)


def available() -> list[AttentionCell]:
    """The cells that can run here."""
    return [cell for cell in ALL if cell.reason() is None]
