"""The adaptive Dormand-Prince 5(4) solver with error control per sample.

Every sample has its own time and step size, so neither its result nor its number of evaluations
depends on the samples it shares a batch with, and a stiff sample makes nobody else wait. Finished
samples leave the batch.

Layout: the samples that are still moving form the rows of one batch; the field sees them with their
own times, t (B,). Times, step sizes and decisions live on the CPU in float64; each attempted step
brings B error norms to the CPU (the one synchronisation an adaptive loop cannot avoid) and takes
the B times and sizes of the next one back.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rfkernels.ops.ode_step import linear_step
from rfkernels.sampling.field import Evaluation, Field, State
from rfkernels.sampling.row_sums import row_sums
from rfkernels.sampling.run import Run, Solution, TolerancesNotReachedError, joined

# Dormand and Prince 1980, J. Comput. Appl. Math. 6: nodes, stage weights, the fifth-order result
# (also stage 7, "first same as last"), and the difference to the embedded fourth-order result.
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
_USED = (0, 2, 3, 4, 5)  # slopes in the result; the second has weight 0
_RESULT = (35 / 384, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
_ERROR = (71 / 57600, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
# Dense output of order 4 (Shampine 1986, Math. Comp. 46): x(t + theta h) = x + h sum_i slope_i
# sum_p c_ip theta^p, p = 1..4, i running over _USED and the last slope.
_DENSE = (
    (1.0, -8048581381 / 2820520608, 8663915743 / 2820520608, -12715105075 / 11282082432),
    (0.0, 131558114200 / 32700410799, -68118460800 / 10900136933, 87487479700 / 32700410799),
    (0.0, -1754552775 / 470086768, 14199869525 / 1410260304, -10690763975 / 1880347072),
    (0.0, 127303824393 / 49829197408, -318862633887 / 49829197408, 701980252875 / 199316789632),
    (0.0, -282668133 / 205662961, 2019193451 / 616988883, -1453857185 / 822651844),
    (0.0, 40617522 / 29380423, -110615467 / 29380423, 69997945 / 29380423),
)

# Step factors from 10 down to 0.2, about 2 % apart. A factor f is taken when error <= (0.9 / f)^5:
# looking the factor up needs comparisons only, while torch.pow may round the same number
# differently at different places of a batch.
_FACTORS = torch.logspace(math.log10(10), math.log10(0.2), 181, dtype=torch.float64, device="cpu")
_THRESHOLDS = (0.9 / _FACTORS[:-1]) ** 5


@dataclass(frozen=True)
class Dopri5:
    """Dormand-Prince 5(4): fifth order, 6 evaluations an attempted step and 2 to begin.

    A step is taken when the root mean square over a sample's elements of error / (atol + rtol
    max(|x|, |x_new|)) is at most 1; the next step is 0.9 error^(-1/5) times as long, within [0.2,
    10]. The first step follows Hairer, Norsett and Wanner, Solving Ordinary Differential Equations
    I, II.4. ``steps`` and ``grid`` do not influence the solution: they name the times reported in
    the trajectory, where the fourth-order dense output is evaluated.

    Guidance doubles the evaluations and adds one kernel to each, since it is taken into the slopes
    that are kept. A sample whose velocity is NaN or infinite even for the smallest steps becomes
    NaN, alone. With low-precision velocities their rounding looks like an error of the step: loosen
    the tolerances to that precision.

    Args:
        rtol: relative tolerance, >= 0.
        atol: absolute tolerance, > 0, the scale for elements that are 0.
        max_steps: attempted steps after which RuntimeError is raised.
        finished: ``"drop"`` takes finished samples out of the batch, cutting (B,) guidance scales
            and the condition tensors, in dicts and lists too, whose first size is B; ``"keep"``
            evaluates the whole batch to the end, for velocities that hold per-sample tensors of
            their own, whose conditions have other things per sample, or that need a fixed batch
            size. NFE counts a sample until it is finished either way. With a callback the batch is
            kept.
    """

    name: ClassVar[str] = "dopri5"
    adaptive: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False
    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 10_000
    finished: Literal["drop", "keep"] = "drop"

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"Dopri5: {name} must be a number; got {type(value).__name__}")
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"Dopri5: {name} must be finite and not negative; got {value}")
        if self.atol == 0:
            raise ValueError("Dopri5: atol must be positive; got 0")
        if self.max_steps < 1:
            raise ValueError(f"Dopri5: max_steps must be at least 1; got {self.max_steps}")
        if self.finished not in ("drop", "keep"):
            raise ValueError(f"Dopri5: finished must be 'drop' or 'keep'; got {self.finished!r}")

    def with_tolerances(self, rtol: float | None, atol: float | None) -> Dopri5:
        """This solver with the tolerances that are not None replaced."""
        return dataclasses.replace(
            self, rtol=self.rtol if rtol is None else rtol, atol=self.atol if atol is None else atol
        )

    def integrate(self, field: Field, x0: Tensor, run: Run) -> Solution:
        """Carry x0 along ``run.times``; see :class:`rfkernels.sampling.run.Solver`."""
        batch = _Batch(self, field, x0, run)
        for index in range(self.max_steps):
            batch.attempt()
            if run.callback is not None:
                run.report(index, batch.on_device(batch.t).clone(), batch.state.model_input)
            run.progress(batch.fraction())
            if not batch.live.any():
                trajectory = batch.reported()
                if run.keep_trajectory:
                    return Solution(trajectory[-1].clone(), batch.nfe, trajectory)
                return Solution(trajectory[0], batch.nfe, None)
            if self.finished == "drop" and run.callback is None:
                batch.drop_finished()
        slowest = int(batch.rows[batch.live][0])
        raise TolerancesNotReachedError(
            f"dopri5: samples must finish within max_steps, {self.max_steps}; got sample {slowest} "
            "unfinished (loosen rtol and atol, or pass solver=Dopri5(max_steps=...))"
        )


class _Batch:
    """The samples still in the batch, row by row, and what was reported of all samples so far."""

    def __init__(self, solver: Dopri5, field: Field, x0: Tensor, run: Run) -> None:
        self.solver, self.field, self.whole = solver, field, field
        count = x0.shape[0]
        # Without a trajectory only the last time is reported.
        self.times = torch.tensor(
            run.times if run.keep_trajectory else run.times[-1:], dtype=torch.float64, device="cpu"
        )
        self.start, self.end = run.times[0], run.times[-1]
        self.direction = 1.0 if self.end > self.start else -1.0
        self.smallest_step = 10 * torch.finfo(field.state_dtype).eps
        self.samples = count
        self.state = field.start(x0)
        # On the CPU whatever torch.set_default_device says.
        self.rows = torch.arange(count, device="cpu")  # the sample in each row
        self.live = torch.ones(count, dtype=torch.bool, device="cpu")
        self.was_rejected = torch.zeros(count, dtype=torch.bool, device="cpu")
        self.t = torch.full((count,), self.start, dtype=torch.float64, device="cpu")
        self.nfe = torch.zeros(count, dtype=torch.int64, device="cpu")
        self.next_report = torch.zeros(count, dtype=torch.int64, device="cpu")  # index into times
        self._positions: list[Tensor] = []
        self._values: list[Tensor] = []
        if run.keep_trajectory:
            self._report(self.live, self.state.model_input)
        self.slope = field.combined(self.state, field.time(self.start, self.state))
        self.h = self._first_step()
        self.nfe += field.calls

    def on_device(self, values: Tensor) -> Tensor:
        """CPU float64 numbers as the times' dtype on the samples' device."""
        return values.to(self.field.state_dtype).to(self.state.x.device)

    def attempt(self) -> None:
        """Try one step of every row, keep what is accurate enough, choose the next steps."""
        field, state, calls = self.field, self.state, self.field.calls
        left = self.end - self.t
        ends = self.h.abs() >= left.abs()
        h = torch.where(ends, left, self.h)  # 0 for finished rows
        t_new = torch.where(ends, self.end, self.t + h)
        times = [self.t + node * h for node in _NODES] + [t_new, t_new]
        weights = [h * weight for weight in (*chain(*_STAGES), *_RESULT)]
        numbers = iter(self.on_device(torch.stack(times + weights)))  # one transfer
        times = [next(numbers) for _ in times]
        slopes = [self.slope]
        for time in times[:-1]:
            terms = [(next(numbers), slope) for slope in slopes]
            slopes.append(field.combined(field.advance(state.x, terms), time))
        used = [slopes[i] for i in _USED]
        new = field.advance(state.x, [(next(numbers), slope) for slope in used])
        used.append(field.combined(new, times[-1]))

        error = self._norm(self._local_error(used), new) * h.abs()
        accepted = self.live & (error <= 1)  # NaN is not
        failed = self.live & ~accepted & (h.abs() <= self.smallest_step)
        self._refuse_vanishing_steps(failed, error)
        self.nfe[self.rows[self.live]] += field.calls - calls
        self._report_reached(accepted, h, t_new, new, used)
        self._take(accepted, new, used[-1])
        if failed.any():
            self._fail(failed)
        self.t = torch.where(accepted, t_new, self.t)
        self.live = self.live & ~failed & ~(accepted & ends)

        factor = _FACTORS[torch.searchsorted(_THRESHOLDS, error.nan_to_num(nan=math.inf))]
        factor = torch.where(self.was_rejected | ~accepted, factor.clamp(max=1.0), factor)
        self.h = self.direction * (h.abs() * factor).clamp(min=self.smallest_step)
        self.was_rejected = ~accepted

    def fraction(self) -> float:
        """How far the slowest sample has come, in [0, 1]."""
        done = torch.where(self.live, (self.t - self.start) / (self.end - self.start), 1.0)
        return float(done.min())

    def drop_finished(self) -> None:
        """Leave only live rows in the batch."""
        if self.live.all():
            return
        kept = self.live.nonzero()[:, 0]
        for name in ("rows", "live", "was_rejected", "t", "h", "next_report"):
            setattr(self, name, getattr(self, name)[kept])
        on_device = kept.to(self.state.x.device)
        # From the whole batch: a shared tensor may have as many rows as are left in between.
        self.field = self.whole.select(self.rows.to(on_device.device))
        self.state = State(*(tensor.index_select(0, on_device) for tensor in self.state))
        self.slope = Evaluation(self.slope.conditional.index_select(0, on_device))

    def reported(self) -> Tensor:
        """(len(times), samples, ...): every sample at every reporting time."""
        order = torch.cat(self._positions).argsort()
        values = joined(torch.cat, self._values)
        ordered = values.index_select(0, order.to(values.device))
        return ordered.reshape(self.times.shape[0], self.samples, *values.shape[1:])

    def _report(self, which: Tensor, values: Tensor) -> None:
        """Note ``values``, one per row in ``which``, at the next reporting time of these rows."""
        self._positions.append(self.next_report[which] * self.samples + self.rows[which])
        self._values.append(values.to(self.field.dtype))
        self.next_report = self.next_report + which

    def _report_reached(
        self, accepted: Tensor, h: Tensor, t_new: Tensor, new: State, used: list[Evaluation]
    ) -> None:
        """Report the states at the reporting times that accepted steps end on or pass."""
        while True:
            due_time = self.times[self.next_report.clamp(max=len(self.times) - 1)]
            pending = accepted & (self.next_report < len(self.times))
            inside = pending & (self.direction * (t_new - due_time) > 0)
            at_end = pending & (t_new == due_time)
            if inside.any():
                theta = ((due_time - self.t) / h)[inside]
                self._report(inside, self._between(inside, theta, h[inside], used))
            elif at_end.any():
                self._report(at_end, _rows(new.model_input, at_end))
            else:
                return

    def _between(self, which: Tensor, theta: Tensor, h: Tensor, used: list[Evaluation]) -> Tensor:
        """The state at t + theta h for the rows in ``which``."""
        weights = [h * theta * (a + theta * (b + theta * (c + theta * d))) for a, b, c, d in _DENSE]
        slopes = [_rows(slope.conditional, which) for slope in used]
        coefficients = list(self.on_device(torch.stack(weights)))
        return linear_step(_rows(self.state.x, which), slopes, coefficients)

    def _take(self, accepted: Tensor, new: State, slope: Evaluation) -> None:
        """Move the accepted rows; without rejected ones that is a swap."""
        if (accepted | ~self.live).all():
            self.state, self.slope = new, slope
        elif accepted.any():
            mask = accepted.to(new.x.device).reshape(-1, *[1] * (new.x.ndim - 1))
            x = torch.where(mask, new.x, self.state.x)
            same = new.model_input is new.x
            model_input = x if same else torch.where(mask, new.model_input, self.state.model_input)
            self.state = State(x, model_input)
            self.slope = Evaluation(torch.where(mask, slope.conditional, self.slope.conditional))

    def _fail(self, failed: Tensor) -> None:
        """Rows that no step size makes finite become NaN from here on."""
        while True:
            unreported = failed & (self.next_report < len(self.times))
            if not unreported.any():
                break
            self._report(
                unreported, torch.full_like(_rows(self.state.model_input, unreported), math.nan)
            )
        mask = failed.to(self.state.x.device).reshape(-1, *[1] * (self.state.x.ndim - 1))
        self.state = State(*(tensor.masked_fill(mask, math.nan) for tensor in self.state))
        self.t = torch.where(failed, self.end, self.t)

    def _refuse_vanishing_steps(self, failed: Tensor, error: Tensor) -> None:
        finite = failed & error.isfinite()
        if finite.any():
            row = int(finite.nonzero()[0])
            raise TolerancesNotReachedError(
                f"dopri5: rtol={self.solver.rtol}, atol={self.solver.atol} must be reachable with "
                f"steps above {self.smallest_step:.1e}; got sample {int(self.rows[row])} stuck at "
                f"t = {float(self.t[row]):.6g} (loosen them, keep away from a singular end by "
                "t_start or t_end, or use float64)"
            )

    def _local_error(self, used: list[Evaluation]) -> Tensor:
        """The error of a step divided by its size. The zero coefficient brings in x's shape and
        precision only."""
        with torch.no_grad():
            slopes = [slope.conditional for slope in used]
            return linear_step(self.state.x, slopes, _ERROR, x_coefficient=0.0)

    def _norm(self, values: Tensor, other: State | None = None) -> Tensor:
        """(B,) root mean square over each row of values / (atol + rtol max(|x|, |other|)), on the
        CPU in float64."""
        with torch.no_grad():
            size = self.state.x.abs()
            if other is not None:
                size = torch.maximum(size, other.x.abs())
            ratio = (values / (size * self.solver.rtol + self.solver.atol)).reshape(
                self.t.shape[0], -1
            )
            mean = row_sums(ratio * ratio) / ratio.shape[1]
            return mean.cpu().double().sqrt()

    def _first_step(self) -> Tensor:
        """(B,) first steps: small against x / v, and against the curvature that one more evaluation
        shows."""
        field, slope = self.field, self.slope
        span = abs(self.end - self.start)
        size, speed = self._norm(self.state.x), self._norm(slope.conditional)
        trial = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed).clamp(
            max=span
        )
        trial = torch.where(trial.isfinite(), trial, self.smallest_step)
        step = self.on_device(self.direction * trial)
        ahead = field.advance(self.state.x, [(step, slope)])
        time = (self.t + self.direction * trial).clamp(
            min(self.start, self.end), max(self.start, self.end)
        )
        beyond = field.combined(ahead, self.on_device(time))
        with torch.no_grad():
            difference = linear_step(
                self.state.x,
                [beyond.conditional, slope.conditional],
                (1.0, -1.0),
                x_coefficient=0.0,
            )
        steepest = torch.maximum(self._norm(difference) / trial, speed)
        # Python's power, one number at a time: see _FACTORS.
        second = [
            (0.01 / s) ** 0.2 if s > 1e-15 else max(1e-6, 1e-3 * t)
            for s, t in zip(steepest.tolist(), trial.tolist(), strict=True)
        ]
        first = torch.tensor(second, dtype=torch.float64, device="cpu")
        first = torch.minimum(100 * trial, first).nan_to_num(nan=0.0)
        return self.direction * first.clamp(self.smallest_step, span)


def _rows(tensor: Tensor, which: Tensor) -> Tensor:
    """The rows of a device tensor where the CPU mask is True."""
    return (
        tensor if which.all() else tensor.index_select(0, which.nonzero()[:, 0].to(tensor.device))
    )
