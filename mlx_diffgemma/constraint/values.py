"""The values that a JSON Schema allows, put into a net as they are written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from .alternatives import Alternatives
from .dfa import DFA
from .dialect import Place, canonical
from .facts import NUMBERS, Facts, place_with
from .json_text import Layout
from .keys import KeyTexts
from .net import Limits, Net, determinise
from .strings import is_counted, texts_of

_MOST_LEVELS = 60
_MOST_UNIQUE = 6  # values of a list without repeats: each set of them has a state
_MOST_CONTAINED = 2
# Values of any type are the same in all schemas: (notation, level, depth) -> automaton.
_UNTYPED: dict[tuple[Layout, int, int], DFA] = {}
_LITERALS = {"null": ("null",), "boolean": ("true", "false")}


@dataclass(frozen=True, slots=True)
class Cuts:
    """How much of an unlimited or a long value is held."""

    depth: int  # objects and lists within each other where the schema says nothing
    recursion: int  # times that a reference is followed within itself
    length: int | None = None  # characters that are counted
    items: int | None = None  # items that are counted
    closed: bool = False  # objects have no keys that the schema does not name


class Writer:
    """Puts values into nets, and notes what it cuts."""

    def __init__(
        self,
        reader: Alternatives,
        layout: Layout,
        cuts: Cuts,
        closed: bool,
        limits: Limits,
        strings: dict[Any, DFA],
    ) -> None:
        self._reader, self._layout, self._cuts = reader, layout, cuts
        self._keys = KeyTexts(reader, layout, closed or cuts.closed, limits, strings)
        self._limits = limits
        self.notes: dict[str, None] = {}
        self._strings = strings  # bodies of strings and keys that are made already

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
        key = (self._layout, level if self._layout.indent is not None else 0, depth)
        if key not in _UNTYPED:
            net = Net(self._limits)
            start, end = net.state(), net.state()
            self._put_scalars(net, start, end, Facts(), ())
            for opening, closing in (("[", "]"), ("{", "}")):
                at = net.spell(start, opening)
                if depth:
                    first = self._layout.gap(net, at, level + 1)
                    ahead = first
                    if opening == "{":
                        ahead = self._layout.colon(net, self._any_key(net, first))
                    net.put(ahead, self.untyped(level + 1, depth - 1), item := net.state())
                    after = self._layout.blank(net, item)
                    comma = self._layout.gap(net, net.spell(after, ","), level + 1)
                    net.skip(comma, first)
                    close = after
                    if self._layout.indent is not None:
                        close = self._layout.gap(net, item, level)
                    net.skip(net.spell(close, closing), end)
                net.skip(net.spell(self._layout.blank(net, at), closing), end)
            _UNTYPED[key] = determinise(net, start, end)
        return _UNTYPED[key]

    def _put(
        self, net: Net, at: int, end: int, facts: Facts, places: Sequence[Place], level: int
    ) -> None:
        if facts.enum is not None:
            for value in self._reader.values(facts):
                net.skip(self._literal(net, at, value, level), end)
            return
        if not places:
            net.put(at, self.untyped(level, self._cuts.depth), end)
            if self._cuts.depth < 10:
                self.notes["values of any type"] = None
            return
        self._put_scalars(net, at, end, facts, places)
        if "array" in facts.types:
            self._array(net, at, end, facts, places, level)
        if "object" in facts.types:
            self._object(net, at, end, facts, places, level)

    def _any_key(self, net: Net, at: int) -> int:
        return self._layout.put_key(net, at, self._keys.any_key())

    def _literal(self, net: Net, at: int, value: Any, level: int) -> int:
        """Return the state behind a given value."""
        if isinstance(value, str):
            return self._layout.string(net, at, value)
        if not isinstance(value, Mapping | list) or not value:
            if isinstance(value, Mapping | list):
                opening, closing = ("{", "}") if isinstance(value, Mapping) else ("[", "]")
                return net.spell(self._layout.blank(net, net.spell(at, opening)), closing)
            return net.spell(at, json.dumps(value))
        is_object = isinstance(value, Mapping)
        at = net.spell(at, "{" if is_object else "[")
        parts = self._layout.in_order(value) if is_object else value
        for i, part in enumerate(parts):
            if i:
                at = net.spell(self._layout.blank(net, at), ",")
            at = self._layout.gap(net, at, level + 1)
            if is_object:
                at = self._layout.colon(net, self._layout.key(net, at, part))
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
            net.put(at, self._layout.numbers(bounds), end)
        self._string(net, at, end, facts)
        return None

    def _string(self, net: Net, at: int, end: int, facts: Facts) -> None:
        if "string" not in facts.types:
            return
        facts = self._shortened(facts)
        words = tuple(value for value in facts.excluded if isinstance(value, str))
        key = (facts.min_length, facts.max_length, facts.patterns, facts.formats, words)
        if key not in self._strings:
            texts = texts_of(facts, self._limits)
            self._strings[key] = self._layout.strings(
                texts, self._limits, counted=is_counted(facts)
            )
        net.skip(self._layout.put_string(net, at, self._strings[key]), end)

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
        prefix = max((len(layer.first) for layer in facts.items), default=0)
        low, high = facts.min_items, facts.max_items
        if high is not None and self._cuts.items is not None:
            held = max(self._cuts.items, low, prefix)
            if high > held:
                self.notes[f"lists of up to {high} items have {held} at most"] = None
                high = held
        count = max(prefix + 1, low, 1) if high is None else high
        opened = net.spell(at, "[")
        wanted = facts.contains
        if len(wanted) > _MOST_CONTAINED:
            raise place_with(facts, "contains").refuse(
                "contains", f"more than {_MOST_CONTAINED} in one list are not supported"
            )
        if low == 0 and not wanted:
            net.skip(net.spell(self._layout.blank(net, opened), "]"), end)
        subsets = [s for n in range(len(wanted) + 1) for s in combinations(range(len(wanted)), n)]
        ahead = {(i, frozenset(s)): net.state() for i in range(count) for s in subsets}
        if ahead:
            net.skip(opened, ahead[0, frozenset()])
        for (i, found), state in ahead.items():
            self._limits.check_time()
            begin = self._layout.gap(net, state, level + 1)
            onward = i + 1 if i + 1 < count else i if high is None else None
            for more in subsets:
                if found.intersection(more):
                    continue
                places_here = item_places(facts, i) + [wanted[number] for number in more]
                behind = self._item(net, begin, places_here, level + 1)
                now = found.union(more)
                is_end = i + 1 >= low and len(now) == len(wanted)
                self._close(net, behind, end, "]", level, is_possible=is_end)
                if onward is not None:
                    comma = net.spell(self._layout.blank(net, behind), ",")
                    net.skip(comma, ahead[onward, now])
        return None

    def _item(self, net: Net, at: int, places: Sequence[Place], level: int) -> int:
        """Return the state behind an item, or behind the value of a key."""
        return self.value(net, at, places, level)

    def _close(
        self, net: Net, at: int, end: int, bracket: str, level: int, *, is_possible: bool = True
    ) -> None:
        if is_possible:
            net.skip(net.spell(self._layout.gap(net, at, level), bracket), end)

    def _unique(
        self, net: Net, at: int, end: int, facts: Facts, places: Sequence[Place], level: int
    ) -> None:
        """Put a list without repeats: of known values, each set of them has a state."""
        place = place_with(facts, "uniqueItems")
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
            found |= {canonical(value): value for value in values}
        return list(found.values())

    # Objects

    def _object(
        self, net: Net, at: int, end: int, facts: Facts, places: Sequence[Place], level: int
    ) -> None:
        from_keys = self._keys.declared(facts)
        if not set(facts.required) <= {key for key, _ in from_keys}:
            return  # a required key may not be there
        others = list(self._keys.undeclared(facts, [key for key, _ in from_keys]))
        if self._cuts.closed and self._keys.are_left_out(facts):
            self.notes["objects have only the keys that the schema names"] = None
        needed = [key in facts.required for key, _ in from_keys]
        low, high = facts.min_keys, facts.max_keys
        if low <= sum(needed):
            low = 0
        if high is not None and not others and high >= len(from_keys):
            high = None
        if low and others and low > len(from_keys) + 1:
            raise place_with(facts, "minProperties").refuse(
                "minProperties", "it asks for more keys than the schema names"
            )
        _Object(self, net, end, level, from_keys, others, needed, low, high).put(at)


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
            ahead = layout.colon(net, layout.key(net, begin, key))
            behind = writer._item(net, ahead, places, self._level + 1)
            self._behind(behind, passed + 1, self._counted(count))
            if not self._needed[passed]:
                net.skip(at, self._state(passed + 1, count))
            return
        if self._low and count + 1 < self._low:
            return  # undeclared keys may repeat, so only the first of them counts for sure
        for keys, places in self._others:
            begin = layout.gap(net, at, self._level + 1)
            ahead = layout.colon(net, layout.put_key(net, begin, keys))
            behind = writer._item(net, ahead, places, self._level + 1)
            self._behind(behind, passed, self._counted(count))

    def _behind(self, at: int, passed: int, count: int) -> None:
        """Put what follows a value: a comma, or the end."""
        net, layout = self._net, self._writer._layout
        if not any(self._needed[passed:]) and (not self._low or count >= self._low):
            self._writer._close(net, at, self._end, "}", self._level)
        comma = net.spell(layout.blank(net, at), ",")
        net.skip(comma, self._state(passed, count))


def item_places(facts: Facts, index: int) -> list[Place]:
    """Return what the schemas say about one item of a list."""
    found = []
    for layer in facts.items:
        if index < len(layer.first):
            found.append(layer.first[index])
        elif layer.rest is not None:
            found.append(layer.rest)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
