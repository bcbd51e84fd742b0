"""The rows of a result file: their columns, reading and writing them. Needs neither torch nor the package."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

_COLUMNS = """
    op case backend role variant memory dtype shape_name shape device threads isa
    n_iter us_p50 us_p20 us_p80 host_us bytes byte_limit gb_s copy_gb_s pct_copy_peak gflop_s
    err_vs_ref sqnr_db speedup_vs_torch rfkernels torch triton cuda driver cpu commit date
"""
COLUMNS = tuple(_COLUMNS.split())
_LATER = {"sqnr_db"}  # files measured before it was there stay readable

Row = dict[str, str]


def write(path: Path, rows: list[Row], columns: Sequence[str] = COLUMNS) -> None:
    """Replaces the file by these rows; a reader sees the old file or the new one, never half of it."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, text.getvalue().encode())


def between(text: str, begin: str, end: str, content: str) -> str:
    """The text with what stands between two markers replaced.

    Raises:
        ValueError: not exactly one pair of them, in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"into: the file must have one {begin} and after it one {end}")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.partition(end)[2]}"


def replace_file(path: Path, content: bytes) -> None:
    """Writes beside the file, then puts it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def read(path: Path) -> list[Row]:
    """The rows of a result file.

    Raises:
        ValueError: the file has other columns.
    """
    with path.open(newline="") as stream:
        reader = csv.DictReader(stream)
        if missing := [c for c in COLUMNS if c not in {*(reader.fieldnames or ()), *_LATER}]:
            raise ValueError(
                f"{path}: the columns must be those of benchmarks/rows.py; missing: {', '.join(missing)}"
            )
        return [{**dict.fromkeys(_LATER, ""), **row} for row in reader]
