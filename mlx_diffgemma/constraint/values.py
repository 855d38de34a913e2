"""The values that a JSON Schema allows, put into a net as they are written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from .alternatives import Alternatives
from .build import difference, intersection, is_empty
from .dfa import DFA
from .dialect import Place
from .facts import NUMBERS, Facts
from .json_text import (
    Layout,
    any_string,
    encoded,
    numbers,
    of_length,
    quoted,
    spell_string,
    texts_except,
)
from .net import Limits, Net, determinise
from .regex import search
from .strings import is_counted, texts_of

_MOST_LEVELS = 60
_MOST_PATTERNS = 4  # of keys in one object: each set of them has keys of its own
_MOST_UNIQUE = 6  # values of a list without repeats: each set of them has a state
_LITERALS = {"null": ("null",), "boolean": ("true", "false")}


@dataclass(frozen=True, slots=True)
class Cuts:
    """How much of an unlimited or a long value is held."""

    depth: int  # objects and lists within each other where the schema says nothing
    recursion: int  # times that a reference is followed within itself
    length: int | None = None  # characters that are counted
    items: int | None = None  # items that are counted


class Writer:
    """Puts values into nets, and notes what it cuts."""

    def __init__(
        self, reader: Alternatives, layout: Layout, cuts: Cuts, closed: bool, limits: Limits
    ) -> None:
        self._reader, self._layout, self._cuts = reader, layout, cuts
        self._closed, self._limits = closed, limits
        self.notes: dict[str, None] = {}
        self._untyped: dict[tuple[int, int], DFA] = {}
        self._strings: dict[Any, DFA] = {}

    def value(self, net: Net, at: int, places: Sequence[Place], level: int = 0) -> int:
        """Return the state behind a value that some schemas allow together."""
        if level > _MOST_LEVELS:
            raise places[0].refuse("", f"values are nested more than {_MOST_LEVELS} deep")
        places = [place for place in places if not place.is_trivial]
        end = net.state()
        for facts in self._reader.of(places):
            self._put(net, at, end, facts, places, level)
        return end

    def untyped(self, level: int, depth: int) -> DFA:
        """Return the automaton of any value, objects and lists within each other to a depth."""
        key = (level if self._layout.indent is not None else 0, depth)
        if key not in self._untyped:
            net = Net(self._limits)
            start, end = net.state(), net.state()
            self._put_scalars(net, start, end, Facts(), ())
            for opening, closing in ("[]", "{}"):
                at = net.spell(start, opening)
                if depth:
                    first = self._layout.gap(net, at, level + 1)
                    ahead = first
                    if opening == "{":
                        net.put(first, any_key(), behind := net.state())
                        ahead = self._layout.colon(net, behind)
                    net.put(ahead, self.untyped(level + 1, depth - 1), item := net.state())
                    after = self._layout.blank(net, item)
                    comma = self._layout.gap(net, net.spell(after, ","), level + 1)
                    net.skip(comma, first)
                    close = after
                    if self._layout.indent is not None:
                        close = self._layout.gap(net, item, level)
                    net.skip(net.spell(close, closing), end)
                net.skip(net.spell(self._layout.blank(net, at), closing), end)
            self._untyped[key] = determinise(net, start, end)
        return self._untyped[key]

    def _put(
        self, net: Net, at: int, end: int, facts: Facts, places: Sequence[Place], level: int
    ) -> None:
        if facts.enum is not None:
            for value in self._reader.values(facts):
                net.skip(self._literal(net, at, value, level), end)
            return
        if not places:
            net.put(at, self.untyped(level, self._depth(level)), end)
            if self._cuts.depth < 10:
                self.notes["values of any type"] = None
            return
        self._put_scalars(net, at, end, facts, places)
        if "array" in facts.types:
            self._array(net, at, end, facts, places, level)
        if "object" in facts.types:
            self._object(net, at, end, facts, places, level)

    def _depth(self, level: int) -> int:
        return self._cuts.depth if level == 0 else max(0, self._cuts.depth - 1)

    def _literal(self, net: Net, at: int, value: Any, level: int) -> int:
        """Return the state behind a given value."""
        if isinstance(value, str):
            return spell_string(net, at, value)
        if not isinstance(value, Mapping | list) or not value:
            if isinstance(value, Mapping | list):
                opening, closing = json.dumps(value)
                return net.spell(self._layout.blank(net, net.spell(at, opening)), closing)
            return net.spell(at, json.dumps(value))
        is_object = isinstance(value, Mapping)
        at = net.spell(at, "{" if is_object else "[")
        for i, part in enumerate(value):
            if i:
                at = net.spell(self._layout.blank(net, at), ",")
            at = self._layout.gap(net, at, level + 1)
            if is_object:
                at = self._layout.colon(net, spell_string(net, at, part))
            at = self._literal(net, at, value[part] if is_object else part, level + 1)
        return net.spell(self._layout.gap(net, at, level), "}" if is_object else "]")

    # Scalars

    def _put_scalars(
        self, net: Net, at: int, end: int, facts: Facts, places: Sequence[Place]
    ) -> None:
        for name, words in _LITERALS.items():
            if name in facts.types:
                for word in words:
                    if json.loads(word) not in [v for v in facts.excluded if not _is_number(v)]:
                        net.skip(net.spell(at, word), end)
        if facts.types.intersection(NUMBERS):
            bounds = replace(
                facts.bounds,
                integers="integer" in facts.types,
                fractions="fraction" in facts.types,
            )
            if bounds.multiples and not bounds.integers:
                return self._string(net, at, end, facts)
            net.put(at, numbers(bounds), end)
        self._string(net, at, end, facts)
        return None

    def _string(self, net: Net, at: int, end: int, facts: Facts) -> None:
        if "string" not in facts.types:
            return
        facts = self._shortened(facts)
        key = (facts.min_length, facts.max_length, facts.patterns, facts.formats)
        key = (*key, tuple(v for v in facts.excluded if isinstance(v, str)))
        if key not in self._strings:
            texts = texts_of(facts, self._limits)
            if texts is None:
                self._strings[key] = any_string()
            else:
                body = encoded(texts, self._limits, with_unicode=not is_counted(facts))
                self._strings[key] = quoted(body, self._limits)
        net.put(at, self._strings[key], end)

    def _shortened(self, facts: Facts) -> Facts:
        most, cut = facts.max_length, self._cuts.length
        if cut is None or most is None or most <= max(cut, facts.min_length):
            return facts
        held = max(cut, facts.min_length)
        self.notes[f"strings of up to {most} characters have {held} at most"] = None
        return replace(facts, max_length=held)

    # Lists

    def _array(
        self, net: Net, at: int, end: int, facts: Facts, places: Sequence[Place], level: int
    ) -> None:
        if facts.is_unique and (facts.max_items is None or facts.max_items > 1):
            return self._unique(net, at, end, facts, places, level)
        if facts.contains:
            return self._containing(net, at, end, facts, places, level)
        prefix = max((len(layer.first) for layer in facts.items), default=0)
        low, high = facts.min_items, facts.max_items
        if high is not None and self._cuts.items is not None:
            held = max(self._cuts.items, low, prefix)
            if high > held:
                self.notes[f"lists of up to {high} items have {held} at most"] = None
                high = held
        count = max(prefix + 1, low, 1) if high is None else high
        opened = net.spell(at, "[")
        if low == 0:
            net.skip(net.spell(self._layout.blank(net, opened), "]"), end)
        ahead = [net.state() for _ in range(count)]
        if ahead:
            net.skip(opened, ahead[0])
        for i in range(count):
            self._limits.check_time()
            begin = self._layout.gap(net, ahead[i], level + 1)
            behind = self._item(net, begin, item_places(facts, i), level + 1)
            onward = i + 1 if i + 1 < count else i if high is None else None
            self._close(net, behind, end, "]", level, is_possible=i + 1 >= low)
            if onward is not None:
                comma = net.spell(self._layout.blank(net, behind), ",")
                net.skip(comma, ahead[onward])
        return None

    def _item(self, net: Net, at: int, places: Sequence[Place], level: int) -> int:
        """Return the state behind an item, or behind the value of a key."""
        return self.value(net, at, places, level)

    def _close(
        self, net: Net, at: int, end: int, bracket: str, level: int, *, is_possible: bool = True
    ) -> None:
        if is_possible:
            net.skip(net.spell(self._layout.gap(net, at, level), bracket), end)

    def _containing(
        self, net: Net, at: int, end: int, facts: Facts, places: Sequence[Place], level: int
    ) -> None:
        """Put a list with one item somewhere in it that must be there."""
        is_simple = facts.min_items <= 1 and facts.max_items is None and len(facts.contains) == 1
        if not is_simple or any(layer.first for layer in facts.items):
            raise _place_with(facts, "contains").refuse(
                "contains", "beside other limits of a list it is not supported"
            )
        anything = item_places(facts, 0)
        before, wanted, after = net.state(), net.state(), net.state()
        net.skip(net.spell(at, "["), before)
        begin = self._layout.gap(net, before, level + 1)
        item = self._item(net, begin, anything, level + 1)
        net.skip(net.spell(self._layout.blank(net, item), ","), before)
        net.skip(self._item(net, begin, [*anything, *facts.contains], level + 1), wanted)
        begin = self._layout.gap(
            net, net.spell(self._layout.blank(net, wanted), ","), level + 1
        )
        net.skip(self._item(net, begin, anything, level + 1), after)
        net.skip(after, wanted)
        self._close(net, wanted, end, "]", level)

    def _unique(
        self, net: Net, at: int, end: int, facts: Facts, places: Sequence[Place], level: int
    ) -> None:
        """Put a list without repeats: of known values, each set of them has a state."""
        place = _place_with(facts, "uniqueItems")
        if facts.contains or any(layer.first for layer in facts.items):
            raise place.refuse("uniqueItems", "beside prefixItems or contains it is not supported")
        values = self._finite(self._reader.of(item_places(facts, 0)))
        if values is None:
            if facts.min_items > 1:
                raise place.refuse("uniqueItems", "it needs items of an enum")
            raise place.refuse("uniqueItems", "items that are no enum cannot be told apart")
        is_ordered = len(values) > _MOST_UNIQUE
        if is_ordered:
            self.notes["lists without repeats keep the order of their enum"] = None
        high = len(values) if facts.max_items is None else min(facts.max_items, len(values))
        opened = net.spell(at, "[")
        if facts.min_items == 0:
            net.skip(net.spell(self._layout.blank(net, opened), "]"), end)
        states: dict[Any, int] = {}

        def state(used: Any) -> int:
            if used not in states:
                states[used] = net.state()
                last, count = used if is_ordered else (0, len(used))
                free = range(last, len(values)) if is_ordered else set(range(len(values))) - used
                begin = self._layout.gap(net, states[used], level + 1)
                if count < high:
                    for i in free:
                        behind = self._literal(net, begin, values[i], level + 1)
                        after = (i + 1, count + 1) if is_ordered else used | {i}
                        self._close(
                            net, behind, end, "]", level, is_possible=count + 1 >= facts.min_items
                        )
                        comma = net.spell(self._layout.blank(net, behind), ",")
                        net.skip(comma, state(after))
            return states[used]

        net.skip(opened, state((0, 0) if is_ordered else frozenset()))

    def _finite(self, alternatives: list[Facts]) -> list[Any] | None:
        """Return the values of items, or None if there are others than those of an enum."""
        found: dict[str, Any] = {}
        for facts in alternatives:
            if facts.enum is not None:
                values = self._reader.values(facts)
            elif facts.types <= {"null", "boolean"} and not facts.excluded:
                values = [json.loads(w) for t in sorted(facts.types) for w in _LITERALS[t]]
            else:
                return None
            found |= {json.dumps(value, sort_keys=True): value for value in values}
        return list(found.values())

    # Objects

    def _object(
        self, net: Net, at: int, end: int, facts: Facts, places: Sequence[Place], level: int
    ) -> None:
        from_keys = self._declared(facts)
        if not set(facts.required) <= {key for key, _ in from_keys}:
            return  # a required key may not be there
        others = list(self._undeclared(facts, [key for key, _ in from_keys]))
        needed = [key in facts.required for key, _ in from_keys]
        low, high = facts.min_keys, facts.max_keys
        if low <= sum(needed):
            low = 0
        if high is not None and not others and high >= len(from_keys):
            high = None
        if low and others and low > len(from_keys) + 1:
            raise _place_with(facts, "minProperties").refuse(
                "minProperties", "it asks for more keys than the schema names"
            )
        _Object(self, net, end, level, from_keys, others, needed, low, high).put(at)

    def _declared(self, facts: Facts) -> list[tuple[str, list[Place]]]:
        """Return the keys that a schema names, in its order, with what their values are."""
        names = dict.fromkeys(key for layer in facts.keys for key in layer.properties)
        names |= dict.fromkeys(facts.required)
        found = []
        for key in names:
            if key in facts.absent or not self._is_name(facts, key):
                continue
            found.append((key, self.key_places(facts, key)))
        return found

    def key_places(self, facts: Facts, key: str) -> list[Place]:
        matching = [
            pattern for layer in facts.keys for pattern in layer.patterns if re.search(pattern, key)
        ]
        return [place for layer in facts.keys for place in layer.of(key, matching)]

    def _is_name(self, facts: Facts, key: str) -> bool:
        return all(self._reader.document.is_valid(key, place) for place in facts.names)

    def _undeclared(
        self, facts: Facts, declared: list[str]
    ) -> Iterator[tuple[DFA, list[Place]]]:
        """Return the keys that a schema does not name, as written in an object, in groups whose
        values are the same."""
        patterns = list(dict.fromkeys(p for layer in facts.keys for p in layer.patterns))
        if len(patterns) > _MOST_PATTERNS:
            raise _place_with(facts, "patternProperties").refuse(
                "patternProperties", f"more than {_MOST_PATTERNS} patterns are not supported"
            )
        open_rest = all(layer.rest is None for layer in facts.keys)
        names = {*declared, *facts.absent, *(k for layer in facts.keys for k in layer.properties)}
        for size in range(len(patterns) + 1):
            for chosen in combinations(patterns, size):
                if not chosen and self._closed and open_rest and declared:
                    continue
                places = [
                    place
                    for layer in facts.keys
                    for place in layer.of("", chosen)
                    if not place.is_trivial
                ] if facts.keys else []
                if any(p.schema is False and not p.is_negated for p in places):
                    continue
                keys = self._key_texts(facts, names, patterns, chosen)
                if not is_empty(keys):
                    yield quoted(keys, self._limits), places

    def _key_texts(
        self, facts: Facts, names: set[str], patterns: list[str], chosen: tuple[str, ...]
    ) -> DFA:
        """Return the texts of undeclared keys that some patterns match and no other does."""
        key = (frozenset(names), tuple(patterns), chosen, facts.names)
        if key not in self._strings:
            texts = texts_except(tuple(sorted(names)), self._limits)
            for pattern in patterns:
                if pattern in chosen:
                    texts = intersection(
                        texts, search(pattern, "narrow", self._limits), self._limits
                    )
                else:
                    texts = difference(texts, search(pattern, "wide", self._limits), self._limits)
            for place in facts.names:
                texts = intersection(texts, self._names(place), self._limits)
            self._strings[key] = encoded(texts, self._limits, with_unicode=False)
        return self._strings[key]

    def _names(self, place: Place) -> DFA:
        """Return the texts that a schema of keys allows."""
        net = Net(self._limits)
        start, end = net.state(), net.state()
        for facts in self._reader.of([place]):
            if "string" not in facts.types:
                continue
            if facts.enum is not None:
                for value in self._reader.values(facts):
                    if isinstance(value, str):
                        net.skip(net.spell(start, value), end)
                continue
            texts = texts_of(self._shortened(facts), self._limits)
            net.put(start, of_length(0, None) if texts is None else texts, end)
        return determinise(net, start, end)


class _Object:
    """One object: declared keys in their order, then others. With limits of their number, each
    place is there once per count."""

    def __init__(
        self,
        writer: Writer,
        net: Net,
        end: int,
        level: int,
        keys: list[tuple[str, list[Place]]],
        others: list[tuple[DFA, list[Place]]],
        needed: list[bool],
        low: int,
        high: int | None,
    ) -> None:
        self._writer, self._net, self._end, self._level = writer, net, end, level
        self._keys, self._others, self._needed = keys, others, needed
        self._low, self._high = low, high
        self._ahead: dict[tuple[int, int], int] = {}  # (keys passed, count) -> state before a key
        self._waiting: list[tuple[int, int]] = []

    def put(self, at: int) -> None:
        net, layout = self._net, self._writer._layout
        opened = net.spell(at, "{")
        if not any(self._needed) and not self._low:
            net.skip(net.spell(layout.blank(net, opened), "}"), self._end)
        net.skip(opened, self._state(0, 0))
        while self._waiting:
            self._writer._limits.check_time()
            self._go_on(*self._waiting.pop())

    def _state(self, passed: int, count: int) -> int:
        if (passed, count) not in self._ahead:
            self._ahead[passed, count] = self._net.state()
            self._waiting.append((passed, count))
        return self._ahead[passed, count]

    def _counted(self, count: int) -> int:
        if self._high is None:
            return min(count + 1, self._low)
        return count + 1

    def _go_on(self, passed: int, count: int) -> None:
        """Put what may follow the space ahead of a key. The states ahead of the keys behind it are
        reached by a skip: their space is the same."""
        net, layout, writer = self._net, self._writer._layout, self._writer
        if self._high is not None and count >= self._high:
            return
        at = self._ahead[passed, count]
        if passed < len(self._keys):
            key, places = self._keys[passed]
            begin = layout.gap(net, at, self._level + 1)
            ahead = layout.colon(net, spell_string(net, begin, key))
            behind = writer._item(net, ahead, places, self._level + 1)
            self._behind(behind, passed + 1, self._counted(count))
            if not self._needed[passed]:
                net.skip(at, self._state(passed + 1, count))
            return
        if self._low and count + 1 < self._low:
            return  # undeclared keys may repeat, so only the first of them counts for sure
        for keys, places in self._others:
            begin = layout.gap(net, at, self._level + 1)
            net.put(begin, keys, name := net.state())
            behind = writer._item(net, layout.colon(net, name), places, self._level + 1)
            self._behind(behind, passed, self._counted(count))

    def _behind(self, at: int, passed: int, count: int) -> None:
        """Put what follows a value: a comma, or the end."""
        net, layout = self._net, self._writer._layout
        if not any(self._needed[passed:]) and (not self._low or count >= self._low):
            self._writer._close(net, at, self._end, "}", self._level)
        comma = net.spell(layout.blank(net, at), ",")
        net.skip(comma, self._state(passed, count))


def any_key() -> DFA:
    return quoted(encoded(of_length(0, None), with_unicode=False))


def item_places(facts: Facts, index: int) -> list[Place]:
    """Return what the schemas say about one item of a list."""
    found = []
    for layer in facts.items:
        if index < len(layer.first):
            found.append(layer.first[index])
        elif layer.rest is not None:
            found.append(layer.rest)
    return found


def _place_with(facts: Facts, keyword: str) -> Place:
    """Return the schema that has a keyword."""
    for place in facts.sources:
        if isinstance(place.schema, Mapping) and keyword in place.schema:
            return place
    return facts.sources[0] if facts.sources else Place({}, "")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
