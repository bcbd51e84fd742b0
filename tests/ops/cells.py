"""The cells of the op x backend x ISA table, and the proof that a call ran in the one it names.

A cell runs a call under ``rf.use_backend`` and, for the native CPU kernels, at one instruction set level; then it reads the
counter that the backend's own launcher keeps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import pytest
import torch

import rfkernels as rf
from rfkernels._dispatch import unavailable_reason
from rfkernels.backends import triton as triton_backend

try:
    from rfkernels import _C
except ImportError:
    _C = None

ISA_LEVELS = ("baseline", "avx2", "avx512")
GPU = torch.cuda.is_available()
T = TypeVar("T")


def level_reason(isa: str) -> str | None:
    """Why this CPU cannot run that instruction set level; None when it can."""
    levels, detected = (*ISA_LEVELS, "amx"), _C.isa_detected()  # amx: of attention only
    if levels.index(isa) > levels.index(detected):
        return f"this CPU is at {detected}, below {isa}"
    return None


@contextlib.contextmanager
def active(backend: str, isa: str | None) -> Iterator[None]:
    """The backend and the level, without a proof."""
    if isa is not None:
        _C.cap_isa(isa)
    try:
        with rf.use_backend(backend):
            yield
    finally:
        if isa is not None:
            _C.cap_isa("amx")


@dataclass(frozen=True)
class Cell:
    """One backend on one device, the native CPU one at one instruction set level."""

    backend: str
    device: str
    isa: str | None = None

    def __str__(self) -> str:
        return "-".join(filter(None, (self.backend, self.device, self.isa)))

    @property
    def exact(self) -> bool:
        """True where path functions (sin, cos, exp in float64) come from the same maths library as the reference's."""
        return self.device == "cpu"

    @property
    def interpreted(self) -> bool:
        """True for Triton's interpreter, which takes 10 ms a program: such a cell gets the first shape only."""
        return self.backend == "triton" and triton_backend.interpreted()

    def reason(self) -> str | None:
        """Why this cell cannot run here; None when it can."""
        if self.device == "cuda" and not GPU:
            return "no CUDA device"
        reason = unavailable_reason(self.backend, self.device)
        if reason is None and self.isa is not None:
            reason = level_reason(self.isa)
        return reason

    def _count(self, op: str) -> int:
        if self.backend == "triton":
            return triton_backend.launches[op]
        return _C.launch_counts()[(op, self.isa or "cuda")]

    def active(self) -> contextlib.AbstractContextManager[None]:
        """The backend and the level, without a proof."""
        return active(self.backend, self.isa)

    def run(self, op: str, call: Callable[[], T], *, launches: bool = True) -> T:
        """The call's result, after its launcher's counter has moved (``launches=False``: only for empty tensors)."""
        with self.active():
            if self.backend == "reference":
                return call()
            before = self._count(op)
            result = call()
            moved = self._count(op) - before
        assert moved > 0 or not launches, (
            f"{op} did not run in {self}: its launcher's counter did not move"
        )
        return result


def _parameter(cell: Cell) -> object:
    reason = cell.reason()
    marks = [] if reason is None else [pytest.mark.skip(reason=f"{cell}: {reason}")]
    return pytest.param(cell, id=str(cell), marks=marks)


_ALL = (
    *(Cell("native", "cpu", isa) for isa in ISA_LEVELS),
    Cell("native", "cuda"),
    Cell("triton", "cuda" if GPU else "cpu"),
)
CELLS = [_parameter(cell) for cell in _ALL]
# Without Triton's interpreter, for the tests that would take minutes in it; the Triton kernels have their own.
FAST_CELLS = [
    _parameter(cell) for cell in _ALL if not (cell.backend == "triton" and cell.device == "cpu")
]
INTERPRETER = [
    _parameter(cell) for cell in _ALL if cell.backend == "triton" and cell.device == "cpu"
]
NATIVE_CPU = [cell for cell in _ALL if cell.isa is not None and cell.reason() is None]
NATIVE = [_parameter(cell) for cell in _ALL if cell.backend == "native"]


def reference(call: Callable[[], T]) -> T:
    """The call's result in eager torch."""
    with rf.use_backend("reference"):
        return call()


def results(value: object) -> list[torch.Tensor]:
    """The tensors of a result, one or several, None left out."""
    return [v for v in (value if isinstance(value, tuple) else (value,)) if v is not None]


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(actual: torch.Tensor, expected: torch.Tensor, what: object = "") -> None:
    """Equal bit for bit; the signs of zeros count, those of NaNs do not."""
    assert actual.dtype == expected.dtype, (what, actual.dtype, expected.dtype)
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    a, e = (t.detach().cpu().contiguous() for t in (actual, expected))
    bits = _BITS[a.element_size()]
    equal = (a.view(bits) == e.view(bits)) | (a.isnan() & e.isnan())
    if not equal.all():
        wrong = (~equal).nonzero()
        first = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{what}: {len(wrong)} of {a.numel()} elements differ; at {first} {a[first].item()!r}, "
            f"expected {e[first].item()!r}"
        )


def same_results(cell: Cell, actual: object, expected: object, what: object = "") -> None:
    """Bit-equal results; Triton's interpreter truncates to bfloat16, so there one unit is allowed."""
    pairs = list(zip(results(actual), results(expected), strict=True))
    truncated = cell.interpreted and any(e.dtype == torch.bfloat16 for _, e in pairs)
    for a, e in pairs:
        if truncated:
            torch.testing.assert_close(a.cpu(), e.cpu(), rtol=2**-7, atol=0.0, equal_nan=True)
        else:
            same_bits(a, e, (str(cell), what))
