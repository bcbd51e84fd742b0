"""The compiled extension ``rfkernels._C``: CPU kernels for every instruction set level, and CUDA where it was built in."""

from __future__ import annotations

import os

import torch  # first: its libgomp then serves the kernels too, and torch.set_num_threads governs them

try:
    from rfkernels import _C
except ImportError as error:  # a checkout that was never built, or a broken installation
    _C = None
    _import_error = str(error)

KERNEL_PATHS = {"linear": 0, "trigonometric": 1, "vp": 2, "sub-vp": 3}  # rfk_path
ISA_LEVELS = ("baseline", "avx2", "avx512", "amx")
_max_isa = os.environ.get("RFK_MAX_ISA")
if _max_isa and _max_isa not in ISA_LEVELS:
    raise ValueError(
        f"RFK_MAX_ISA: the value must be one of {', '.join(ISA_LEVELS)}; got {_max_isa!r}"
    )


def _never(*_: object) -> None:
    """Stands in for the fast calls where there is no extension."""


def _unusual(*_: object) -> int:
    """The same for ``handover_key``."""
    return -1


fast_step = _never if _C is None else _C.fast_step
fast_interpolate = _never if _C is None else _C.fast_interpolate
handover_key = getattr(_C, "handover_key", _unusual)  # not in a build of before it


def unavailable_reason(device_type: str) -> str | None:
    """Why the native kernels do not serve tensors of that device type here; None when they do."""
    if _C is None:
        return f"the compiled extension rfkernels._C cannot be imported ({_import_error}); install with `pip install .`"
    if device_type == "cpu":
        return None
    if device_type != "cuda":
        return f"there are no native kernels for {device_type}; the reference serves it"
    if not _C.has_cuda():
        return "this build has no CUDA kernels; rebuild with nvcc on the path and RFK_CUDA=ON"
    if not torch.cuda.is_available():
        return f"no CUDA device is visible to torch {torch.__version__}; the kernels are compiled, not run"
    return None
