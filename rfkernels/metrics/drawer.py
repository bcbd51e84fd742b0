"""Drawing from a run: the noise by (seed, sample index), labels, guidance, solver, batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from rfkernels.metrics.transport import straightness_of_trajectory
from rfkernels.ops.random import derive_seed, randn
from rfkernels.sampling import sample
from rfkernels.sampling.solvers import get_solver

if TYPE_CHECKING:
    from rfkernels.training import LoadedRun, RunResult

__all__ = ["Drawer"]


class Drawer:
    """A run ready to draw from.

    Args:
        run: of `rfkernels.training.load`, or a result in memory.
        guidance: classifier-free guidance scale, or None.
        label: the class of every sample; None takes all classes in turn when the run is
            conditional.

    Attributes:
        velocity: the run's network with averaged weights.
        sample_shape: of one sample.
        num_classes: labels that the network is given; None for a run without.
        default_solver: what the run is meant to be sampled with: its own, else "euler".

    Raises:
        ValueError: a label or guidance that the run cannot have, or a run that does not start from noise.
    """

    def __init__(
        self, run: LoadedRun | RunResult, *, guidance: float | None = None, label: int | None = None
    ) -> None:
        # A result in memory has the averaged weights beside the last ones; a loaded run has one set.
        self.velocity = run.ema if hasattr(run, "ema") else run.model
        trained_for = getattr(getattr(run, "config", None), "sample_solver", None)
        self.default_solver = getattr(run, "default_solver", None) or trained_for or "euler"
        self.sample_shape = tuple(run.sample_shape)
        self.num_classes = run.num_classes if run.conditional else None
        if getattr(run, "description", {}).get("source") is not None:
            raise ValueError(
                "run: it starts from samples, not from noise; sample it in Python, with rf.sample"
            )
        if run.conditional and self.num_classes is None:
            raise ValueError(
                "run: its condition is a vector; sample it in Python, with rf.sample(condition=...)"
            )
        if self.num_classes is None:
            for name, value in (("label", label), ("guidance", guidance)):
                if value is not None:
                    raise ValueError(
                        f"{name}: needs a run trained with --conditional; got {value:g} for one without labels"
                    )
        elif label is not None and not 0 <= label < self.num_classes:
            raise ValueError(f"label: must be from 0 to {self.num_classes - 1}; got {label}")
        if guidance not in (None, 1.0) and run.kind == "train" and run.config.label_dropout == 0.0:
            raise ValueError(
                "guidance: needs a run trained with label dropout, which teaches the network to draw without a label; "
                f"got {guidance:g} for one without"
            )
        self._guidance, self._label = guidance, label
        self._device = next(self.velocity.parameters()).device

    @property
    def calls(self) -> int:
        """Calls of the network in one evaluation of the velocity: two where samples are guided."""
        return 1 if self._guidance in (None, 1.0) else 2

    def labels(self, index: torch.Tensor) -> torch.Tensor | None:
        """The labels of these samples, int64; None for a run without."""
        if self.num_classes is None:
            return None
        return (
            index % self.num_classes if self._label is None else torch.full_like(index, self._label)
        )

    def noise(self, index: torch.Tensor, seed: int) -> torch.Tensor:
        """The noise of these samples: that of sample i is a function of (seed, i) alone."""
        offset = index.to(self._device)
        return randn(
            len(index),
            *self.sample_shape,
            seed=derive_seed(seed, "sample"),
            offset=offset,
            device=self._device,
        )

    def draw(
        self,
        index: torch.Tensor,
        *,
        seed: int,
        steps: int | None,
        solver: str | None = None,
        grid: Any = None,
        batch: int = 1000,
        progress: bool = False,
        done: Callable[[int], object] | None = None,
    ) -> tuple[torch.Tensor, float]:
        """(samples of these indices on the CPU, evaluations of the network per sample).

        Args:
            index: (n,) int64 sample indices; sample i is the same whatever else is drawn.
            seed: of the noise.
            steps: of a solver that takes steps; None for an adaptive one.
            solver: None is `default_solver`.
            grid: of times, as in `rfkernels.sample`.
            batch: samples at a time.
            progress: show a bar.
            done: told the number of samples after every batch.
        """
        parts, evaluations = [], 0.0
        for rows in index.split(batch):
            info = self._solve(
                rows,
                seed,
                steps=steps,
                solver=solver or self.default_solver,
                grid=grid,
                progress=progress and len(index) > batch // 2,
            )
            parts.append(info.x.cpu())
            evaluations += float(torch.as_tensor(info.nfe, dtype=torch.float64).mean()) * len(rows)
            if done is not None:
                done(len(rows))
        return torch.cat(parts), evaluations / len(index)

    def straightness(self, index: torch.Tensor, *, seed: int, steps: int = 32) -> float:
        """Straightness S of the flow from these samples' noise, by Euler steps; 0 is straight."""
        info = self._solve(index, seed, steps=steps, solver="euler")
        return straightness_of_trajectory(info.times, info.trajectory)

    def given(self, index: torch.Tensor) -> dict[str, Any]:
        """What `rfkernels.sample` takes besides the noise of these samples: condition and guidance."""
        labels = self.labels(index)
        return {
            "condition": {} if labels is None else {"y": labels.to(self._device)},
            "guidance_scale": self._guidance,
            "uncondition": None if self._guidance is None else {},
        }

    @torch.no_grad()
    def _solve(self, rows: torch.Tensor, seed: int, **options: Any) -> Any:
        if getattr(get_solver(options["solver"]), "stochastic", False):
            # A key of its own for every sample, so that sample i is the same whatever else is drawn.
            options["seed"] = rows.to(self._device) + derive_seed(seed, "solver noise") // 2
        return sample(
            self.velocity,
            self.noise(rows, seed),
            **self.given(rows),
            return_info=True,
            **options,
        )
