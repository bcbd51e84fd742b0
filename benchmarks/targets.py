"""What the package promises of its speed, as ratios within one run, and whether a result file reaches it.

    python benchmarks/targets.py results/cpu.csv

A ratio is the quickest rival's median over our quickest median in the rows that the target names. Lines without a goal are
there so that a tie or a weakness is said as plainly as a gain.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import attention_targets
import rows as files
from rows import Row

SIZES = {
    "64 Ki": "latent-4x64x64-b4",
    "1 Mi": "latent-16x128x128-b4",
    "16 Mi": "latent-16x128x128-b64",
}


@dataclass(frozen=True)
class Target:
    """Our spelling against a rival's, size by size.

    Attributes:
        text: what is promised.
        case: the case's name.
        ours: memory of our spelling.
        role: the rival's role.
        memory: the rival's memory; None takes the quickest of any.
        goals: least ratio by size; None where nothing is promised and the figure is only shown.
        variant: the rival's name, where only one counts.
        dtype: of the rows.
    """

    text: str
    case: str
    ours: str
    role: str
    memory: str | None
    goals: dict[str, float | None]
    variant: str | None = None
    dtype: str = "float32"


@dataclass(frozen=True)
class Outcome:
    """One target at one size: state is reached, missed, shown (no goal) or "not measured"."""

    text: str
    size: str
    goal: str
    measured: str
    state: str


def _every(goal: float | None) -> dict[str, float | None]:
    return dict.fromkeys(SIZES, goal)


RATIOS = (
    Target("guided Euler, out=, against naive eager", "euler_guided", "out", "naive", None, _every(3.0)),
    Target(
        "guided Euler in place against the best eager in place (bytes allow 1.31 / 1.35 / 2.0)",
        "euler_guided", "inplace", "best", "inplace", dict(zip(SIZES, (1.2, 1.25, 1.6), strict=True)),
    ),
    Target("guided Euler, out=, against the best eager with out=", "euler_guided", "out", "best", "out", _every(None)),
    Target(
        "interpolate with drawn noise against naive eager, both allocating",
        "interpolate_drawn", "new", "naive", None, {"64 Ki": 4.0, "1 Mi": 5.0, "16 Mi": None},
    ),
    Target(
        "interpolate with drawn noise, out=, against naive eager",
        "interpolate_drawn", "out", "naive", None, {"64 Ki": None, "1 Mi": None, "16 Mi": 4.0},
    ),
    Target(
        "interpolate with drawn noise against the best eager, both with out=",
        "interpolate_drawn", "out", "best", "out", _every(None),
    ),
    Target(
        "interpolate with drawn noise against randn + compiled arithmetic, both allocating",
        "interpolate_drawn", "new", "compile", "new", _every(3.0), "randn + compiled",
    ),
    Target(
        "interpolate with drawn noise against normal_ + compiled arithmetic, both with out=",
        "interpolate_drawn", "out", "compile", "out", _every(3.0), "randn + compiled",
    ),
    Target("mse loss with gradient against naive eager", "loss_mse", "new", "naive", None, _every(2.5)),
    Target("mse loss with gradient against mse_loss", "loss_mse", "new", "best", None, _every(None)),
    Target(
        "mse loss with gradient against the gradient written by hand in eager, out=",
        "loss_mse", "new", "manual", "out", _every(None),
    ),
    Target("plain Euler, out=, against add(alpha=, out=): a tie by bytes", "euler", "out", "best", "out", _every(None)),
)  # fmt: skip

COMPILE_GOAL = 0.95  # never slower than torch.compile by more than 5 %
HOST_GOAL_US = 1.0  # a call with its output given, above the kernel
COPY_GOAL_PERCENT, COPY_FROM_BYTES = (
    90.0,
    64 * 10**6,
)  # on CUDA, of a measured copy, a state of this size and more


def quickest(rows: Iterable[Row], **wanted: str | None) -> Row | None:
    """The row with the least median among those whose columns have the wanted values (None: any)."""
    found = [
        row
        for row in rows
        if all(value is None or row[name] == value for name, value in wanted.items())
    ]
    return min(found, key=lambda row: float(row["us_p50"]), default=None)


def ratio(rival: Row | None, ours: Row | None) -> float | None:
    """How many times quicker ours is; None where one of the two is missing."""
    return None if rival is None or ours is None else float(rival["us_p50"]) / float(ours["us_p50"])


def check(rows: list[Row]) -> list[Outcome]:
    """Every target against the rows of one run on one device."""
    outcomes = []
    for target in RATIOS:
        for size, shape_name in SIZES.items():
            place = {"case": target.case, "dtype": target.dtype, "shape_name": shape_name}
            ours = quickest(rows, role="fused", memory=target.ours, **place)
            rival = quickest(
                rows, role=target.role, memory=target.memory, variant=target.variant, **place
            )
            outcomes.append(_outcome(target.text, size, target.goals[size], ratio(rival, ours)))
    outcomes += _against_compile(rows) + _overhead(rows) + _bandwidth(rows)
    return outcomes + [Outcome(*found) for found in attention_targets.check(rows)]


def _outcome(text: str, size: str, goal: float | None, measured: float | None) -> Outcome:
    if measured is None:
        return Outcome(text, size, "" if goal is None else f"{goal:g}x", "", "not measured")
    state = "shown" if goal is None else "reached" if measured >= goal else "missed"
    return Outcome(text, size, "" if goal is None else f"{goal:g}x", f"{measured:.2f}x", state)


def _against_compile(rows: list[Row]) -> list[Outcome]:
    """Every case, dtype, size and kind of memory that has a compiled spelling."""
    outcomes = []
    names = {name: size for size, name in SIZES.items()}
    for case, dtype, shape_name, memory in dict.fromkeys(
        (row["case"], row["dtype"], row["shape_name"], row["memory"])
        for row in rows
        if row["role"] == "compile"
    ):
        place = {"case": case, "dtype": dtype, "shape_name": shape_name, "memory": memory}
        measured = ratio(
            quickest(rows, role="compile", **place), quickest(rows, role="fused", **place)
        )
        text = f"{case} {dtype} ({memory}) against torch.compile"
        if measured is not None:
            outcomes.append(
                _outcome(text, names.get(shape_name, shape_name), COMPILE_GOAL, measured)
            )
    return outcomes


def _overhead(rows: list[Row]) -> list[Outcome]:
    """Host time of our calls with a given output, once a case, dtype and backend."""
    outcomes = {}
    for row in rows:
        if row["role"] == "fused" and row["memory"] != "new" and row["host_us"]:
            text = f"overhead of {row['case']} {row['dtype']} ({row['memory']}, {row['backend']})"
            state = "reached" if float(row["host_us"]) < HOST_GOAL_US else "missed"
            outcomes[text] = Outcome(
                text, "any", f"< {HOST_GOAL_US:g} us", f"{float(row['host_us']):.2f} us", state
            )
    return list(outcomes.values())


def _bandwidth(rows: list[Row]) -> list[Outcome]:
    outcomes = []
    for row in rows:
        elements = 1
        for side in row["shape"].split("x"):
            elements *= int(side)
        width = 2 if row["dtype"] == "bfloat16" else 4
        if (
            row["role"] != "fused"
            or row["op"] == "attention"  # bound by arithmetic
            or not row["cuda"]
            or row["device"] == "cpu"
            or elements * width < COPY_FROM_BYTES
        ):
            continue
        state = "reached" if float(row["pct_copy_peak"]) >= COPY_GOAL_PERCENT else "missed"
        text = f"share of a copy's bandwidth: {row['case']} {row['dtype']} ({row['memory']}, {row['backend']})"
        outcomes.append(
            Outcome(
                text,
                row["shape_name"],
                f"{COPY_GOAL_PERCENT:g} %",
                f"{row['pct_copy_peak']} %",
                state,
            )
        )
    return outcomes


def report(outcomes: list[Outcome]) -> str:
    """One line an outcome, and how many there are of each state."""
    sizes, goals, found = (
        max([least, *(len(getattr(o, name)) for o in outcomes)])
        for name, least in (("size", 6), ("goal", 8), ("measured", 9))
    )
    lines = [
        "",
        f"{'state':12s} {'size':>{sizes}s} {'goal':>{goals}s} {'measured':>{found}s}  target",
    ]
    lines += [
        f"{o.state:12s} {o.size:>{sizes}s} {o.goal:>{goals}s} {o.measured:>{found}s}  {o.text}"
        for o in outcomes
    ]
    counts = {
        state: sum(o.state == state for o in outcomes)
        for state in ("reached", "missed", "shown", "not measured")
    }
    lines.append(", ".join(f"{count} {state}" for state, count in counts.items()))
    return "\n".join(lines)


def main(command_line: list[str]) -> int:
    """Checks a result file; 1 when a target is missed."""
    if len(command_line) != 1:
        print("usage: python benchmarks/targets.py FILE.csv", file=sys.stderr)
        return 2
    outcomes = check(files.read(Path(command_line[0])))
    print(report(outcomes))
    return int(any(outcome.state == "missed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
