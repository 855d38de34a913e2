"""Sets of characters that expressions name: classes, general categories, letters of any case.

Two readings of a class: "narrow", what every dialect of expressions agrees on, and "wide", what any
of them allows. For `unicode` and `ascii` both are Python's.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from functools import cache
from itertools import groupby
from typing import Literal

from .ranges import LAST, SCALARS, Ranges, common, of_characters, union, without

Reading = Literal["unicode", "ascii", "narrow", "wide"]

_ASCII = {
    "d": of_characters("0123456789"),
    "w": union([(48, 57), (65, 90), (95, 95), (97, 122)]),
    "s": of_characters(" \t\n\r\f\v"),
}
# ECMA 262 counts these as white space; Python's \s has most of them and some control characters.
_ECMA_SPACE = union([(0x2028, 0x2029), (0xA0, 0xA0), (0xFEFF, 0xFEFF)])


@cache
def shorthand(letter: str, reading: Reading) -> Ranges:
    r"""Return the set of \d, \w, \s, or of the capital letter: its complement."""
    if letter.isupper():
        opposite: dict[Reading, Reading] = {"narrow": "wide", "wide": "narrow"}
        return without(SCALARS, shorthand(letter.lower(), opposite.get(reading, reading)))
    if reading in ("ascii", "narrow"):
        return _ASCII[letter]
    if letter == "d":
        return _categories()["Nd"]
    if letter == "w":
        return _where(lambda character: character.isalnum() or character == "_")
    spaces = _where(str.isspace)
    return spaces if reading == "unicode" else union([*spaces, *_ECMA_SPACE, *_categories()["Zs"]])


def dot(reading: Reading) -> Ranges:
    """Return every character but line ends."""
    return without(SCALARS, of_characters("\n\r\u2028\u2029" if reading == "narrow" else "\n"))


@cache
def category(name: str) -> Ranges | None:
    """Return a general category, such as Lu or L; None if there is no such category."""
    found = union(
        span for each, spans in _categories().items() if each[0] == name for span in spans
    )
    return _categories().get(name) or found or None


# Every other plane is unassigned or for private use; reading them all takes half a second.
_PLANES_READ = ((0, 0x3FFFF), (0xE0000, 0xE0FFF))
_PLANES_KNOWN: dict[str, list[tuple[int, int]]] = {
    "Cn": [(0x40000, 0xDFFFF), (0xE1000, 0xEFFFF), (0xFFFFE, 0xFFFFF), (0x10FFFE, LAST)],
    "Co": [(0xF0000, 0xFFFFD), (0x100000, 0x10FFFD)],
}


@cache
def _categories() -> dict[str, Ranges]:
    spans = {name: list(known) for name, known in _PLANES_KNOWN.items()}
    for low, high in _PLANES_READ:
        codes = range(low, high + 1)
        for name, run in groupby(codes, lambda code: unicodedata.category(chr(code))):
            members = list(run)
            spans.setdefault(name, []).append((members[0], members[-1]))
    return {name: common(union(found), SCALARS) for name, found in spans.items()}


def _where(test: Callable[[str], bool]) -> Ranges:
    """Return the characters for which a test of letters, digits or spaces is true."""
    found = ((c, c) for low, high in _PLANES_READ for c in range(low, high + 1) if test(chr(c)))
    return common(union(found), SCALARS)


def any_case(symbols: Ranges, *, ascii_only: bool) -> Ranges:
    """Return a set together with the same letters in other cases, as Python's `re.IGNORECASE`."""
    more = list(symbols)
    for family in _ascii_families() if ascii_only else _families():
        if any(low <= code <= high for low, high in symbols for code in family):
            more += ((code, code) for code in family)
    return union(more)


@cache
def _families() -> tuple[tuple[int, ...], ...]:
    """Return the characters that differ in case only."""
    families: dict[str, list[int]] = {}
    for code in range(0x20000):
        character = chr(code)
        lower = character.lower()
        if lower != character or character.upper() != character:
            lower = lower if len(lower) == 1 else lower[0]
            families.setdefault(lower.upper(), []).append(code)
    return tuple(tuple(codes) for codes in families.values() if len(codes) > 1)


@cache
def _ascii_families() -> tuple[tuple[int, ...], ...]:
    return tuple((code, code + 32) for code in range(65, 91))
