"""Ten classes of emoji, by code point."""

from __future__ import annotations

from bisect import bisect_right

__all__ = ["EMOJI_CLASSES", "emoji_class"]

EMOJI_CLASSES = (
    "symbol",  # signs, arrows, letters, shapes, hearts, clock faces, flags
    "face",  # smileys, cat faces, monsters
    "body",  # hands and other parts of the body
    "person",
    "animal",
    "nature",  # sky, weather, plants
    "food",  # and drink
    "place",  # buildings, landscapes, vehicles
    "activity",  # sports, games, feasts, arts
    "object",  # tools, clothes, music, paper, money
)

# A class holds from its code point to the next one in the table. The runs follow the sub-headings
# of the code charts (unicode.org/charts); where those mix, the picture decides.
_RUNS = """
00A9 symbol
231A object  231C symbol  2328 object  2329 symbol  23F0 object  23F4 symbol
2600 nature  2605 symbol  260E object  260F symbol  2614 nature  2615 food  2616 symbol
2618 nature  2619 symbol  261D body  261E symbol  2639 face  263B symbol  265F activity
2668 symbol  2692 object  2695 symbol  2696 object  2698 symbol  2699 object  269A symbol
26B0 object  26B2 symbol  26BD activity  26BF symbol  26C4 nature  26C9 symbol
26CF object  26D4 symbol  26E9 place  26F7 activity  26FA place  26FE symbol
2702 object  2705 symbol  2708 place  2709 object  270A body  270E object  2713 symbol
2744 nature  2745 symbol  2B50 nature  2B51 symbol
1F004 activity  1F100 symbol
1F300 nature  1F302 object  1F303 place  1F308 nature  1F309 place  1F30A nature  1F30D place
1F311 nature  1F321 object  1F322 nature  1F32D food  1F331 nature  1F336 food  1F337 nature
1F33D food  1F33E nature  1F345 food
1F380 activity  1F382 food  1F383 activity  1F385 person  1F386 activity  1F392 object
1F396 activity  1F399 object  1F39F activity  1F3A0 place  1F3A3 activity  1F3A4 object
1F3A8 activity  1F3A9 object  1F3AA activity  1F3B5 object  1F3BD activity  1F3D4 place
1F3F1 symbol  1F3F5 nature  1F3F6 object  1F3F8 activity  1F3FA object  1F3FB symbol
1F400 animal  1F440 body  1F451 object  1F463 body  1F464 person  1F479 face  1F47C person
1F47D face  1F481 person  1F484 object  1F485 body  1F486 person  1F488 object  1F48B symbol
1F48C object  1F48F person  1F490 nature  1F491 person  1F492 place  1F493 symbol
1F4A1 object  1F4A2 symbol  1F4A3 object  1F4A4 symbol  1F4A7 nature  1F4A8 symbol  1F4A9 face
1F4AA body  1F4AB symbol  1F4B0 object  1F4B1 symbol  1F4B3 object  1F4F3 symbol
1F4F7 object  1F500 symbol  1F507 object  1F518 symbol  1F525 nature  1F526 object
1F52F symbol  1F54A animal  1F54B place  1F54E symbol  1F56F object  1F574 person
1F576 object  1F577 animal  1F578 nature  1F579 object  1F57A person  1F57B object
1F590 body  1F597 symbol  1F5A5 object  1F5E3 body  1F5E4 symbol  1F5F3 object  1F5FA place
1F600 face  1F645 person  1F648 face  1F64B person  1F64C body  1F64D person  1F64F body
1F680 place  1F6A9 symbol  1F6AA object  1F6AB symbol  1F6B2 place  1F6B3 symbol
1F6B4 activity  1F6B6 person  1F6B7 symbol  1F6BD object  1F6BE symbol  1F6BF object
1F6C0 person  1F6C1 object  1F6C2 symbol  1F6CB object  1F6CC person  1F6CD object
1F6D0 symbol  1F6D2 object  1F6D5 place  1F6D7 symbol  1F6DD place  1F6DE object
1F6E3 place  1F6F7 activity  1F6F8 place  1F6F9 activity  1F6FA place  1F6FC activity
1F7E0 symbol
1F90C body  1F90D symbol  1F90F body  1F910 face  1F918 body  1F920 face  1F926 person
1F927 face  1F930 person  1F932 body  1F933 person  1F938 activity  1F940 nature
1F941 object  1F942 food  1F945 activity  1F950 food  1F970 face  1F977 person  1F978 face
1F97B object  1F980 animal  1F9AF object  1F9B0 body  1F9B8 person  1F9BA object  1F9BB body
1F9BC object  1F9BE body  1F9C0 food  1F9CC person  1F9D0 face  1F9D1 person  1F9E0 body
1F9E1 symbol  1F9E2 object  1F9E8 activity  1F9EA object
1FA75 symbol  1FA78 object  1FA80 activity  1FA87 object  1FA90 nature  1FA91 object
1FAA8 nature  1FAA9 object  1FAAF symbol  1FAB0 animal  1FAB4 nature  1FAB6 animal
1FAB7 nature  1FABC animal  1FAC0 body  1FAC2 person  1FAC6 animal  1FAD0 food  1FAE0 face
1FAE6 body  1FAE7 nature  1FAE8 face  1FAF0 body
"""

_words = _RUNS.split()
_STARTS = [int(word, 16) for word in _words[::2]]
_CLASSES = [EMOJI_CLASSES.index(word) for word in _words[1::2]]


def emoji_class(code_point: int) -> int:
    """The class, an index of EMOJI_CLASSES, of an emoji's (first) code point."""
    return _CLASSES[max(bisect_right(_STARTS, code_point) - 1, 0)]
