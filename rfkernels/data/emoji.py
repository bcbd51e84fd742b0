"""Emoji as a data set of small colour images with classes and captions, drawn from a font on this
machine, so that no download is needed."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rfkernels.data.dataset import Dataset
from rfkernels.data.decode import import_pillow
from rfkernels.data.emoji_classes import emoji_class
from rfkernels.data.emoji_sequences import REGIONS, sequences_of

__all__ = ["emoji", "find_emoji_font"]

_FONT = "NotoColorEmoji.ttf"
_STRIKE = 109  # the one size of the font's bitmaps, in pixels per em; they are 136 x 128
# Where the emoji of Unicode lie; which of these are pictures, the font says.
_CODE_POINTS = (0xA9, 0xAE, *range(0x203C, 0x32A0), *range(0x1F000, 0x1FB00))


def _font_folders() -> Iterator[Path]:
    """Where fonts lie: the folders of the XDG base directories, then those of macOS and Windows."""
    home = Path.home()
    yield Path(os.environ.get("XDG_DATA_HOME") or home / ".local/share") / "fonts"
    yield home / ".fonts"
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    yield from (Path(folder) / "fonts" for folder in shared.split(os.pathsep) if folder)
    if sys.platform == "darwin":
        yield from (home / "Library/Fonts", Path("/Library/Fonts"))
    if sys.platform == "win32":
        yield Path(os.environ.get("LOCALAPPDATA") or home) / "Microsoft/Windows/Fonts"
        yield Path(os.environ.get("WINDIR") or "C:/Windows") / "Fonts"


def find_emoji_font() -> Path:
    """The file of the Noto Color Emoji font: NotoColorEmoji.ttf in or below $XDG_DATA_HOME/fonts,
    ~/.fonts, the fonts folders of $XDG_DATA_DIRS, or the system's own.

    Raises:
        FileNotFoundError: it is in none of them; the message says how to install it.
    """
    folders = list(_font_folders())
    for folder in folders:
        found = sorted(folder.rglob(_FONT)) if folder.is_dir() else []
        if found:
            return found[0]
    raise FileNotFoundError(
        f"font: {_FONT} is not in {', '.join(map(str, folders))}; install it (Debian and Ubuntu: apt "
        "install fonts-noto-color-emoji), or give its path"
    )


class _Drawer:
    """Draws text with a colour bitmap font."""

    def __init__(self, file: Path) -> None:
        image = import_pillow("emoji")
        from PIL import ImageDraw, ImageFont, features

        self._image, self._draw = image, ImageDraw
        self.shapes_sequences = features.check("raqm")
        try:
            self._font = ImageFont.truetype(str(file), _STRIKE)
        except OSError as error:
            raise ValueError(
                f"font: {file} has no colour bitmaps of {_STRIKE} pixels, as the Debian package "
                f"fonts-noto-color-emoji has ({error})"
            ) from error
        probe = np.asarray(self.draw("\N{GRINNING FACE}"))
        if not (probe[..., 0] > probe[..., 2]).any():  # nothing, or an outline, in place of yellow
            raise ValueError(f"font: {file} draws no colour bitmaps of {_STRIKE} pixels")
        # What a glyph that the font lacks looks like: no font has one for a noncharacter, and no
        # country is called ZZ.
        missing = self.draw("\U0001fffe")
        self._missing = missing.tobytes() if missing.getbbox() else None
        self._missing_flag = self.draw("\U0001f1ff" * 2).tobytes()
        self._advance = self._font.getlength("\N{GRINNING FACE}")

    def draw(self, text: str) -> Any:
        canvas = self._image.new("RGBA", (136, 128))
        self._draw.Draw(canvas).text((0, 0), text, font=self._font, embedded_color=True)
        return canvas

    def has(self, text: str) -> bool:
        """Whether the text draws something other than nothing and the missing glyph."""
        _, top, _, bottom = self._font.getbbox(text)
        if top >= bottom:
            return False
        return self._missing is None or self.draw(text).tobytes() != self._missing

    def has_sequence(self, text: str) -> bool:
        """Whether several code points draw one glyph, other than the flag of an unknown country."""
        if self._font.getlength(text) != self._advance:
            return False
        return text[0] not in REGIONS or self.draw(text).tobytes() != self._missing_flag

    def square(self, text: str, size: int, background: tuple[int, int, int]) -> np.ndarray:
        """uint8 (3, size, size): the glyph in the middle of a square, averaged down."""
        glyph = self.draw(text)
        canvas = self._image.new("RGBA", (136, 136), (*background, 255))
        canvas.alpha_composite(glyph, (0, 4))
        small = canvas.convert("RGB").resize((size, size), self._image.Resampling.LANCZOS)
        return np.asarray(small).transpose(2, 0, 1)


def _caption(text: str) -> str:
    """The Unicode names of the code points, lower case, without joiners and variation selectors."""
    names = (unicodedata.name(c, "") for c in text if unicodedata.category(c) not in ("Cf", "Mn"))
    return ", ".join(name.lower() for name in names)


def _glyphs(drawer: _Drawer) -> list[str]:
    """The single code points that are emoji: named, no combining marks, drawn by the font."""
    characters = map(chr, _CODE_POINTS)
    return [
        c
        for c in characters
        if unicodedata.name(c, "") and unicodedata.category(c)[0] not in "MC" and drawer.has(c)
    ]


def emoji(
    size: int = 32,
    font: str | Path | None = None,
    sequences: bool = False,
    background: Sequence[int] = (255, 255, 255),
) -> Dataset:
    """Some 1350 emoji as (3, size, size) images in [-1, 1], drawn with the Noto Color Emoji font.

    Labels are the ten classes of `rfkernels.data.EMOJI_CLASSES` (symbol, face, body, person, animal,
    nature, food, place, activity, object); captions are the Unicode names in lower case, for
    instance "grinning face with smiling eyes"; `caption_conditioned` makes condition vectors of them.
    Samples are in the order of the code points, sequences after them. Which emoji there are depends
    on the version of the font, and of Python's Unicode names, alone.

    Args:
        size: side in pixels; the font's bitmaps are 136 wide, more only enlarges them.
        font: the path of a NotoColorEmoji.ttf with bitmaps; None searches the font folders
            (`find_emoji_font`).
        sequences: also flags, keycaps, skin tones and the joined sequences (families, professions)
            that the font draws as one glyph: some 2000 more, captioned with the names of their
            parts. Needs a Pillow with Raqm, which its wheels are, and some seconds.
        background: red, green and blue, 0 to 255, behind the glyphs.

    Raises:
        FileNotFoundError: the font is not found; the message says how to install it.
        ValueError: the font has no such bitmaps, or an argument is out of range.
        ImportError: Pillow is not installed (the extra `data` brings it).
    """
    if size < 1:
        raise ValueError(f"size: must be at least 1; got {size}")
    if len(background) != 3 or not all(0 <= c <= 255 for c in background):
        raise ValueError(f"background: must be three numbers from 0 to 255; got {background}")
    file = find_emoji_font() if font is None else Path(font)
    if not file.is_file():
        raise FileNotFoundError(f"font: {file}: no such file")
    drawer = _Drawer(file)
    texts = _glyphs(drawer)
    if sequences:
        if not drawer.shapes_sequences:
            raise ValueError("sequences: need a Pillow that was built with Raqm; this one was not")
        texts += sequences_of(texts, drawer.has_sequence)
    colour = (int(background[0]), int(background[1]), int(background[2]))
    pixels = np.stack([drawer.square(text, size, colour) for text in texts])
    labels = torch.tensor([emoji_class(ord(text[0])) for text in texts], device="cpu")
    captions = tuple(map(_caption, texts))
    return Dataset(
        torch.from_numpy(pixels).to(torch.float32) / 127.5 - 1.0, labels, "emoji", captions
    )
