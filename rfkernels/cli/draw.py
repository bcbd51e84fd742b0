"""Drawing from a run, for `sample`, `eval` and `demo`: the noise by (seed, sample index), labels, guidance, batches."""

from __future__ import annotations

import torch

from rfkernels.ops.random import derive_seed, randn
from rfkernels.sampling import sample
from rfkernels.training import LoadedRun, RunResult

__all__ = ["Drawer"]


class Drawer:
    """A run ready to draw from.

    Args:
        run: of `rfkernels.training.load`, or a result in memory.
        guidance: classifier-free guidance scale, or None.
        label: the class of every sample; None takes all classes in turn when the run is conditional.

    Raises:
        ValueError: a label or guidance that the run cannot have, or a run that does not start from noise.
    """

    def __init__(
        self, run: LoadedRun | RunResult, *, guidance: float | None = None, label: int | None = None
    ) -> None:
        self.velocity = run.model if isinstance(run, LoadedRun) else run.ema
        self.sample_shape = tuple(run.sample_shape)
        self.num_classes = run.num_classes if run.conditional else None
        if isinstance(run, LoadedRun) and run.description.get("source") is not None:
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
        solver: str = "euler",
        grid: float | None = None,
        batch: int = 1000,
        progress: bool = False,
    ) -> tuple[torch.Tensor, float]:
        """(samples of these indices on the CPU, evaluations of the network per sample)."""
        parts, evaluations = [], 0.0
        with torch.no_grad():
            for rows in index.split(batch):
                labels = self.labels(rows)
                condition = {} if labels is None else {"y": labels.to(self._device)}
                info = sample(
                    self.velocity,
                    self.noise(rows, seed),
                    steps=steps,
                    solver=solver,
                    grid=grid,
                    guidance_scale=self._guidance,
                    condition=condition,
                    uncondition=None if self._guidance is None else {},
                    progress=progress and len(index) > batch // 2,
                    return_info=True,
                )
                parts.append(info.x.cpu())
                evaluations += float(torch.as_tensor(info.nfe, dtype=torch.float64).mean()) * len(
                    rows
                )
        return torch.cat(parts), evaluations / len(index)
