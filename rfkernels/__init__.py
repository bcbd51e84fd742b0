"""rfkernels: fused kernels for rectified-flow (flow-matching) generative models, and the library on top.

Time t runs from 0 (noise, x0) to 1 (data, x1); velocity is dx/dt. Start with ``rfkernels demo`` on the command line, or
with ``rf.sample``, ``rf.interpolate`` and ``rf.flow_loss`` below.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from rfkernels._dispatch import available_backends, backend_table, use_backend
from rfkernels._errors import BackendUnavailableError
from rfkernels._version import __version__
from rfkernels.ops._attention_stats import AttentionStats, attention_stats
from rfkernels.ops.attention import attention
from rfkernels.ops.attention_varlen import attention_varlen
from rfkernels.ops.flow_loss import flow_loss
from rfkernels.ops.interpolate import Interpolant, interpolate
from rfkernels.ops.ode_step import euler_step, linear_step, taylor_step
from rfkernels.ops.quantize import QuantizedKV, quantize
from rfkernels.ops.random import derive_seed, rand, randn

if TYPE_CHECKING:
    from rfkernels.integrations.sageattention import sageattn, sageattn_varlen
    from rfkernels.sampling import invert, sample
    from rfkernels.training import load

# Loaded at first use, so that a program which needs the kernels alone starts fast.
_LAZY = {
    "sample": "rfkernels.sampling",
    "invert": "rfkernels.sampling",
    "load": "rfkernels.training",
    "sageattn": "rfkernels.integrations.sageattention",
    "sageattn_varlen": "rfkernels.integrations.sageattention",
}
_ROOMS = (
    "data",
    "editing",
    "flow",
    "integrations",
    "metrics",
    "models",
    "optim",
    "sampling",
    "training",
)

__all__ = [
    "AttentionStats",
    "BackendUnavailableError",
    "Interpolant",
    "QuantizedKV",
    "__version__",
    "attention",
    "attention_stats",
    "attention_varlen",
    "available_backends",
    "backend_table",
    "derive_seed",
    "euler_step",
    "flow_loss",
    "interpolate",
    "invert",
    "linear_step",
    "load",
    "quantize",
    "rand",
    "randn",
    "sageattn",
    "sageattn_varlen",
    "sample",
    "taylor_step",
    "use_backend",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"rfkernels.{name}")
    raise AttributeError(f"module 'rfkernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])
