"""x_t and its target by the compiled kernels."""

from __future__ import annotations

from rfkernels import _C

_PATHS = {"linear": 0, "trigonometric": 1, "vp": 2, "sub-vp": 3}  # rfk_path
_CUSTOM = 4


def interpolate(x1, x0, t, path, seed, offset, xt, target, x0_out) -> None:
    """See ``rfkernels.ops.interpolate``."""
    kind, custom = (_PATHS[path], None) if isinstance(path, str) else (_CUSTOM, path)
    _C.interpolate(x1, x0, t, kind, custom, seed, offset, xt, target, x0_out)
