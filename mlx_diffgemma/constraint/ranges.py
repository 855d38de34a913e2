"""Sets of symbols as sorted, disjoint, inclusive ranges."""

from __future__ import annotations

from collections.abc import Iterable

Ranges = tuple[tuple[int, int], ...]

LAST = 0x10FFFF
# Every character of a text. Surrogates are code points and no characters.
SCALARS: Ranges = ((0, 0xD7FF), (0xE000, LAST))


def single(symbol: int) -> Ranges:
    return ((symbol, symbol),)


def of_characters(text: str) -> Ranges:
    """Return the set of the characters of a text."""
    return union((ord(character), ord(character)) for character in text)


def union(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Return sorted and joined ranges."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if joined and low <= joined[-1][1] + 1:
            if high > joined[-1][1]:
                joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return tuple(joined)


def common(one: Ranges, other: Ranges) -> Ranges:
    """Return the symbols that both sets hold."""
    found: list[tuple[int, int]] = []
    i = j = 0
    while i < len(one) and j < len(other):
        low, high = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if low <= high:
            found.append((low, high))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return tuple(found)


def without(one: Ranges, other: Ranges) -> Ranges:
    """Return the symbols of the first set that the other does not hold."""
    gaps: list[tuple[int, int]] = []
    at = 0
    for low, high in other:
        if low > at:
            gaps.append((at, low - 1))
        at = high + 1
    gaps.append((at, 1 << 30))
    return common(one, tuple(gaps))


def characters_except(other: Ranges) -> Ranges:
    """Return every character that a set does not hold."""
    return without(SCALARS, other)


def holds(ranges: Ranges, symbol: int) -> bool:
    return any(low <= symbol <= high for low, high in ranges)
