"""What the package promises of attention's speed, checked by ``targets.py`` with the rest.

Every ratio is PyTorch's median over ours in the same run, quantization included. On the CPU the goals are those of two cores
with AMX; the rows for AVX-512 and AVX2 are the same machine with the kernels capped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rows import Row

MARK = 2.5  # to beat, not promised
SMALL_SHARE, SMALL_US = 1.05, 2.0  # a call may cost so many times PyTorch's, and so much more
TOPS = {64: 450.0, 128: 600.0}  # on Hopper from 8 Ki keys on, by head size


@dataclass(frozen=True)
class Speed:
    """Our spelling of a case against PyTorch's: the least ratio by length, from that length on; None is only shown."""

    case: str
    ours: str
    goals: dict[int, float | None]

    def goal(self, length: int) -> float | None:
        """What is promised at a length."""
        return next(
            (g for least, g in sorted(self.goals.items(), reverse=True) if length >= least), None
        )


SPEEDS = (
    Speed("attention_bfloat16", "int8", {1024: 1.8, 4096: 2.2}),
    Speed("attention_bfloat16", "int8, K and V quantized before", {}),
    Speed("attention_bfloat16", "int8_bf16", {}),
    Speed("attention_bfloat16", "bf16", {}),
    Speed("attention_causal", "int8", {}),
    Speed("attention_masked", "int8", {}),
    Speed("attention_float32", "int8", {}),
    Speed("attention_float32", "int8 (avx512)", {0: 2.2}),
    Speed("attention_float32", "int8 (avx2)", {0: 1.0}),
    Speed("attention_dit", "int8", {0: 1.15}),
)

Found = tuple[str, str, str, str, str]  # text, size, goal, measured, state


def shape_of(row: Row) -> tuple[int, ...]:
    """(B, H, queries, keys, D)."""
    return tuple(int(side) for side in row["shape"].split("x"))


def rival_of(rows: list[Row], ours: Row) -> Row | None:
    """PyTorch's quickest row for the same case, dtype and shape."""
    same = ("case", "dtype", "shape_name")
    found = [r for r in rows if r["role"] == "best" and all(r[n] == ours[n] for n in same)]
    return min(found, key=lambda row: float(row["us_p50"]), default=None)


def times_quicker(rows: list[Row], ours: Row) -> float | None:
    """PyTorch's time over ours."""
    rival = rival_of(rows, ours)
    return None if rival is None else float(rival["us_p50"]) / float(ours["us_p50"])


def check(rows: list[Row]) -> Iterator[Found]:
    """Every target that the rows say something about."""
    rows = [row for row in rows if row["op"] == "attention"]
    on_cpu = [row for row in rows if row["device"] == "cpu"]
    for speed in SPEEDS:
        for row in _ours(on_cpu, speed.case, speed.ours):
            ratio = times_quicker(rows, row)
            goal = speed.goal(shape_of(row)[3])
            if ratio is None:
                continue
            state = "shown" if goal is None else "reached" if ratio >= goal else "missed"
            mark = (
                f" (mark {MARK:g}x)"
                if (speed.case, speed.ours) == ("attention_bfloat16", "int8")
                else ""
            )
            text = f"{speed.case}: {speed.ours} against SDPA in {row['dtype']}{mark}"
            yield (
                text,
                row["shape_name"],
                "" if goal is None else f"{goal:g}x",
                f"{ratio:.2f}x",
                state,
            )
    yield from _small(on_cpu)
    yield from _share(on_cpu)
    yield from _tops(row for row in rows if row["device"] != "cpu")


def _ours(rows: list[Row], case: str, name: str) -> list[Row]:
    return [r for r in rows if (r["role"], r["case"], r["variant"]) == ("fused", case, name)]


def _small(rows: list[Row]) -> Iterator[Found]:
    """The package's own choice against PyTorch where calls are small: the rule of the hand-over is held to it."""
    goal = f"<= {100 * (SMALL_SHARE - 1):.0f} % + {SMALL_US:g} us"
    for row in rows:
        if row["role"] == "fused" and row["case"] == "attention_small":
            rival = rival_of(rows, row)
            if rival is None:
                continue
            ours, theirs = float(row["us_p50"]), float(rival["us_p50"])
            state = "reached" if ours <= SMALL_SHARE * theirs + SMALL_US else "missed"
            text = f"attention_small {row['dtype']}: no slower than SDPA"
            yield text, row["shape_name"], goal, f"{ours:.1f} / {theirs:.1f} us", state


def _share(rows: list[Row]) -> Iterator[Found]:
    """Attention's part of a transformer's time under SDPA."""
    for row in rows:
        if row["role"] == "part" and (rival := rival_of(rows, row)) is not None:
            share = 1 - float(row["us_p50"]) / float(rival["us_p50"])
            yield (
                "attention_dit: share of SDPA",
                row["shape_name"],
                "",
                f"{100 * share:.0f} %",
                "shown",
            )


def _tops(rows: Iterator[Row]) -> Iterator[Found]:
    for row in rows:
        if row["role"] == "fused" and row["case"] == "attention_bfloat16":
            goal = TOPS.get(shape_of(row)[4]) if shape_of(row)[3] >= 8192 else None
            tops = float(row["gflop_s"]) / 1000
            state = "shown" if goal is None else "reached" if tops >= goal else "missed"
            goal_text = "" if goal is None else f"{goal:g} TOPS"
            yield (
                f"attention: {row['variant']}",
                row["shape_name"],
                goal_text,
                f"{tops:.0f} TOPS",
                state,
            )
