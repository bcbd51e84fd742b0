"""Regression losses by name: thin objects over the fused ``rf.flow_loss``.

A loss object is also a distance between two batches, ``loss(a, b)``, so that distillation takes it
where it takes any callable (a perceptual distance, for example).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rfkernels.ops.flow_loss import flow_loss

# Any callable distance(prediction, target) -> scalar loss serves where a loss is asked for.
Distance = Callable[..., Tensor]

LOSSES = {
    "mse": "mse",
    "l2": "mse",
    "pseudo-huber": "pseudo_huber",
    "pseudo_huber": "pseudo_huber",
    "pseudo-huber-elementwise": "pseudo_huber_elementwise",
    "pseudo_huber_elementwise": "pseudo_huber_elementwise",
}


@dataclass(frozen=True)
class FlowLoss:
    """A kind of flow loss with its constant; called like ``rf.flow_loss`` without those two.

    Kinds, for a sample's residual r of d elements: ``mse``, mean of r^2; ``pseudo_huber``,
    (sqrt(|r|^2 + c^2) - c) / d with c = 0.00054 d by default (2-rectified flow++, Lee, Lin,
    Fanti 2024); ``pseudo_huber_elementwise``, mean of sqrt(r_i^2 + c^2) - c with c = 1e-3 by
    default (Rectified Diffusion, Wang et al. 2024). The Huber kinds share the optimum of ``mse``
    only when x0 determines x1, as reflow pairs do: with independent noise their optimum is not the
    mean velocity, and the flow they learn does not end at the data.

    Args:
        kind: one of the names above, or an alias from LOSSES.
        huber_c: the constant c of the Huber kinds; None for the default.

    Raises:
        ValueError: for an unknown kind, a constant that is not positive, or one given for ``mse``.
    """

    kind: str = "mse"
    huber_c: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in LOSSES:
            raise ValueError(
                f"FlowLoss: kind must be one of {', '.join(LOSSES)}; got {self.kind!r}"
            )
        object.__setattr__(self, "kind", LOSSES[self.kind])
        if self.huber_c is None:
            return
        if self.kind == "mse":
            raise ValueError(
                f"FlowLoss: huber_c is for the Huber kinds; got {self.huber_c} for mse"
            )
        if not 0 < self.huber_c < math.inf:
            raise ValueError(f"FlowLoss: huber_c must be positive and finite; got {self.huber_c}")

    def __call__(self, prediction: Tensor, target: Tensor | None = None, **options: Any) -> Tensor:
        """``rf.flow_loss(prediction, target, **options)`` with this kind: (B, ...) to a scalar.

        ``options`` are those of ``rf.flow_loss``: x0, x1, seed, offset, weight, reduction.
        """
        return flow_loss(prediction, target, kind=self.kind, huber_c=self.huber_c, **options)


def get_loss(loss: str | Distance) -> Distance:
    """The FlowLoss of that name, or the callable itself.

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything that is neither a name nor callable.
    """
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"loss: must be one of {', '.join(LOSSES)}; got {loss!r}")
        return FlowLoss(loss)
    if not callable(loss):
        raise TypeError(f"loss: must be a name or a callable; got {type(loss).__name__}")
    return loss
