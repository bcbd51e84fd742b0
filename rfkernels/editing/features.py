"""Sharing attention features: what inversion computed stands in for what sampling would compute.

RF-Edit (Wang et al. 2024, "Taming rectified flow for inversion and editing") keeps V of some attention
blocks during the last n steps of inversion, those nearest the noise, and uses it in the first n steps of
sampling over the same intervals of the grid; so the edit keeps the source's layout. FireFlow (Deng et
al. 2024) does the same in every block, for one step.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rfkernels.editing.setting import EditField
from rfkernels.editing.storage import STORES, Stored, keep
from rfkernels.sampling.field import Evaluation, Field, State
from rfkernels.training.option_checks import number, require, whole

__all__ = ["Bank", "Features", "Key", "TappedField", "attention_blocks"]

MODES = ("replace", "mix", "add")


@dataclass(frozen=True)
class Features:
    """What ``edit`` shares between inversion and sampling.

    Args:
        steps: n, how many steps share: the last of inversion, the first of sampling. 0 shares
            nothing. Published: RF-Edit 2 to 8 of 15 to 30, FireFlow 1 of 8. More keeps more of the
            source.
        blocks: numbers of the attention blocks, in the network's order; None is all, as FireFlow has
            it; RF-Edit takes the later half, ``range(depth // 2, depth)``.
        what: which of q, k, v; any of the letters, "v" is published for both.
        mode: "replace"; "mix", weight * kept + (1 - weight) * own; or "add", own + weight * kept.
        weight: of "mix", in [0, 1], and of "add"; not of "replace".
        store: "device", "host", "int8" or "fp8"; see :func:`rfkernels.editing.storage.keep`. The
            first two are exact.
    """

    steps: int
    blocks: Sequence[int] | None = None
    what: str = "v"
    mode: str = "replace"
    weight: float = 1.0
    store: str = "device"

    def __post_init__(self) -> None:
        whole("steps", self.steps, 0)
        if self.blocks is not None:
            if not isinstance(self.blocks, Iterable):
                raise TypeError(f"blocks: must be whole numbers or None; got {self.blocks!r}")
            object.__setattr__(self, "blocks", tuple(self.blocks))
            for block in self.blocks:
                whole("blocks", block, 0)
            distinct = len(set(self.blocks)) == len(self.blocks)
            require(distinct, "blocks", "must name each block once", self.blocks)
        letters = isinstance(self.what, str) and 0 < len(self.what) == len(set(self.what))
        right = letters and set(self.what) <= set("qkv")
        require(right, "what", "must be some of the letters q, k, v", self.what)
        require(self.mode in MODES, "mode", f"must be one of {', '.join(MODES)}", self.mode)
        require(self.store in STORES, "store", f"must be one of {', '.join(STORES)}", self.store)
        weight = number("weight", self.weight)
        if self.mode == "replace":
            require(weight == 1, "weight", "is for mode='mix' or 'add'", weight)
        if self.mode == "mix":
            require(0 <= weight <= 1, "weight", "must be in [0, 1] for mode='mix'", weight)


@dataclass(frozen=True)
class Key:
    """Where a feature belongs.

    Attributes:
        interval: of the ascending grid, from 0 at the noise.
        middle: whether it was computed inside the interval, not at the end that the step began from.
        unconditional: whether in the second call of guidance.
        block: number of the attention block.
        name: "q", "k" or "v".
        turn: how often the block has run before in that call, as a network that repeats its blocks
            runs it.
    """

    interval: int
    middle: bool
    unconditional: bool
    block: int
    name: str
    turn: int = 0


@dataclass
class Bank:
    """The kept features of one edit.

    Attributes:
        features: the options.
        kept: by key.
        peak_bytes: all that was kept.
        missed: how often sampling found nothing kept and went on with its own, as it does at
            FireFlow's first evaluation.
    """

    features: Features
    kept: dict[Key, Stored] = field(default_factory=dict)
    peak_bytes: int = 0
    missed: int = 0
    _squares: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def error(self) -> float:
        """Root mean square of (restored - computed) over that of computed; 0 where exact."""
        if not self._squares:
            return 0.0
        wrong, whole_ = (
            math.fsum(float(pair[side]) for pair in self._squares) for side in range(2)
        )
        return math.sqrt(wrong / whole_) if whole_ else 0.0

    def record(self, key: Key, tensor: Tensor) -> None:
        """Keeps a copy.

        Raises:
            ValueError: something is kept under that key.
        """
        if key in self.kept:
            raise ValueError(f"Bank: every key must be recorded once; got {key} again")
        stored = keep(tensor, self.features.store)
        self.kept[key] = stored
        self.peak_bytes += stored.nbytes
        if stored.scale is not None:
            wide = tensor.double()
            wrong = stored.restored().double() - wide
            self._squares.append((wrong.square().sum(), wide.square().sum()))

    def inject(self, key: Key, own: Tensor) -> Tensor:
        """What attention takes in the place of ``own``, which stays as it is: it may share memory with
        other features or belong to the network.

        It has the memory layout of ``own``, since in another one attention might round differently.
        The unconditional call of guidance takes what the conditional one left, if inversion was not
        guided.

        Raises:
            ValueError: what was kept has another shape.
        """
        stored = self.kept.get(key)
        if stored is None and key.unconditional:
            stored = self.kept.get(replace(key, unconditional=False))
        if stored is None:
            self.missed += 1
            return own
        if stored.values.shape != own.shape:
            raise ValueError(
                f"features: {key.name} of block {key.block} must have the shape that inversion kept, "
                f"{tuple(stored.values.shape)}; got {tuple(own.shape)} (where text is attended to with "
                "the image, all conditions must have as many tokens)"
            )
        kept, weight = stored.restored(), self.features.weight
        if self.features.mode == "mix":
            kept = own.lerp(kept.to(own.dtype), weight)
        elif self.features.mode == "add":
            kept = own.add(kept.to(own.dtype), alpha=weight)
        return _blank(own).copy_(kept)


def _blank(tensor: Tensor) -> Tensor:
    """Memory of its own with the strides of ``tensor``; contiguous for an expanded one."""
    if 0 in tensor.stride():
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )


def attention_blocks(velocity: object) -> list[nn.Module]:
    """The blocks of a network that let features be exchanged, in its order.

    Those are modules whose class has the attribute ``exchange``, such as ``DiTBlock``: where it is
    not None it is called with (q, k, v) and returns what attention takes.

    Raises:
        TypeError: not a module. ValueError: a module without such blocks.
    """
    if not isinstance(velocity, nn.Module):
        raise TypeError(
            "features: velocity must be a torch.nn.Module, whose attention blocks can be reached; "
            f"got {type(velocity).__name__}"
        )
    blocks = [module for module in velocity.modules() if hasattr(type(module), "exchange")]
    if not blocks:
        raise ValueError(
            "features: velocity must have attention blocks that exchange features, such as those "
            f"of rfkernels.models.DiT; got {type(velocity).__name__}"
        )
    return blocks


@dataclass
class TappedField(EditField):
    """A field that records its network's features in a bank, or injects them, in the first intervals
    of the grid.

    For solvers that evaluate once at the start of a step, or once inside it, or both.

    Args:
        bank: where to, or from.
        times: the ascending grid.
        backwards: whether it is walked down.
        recording: whether features are recorded; else injected.
        tapped: calls of the velocity in which blocks could exchange.
    """

    bank: Bank | None = None
    times: tuple[float, ...] = ()
    backwards: bool = False
    recording: bool = False
    tapped: int = 0
    _where: tuple[int, bool] = (0, False)
    _calls_before: int = 0
    _turns: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, made: Field, **tap: Any) -> TappedField:
        """That field, tapped."""
        return cls(**vars(made), **tap)

    def __call__(self, state: State, t: float | Tensor) -> Evaluation:
        """The velocity at (state, t)."""
        self._where, self._calls_before = self.locate(float(t)), self.calls
        return super().__call__(state, t)

    def locate(self, t: float) -> tuple[int, bool]:
        """(interval, whether t is inside it); a time of the grid belongs to the step that starts
        there."""
        if t in self.times:
            return self.times.index(t) - self.backwards, False
        return sum(time < t for time in self.times) - 1, True

    def exchange(
        self, block: int, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the attention block of that number takes."""
        turn, (interval, middle) = self._turns[block], self._where
        self._turns[block] += 1
        # The first call of an evaluation is the conditional one.
        second = self.calls - self._calls_before > 1
        heads = {"q": q, "k": k, "v": v}
        for name in self.bank.features.what:
            key = Key(interval, middle, second, block, name, turn)
            if self.recording:
                self.bank.record(key, heads[name])
            else:
                heads[name] = self.bank.inject(key, heads[name])
        return heads["q"], heads["k"], heads["v"]

    def _call(self, state: State, t: Tensor, condition: Mapping[str, Any]) -> Tensor:
        if self._where[0] >= self.bank.features.steps:
            return super()._call(state, t, condition)
        self._turns.clear()
        self.tapped += 1
        with _tapped(self):
            return super()._call(state, t, condition)


# Blocks belong to all threads: one tapped call at a time, and those of other threads go untouched.
_one_call = threading.RLock()


@contextlib.contextmanager
def _tapped(tap: TappedField) -> Iterator[None]:
    """The chosen blocks of the network exchange with that field, in this thread."""
    blocks, chosen = attention_blocks(tap.velocity), tap.bank.features.blocks
    with _one_call:
        before = [(block, vars(block).get("exchange")) for block in blocks]
        try:
            for number_, block in enumerate(blocks):
                if chosen is None or number_ in chosen:
                    block.exchange = _Exchange(tap, number_)
            yield
        finally:
            for block, own in before:
                vars(block).pop("exchange", None)
                if own is not None:
                    block.exchange = own


class _Exchange:
    """``TappedField.exchange`` of one block, in the thread that made it.

    An object, since torch.compile would compile anew for every number that a closure holds.
    """

    def __init__(self, tap: TappedField, block: int) -> None:
        self.tap, self.block, self.thread = tap, block, threading.get_ident()

    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if threading.get_ident() != self.thread:
            return q, k, v
        return self.tap.exchange(self.block, q, k, v)
