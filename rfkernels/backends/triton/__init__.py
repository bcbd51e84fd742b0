"""Triton kernels. Needs the package triton and a CUDA device, or TRITON_INTERPRET=1 for the CPU interpreter."""

from __future__ import annotations

import importlib.util
import os


def unavailable_reason(device_type: str) -> str | None:
    """Why the Triton kernels do not serve tensors of that device type here; None when they do."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; `pip install triton` (Linux)"
    return "not written yet" if device_type in ("cpu", "cuda") or os.environ else None
