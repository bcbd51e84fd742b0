"""Triton kernels. Needs the package triton and a CUDA device, or TRITON_INTERPRET=1 for the CPU interpreter.

The package triton is imported with the first kernel module, never by ``import rfkernels``. ``launches`` counts what each
op's launcher sent to the device.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import sys

import torch

from rfkernels._dispatch import OPS

launches: dict[str, int] = dict.fromkeys(OPS, 0)

OLDEST = (
    3,
    4,
)  # the first whose compiler takes the nested tuples of arguments that the kernels use


@functools.cache
def _missing() -> str | None:
    """Why the package triton cannot be used; None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; `pip install triton` (Linux)"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a nightly build under another name
        return None
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        return (
            f"triton {version} is installed; the kernels need {'.'.join(map(str, OLDEST))} or later"
        )
    return None


@functools.cache
def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def interpreted() -> bool:
    """True when kernels run in Triton's interpreter: TRITON_INTERPRET=1 was set before triton was imported."""
    language = sys.modules.get("triton.language")
    if language is None:
        return os.environ.get("TRITON_INTERPRET") == "1"
    return type(language.cdiv).__name__ == "InterpretedFunction"


def unavailable_reason(device_type: str) -> str | None:
    """Why the Triton kernels do not serve tensors of that device type here; None when they do."""
    if device_type not in ("cpu", "cuda"):
        return f"there are no Triton kernels for {device_type}; the reference serves it"
    missing = _missing()
    if missing is not None:
        return missing
    if device_type == "cuda" and not torch.cuda.is_available():
        return f"no CUDA device is visible to torch {torch.__version__}"
    if interpreted():
        return None
    if device_type == "cpu":
        return "on the CPU only Triton's interpreter runs; set TRITON_INTERPRET=1 before triton is imported"
    if _capability() < (8, 0):
        return f"the Triton kernels need compute capability 8.0; this device has {'.'.join(map(str, _capability()))}"
    return None
