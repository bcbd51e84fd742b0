"""Pictures: labelled rows of samples, and quality against the number of steps. Both come back as PNG bytes.

Needs the extra `demo` (Pillow, matplotlib); they are imported at first use, so that the other commands do without.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from rfkernels.cli.quality import Quality

__all__ = [
    "COLOURS",
    "is_image",
    "one_grid",
    "point_cloud",
    "quality_plot",
    "require_pictures",
    "sample_rows",
]

# Okabe-Ito: told apart by every kind of colour vision; a model keeps its colour in plots, labels and the report.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_SOLVERS = {"euler": "Euler", "heun": "Heun", "rk4": "RK4", "ab2": "AB2", "taylor": "Taylor"}
_INK, _FAINT = "#24292f", "#6b7280"


def require_pictures() -> None:
    """Refuses early, before minutes of work, when the packages that draw are not installed.

    Raises:
        ImportError: what is missing and how to get it.
    """
    try:
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'pictures: need matplotlib and Pillow; install them with: pip install "rfkernels[demo]" ({error})'
        ) from error


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) in [-1, 1] -> uint8 (N, H, W, 3)."""
    x = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return x.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def is_image(shape: Sequence[int]) -> bool:
    """Whether samples of this shape can be drawn: (1, H, W) or (3, H, W)."""
    return len(shape) == 3 and shape[0] in (1, 3)


def _enlarged(side: int, target: int) -> int:
    """Whole pixels per pixel, so that an image of `side` is about `target` wide and stays crisp."""
    return max(1, round(target / side))


def _tile(image: torch.Tensor, scale: int) -> torch.Tensor:
    """Nearest-neighbour enlargement of (H, W, 3) by a whole factor."""
    return image.repeat_interleave(scale, 0).repeat_interleave(scale, 1)


def _png(picture: torch.Tensor) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(picture.numpy()).save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def one_grid(x: torch.Tensor) -> bytes:
    """Images (N, C, H, W) in [-1, 1] in a nearly square grid with thin gaps, enlarged to whole pixels."""
    pixels = _pixels(x)
    count, height, width, _ = pixels.shape
    scale, gap = _enlarged(max(height, width), 48), 2
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    high, wide = height * scale + gap, width * scale + gap
    picture = torch.full((rows * high + gap, columns * wide + gap, 3), 255, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top, left = gap + (i // columns) * high, gap + (i % columns) * wide
        picture[top : top + height * scale, left : left + width * scale] = _tile(image, scale)
    return _png(picture)


def sample_rows(groups: Sequence[tuple[str, str, Sequence[tuple[str, torch.Tensor]]]]) -> bytes:
    """Rows of images side by side, so that a column is one noise seen through every model and step count.

    Args:
        groups: (title, colour, rows), each row (label, images (N, C, H, W) in [-1, 1]); N is the same everywhere.
    """
    from PIL import Image, ImageDraw, ImageFont

    first = groups[0][2][0][1]
    count, _, height, width = first.shape
    scale = _enlarged(max(height, width), 44)
    high, wide, gap = height * scale, width * scale, 4
    left, heading, margin = 118, 34, 18
    rows = sum(len(group[2]) for group in groups)
    size = (
        left + count * (wide + gap) + margin,
        margin + rows * (high + gap) + len(groups) * heading,
    )
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    title_font, label_font = ImageFont.load_default(17), ImageFont.load_default(14)
    top = margin // 2
    for title, colour, members in groups:
        draw.rectangle(
            (margin, top + 9, margin + 4, top + heading + len(members) * (high + gap) - gap - 1),
            fill=colour,
        )
        draw.text(
            (margin + 14, top + heading / 2 + 2), title, fill=colour, font=title_font, anchor="lm"
        )
        top += heading
        for label, images in members:
            draw.text((left - 12, top + high / 2), label, fill=_INK, font=label_font, anchor="rm")
            for column, image in enumerate(_pixels(images)):
                tile = Image.fromarray(_tile(image, scale).numpy())
                picture.paste(tile, (left + column * (wide + gap), top))
            top += high + gap
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def quality_plot(
    curves: Mapping[str, Mapping[int, Quality]],
    *,
    distance: str = "frechet",
    distance_name: str = "Fréchet distance of the pixels",
    solver: str = "euler",
    gaussian: Quality | None = None,
) -> bytes:
    """Two panels against the number of steps (logarithmic): a distance, and the 1-nearest-neighbour accuracy.

    Args:
        curves: model -> steps -> quality.
        distance: the field of Quality in the left panel, and `distance_name` its title.
        solver: whose steps they are.
        gaussian: drawn as a dashed line, for comparison.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = sorted({n for curve in curves.values() for n in curve})
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        style = {
            "color": colour,
            "marker": "o",
            "markersize": 5,
            "linewidth": 2,
            "label": name,
            "clip_on": False,
        }
        at = sorted(curve)
        left.plot(at, [getattr(curve[n], distance) for n in at], **style)
        right.plot(at, [curve[n].one_nn for n in at], **style)
    if gaussian is not None:
        style = {"color": _FAINT, "linestyle": (0, (5, 4)), "linewidth": 1.2, "zorder": 0}
        left.axhline(getattr(gaussian, distance), label="a Gaussian fitted to the data", **style)
        right.axhline(gaussian.one_nn, label="a Gaussian fitted to the data", **style)
    right.axhline(
        0.5, color=_FAINT, linewidth=1.2, linestyle=(0, (1, 2)), label="cannot be told apart"
    )
    left.set_title(distance_name)
    left.set_yscale("log", nonpositive="clip")  # an unbiased energy distance may fall below zero
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    low = min([0.5, *(q.one_nn for curve in curves.values() for q in curve.values())])
    right.set(
        title="1-NN accuracy: telling samples from real data", ylim=(min(0.47, low - 0.03), 1.01)
    )
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.set_xticks(steps, [str(n) for n in steps])
        panel.set_xlabel(f"{_SOLVERS.get(solver, solver)} steps per sample", color=_FAINT)
        panel.title.set(fontsize=11.5, color=_INK, fontweight="bold")
        panel.tick_params(colors=_FAINT, which="both", length=3)
        panel.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        panel.set_axisbelow(True)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            panel.spines[side].set_color("#c4c9cf")
    right.legend(frameon=False, fontsize=9.5, labelcolor=_INK)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", facecolor="white")
    return stream.getvalue()


def point_cloud(x: torch.Tensor) -> bytes:
    """A scatter plot of points (N, 2)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), dpi=150, layout="constrained")
    panel = figure.subplots()
    panel.scatter(
        x[:, 0],
        x[:, 1],
        s=max(2.0, min(20.0, 4000 / len(x))),
        color=COLOURS[1],
        alpha=0.6,
        linewidths=0,
    )
    panel.set_aspect("equal", "datalim")
    panel.tick_params(colors=_FAINT, length=3)
    for side, spine in panel.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#c4c9cf")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", facecolor="white")
    return stream.getvalue()
