"""Per-sample losses and their gradient by the compiled kernels."""

from __future__ import annotations

import math

import torch

from rfkernels import _C

_KINDS = {"mse": 0, "pseudo_huber": 1, "pseudo_huber_elementwise": 2}  # rfk_loss_kind


def flow_loss(
    prediction, target, x0, x1, seed, offset, weight, kind, huber_c, grad_scale, losses, grad
) -> None:
    """See ``rfkernels.ops.flow_loss``; the partial sums live in a workspace of one double per 4096 elements."""
    size = _C.flow_loss_workspace(prediction.shape[0], math.prod(prediction.shape[1:]))
    workspace = torch.empty(size, dtype=torch.float64, device=prediction.device)
    _C.flow_loss(
        prediction, target, x0, x1, seed, offset, weight, _KINDS[kind], huber_c, grad_scale, losses, grad,
        workspace.data_ptr(),
    )  # fmt: skip
