"""AdamP and SGDP steps by the compiled kernels."""

from __future__ import annotations

import torch

from rfkernels import _C

CHECKS_TENSORS = True  # the extension refuses what it cannot take before it writes anything
_RULES = {"adamp": 0, "sgdp": 1}  # rfk_update_rule
_WHOLE, _GATHER, _APPLY = 0, 1, 2  # rfk_update_phase
_SUMMARY = 5  # RFK_UPDATE_SUMMARY


def projected_update(
    weights, grads, first, second, steps, averages, projected, totals, options, reduce
) -> None:
    """See ``rfkernels.ops.projected_update``; the row sums need memory from torch on CUDA, and between two phases."""
    tensors = (weights, grads, first, second, steps, averages, projected, totals)
    numbers = (_RULES[options.rule], *options[1:])
    device = weights[0].device
    workspace = None
    if device.type != "cpu" or reduce is not None:
        rows = [w.shape[0] if p else 1 for w, p in zip(weights, projected, strict=True)]
        shapes = [
            (n, w.numel() // n if n else 0, p)
            for w, n, p in zip(weights, rows, projected, strict=True)
        ]
        size = _C.projected_update_workspace(shapes)
        workspace = torch.empty(size, dtype=torch.float64, device=device)
    place = 0 if workspace is None else workspace.data_ptr()
    if reduce is None:
        _C.projected_update(*tensors, numbers, _WHOLE, 0, place)
        return
    summary = torch.zeros(len(weights), _SUMMARY, dtype=torch.float64, device=device)
    _C.projected_update(*tensors, numbers, _GATHER, summary.data_ptr(), place)
    reduce(summary)
    _C.projected_update(*tensors, numbers, _APPLY, summary.data_ptr(), place)
