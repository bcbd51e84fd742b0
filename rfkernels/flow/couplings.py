"""Couplings: which source x0 (t = 0) meets which data point x1 (t = 1) in a training batch.

A coupling is called as ``coupling(x0, x1, labels)`` and returns the same three, the rows of x0
possibly in another order. x1 and its labels never move, so conditions stay with their data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor, "Tensor | None"]


@runtime_checkable
class Coupling(Protocol):
    """What the library asks of a coupling.

    ``independent`` says that x0 carries no information about x1, which is what lets training draw
    the noise inside the kernel and what the score formula rests on.
    """

    @property
    def name(self) -> str: ...

    @property
    def independent(self) -> bool: ...

    def __call__(self, x0: Tensor, x1: Tensor, labels: Tensor | None = None) -> Batch: ...


@dataclass(frozen=True)
class Independent:
    """Fresh noise for every data point: x0 as drawn, in the order drawn (Liu, Gong, Liu 2022).

    For two data sets (image translation) feed x0 in random order.
    """

    name: ClassVar[str] = "independent"
    independent: ClassVar[bool] = True

    def __call__(self, x0: Tensor, x1: Tensor, labels: Tensor | None = None) -> Batch:
        """(x0, x1, labels), unchanged."""
        _check_batch("Independent", x0, x1, labels)
        return x0, x1, labels


@dataclass(frozen=True)
class GivenPairs:
    """Row i of x0 belongs to row i of x1: the pairs that reflow and distillation train on."""

    name: ClassVar[str] = "given-pairs"
    independent: ClassVar[bool] = False

    def __call__(self, x0: Tensor, x1: Tensor, labels: Tensor | None = None) -> Batch:
        """(x0, x1, labels), unchanged."""
        _check_batch("GivenPairs", x0, x1, labels)
        return x0, x1, labels


@dataclass(frozen=True)
class MinibatchOT:
    """Optimal transport within the batch: x0 permuted so that the sum of |x0_i - x1_i|^2 is least.

    An exact assignment, so every row of x0 is used once and the batch's noise stays the batch's
    noise; sampling from a transport plan repeats some rows and drops others (Pooladian et al. 2023;
    Tong et al. 2024). The cost is the squared distance of flattened samples, not normalised; the
    solver is scipy's ``linear_sum_assignment`` on the host, cubic in the batch: up to about 1024.

    Over a whole batch the noise a data point meets depends on its class, so a conditional model
    learns from another prior per class than the one it samples from. ``within_labels=True`` gives
    each class the noise of its own rows and assigns inside the class only, which keeps the prior.

    Args:
        within_labels: assign among the rows of equal label; needs integer labels (B,).
    """

    within_labels: bool = False

    name: ClassVar[str] = "minibatch-ot"
    independent: ClassVar[bool] = False

    def __call__(self, x0: Tensor, x1: Tensor, labels: Tensor | None = None) -> Batch:
        """(x0 permuted, x1, labels).

        Raises:
            ValueError: for shapes that do not fit, labels missing where they are needed, or values
                that are not finite.
            ImportError: when scipy is not installed; the extra ``train`` brings it.
        """
        _check_batch("MinibatchOT", x0, x1, labels)
        if not self.within_labels:
            return x0[optimal_assignment(x0, x1)], x1, labels
        if labels is None or labels.ndim != 1 or labels.is_floating_point():
            got = "None" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise ValueError(
                f"MinibatchOT: labels must be integers (B,) with within_labels=True; got {got}"
            )
        order = torch.arange(len(x0), device=x0.device)
        for label in labels.unique():
            rows = (labels == label).nonzero().flatten().to(x0.device)
            order[rows] = rows[optimal_assignment(x0[rows], x1[rows])]
        return x0[order], x1, labels


def optimal_assignment(x0: Tensor, x1: Tensor) -> Tensor:
    """(B,) int64 permutation p with the least sum of |x0[p[i]] - x1[i]|^2, on x0's device.

    Solved in float64. The squared norms are the same for every permutation, so what is assigned is
    the negative inner product of the centred samples, which does not cancel.

    Raises:
        ValueError: for shapes that differ or values that are not finite.
        ImportError: when scipy is not installed.
    """
    _check_batch("optimal_assignment", x0, x1, None)
    source, data = _flat(x0), _flat(x1)
    cost = -(data - data.mean(0)) @ (source - source.mean(0)).T
    if not bool(torch.isfinite(cost).all()):
        raise ValueError("optimal_assignment: x0 and x1 must be finite; got inf or nan")
    _, columns = _linear_sum_assignment()(cost.numpy())
    return torch.as_tensor(columns, dtype=torch.int64, device=x0.device)


COUPLINGS: dict[str, type] = {kind.name: kind for kind in (Independent, GivenPairs, MinibatchOT)}


def get_coupling(coupling: str | Coupling) -> Coupling:
    """The coupling of that name with its default options, or the object itself.

    Raises:
        ValueError: for an unknown name.
        TypeError: for an object that is no coupling.
    """
    if isinstance(coupling, str):
        if coupling not in COUPLINGS:
            raise ValueError(f"coupling: must be one of {', '.join(COUPLINGS)}; got {coupling!r}")
        return COUPLINGS[coupling]()
    if isinstance(coupling, type) or not isinstance(coupling, Coupling):
        raise TypeError(
            "coupling: must be a name or an object called as coupling(x0, x1, labels); "
            f"got {coupling.__name__ if isinstance(coupling, type) else type(coupling).__name__}"
        )
    return coupling


def _flat(x: Tensor) -> Tensor:
    return x.detach().reshape(len(x), math.prod(x.shape[1:])).to("cpu", torch.float64)


def _check_batch(owner: str, x0: Tensor, x1: Tensor, labels: Tensor | None) -> None:
    if x0.ndim == 0 or x0.shape != x1.shape:
        raise ValueError(
            f"{owner}: x0 must have the shape of x1, {tuple(x1.shape)}; got {tuple(x0.shape)}"
        )
    if labels is not None and labels.shape[:1] != x1.shape[:1]:
        raise ValueError(
            f"{owner}: labels must have {len(x1)} rows like x1; got shape {tuple(labels.shape)}"
        )


def _linear_sum_assignment() -> Any:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            'optimal_assignment: scipy is needed; install it with pip install "rfkernels[train]"'
        ) from error
    return linear_sum_assignment
