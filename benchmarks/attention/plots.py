"""The plots of ``docs/attention.md``, as PNG bytes; needs matplotlib."""

from __future__ import annotations

import io

from attention_targets import shape_of, times_quicker
from rows import Row

COLOURS = {
    "int8": "#3465a4", "int8_u8": "#3465a4", "int8_bf16": "#4e9a06", "bf16": "#75507b", "int8_fp8": "#c4a000",
    "fp8": "#8f5902", "SageAttention 2": "#cc0000", "FlashAttention 3 fp8": "#ef7070", "SDPA bfloat16": "#888888",
}  # fmt: skip


def _png(figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    return picture.getvalue()


def _figure(columns: int, height: float):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, height), layout="constrained")
    return figure, figure.subplots(1, columns, sharey=True, squeeze=False)[0]


def speed(rows: list[Row], mark: float) -> bytes:
    """Ratio to SDPA in bfloat16 over the length, a panel a head size."""
    figure, panels = _figure(2, 3.8)
    ours = [r for r in rows if r["case"] == "attention_bfloat16" and r["role"] == "fused"]
    for panel, dim in zip(panels, (64, 128), strict=True):
        for name in ("int8", "int8_bf16", "bf16"):
            points = sorted(
                (shape_of(r)[3], times_quicker(rows, r))
                for r in ours
                if r["variant"] == name and shape_of(r)[4] == dim and shape_of(r)[1] != 24
            )
            panel.plot(*zip(*points, strict=True), marker="o", color=COLOURS[name], label=name)
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.axhline(mark, color="#888888", linewidth=0.8, linestyle="--")
        panel.set_xscale("log", base=2)
        panel.set_xticks([256, 1024, 4096, 16384], ["256", "1024", "4096", "16384"])
        panel.set(title=f"head size {dim}", xlabel="queries and keys")
    panels[0].set(ylabel="times PyTorch's SDPA in bfloat16", ylim=(0, None))  # shared: once all lines are drawn
    panels[0].legend(frameon=False, loc="lower right")
    return _png(figure)


def accuracy(rows: list[Row]) -> bytes:
    """Decibels of every scheme, a group an input, float32 inputs, a panel a head size."""
    rows = [r for r in rows if r["dtype"] == "float32" and not r["inputs"].startswith("DiT")]
    schemes = list(dict.fromkeys(r["scheme"] for r in rows))
    names = list(dict.fromkeys(r["inputs"] for r in rows))
    dims = list(dict.fromkeys(r["head_dim"] for r in rows))
    figure, panels = _figure(len(dims), 5.2)
    width = 0.8 / len(schemes)
    for panel, dim in zip(panels, dims, strict=True):
        for i, scheme in enumerate(schemes):
            values = [
                next(
                    float(r["sqnr_db"])
                    for r in rows
                    if (r["inputs"], r["scheme"], r["head_dim"]) == (name, scheme, dim)
                )
                for name in names
            ]
            places = [n + (i - len(schemes) / 2) * width for n in range(len(names))]
            panel.barh(places, values, width, color=COLOURS[scheme], label=scheme)
        panel.set_yticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
        panel.set(title=f"head size {dim}", xlabel="signal to noise, dB")
        panel.grid(axis="x", linewidth=0.3)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return _png(figure)


def drift(rows: list[Row]) -> bytes:
    """How far quantized sampling leaves exact sampling along the path."""
    figure, (panel,) = _figure(1, 3.8)
    rows = [r for r in rows if r["measure"] == "drift"]
    for name in dict.fromkeys(r["attention"] for r in rows):
        points = [(float(r["t"]), float(r["value"])) for r in rows if r["attention"] == name]
        points = [(t, value) for t, value in points if value > 0]
        panel.plot(*zip(*points, strict=True), color=COLOURS.get(name, "#888888"), label=name)
    panel.set_yscale("log")
    panel.set(xlabel="t", ylabel="distance from exact sampling / size of x")
    panel.legend(frameon=False)
    return _png(figure)
