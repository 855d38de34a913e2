"""How JSON is spelled: strings with their escapes, numbers within bounds, and white space."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache

import numpy as np

from .build import anything, intersection, union
from .dfa import DFA, NOWHERE
from .minimise import finished
from .net import Limits, Net, determinise
from .ranges import LAST, Ranges, of_characters, single
from .regex import regex

SHORT_ESCAPES = {
    '"': '"',
    "\\": "\\",
    "/": "/",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
}
_SHORT = {character: letter for letter, character in SHORT_ESCAPES.items()}
_BLANK: Ranges = of_characters(" \t\n\r")
# Strings over more states than this have no \uXXXX: it needs 13 states for one.
_MOST_STATES_WITH_UNICODE, _MOST_RANGES = 12, 40
# Floats keep 15 digits, so a number with no more of them is on the same side of a bound as its
# float.
_DIGITS = 15
_MOST_MULTIPLE = 1_000


def spell_string(net: Net, at: int, text: str) -> int:
    r"""Return the state behind a string, in each of its spellings. Only what JSON's short spellings
    in ASCII cannot hold may be \uXXXX."""
    at = net.spell(at, '"')
    for character in text:
        end = net.state()
        code = ord(character)
        if code >= 0x20 and character not in '"\\':
            net.move(at, single(code), end)
        if character in _SHORT:
            net.skip(net.spell(at, "\\" + _SHORT[character]), end)
        elif code < 0x20 or code > 0x7E:
            units = character.encode("utf-16-be").hex()
            behind = at
            for i in range(0, len(units), 4):
                behind = net.spell(behind, "\\u")
                for digit in units[i : i + 4]:
                    further = net.state()
                    net.move(behind, of_characters(digit + digit.upper()), further)
                    behind = further
            net.skip(behind, end)
        at = end
    return net.spell(at, '"')


@lru_cache(16)
def any_string() -> DFA:
    """Return the automaton of the body of every string."""
    return encoded(anything())


def put_quoted(net: Net, at: int, body: DFA) -> int:
    """Return the state behind a body in quotes."""
    behind = net.state()
    net.put(net.spell(at, '"'), body, behind)
    return net.spell(behind, '"')


def encoded(texts: DFA, limits: Limits | None = None, *, with_unicode: bool = True) -> DFA:
    r"""Return the automaton of the spellings of texts within a JSON string: characters, short
    escapes, and \uXXXX where that is wanted and needs few states."""
    is_large = len(texts) > _MOST_STATES_WITH_UNICODE or len(texts.bounds) > _MOST_RANGES
    if is_large or not with_unicode:
        return _with_short_escapes(texts)
    return _with_unicode_escapes(texts, limits)


def _with_short_escapes(texts: DFA) -> DFA:
    bounds = np.union1d(
        texts.bounds,
        [0, 0x20, *(ord(c) + i for c in (*SHORT_ESCAPES, *_SHORT) for i in (0, 1))],
    )
    columns = np.searchsorted(texts.bounds, bounds, side="right") - 1
    states = len(texts)
    table = np.full((2 * states, len(bounds)), NOWHERE, np.int32)  # the second half: behind a \
    table[:states] = texts.table[:, columns]
    table[:states, bounds < 0x20] = NOWHERE
    table[:states, bounds == ord('"')] = NOWHERE
    table[:states, bounds == ord("\\")] = np.arange(states, 2 * states)[:, None]
    for letter, character in SHORT_ESCAPES.items():
        column = np.searchsorted(texts.bounds, ord(character), side="right") - 1
        table[states:, bounds == ord(letter)] = texts.table[:, [column]]
    accepting = np.append(texts.accepting, np.zeros(states, bool))
    return finished(table, accepting, bounds, np.arange(len(bounds)))


def _with_unicode_escapes(texts: DFA, limits: Limits | None) -> DFA:
    net = Net(limits)
    states = [net.state() for _ in range(len(texts))]
    borders = [*texts.bounds.tolist(), 0x110000]
    for state, row in zip(states, texts.table.tolist(), strict=True):
        slash = net.spell(state, "\\")
        u = net.spell(slash, "u")
        for i, target in enumerate(row):
            low, high = borders[i], min(borders[i + 1] - 1, 0x10FFFF)
            if target == NOWHERE or low > high:
                continue
            raw = [(max(low, 0x20), 0x21), (max(low, 0x23), 0x5B), (max(low, 0x5D), high)]
            net.move(state, _clipped(raw, high), states[target])
            for letter, character in SHORT_ESCAPES.items():
                if low <= ord(character) <= high:
                    net.move(slash, single(ord(letter)), states[target])
            _put_units(net, u, low, high, states[target])
    start, end = net.state(), net.state()
    net.skip(start, states[0])
    for state in np.flatnonzero(texts.accepting).tolist():
        net.skip(states[state], end)
    return determinise(net, start, end)


def _clipped(pairs: list[tuple[int, int]], high: int) -> Ranges:
    return tuple((a, min(b, high)) for a, b in pairs if a <= min(b, high))


def _put_units(net: Net, u: int, low: int, high: int, target: int) -> None:
    r"""Let the digits behind \u, and for high characters a second \uXXXX, lead on."""
    for digits in _digit_ranges(low, min(high, 0xFFFF), 4):
        net.skip(_put_digits(net, u, digits), target)
    low, high = max(low, 0x10000) - 0x10000, high - 0x10000
    while low <= high:
        first, last = low >> 10, high >> 10
        if low & 0x3FF == 0 and high & 0x3FF != 0x3FF and first < last:
            last -= 1  # whole blocks first
        if low & 0x3FF or first == last:
            end = min(high, low | 0x3FF)
            lead, trail = (first, first), (low & 0x3FF, end & 0x3FF)
        else:
            end = (last << 10) | 0x3FF
            lead, trail = (first, last), (0, 0x3FF)
        for heads in _digit_ranges(0xD800 + lead[0], 0xD800 + lead[1], 4):
            second = net.spell(_put_digits(net, u, heads), "\\u")
            for tails in _digit_ranges(0xDC00 + trail[0], 0xDC00 + trail[1], 4):
                net.skip(_put_digits(net, second, tails), target)
        low = end + 1


def _put_digits(net: Net, at: int, digits: tuple[tuple[int, int], ...]) -> int:
    for low, high in digits:
        behind = net.state()
        both = "".join(f"{digit:x}{digit:X}" for digit in range(low, high + 1))
        net.move(at, of_characters(both), behind)
        at = behind
    return at


def _digit_ranges(low: int, high: int, digits: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Split a range of numbers into ranges of each hexadecimal digit."""
    if low > high:
        return
    if digits == 0:
        yield ()
        return
    size = 16 ** (digits - 1)
    first, last = low // size, high // size
    if low % size == 0 and high % size == size - 1:
        yield ((first, last), *([(0, 15)] * (digits - 1)))
    elif first == last:
        for rest in _digit_ranges(low % size, high % size, digits - 1):
            yield ((first, first), *rest)
    else:
        for a, b in (
            (low, (first + 1) * size - 1),
            ((first + 1) * size, last * size - 1),
            (last * size, high),
        ):
            yield from _digit_ranges(a, b, digits)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a number may be. A bound that is open does not belong itself."""

    low: Decimal | None = None
    low_open: bool = False
    high: Decimal | None = None
    high_open: bool = False
    multiples: tuple[int, ...] = ()
    integers: bool = True
    fractions: bool = True  # numbers with a point or an exponent

    @property
    def is_empty(self) -> bool:
        """Whether no number is within them."""
        if self.low is None or self.high is None:
            return False
        is_open = self.low_open or self.high_open
        return self.low > self.high or (self.low == self.high and is_open)


@lru_cache(256)
def numbers(bounds: Bounds) -> DFA:
    """Return the automaton of the numbers within bounds. Bounded ones have no exponent, those with
    an open bound at most 15 digits behind the point."""
    if not bounds.integers:
        return _only_fractions(bounds)
    fractions = bounds.fractions and not bounds.multiples
    parts = []
    free = bounds.high is None and fractions
    if free and bounds.low is None:
        return regex(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
    if free and bounds.low == 0 and not bounds.low_open:
        return regex(r"(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
    zero = Decimal(0)
    if bounds.high is None or bounds.high >= zero:
        low = None if bounds.low is None or bounds.low < zero else bounds.low
        parts.append(_magnitudes(low, bounds.low_open, bounds.high, bounds.high_open, fractions))
    if bounds.low is None or bounds.low < zero:
        least, is_open = (zero, True)
        if bounds.high is not None and bounds.high < zero:
            least, is_open = -bounds.high, bounds.high_open
        most = None if bounds.low is None else -bounds.low
        negative = _magnitudes(least, is_open, most, bounds.low_open, fractions)
        parts.append(_behind_minus(negative))
    result = union(parts)
    for multiple in bounds.multiples:
        result = intersection(result, _multiples_of(multiple))
    return result


def _only_fractions(bounds: Bounds) -> DFA:
    """Return the numbers that are no integers even when they are read as floats."""
    some = regex(r"-?(0|[1-9][0-9]{0,5})\.[0-9]{0,8}[1-9]")
    every = Bounds(bounds.low, bounds.low_open, bounds.high, bounds.high_open)
    return intersection(some, numbers(every))


def _behind_minus(positive: DFA) -> DFA:
    net = Net()
    start, end = net.state(), net.state()
    net.put(net.spell(start, "-"), positive, end)
    return determinise(net, start, end)


def _magnitudes(
    low: Decimal | None, low_open: bool, high: Decimal | None, high_open: bool, fractions: bool
) -> DFA:
    """Return the numbers without a sign between two bounds."""
    point = r"(\.[0-9]+)?" if fractions else ""
    result = regex(r"(0|[1-9][0-9]*)" + point)
    if low is not None and (low > 0 or low_open):
        result = intersection(result, regex(_at_least(low, low_open, point)))
    if high is not None:
        result = intersection(result, regex(_at_most(high, high_open, point)))
    open_bounds = [b for b, is_open in ((low, low_open), (high, high_open)) if is_open and b]
    if fractions and (low_open or high_open):
        whole = max((len(str(int(bound))) for bound in open_bounds), default=0)
        places = max(1, _DIGITS - whole)
        result = intersection(result, regex(rf"[0-9]+(\.[0-9]{{1,{places}}})?"))
    return result


def _digits(number: Decimal) -> tuple[str, str]:
    whole, _, fraction = f"{number:f}".partition(".")
    return whole, fraction.rstrip("0")


def _at_least(low: Decimal, is_open: bool, point: str) -> str:
    whole, fraction = _digits(low)
    ways = [rf"[1-9][0-9]{{{len(whole)},}}{point}"]
    for i, digit in enumerate(whole):
        if digit != "9":
            rest = len(whole) - 1 - i
            ways.append(rf"{whole[:i]}[{int(digit) + 1}-9][0-9]{{{rest}}}{point}")
    if not fraction and not is_open:
        ways.append(whole + point)
    elif point:
        for i, digit in enumerate(fraction):
            if digit != "9":
                ways.append(rf"{whole}\.{fraction[:i]}[{int(digit) + 1}-9][0-9]*")
        ways.append(rf"{whole}\.{fraction}[0-9]*" + ("[1-9][0-9]*" if is_open else ""))
    return "|".join(ways)


def _at_most(high: Decimal, is_open: bool, point: str) -> str:
    whole, fraction = _digits(high)
    ways = []
    if len(whole) > 1:
        ways.append(rf"(0|[1-9][0-9]{{0,{len(whole) - 2}}}){point}")
    for i, digit in enumerate(whole):
        least = 1 if i == 0 and len(whole) > 1 else 0
        if int(digit) > least:
            rest = len(whole) - 1 - i
            ways.append(rf"{whole[:i]}[{least}-{int(digit) - 1}][0-9]{{{rest}}}{point}")
    if fraction or not is_open:
        ways.append(whole)
    if point and fraction:
        for i, digit in enumerate(fraction):
            if digit != "0":
                ways.append(rf"{whole}\.{fraction[:i]}[0-{int(digit) - 1}][0-9]*")
            if i:
                ways.append(rf"{whole}\.{fraction[:i]}")
    if point and not is_open:
        ways.append(rf"{whole}\.{fraction}0*" if fraction else rf"{whole}\.0+")
    return "|".join(ways) or "[^\\d\\D]"


def is_countable_multiple(multiple: int) -> bool:
    return 1 <= multiple <= _MOST_MULTIPLE


def _multiples_of(multiple: int) -> DFA:
    """Return the integers without rest, counted digit by digit."""
    table = np.full((multiple + 1, 15), NOWHERE, np.int32)
    remainders = np.append(0, np.arange(multiple))  # of nothing yet, then of each state
    table[:, 4:14] = 1 + (remainders[:, None] * 10 + np.arange(10)) % multiple
    table[0, 1] = 0  # a minus; the grammar of numbers has one at most
    bounds = np.array([0, *b"-./", *range(ord("0"), ord("9") + 2)])
    accepting = np.arange(multiple + 1) == 1
    return finished(table, accepting, bounds, np.arange(len(bounds)))


def texts_except(words: Iterable[str]) -> DFA:
    """Return the automaton of every text but some: a trie, and a state for what has left it."""
    nodes: list[dict[str, int]] = [{}]
    ends = set()
    for word in words:
        at = 0
        for character in word:
            at = nodes[at].setdefault(character, len(nodes))
            if at == len(nodes):
                nodes.append({})
        ends.add(at)
    letters = sorted({ord(letter) for node in nodes for letter in node})
    bounds = np.unique([0, 0xD800, 0xE000, LAST + 1, *letters, *(code + 1 for code in letters)])
    table = np.full((len(nodes) + 1, len(bounds)), len(nodes), np.int32)
    for state, node in enumerate(nodes):
        for letter, target in node.items():
            table[state, np.searchsorted(bounds, ord(letter))] = target
    table[:, (bounds == 0xD800) | (bounds > LAST)] = NOWHERE
    accepting = np.array([state not in ends for state in range(len(nodes) + 1)])
    return finished(table, accepting, bounds, np.arange(len(bounds)))


@lru_cache(64)
def of_length(low: int, high: int | None) -> DFA:
    """Return the automaton of texts of `low` to `high` characters."""
    last = low if high is None else high
    table = np.full((last + 1, 4), NOWHERE, np.int32)
    table[:-1, [0, 2]] = np.arange(1, last + 1)[:, None]
    if high is None:
        table[-1, [0, 2]] = last
    bounds = np.array([0, 0xD800, 0xE000, LAST + 1], np.int32)
    return DFA(bounds, table, np.arange(last + 1) >= low)


@dataclass(frozen=True, slots=True)
class Layout:
    """How JSON is written: its strings and keys, and the white space between its parts: any, none,
    or lines indented by some spaces."""

    indent: int | None = None
    is_any: bool = True

    def gap(self, net: Net, at: int, level: int) -> int:
        """Return the state behind the space at the border of an object or list, or behind a comma
        in it; `level` counts what its lines lie in."""
        if self.indent is not None:
            return net.spell(at, "\n" + " " * (self.indent * level))
        return self.blank(net, at)

    def blank(self, net: Net, at: int) -> int:
        """Return the state behind space where lines do not break."""
        if not self.is_any:
            return at
        loop = net.state()
        net.skip(at, loop)
        net.move(loop, _BLANK, loop)
        return loop

    def colon(self, net: Net, at: int) -> int:
        """Return the state behind the colon after a key."""
        at = net.spell(self.blank(net, at), ":" if self.indent is None else ": ")
        return self.blank(net, at)

    def in_order(self, keys: Iterable[str]) -> list[str]:
        """Return the keys that a schema names, as they are written."""
        return list(keys)

    def key(self, net: Net, at: int, text: str) -> int:
        """Return the state behind a given key."""
        return spell_string(net, at, text)

    def string(self, net: Net, at: int, text: str) -> int:
        """Return the state behind a given string."""
        return spell_string(net, at, text)

    def put_key(self, net: Net, at: int, body: DFA) -> int:
        """Return the state behind a key of which `keys` has made the body."""
        return put_quoted(net, at, body)

    def put_string(self, net: Net, at: int, body: DFA) -> int:
        """Return the state behind a string of which `strings` has made the body."""
        return put_quoted(net, at, body)

    def keys(self, texts: DFA, limits: Limits) -> DFA:
        r"""Return the automaton of keys between their quotes. They have no \uXXXX, in which a key
        that is named could come again."""
        return encoded(texts, limits, with_unicode=False)

    def strings(self, texts: DFA | None, limits: Limits, *, counted: bool) -> DFA:
        """Return the automaton of strings between their quotes; of any string for None."""
        return any_string() if texts is None else encoded(texts, limits, with_unicode=not counted)

    def numbers(self, bounds: Bounds) -> DFA:
        return numbers(bounds)
