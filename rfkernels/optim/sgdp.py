"""SGDP: SGD with momentum that takes the radial part out of the update of scale-invariant weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from rfkernels.optim.projected import Projected

__all__ = ["SGDP"]


class SGDP(Projected):
    """SGD with momentum, decoupled weight decay and projection (Heo et al., "AdamP", ICLR 2021), one fused pass a step.

    The projection is that of :class:`AdamP`. Two things differ from torch.optim.SGD: the momentum buffer starts at zero, so
    the first step has the factor 1 - dampening too, and the decay is decoupled, w (1 - lr weight_decay / (1 - momentum)).
    Without ``nesterov`` the projected update stays in the momentum buffer, as in the authors' code. Formulas and their
    order: ``rfkernels.ops.projected_update``; arguments, defaults and state are those of the package ``adamp``.

    Args:
        params: as for ``AdamP``.
        lr: learning rate, a number or a 0-d tensor, which is read on its device.
        momentum: at least 0; not 1 with weight decay.
        dampening: of the gradient in the momentum buffer.
        weight_decay: decoupled.
        nesterov: Nesterov momentum.
        eps: added to norms.
        delta, wd_ratio, ema, ema_decay: as for ``AdamP``.

    Example:
        >>> optimizer = rf.optim.SGDP(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    """

    _rule = "sgdp"
    _moments = ("momentum",)

    def __init__(
        self,
        params: Iterable,
        lr: float | torch.Tensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        *,
        ema: Sequence[torch.Tensor] | None = None,
        ema_decay: float = 0.999,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "eps": eps,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "ema_decay": ema_decay,
        }
        super().__init__(params, defaults, ema)
