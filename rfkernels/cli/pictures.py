"""Pictures of images: grids, labelled rows, and tables of grids. All come back as PNG bytes.

Needs the extra `demo` (Pillow, matplotlib); they are imported at first use, so that the other commands do without.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import PIL.Image

__all__ = [
    "COLOURS",
    "FAINT",
    "INK",
    "beside",
    "grid_table",
    "is_image",
    "one_grid",
    "require_pictures",
    "sample_rows",
]

# Okabe-Ito: told apart by every kind of colour vision; a model keeps its colour in plots, labels and the report.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, FAINT = "#24292f", "#6b7280"


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


def _png(picture: PIL.Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def one_grid(x: torch.Tensor, columns: int | None = None, side: int = 48) -> bytes:
    """Images (N, C, H, W) in [-1, 1] in a grid with thin gaps, nearly square unless `columns` says otherwise.

    Each is enlarged by whole pixels to about `side`.
    """
    from PIL import Image

    grid = _grid(x, columns or math.ceil(math.sqrt(len(x))), side)
    return _png(Image.fromarray(grid.numpy()))


def _grid(x: torch.Tensor, columns: int, side: int) -> torch.Tensor:
    pixels = _pixels(x)
    count, height, width, _ = pixels.shape
    scale, gap = _enlarged(max(height, width), side), 2
    rows = math.ceil(count / columns)
    high, wide = height * scale + gap, width * scale + gap
    picture = torch.full((rows * high + gap, columns * wide + gap, 3), 255, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top, left = gap + (i // columns) * high, gap + (i % columns) * wide
        picture[top : top + height * scale, left : left + width * scale] = _tile(image, scale)
    return picture


def grid_table(
    columns: Sequence[tuple[str, str]],
    rows: Sequence[str],
    cells: Sequence[Sequence[torch.Tensor | str | None]],
    across: int,
) -> bytes:
    """Grids of images in a table, so that the same place in every grid is the same noise.

    Args:
        columns: (title, colour) each.
        rows: their labels; what follows a line break is smaller.
        cells: a row of images (N, C, H, W) in [-1, 1] a row; words say why a place is empty, and None
            leaves it so. One place at least has images.
        across: images side by side in a grid.
    """
    from PIL import Image, ImageDraw, ImageFont

    grids = [
        [_grid(x, across, 32) if isinstance(x, torch.Tensor) else x for x in members]
        for members in cells
    ]
    first = next(g for members in grids for g in members if isinstance(g, torch.Tensor))
    high, wide, _ = first.shape
    title_font, label_font = ImageFont.load_default(17), ImageFont.load_default(14)
    note_font = ImageFont.load_default(11)
    high = max(high, 16 * max(1 + label.count("\n") for label in rows))
    notes = [cell for members in grids for cell in members if isinstance(cell, str)]
    texts = [
        *(title_font.getlength(title) for title, _ in columns),
        *map(note_font.getlength, notes),
    ]
    wide = max(wide, math.ceil(max(texts)) + 6)
    lines = [label.partition("\n")[::2] for label in rows]
    left = 28 + math.ceil(
        max(max(label_font.getlength(a), note_font.getlength(b)) for a, b in lines)
    )
    heading, gap = 40, 14
    size = (left + len(columns) * (wide + gap), heading + len(rows) * (high + gap))
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for j, (title, colour) in enumerate(columns):
        x = left + j * (wide + gap)
        draw.rectangle((x + 2, heading - 7, x + wide - 3, heading - 4), fill=colour)
        draw.text((x + 2, heading / 2 - 3), title, fill=colour, font=title_font, anchor="lm")
    for i, ((label, note), members) in enumerate(zip(lines, grids, strict=True)):
        top = heading + i * (high + gap)
        middle, edge = top + high / 2, left - 14
        lift = 8 if note else 0
        draw.text((edge, middle - lift), label, fill=INK, font=label_font, anchor="rm")
        draw.text((edge, middle + lift), note, fill=FAINT, font=note_font, anchor="rm")
        for j, grid in enumerate(members):
            x = left + j * (wide + gap)
            if isinstance(grid, str):
                draw.text((x + 2, middle), grid, fill=FAINT, font=note_font, anchor="lm")
            elif grid is not None:
                picture.paste(Image.fromarray(grid.numpy()), (x, top))
    return _png(picture)


def sample_rows(groups: Sequence[tuple[str, str, Sequence[tuple[str, torch.Tensor]]]]) -> bytes:
    """Rows of images side by side, so that a column is one noise seen through every model and step count.

    Args:
        groups: (title, colour, rows), each row (label, images (N, C, H, W) in [-1, 1]); no N is above the first.
    """
    from PIL import Image, ImageDraw, ImageFont

    first = groups[0][2][0][1]
    count, _, height, width = first.shape
    scale = _enlarged(max(height, width), 44)
    high, wide, gap = height * scale, width * scale, 4
    left, heading, margin = 118, 34, 18
    title_font, label_font = ImageFont.load_default(17), ImageFont.load_default(14)
    titles = max(math.ceil(title_font.getlength(title)) for title, _, _ in groups)
    rows = sum(len(group[2]) for group in groups)
    size = (
        max(left + count * (wide + gap), margin + 14 + titles) + margin,
        margin + rows * (high + gap) + len(groups) * heading,
    )
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
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
            draw.text((left - 12, top + high / 2), label, fill=INK, font=label_font, anchor="rm")
            for column, image in enumerate(_pixels(images)):
                tile = Image.fromarray(_tile(image, scale).numpy())
                picture.paste(tile, (left + column * (wide + gap), top))
            top += high + gap
    return _png(picture)


def beside(before: torch.Tensor, after: torch.Tensor, title: str) -> bytes:
    """Images (N, C, H, W) in [-1, 1] above what became of them, as many side by side as are easy to see.

    Args:
        title: what was done, under which it stands.
    """
    side = max(before.shape[2:])
    across = max(1, min(16, 1024 // (side * _enlarged(side, 44))))
    groups = [
        (
            f"{title}: {start + 1} to {start + len(x)}" if len(before) > across else title,
            COLOURS[1],
            [("image", x), ("edit", y)],
        )
        for start, x, y in zip(
            range(0, len(before), across), before.split(across), after.split(across), strict=True
        )
    ]
    return sample_rows(groups)
