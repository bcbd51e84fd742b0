"""What calls of attention ran as: the counters behind ``rfkernels.attention_stats``, exact under threads."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass

_lock = threading.Lock()
_calls: dict[
    tuple[str, str, str], list[int]
] = {}  # (precision, scheme, backend) -> calls, exact heads


class Tally:
    """A count that many threads may raise at the cost of one call into C, without a lock."""

    __slots__ = ("_base", "_looks", "add")

    def __init__(self) -> None:
        # next() of this iterator is one indivisible step; looking is one more, which is taken off again.
        self.add: Callable[[], int] = itertools.count().__next__
        self._looks = self._base = 0

    def read(self, reset: bool) -> int:
        """How often ``add`` was called since the last reset; one reader at a time."""
        total = self.add() - self._looks
        self._looks += 1
        count = total - self._base
        if reset:
            self._base = total
        return count


_handovers: dict[tuple[str, str], Tally] = {}  # (precision, reason) -> calls; never removed


@dataclass(frozen=True)
class AttentionStats:
    """Counts since the start of the process or the last reset.

    Attributes:
        calls: by (precision asked for, scheme that ran, backend); what ``"int8"`` resolved to stands in the second place.
        exact_heads: by the same key, the (batch, head) pairs that held a NaN, an infinity or overflowing scores and took
            PyTorch's attention instead. On CUDA they are found on the device and not counted.
        handovers: by (precision asked for, reason), calls that PyTorch's attention served by rule.
    """

    calls: dict[tuple[str, str, str], int]
    exact_heads: dict[tuple[str, str, str], int]
    handovers: dict[tuple[str, str], int]

    def __repr__(self) -> str:
        lines = []
        for (precision, scheme, backend), calls in sorted(self.calls.items()):
            exact = self.exact_heads[precision, scheme, backend]
            name = scheme if precision == scheme else f"{precision} as {scheme}"
            lines.append(f"{name} ({backend}): {calls} calls, {exact} exact heads")
        for (precision, reason), calls in sorted(self.handovers.items()):
            lines.append(f"{precision} handed over to PyTorch: {calls} calls, since {reason}")
        return "\n".join(["attention_stats:", *(f"  {line}" for line in lines or ["no calls"])])


def count_call(precision: str, scheme: str, backend: str, exact_heads: int) -> None:
    """One call of a kernel."""
    key = (precision, scheme, backend)
    with _lock:
        entry = _calls.get(key)
        if entry is None:
            entry = _calls[key] = [0, 0]
        entry[0] += 1
        entry[1] += exact_heads


def handover_counter(precision: str, reason: str) -> Callable[[], object]:
    """What counts one call that went to PyTorch's attention; good for ever."""
    with _lock:
        return _handovers.setdefault((precision, reason), Tally()).add


def count_handover(precision: str, reason: str) -> None:
    """One call that went to PyTorch's attention."""
    handover_counter(precision, reason)()


def attention_stats(reset: bool = False) -> AttentionStats:
    """How many calls of ``attention`` ran in which scheme and backend, and how many were handed over and why.

    Args:
        reset: start again from zero after reading, in one step.
    """
    with _lock:
        handovers = {key: tally.read(reset) for key, tally in _handovers.items()}
        stats = AttentionStats(
            {key: entry[0] for key, entry in _calls.items()},
            {key: entry[1] for key, entry in _calls.items()},
            {key: calls for key, calls in handovers.items() if calls},
        )
        if reset:
            _calls.clear()
    return stats
