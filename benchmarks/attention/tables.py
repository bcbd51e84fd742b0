"""Tables and plots of ``docs/attention.md`` from the result files, so that no figure in it is typed by hand.

    python benchmarks/attention/tables.py                    every table whose file is there, into docs/attention.md
    python benchmarks/attention/tables.py --plots            the plots beside it as well (needs matplotlib)

A table stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``; NAME is one of
``TABLES``, or handover. A file that is not there leaves its tables as they are.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import plots
import rows as files
from attention_targets import MARK, SMALL_SHARE, SMALL_US, rival_of, shape_of, times_quicker
from rows import Row

from rfkernels.ops._attention_handover import SMALL

ROOT = Path(__file__).resolve().parents[2]
SPEED, ACCURACY, MEMORY, END = (
    f"attention_{name}.csv" for name in ("cpu", "accuracy", "memory", "end_to_end")
)


def read(path: Path) -> list[Row]:
    """The rows of a CSV file."""
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def markdown(head: list[str], body: list[list[str]], right: int = 1) -> str:
    """A table; columns from ``right`` on are aligned to the right."""
    rule = ["---"] * right + ["--:"] * (len(head) - right)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])


def _where(row: Row) -> str:
    return (
        f"{row['cpu']}, {row['threads']} threads, {row['isa']}, torch {row['torch']}, commit {row['commit']}, "
        f"{row['date'][:10]}."
    )


def _speed_line(rows: list[Row], ours: Row, names: list[str]) -> list[str]:
    """Length, heads, D, mask, PyTorch's time, then ratio and decibels of every named spelling."""
    _, heads, length, _, dim = shape_of(ours)
    kind = {"attention_causal": "causal", "attention_masked": "bool mask"}
    same = ("case", "dtype", "shape_name")
    line = [str(length), str(heads), str(dim), kind.get(ours["case"], "")]
    line.append(f"{float(rival_of(rows, ours)['us_p50']) / 1000:.2f}")
    for name in names:
        row = next(
            (r for r in rows if r["variant"] == name and all(r[n] == ours[n] for n in same)), None
        )
        line.append(
            "-"
            if row is None
            else f"{times_quicker(rows, row):.2f} ({float(row['sqnr_db']):.0f} dB)"
        )
    return line


def speed(rows: list[Row]) -> str:
    """bfloat16: how many times quicker than PyTorch each precision is."""
    names = ["int8", "int8, K and V quantized before", "int8_bf16", "bf16"]
    cases = ("attention_bfloat16", "attention_causal", "attention_masked")
    ours = [r for r in rows if r["case"] in cases and r["variant"] == "int8"]
    head = ["keys", "heads", "D", "", "SDPA ms", "int8", "int8, K and V before", *names[2:]]
    body = [_speed_line(rows, row, names) for row in ours]
    return _where(ours[0]) + "\n\n" + markdown(head, body, 4)


def float32(rows: list[Row]) -> str:
    """float32 inputs, the kernels also held below AMX and below AVX-512."""
    names = ["int8", "int8 (avx512)", "int8 (avx2)"]
    ours = [r for r in rows if r["case"] == "attention_float32" and r["variant"] == "int8"]
    body = [_speed_line(rows, row, names) for row in ours]
    return markdown(["keys", "heads", "D", "", "SDPA ms", *names], body, 4)


def small(rows: list[Row]) -> str:
    """Calls of few tokens as the package decides them, in one line, and those that miss the goal."""
    ours = [r for r in rows if r["case"] == "attention_small" and r["role"] == "fused"]
    ratios = [times_quicker(rows, r) for r in ours]
    slow = [
        r for r in ours if float(r["us_p50"]) > SMALL_SHARE * float(rival_of(rows, r)["us_p50"]) + SMALL_US
    ]  # fmt: skip
    text = (
        f"{len(ours)} small shapes (1 to 1024 queries and keys, both dtypes): {min(ratios):.2f} to {max(ratios):.2f} times "
        f"PyTorch's speed, median {statistics.median(ratios):.2f}; {len(slow)} of them miss the goal of at most 5 % + 2 us."
    )
    if not slow:
        return text
    body = [
        [r["shape_name"], r["dtype"], f"{float(r['us_p50']):.1f}", f"{float(rival_of(rows, r)['us_p50']):.1f}"]
        for r in slow
    ]  # fmt: skip
    return text + "\n\n" + markdown(["missed", "dtype", "us", "SDPA us"], body, 2)


def dit(rows: list[Row]) -> str:
    """The forward pass of a transformer."""
    ours = [r for r in rows if r["case"] == "attention_dit"]
    if not ours:
        return "Not measured."
    rival = rival_of(rows, ours[0])
    rest = next(r for r in ours if r["role"] == "part")
    share = 1 - float(rest["us_p50"]) / float(rival["us_p50"])
    body = [
        [r["variant"], f"{float(r['us_p50']) / 1000:.1f}", f"{times_quicker(rows, r):.2f}", r["sqnr_db"]]
        for r in ours
        if r["role"] != "part"
    ]  # fmt: skip
    return (
        markdown(["attention", "ms", "x SDPA", "dB against float32"], body)
        + f"\n\nUnder SDPA attention is {100 * share:.0f} % of the time."
    )


def memory(rows: list[Row]) -> str:
    """Peak of a call."""
    spellings = list(dict.fromkeys((r["variant"], r["dtype"]) for r in rows))
    body = []
    for shape in dict.fromkeys(r["shape"] for r in rows):
        cells = {(r["variant"], r["dtype"]): r["peak_mib"] for r in rows if r["shape"] == shape}
        body.append([shape.replace("x", " x "), *(cells[s] for s in spellings)])
    return markdown(["B x H x S x D", *(f"{name}, {dtype}" for name, dtype in spellings)], body)


