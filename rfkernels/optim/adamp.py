"""AdamP: AdamW that takes the radial part out of the update of scale-invariant weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from rfkernels.optim.projected import Projected

__all__ = ["AdamP"]


class AdamP(Projected):
    """AdamW with projection (Heo et al., "AdamP", ICLR 2021; https://github.com/clovaai/AdamP), one fused pass a step.

    A weight that a normalisation follows does not change the network's output when it is scaled, so its gradient is
    orthogonal to it, and momentum makes its norm grow and its effective step shrink. Where the gradient is that orthogonal,
    row by row or over the whole tensor, the part of the update along the weight is taken out, and ``weight_decay`` is
    multiplied by ``wd_ratio``. Vectors and scalars are updated as AdamW does. Formulas and their order:
    ``rfkernels.ops.projected_update``; arguments, defaults and state are those of the package ``adamp``.

    Args:
        params: parameters or parameter groups; float32, float64, bfloat16 or float16, moments in float32 (float64 for
            float64). DTensors sharded along dimension 0 (FSDP2) are projected as the whole parameter would be.
        lr: learning rate, a number or a 0-d tensor, which is read on its device.
        betas: decay of the first and second moment, in [0, 1).
        eps: added to the denominator and to norms.
        weight_decay: decoupled, as in AdamW.
        delta: a parameter is projected where |cos(gradient, weight)| < delta / sqrt(length).
        wd_ratio: factor on weight_decay where projected.
        nesterov: Nesterov momentum.
        ema: one averaged tensor per parameter, in the order of ``params``, moved in the same pass:
            e + (1 - ema_decay) (w - e). They are the caller's and not in the state dict.
        ema_decay: in [0, 1]; also a key of the groups, so that it can be scheduled like ``lr``.

    Example:
        >>> optimizer = rf.optim.AdamP(model.parameters(), lr=1e-4, weight_decay=1e-2)
    """

    _rule = "adamp"
    _moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        *,
        ema: Sequence[torch.Tensor] | None = None,
        ema_decay: float = 0.999,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "nesterov": nesterov,
            "ema_decay": ema_decay,
        }
        super().__init__(params, defaults, ema)
