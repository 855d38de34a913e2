"""The keys of the objects that facts allow: those that a schema names, and all others."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

from .alternatives import Alternatives
from .build import difference, intersection, is_empty
from .dfa import DFA
from .dialect import Place
from .facts import Facts, place_with
from .json_text import Layout, of_length, texts_except
from .net import Limits, Net, determinise
from .regex import search
from .search import is_found
from .strings import texts_of

_MOST_PATTERNS = 4  # of keys in one object: each set of them has keys of its own


class KeyTexts:
    """Reads the keys of objects."""

    def __init__(
        self,
        reader: Alternatives,
        layout: Layout,
        closed: bool,
        limits: Limits,
        known: dict[Any, DFA],
    ) -> None:
        self._reader, self._layout = reader, layout
        self._closed, self._limits = closed, limits
        self._strings = known  # bodies of strings and keys that are made already

    def are_left_out(self, facts: Facts) -> bool:
        """Return whether keys that no schema speaks of are left out."""
        return self._closed and bool(facts.keys) and all(x.rest is None for x in facts.keys)

    def any_key(self) -> DFA:
        """Return the automaton of every key, without its quotes."""
        if "any key" not in self._strings:
            self._strings["any key"] = self._layout.keys(of_length(0, None), self._limits)
        return self._strings["any key"]

    def declared(self, facts: Facts) -> list[tuple[str, list[Place]]]:
        """Return the keys that a schema names, in its order, with what their values are."""
        names = dict.fromkeys(key for layer in facts.keys for key in layer.properties)
        names |= dict.fromkeys(facts.required)
        found = []
        for key in self._layout.in_order(names):
            if key in facts.absent or not self._is_name(facts, key):
                continue
            found.append((key, self._places(facts, key)))
        return found

    def _places(self, facts: Facts, key: str) -> list[Place]:
        matching = [
            pattern for layer in facts.keys for pattern in layer.patterns if is_found(pattern, key)
        ]
        return [place for layer in facts.keys for place in layer.of(key, matching)]

    def _is_name(self, facts: Facts, key: str) -> bool:
        return all(self._reader.document.is_valid(key, place) for place in facts.names)

    def undeclared(self, facts: Facts, declared: list[str]) -> Iterator[tuple[DFA, list[Place]]]:
        """Return the keys that a schema does not name, as written in an object, in groups whose
        values are the same."""
        patterns = list(dict.fromkeys(p for layer in facts.keys for p in layer.patterns))
        if len(patterns) > _MOST_PATTERNS:
            raise place_with(facts, "patternProperties").refuse(
                "patternProperties", f"more than {_MOST_PATTERNS} patterns are not supported"
            )
        names = {*declared, *facts.absent, *(k for layer in facts.keys for k in layer.properties)}
        for size in range(len(patterns) + 1):
            for chosen in combinations(patterns, size):
                if not chosen and declared and self.are_left_out(facts):
                    continue
                places = [place for layer in facts.keys for place in layer.of(None, chosen)]
                if any(p.schema is False and not p.is_negated for p in places):
                    continue
                keys = self._key_texts(facts, names, patterns, chosen)
                if not is_empty(keys):
                    yield keys, places

    def _key_texts(
        self, facts: Facts, names: set[str], patterns: list[str], chosen: tuple[str, ...]
    ) -> DFA:
        """Return the texts of undeclared keys that some patterns match and no other does."""
        limits = tuple((place.pointer, place.is_negated, place.trail) for place in facts.names)
        key = (frozenset(names), tuple(patterns), chosen, limits)
        if key not in self._strings:
            texts = texts_except(sorted(names))
            for pattern in patterns:
                if pattern in chosen:
                    texts = intersection(
                        texts, search(pattern, "narrow", self._limits), self._limits
                    )
                else:
                    texts = difference(texts, search(pattern, "wide", self._limits), self._limits)
            for place in facts.names:
                texts = intersection(texts, self._names(place), self._limits)
            self._strings[key] = self._layout.keys(texts, self._limits)
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
            texts = texts_of(facts, self._limits)
            net.put(start, of_length(0, None) if texts is None else texts, end)
        return determinise(net, start, end)
