"""Philox uniforms and normals by the compiled kernels."""

from __future__ import annotations

from rfkernels import _C

_DISTRIBUTIONS = {"normal": 0, "uniform": 1}  # rfk_distribution


def random(out, seed, offset, distribution) -> None:
    """See ``rfkernels.ops.random``."""
    _C.random(out, seed, offset, _DISTRIBUTIONS[distribution])
