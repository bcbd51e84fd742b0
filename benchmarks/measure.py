"""How a time is taken: every spelling of a case in turn, round by round, in one process, beside a copy of as many bytes.

In each round all spellings run in a new random order, so that drift, a busy neighbour and the cache state left by the one
before hit all of them alike; the medians are over rounds. A short call is repeated within its turn until the turn lasts a
millisecond, after one untimed call, so that it finds its inputs where its own last call left them. On CUDA each call has its
own pair of events, and the L2 cache is overwritten before it.
"""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy
import torch

import rfkernels as rf

_TURN_US = 1000.0  # a turn lasts at least this long on the CPU
_MAX_ROUNDS = 60
_L2_BYTES = 256 * 2**20  # more than any L2 cache today
_OVERHEAD_CALLS = 200
_HEAD_START_CYCLES = 500_000  # about 0.3 ms, in which the host enqueues a call


@dataclass(frozen=True)
class Timing:
    """Microseconds a call over rounds, and how many timed calls they stand on."""

    p50: float
    p20: float
    p80: float
    calls: int


@dataclass(frozen=True)
class Runner:
    """A call, and the backend and the instruction set level forced during it (None: the package's own choice).

    ``warm``: an untimed call begins its turn even where one call is long enough for a turn, as a run of many steps is.
    """

    call: Callable[[], object]
    backend: str | None = None
    isa: str | None = None
    warm: bool = False

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        """Entered around a turn, outside the timed region."""
        with rf.use_backend(self.backend or "auto"), _capped(self.isa):
            yield


@contextlib.contextmanager
def _capped(isa: str | None) -> Iterator[None]:
    if isa is None:
        yield
        return
    from rfkernels import _C

    before = _C.isa_used()  # RFK_MAX_ISA may have lowered it
    _C.cap_isa(isa)
    try:
        yield
    finally:
        _C.cap_isa(before)


def interleaved(
    runners: dict[str, Runner], device: str, seconds: float, min_rounds: int
) -> dict[str, Timing]:
    """Times all runners in turns.

    Args:
        runners: by a name each; all have run once already, so that nothing compiles here.
        device: cpu or cuda.
        seconds: about how long to go on; ``min_rounds`` are done in any case.
        min_rounds: at least 1.
    """
    turn = _cuda_turn if device == "cuda" else _cpu_turn
    repeats = {name: _repeats(runner, device) for name, runner in runners.items()}
    order, shuffle = list(runners), random.Random(0).shuffle
    samples: dict[str, list[float]] = {name: [] for name in runners}
    counts = dict.fromkeys(runners, 0)
    with _no_collection():
        end, rounds = time.monotonic() + seconds, 0
        while rounds < min_rounds or (rounds < _MAX_ROUNDS and time.monotonic() < end):
            shuffle(order)
            for name in order:
                times = turn(runners[name], repeats[name])
                samples[name] += times
                counts[name] += repeats[name]
            rounds += 1
    return {name: _summary(samples[name], counts[name]) for name in runners}


def copy_runner(traffic: int, device: str) -> Runner:
    """``copy_`` that reads half of ``traffic`` bytes and writes the other half: the yardstick of pct_copy_peak."""
    source = torch.ones(max(traffic // 8, 1), device=device)
    target = torch.zeros_like(source)
    return Runner(lambda: target.copy_(source))


def overhead_us(runners: dict[str, Runner], turns: int) -> dict[str, float]:
    """Host microseconds a call of runners built on so few elements that the arithmetic is nothing.

    The median over interleaved turns of 200 calls, less that of a Python function that does nothing. On CUDA the queue is
    emptied between turns and a turn is short enough not to fill it.
    """
    everything = {"": Runner(lambda: None), **runners}
    samples: dict[str, list[float]] = {name: [] for name in everything}
    order, shuffle = list(everything), random.Random(0).shuffle
    with _no_collection():
        for _ in range(turns):
            shuffle(order)
            for name in order:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                samples[name] += _cpu_turn(everything[name], _OVERHEAD_CALLS)
    medians = {name: float(numpy.median(times)) for name, times in samples.items()}
    return {name: medians[name] - medians[""] for name in runners}


def _cpu_turn(runner: Runner, repeats: int) -> list[float]:
    call = runner.call
    with runner.forced():
        if repeats > 1 or runner.warm:
            call()
        begin = time.perf_counter_ns()
        for _ in range(repeats):
            call()
        return [(time.perf_counter_ns() - begin) / 1000 / repeats]


def _cuda_turn(runner: Runner, repeats: int) -> list[float]:
    """Each call by itself; the device is kept busy before it while the host enqueues, so this is device time."""
    pairs = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    flush = torch.empty(_L2_BYTES, dtype=torch.int8, device="cuda")
    with runner.forced():
        for begin, end in pairs:
            flush.zero_()
            torch.cuda._sleep(_HEAD_START_CYCLES)
            begin.record()
            runner.call()
            end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1000 for begin, end in pairs]


def _repeats(runner: Runner, device: str) -> int:
    """How many calls make a turn; warms the runner up on the way."""
    if device == "cuda":
        _cuda_turn(runner, 3)
        return 5
    estimate = min(_cpu_turn(runner, 1)[0] for _ in range(2))
    return int(min(max(_TURN_US // max(estimate, 0.1), 1), 1000))


def _summary(times: list[float], calls: int) -> Timing:
    p20, p50, p80 = (float(q) for q in numpy.percentile(times, (20, 50, 80)))
    return Timing(p50, p20, p80, calls)


@contextlib.contextmanager
def _no_collection():
    """Python's garbage collector runs before, not in a turn."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
