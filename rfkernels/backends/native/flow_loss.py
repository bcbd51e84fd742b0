"""Per-sample losses and their gradient by the compiled kernels."""

from __future__ import annotations

import math

import torch

from rfkernels import _C

_KINDS = {"mse": 0, "pseudo_huber": 1, "pseudo_huber_elementwise": 2}  # rfk_loss_kind


def flow_loss(
    prediction, target, x0, x1, seed, offset, weight, kind, huber_c, grad_scale, losses, grad
) -> None:
    """See ``rfkernels.ops.flow_loss``; on CUDA the partial sums need a double per 4096 elements from torch."""
    place, workspace = 0, None
    if not prediction.is_cpu:
        size = _C.flow_loss_workspace(prediction.shape[0], math.prod(prediction.shape[1:]))
        workspace = torch.empty(size, dtype=torch.float64, device=prediction.device)
        place = workspace.data_ptr()
    _C.flow_loss(
        prediction, target, x0, x1, seed, offset, weight, _KINDS[kind], huber_c, grad_scale, losses, grad, place
    )  # fmt: skip
