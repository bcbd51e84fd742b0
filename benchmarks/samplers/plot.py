"""The picture of ``docs/samplers.md``: error against evaluations, a panel a field. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

Row = dict[str, str]

# Families share a hue: first order grey, one-step orange to red, Adams blue, exponential green.
LOOKS = {
    "euler": ("#111111", "-", "o"),
    "uni-inv": ("#8a8f98", "--", "s"),
    "midpoint": ("#b5651d", "-", "o"),
    "heun": ("#e69f00", "--", "s"),
    "rk4": ("#d7301f", "-", "D"),
    "dopri5": ("#f768a1", ":", "^"),
    "ab2": ("#08306b", "-", "o"),
    "ab3": ("#2b7bba", "--", "s"),
    "fireflow": ("#6a3d9a", "-", "D"),
    "dpm++": ("#00695c", "--", "s"),
    "unipc": ("#2ca02c", "-", "o"),
}
SAME = {"taylor": "midpoint"}  # the same rule, drawn once under both names
TITLES = {
    "ring": "ring: eight Gaussians, exact",
    "digits": "digits: an MLP on 8 x 8 images",
    "mnist-dit": "mnist-dit: a DiT on 28 x 28 images",
}
INK, FAINT = "#24292f", "#6b7280"


def plot(rows: list[Row], path: Path) -> None:
    """Both axes logarithmic; every line is named at its end, in the order in which the lines end."""
    from matplotlib.figure import Figure

    fields = list(dict.fromkeys(row["field"] for row in rows))
    figure = Figure(figsize=(4.9 * len(fields), 5.4), dpi=130, layout="constrained")
    figure.suptitle(
        "Error of the end point (rms) against evaluations of the network, even steps",
        fontsize=16,
        color=INK,
    )
    for ax, field in zip(figure.subplots(1, len(fields), squeeze=False)[0], fields, strict=True):
        own = [r for r in rows if r["field"] == field and r["grid"] == "uniform" and r["error"]]
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in own:
            if row["solver"] not in SAME:
                lines.setdefault(row["solver"], []).append((float(row["nfe"]), float(row["error"])))
        _panel(ax, TITLES.get(field, field), {name: sorted(line) for name, line in lines.items()})
    figure.savefig(path, facecolor="white")


def _panel(ax: Any, title: str, lines: Mapping[str, list[tuple[float, float]]]) -> None:
    for name, line in lines.items():
        colour, dash, marker = LOOKS[name]
        ax.loglog(*zip(*line, strict=True), dash, color=colour, marker=marker, markersize=4)
    ticks = (2, 4, 8, 16, 32, 64, 128)
    ax.set_xticks(ticks, map(str, ticks))
    ax.minorticks_off()
    ax.set_title(title, fontsize=13.5, color=INK)
    ax.set_xlabel("evaluations", fontsize=13.5, color=INK)
    ax.tick_params(labelsize=12.5, colors=FAINT)
    ax.grid(color="#e5e7eb", linewidth=0.8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    _name_ends(ax, lines)


def _name_ends(ax: Any, lines: Mapping[str, list[tuple[float, float]]]) -> None:
    """Names to the right of the panel, each at the height of its line's end or as near as there is room."""
    low, high = (math.log10(y) for y in ax.get_ylim())
    right = max(x for line in lines.values() for x, _ in line)
    ends = sorted((math.log10(line[-1][1]), name) for name, line in lines.items())
    room = 0.05 * (high - low)  # of a line of text
    places = [end for end, _ in ends]
    for _ in range(500):  # neighbours push each other apart until none is too near
        for i, (below, above) in enumerate(pairwise(places)):
            short = room - (above - below)
            if short > 0:
                places[i] -= short / 2
                places[i + 1] += short / 2
        places = [min(max(place, low), high) for place in places]
    for (end, name), place in zip(ends, places, strict=True):
        colour = LOOKS[name][0]
        also = [other for other, one in SAME.items() if one == name]
        ax.annotate(
            ", ".join((name, *also)),
            (lines[name][-1][0], 10**end),
            (right * 1.28, 10**place),
            fontsize=12.5,
            color=colour,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.7,
                "relpos": (0, 0.5),
                "shrinkA": 0,
                "shrinkB": 3,
            },
        )
