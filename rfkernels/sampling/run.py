"""What a solver is given besides the field, what it hands back, what makes an object a solver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from rfkernels.sampling.field import Field, writes

Callback = Callable[[int, Tensor, Tensor], object]


@dataclass(frozen=True)
class Run:
    """One integration.

    Args:
        times: the grid in the order of integration: ascending to sample, descending to invert.
        keep_trajectory: whether the states at ``times`` are wanted.
        callback: ``callback(step_index, t, x)``, t (B,), x the whole batch in the caller's dtype;
            or None.
        progress: told the fraction that is done, in [0, 1].
        seed: of a stochastic solver's noise, an int, or an int64 tensor, 0-d or (B,); else None.
    """

    times: tuple[float, ...]
    keep_trajectory: bool
    callback: Callback | None
    progress: Callable[[float], None]
    seed: int | Tensor | None = None

    def report(self, index: int, t: Tensor, x: Tensor) -> None:
        """Call the callback, which must not write into x: the run goes on from there."""
        before = writes(x)
        self.callback(index, t, x)
        if writes(x) != before:
            raise ValueError(
                "callback: must not write into x; got x changed in place by the call at step "
                f"{index}"
            )


class TolerancesNotReachedError(RuntimeError):
    """An adaptive solver gives up: about this flow and its tolerances, not a fault of the solver."""


def joined(join: Callable[[list[Tensor]], Tensor], parts: list[Tensor]) -> Tensor:
    """``join``, torch.stack or torch.cat, of the parts. Autocast refuses parts of the half precision
    that is not its own."""
    device, dtype = parts[0].device.type, parts[0].dtype
    if dtype not in (torch.float16, torch.bfloat16) or device == "meta":
        return join(parts)
    with torch.autocast(device, enabled=False):
        return join(parts)


class Solution(NamedTuple):
    """What a solver hands back.

    Attributes:
        x: (B, ...) the state at the last time, in the field's dtype.
        nfe: evaluations per sample: an int, or (B,) int64 on the CPU where samples may differ.
        trajectory: (len(times), B, ...) in the field's dtype, or None when it is not wanted.
    """

    x: Tensor
    nfe: int | Tensor
    trajectory: Tensor | None


@runtime_checkable
class Solver(Protocol):
    """Anything like this can be passed as ``solver=``.

    A solver with an attribute ``stochastic = True`` gets a seed in its run, and is not for inverting.
    One with ``adaptive = True`` chooses its own steps, treats the grid as the times to report,
    and has a method ``with_tolerances(rtol, atol)`` that returns a solver with those that are not
    None replaced.
    """

    name: str
    adaptive: bool

    def integrate(self, field: Field, x0: Tensor, run: Run) -> Solution:
        """Carry x0 along ``run.times``; x0, which has at least one element, is never written to."""
        ...


@contextmanager
def progress_bar(shown: bool, title: str) -> Iterator[Callable[[float], None]]:
    """A function of the fraction done that moves a bar on standard error, if ``shown``."""
    if not shown:
        yield lambda fraction: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda fraction: bar.update(task, completed=fraction)
