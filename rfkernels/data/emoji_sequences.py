"""Emoji of several code points: which ones a font draws as a single glyph."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

__all__ = ["REGIONS", "sequences_of"]

_JOINER, _EMOJI_STYLE, _KEYCAP = "\u200d", "\ufe0f", "\u20e3"
_TONES = [chr(c) for c in range(0x1F3FB, 0x1F400)]
REGIONS = [chr(c) for c in range(0x1F1E6, 0x1F200)]
# What follows a joiner: signs of gender, professions, hair, and what makes a flag or an animal.
_SECOND = [
    *(c + _EMOJI_STYLE for c in "\u2640\u2642\u2695\u2696\u2708\u26a7\u2620"),
    *"🌾🍳🍼🎓🎤🎨🏫🏭💻💼🔧🔬🚀🚒🎄🦯🦼🦽🦰🦱🦲🦳🌈🔥🩹💫💨⬛🦺",
    "\u2744" + _EMOJI_STYLE,
    "\U0001f5e8" + _EMOJI_STYLE,
]
# What a joiner may follow, besides whatever takes a skin tone.
_FIRST = "👯🤼🧞🧟🏳🏴🐕🐈🐻🐦❤👁😮😵😶"
_PARENTS, _CHILDREN = "👨👩", "👦👧"
_HEART = "\u2764" + _EMOJI_STYLE


def _families() -> Iterable[str]:
    """One or two parents with one or two children; two people with a heart or a kiss."""
    parents = [*_PARENTS, "👨‍👨", "👨‍👩", "👩‍👩"]
    children = [*_CHILDREN, "👦‍👦", "👧‍👦", "👧‍👧"]
    for some, others in itertools.product(parents, children):
        yield some + _JOINER + others
    for one, other in itertools.product([*_PARENTS, "🧑"], repeat=2):
        for between in ([_HEART], [_HEART, "💋"]):
            yield _JOINER.join([one, *between, other])


def sequences_of(characters: Sequence[str], drawn: Callable[[str], bool]) -> list[str]:
    """The sequences over `characters` for which `drawn` holds, in a fixed order: flags, keycaps,
    skin tones, joined pairs (with every skin tone), families.

    Args:
        characters: the single emoji of the font, in order.
        drawn: whether the font draws a text as one glyph of its own.
    """
    found = [a + b for a in REGIONS for b in REGIONS if drawn(a + b)]
    found += [c + _EMOJI_STYLE + _KEYCAP for c in "#*0123456789"]
    toned = [c for c in characters if c not in _TONES and drawn(c + _TONES[0])]
    tones = {c: [c + tone for tone in _TONES] for c in toned}
    found += itertools.chain.from_iterable(tones.values())
    joining = [c for c in characters if c in tones or c in _FIRST]
    for first, second in itertools.product(joining, _SECOND):
        if drawn(first + _JOINER + second):
            found.append(first + _JOINER + second)
            found += [
                text for base in tones.get(first, []) if drawn(text := base + _JOINER + second)
            ]
    found += filter(drawn, _families())
    return list(dict.fromkeys(found))