def accuracy(rows: list[Row]) -> str:
    """Decibels of every scheme by inputs, then every measure for two of the inputs."""
    rows = [r for r in rows if not r["inputs"].startswith("DiT")]
    schemes = list(dict.fromkeys(r["scheme"] for r in rows))
    body = []
    for place in dict.fromkeys((r["inputs"], r["dtype"], r["head_dim"]) for r in rows):
        cells = {
            r["scheme"]: r["sqnr_db"]
            for r in rows
            if (r["inputs"], r["dtype"], r["head_dim"]) == place
        }
        name = place[0] + ("" if place[1] == "float32" else f", {place[1]}")
        body.append([name, place[2], *(f"{float(cells[s]):.1f}" for s in schemes)])
    first = markdown(["inputs", "D", *schemes], body, 2)
    chosen = [
        r for r in rows
        if r["inputs"] in ("normal", "biased K") and r["dtype"] == "float32" and r["head_dim"] == "64"
    ]  # fmt: skip
    second = markdown(
        ["inputs", "scheme", "SQNR dB", "cosine", "relative L1", "RMSE"],
        [
            [r[n] for n in ("inputs", "scheme", "sqnr_db", "cosine", "relative_l1", "rmse")]
            for r in chosen
        ],
        2,
    )
    return f"{first}\n\nAll measures, D 64:\n\n{second}"


def trained(rows: list[Row]) -> str:
    """Q, K and V of the trained DiT: the median and the least over its times, by layer."""
    rows = [r for r in rows if r["inputs"].startswith("DiT")]
    if not rows:
        return "Not measured."
    schemes = list(dict.fromkeys(r["scheme"] for r in rows))
    body = []
    for layer in dict.fromkeys(r["inputs"].split(",")[0] for r in rows):
        cells = []
        for scheme in schemes:
            found = [
                float(r["sqnr_db"]) for r in rows
                if r["scheme"] == scheme and r["inputs"].startswith(layer + ",")
            ]  # fmt: skip
            cells.append(f"{min(found):.1f}")
        body.append([layer.removeprefix("DiT "), *cells])
    return markdown(["layer", *schemes], body)


def end_to_end(rows: list[Row]) -> str:
    """Drift at the end of the path and both Frechet distances."""
    last = {
        r["attention"]: r["value"] for r in rows if r["measure"] == "drift" and float(r["t"]) == 1.0
    }
    distance = {
        (r["attention"], r["against"]): r["value"] for r in rows if r["measure"] == "frechet"
    }
    names = list(dict.fromkeys(r["attention"] for r in rows))
    body = [
        [
            {"sdpa": "exact"}.get(name, name),
            *("-" if value is None else f"{float(value):.2e}" for value in (
                last.get(name), distance.get((name, "sdpa")), distance.get((name, "data"))
            )),
        ]
        for name in names
    ]  # fmt: skip
    first = rows[0]
    head = ["attention", "drift at t = 1", "Frechet to exact samples", "Frechet to data"]
    return (
        f"{first['samples']} samples, {first['steps']} Euler steps, a DiT after {first['train_steps']} training steps.\n\n"
        + markdown(head, body)
    )


def handover() -> str:
    """The rows of the rule, from the code."""
    regions = [row for rows in SMALL.values() for row in rows]
    if not regions:
        return "No such region has been found yet."
    body = [
        [r.device, r.scheme, str(r.dtype).removeprefix("torch."), r.mask or "any", _span(r.threads), _span(r.head_dim),
         str(r.queries), str(r.scores)]
        for r in regions
    ]  # fmt: skip
    head = [
        "device",
        "scheme",
        "dtype",
        "mask",
        "threads",
        "head size",
        "queries up to",
        "or queries x keys up to",
    ]
    return markdown(head, body, 4)


def _span(pair: tuple[int, int]) -> str:
    return "any" if pair[1] >= 1 << 20 else f"{pair[0]} to {pair[1]}"


TABLES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "speed": (SPEED, speed), "float32": (SPEED, float32), "small": (SPEED, small), "transformer": (SPEED, dit),
    "memory": (MEMORY, memory), "accuracy": (ACCURACY, accuracy), "trained": (ACCURACY, trained),
    "end-to-end": (END, end_to_end),
}  # fmt: skip


def between(text: str, name: str, content: str) -> str:
    """The text with what stands between the markers of that name replaced.

    Raises:
        ValueError: not exactly one pair of them, in order.
    """
    return files.between(text, f"<!-- {name}:begin -->", f"<!-- {name}:end -->", content)


def main(command_line: list[str] | None = None) -> int:
    """Writes the page, and the plots if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "attention.md")
    parser.add_argument("--plots", action="store_true")
    options = parser.parse_args(command_line)
    text = options.page.read_text()
    found = {name: read(options.results / name) for name in (SPEED, ACCURACY, MEMORY, END)
             if (options.results / name).is_file()}  # fmt: skip
    for name, (source, table) in TABLES.items():
        if source in found:
            text = between(text, name, table(found[source]))
    text = between(text, "handover", handover())
    files.replace_file(options.page, text.encode())
    if options.plots:
        for source, (picture, plot) in {
            SPEED: ("attention_speed.png", lambda rows: plots.speed(rows, MARK)),
            ACCURACY: ("attention_accuracy.png", plots.accuracy),
            END: ("attention_drift.png", plots.drift),
        }.items():
            if source in found:
                files.replace_file(options.page.with_name(picture), plot(found[source]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
