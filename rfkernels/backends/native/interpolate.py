"""x_t and its target by the compiled kernels."""

from __future__ import annotations

from rfkernels import _C
from rfkernels.backends.native import KERNEL_PATHS

_CUSTOM = 4


def interpolate(x1, x0, t, path, seed, offset, xt, target, x0_out) -> None:
    """See ``rfkernels.ops.interpolate``."""
    kind, custom = (KERNEL_PATHS[path], None) if isinstance(path, str) else (_CUSTOM, path)
    _C.interpolate(x1, x0, t, kind, custom, seed, offset, xt, target, x0_out)
