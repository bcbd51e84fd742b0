"""Settings of the integration tests: helper modules are importable, and calls of a kernel are counted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rfkernels as rf

sys.path.insert(0, str(Path(__file__).parent))


class Kernel:
    """One backend forced, so that no call is handed over to PyTorch, and its calls counted."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def calls(self, precision: str | None = None) -> int:
        """Calls since the last question, under one precision or all; no call may have been handed over."""
        stats = rf.attention_stats(reset=True)
        assert not stats.handovers
        assert {backend for _, _, backend in stats.calls} <= {self.backend}
        return sum(n for (asked, _, _), n in stats.calls.items() if precision in (None, asked))


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    """A counter of kernel calls: native's where it serves attention here, else the reference's."""
    backend = "native" if "native" in rf.available_backends("attention") else "reference"
    with rf.use_backend(backend):
        counter = Kernel(backend)
        rf.attention_stats(reset=True)
        yield counter
