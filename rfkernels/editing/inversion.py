"""Inversion and sampling on the same grid, with features shared between them: RF-Edit and FireFlow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rfkernels.editing.features import Bank, Features, TappedField, attention_blocks
from rfkernels.editing.setting import Setting
from rfkernels.sampling.run import Solver
from rfkernels.sampling.solvers import get_solver

__all__ = ["FireFlowEdit", "RFEdit"]

# One evaluation at most at the start of a step and one inside, so that keys are unique.
_TAPPED = ("euler", "midpoint", "fireflow")


@dataclass(frozen=True)
class RFEdit:
    """Inverts under the source, samples from there under the target, on the same grid.

    With ``features`` of ``edit`` the attention features of the last steps of inversion stand in for
    those of the first steps of sampling (Wang et al. 2024, "Taming rectified flow for inversion and
    editing"). Of an interval of the grid, what was computed at its middle is used at its middle, and
    what inversion computed at the end that it came from, the cleaner one, at the end that sampling
    starts from: where the authors' code has it too. Without features this is plain inversion and
    sampling; published scales are 1 for the source, 2 to 2.5 for the target.

    Args:
        solver: a name or an object, deterministic, of fixed steps. "midpoint" is RF-Solver. Only
            "euler", "midpoint" and "fireflow" share features.
    """

    name: ClassVar[str] = "rf-edit"
    shares_features: ClassVar[bool] = True
    solver: str | Solver = "midpoint"

    def __post_init__(self) -> None:
        solver = get_solver(self.solver)
        if solver.adaptive or getattr(solver, "stochastic", False):
            raise ValueError(f"solver: must be deterministic, of fixed steps; got {solver.name!r}")

    def run(self, setting: Setting) -> Tensor:
        """The edited samples; see :class:`rfkernels.editing.Method`."""
        solver, features = get_solver(self.solver), setting.features
        source, target = setting.source_field(), setting.target_field()
        if features is not None:
            # Euler's original_eps evaluates beside the times of the grid, which tell steps apart.
            if solver.name not in _TAPPED or getattr(solver, "original_eps", 0):
                raise ValueError(
                    f"features: need one of the solvers {', '.join(_TAPPED)}, with their defaults; "
                    f"got {solver!r}"
                )
            _check(features, setting)
            setting.bank = Bank(features)
            tap = {"bank": setting.bank, "times": setting.times}
            source = TappedField.of(source, **tap, backwards=True, recording=True)
            target = TappedField.of(target, **tap)
            setting.fields = [source, target]
        down = setting.run(setting.times[::-1], 0.0, 0.5)
        up = setting.run(setting.times, 0.5, 1.0)
        inverted = solver.integrate(source, setting.x1, down)
        if features is not None:
            _check_kept(source)
        target.carried = source.last
        return solver.integrate(target, inverted.x, up).x


@dataclass(frozen=True)
class FireFlowEdit(RFEdit):
    """RF-Edit with the lagged velocity of FireFlow: N + 1 evaluations each way (Deng et al. 2024,
    "FireFlow"). Published: 8 steps, ``Features(steps=1)``, scale 2.
    """

    name: ClassVar[str] = "fireflow"
    solver: str | Solver = "fireflow"


def _check_kept(source: TappedField) -> None:
    """Refuses to go on where blocks were to share and none did, which no result would tell."""
    bank = source.bank
    if bank.features.blocks != () and source.tapped and not bank.kept:
        raise ValueError(
            "features: blocks must run when the velocity is called, in the thread that calls it; "
            "none of them did in the steps that share"
        )


def _check(features: Features, setting: Setting) -> None:
    """Refuses what does not fit the network or the grid."""
    if features.steps > setting.steps:
        raise ValueError(
            f"features: steps must be at most those of the grid, {setting.steps}; "
            f"got {features.steps}"
        )
    count = len(attention_blocks(setting.velocity))
    if features.blocks and max(features.blocks) >= count:
        raise ValueError(
            f"features: blocks must be below {count}, the number of attention blocks; "
            f"got {max(features.blocks)}"
        )
