"""What one alternative of a JSON Schema says about a value, keyword by keyword."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from .dialect import Place, canonical
from .json_text import Bounds

# `integer` and `fraction` are how a number is written; a schema's "number" is both.
TYPES = ("null", "boolean", "integer", "fraction", "string", "array", "object")
NUMBERS = ("integer", "fraction")


@dataclass(frozen=True, slots=True)
class Keys:
    """What one schema says about the values of an object."""

    properties: Mapping[str, Place]
    patterns: Mapping[str, Place]
    rest: Place | None  # of every other key
    evaluates: bool = True  # for unevaluatedProperties

    def of(self, key: str | None, matching: Iterable[str]) -> list[Place]:
        """Return what is said about one key, given the patterns that match it; None is a key that
        is not named."""
        found = [self.properties[key]] if key is not None and key in self.properties else []
        found += [self.patterns[pattern] for pattern in matching if pattern in self.patterns]
        return found or ([] if self.rest is None else [self.rest])


@dataclass(frozen=True, slots=True)
class Items:
    """What one schema says about the items of a list."""

    first: tuple[Place, ...] = ()
    rest: Place | None = None
    evaluates: bool = True


@dataclass(frozen=True, slots=True)
class Facts:
    """One alternative. Facts about a type count only for values of it."""

    types: frozenset[str] = frozenset(TYPES)
    enum: tuple[Any, ...] | None = None
    excluded: tuple[Any, ...] = ()  # values that it may not be
    bounds: Bounds = Bounds()
    min_length: int = 0
    max_length: int | None = None
    patterns: tuple[tuple[str, bool], ...] = ()  # False: it must not be found
    formats: tuple[str, ...] = ()
    keys: tuple[Keys, ...] = ()
    required: tuple[str, ...] = ()
    absent: frozenset[str] = frozenset()
    names: tuple[Place, ...] = ()
    min_keys: int = 0
    max_keys: int | None = None
    items: tuple[Items, ...] = ()
    min_items: int = 0
    max_items: int | None = None
    is_unique: bool = False
    contains: tuple[Place, ...] = ()
    sources: tuple[Place, ...] = ()  # the schemas that say all this

    def only(self, *types: str) -> Facts:
        return replace(self, types=self.types.intersection(types))

    def within(
        self, *, low: Decimal | None = None, high: Decimal | None = None, is_open: bool = False
    ) -> Facts:
        """Return these facts with one more bound for numbers."""
        bounds = self.bounds
        if low is not None and _is_tighter(low, is_open, bounds.low, bounds.low_open, 1):
            bounds = replace(bounds, low=low, low_open=is_open)
        if high is not None and _is_tighter(high, is_open, bounds.high, bounds.high_open, -1):
            bounds = replace(bounds, high=high, high_open=is_open)
        return replace(self, bounds=bounds)

    def one_of(self, values: Iterable[Any]) -> Facts:
        """Return these facts for some values only."""
        values = tuple(values)
        if self.enum is not None:
            known = {canonical(value) for value in self.enum}
            values = tuple(value for value in values if canonical(value) in known)
        types = self.types.intersection(*[{t for value in values for t in types_of(value)}])
        return replace(self, enum=values, types=types)

    def counted(self, kind: str, low: int = 0, high: int | None = None) -> Facts:
        """Return these facts with one more limit of a length, a number of items or of keys."""
        least = max(low, getattr(self, f"min_{kind}"))
        most = getattr(self, f"max_{kind}")
        most = high if most is None else most if high is None else min(most, high)
        if kind == "length":
            return replace(self, min_length=least, max_length=most)
        if kind == "items":
            return replace(self, min_items=least, max_items=most)
        return replace(self, min_keys=least, max_keys=most)

    def pruned(self) -> Facts | None:
        """Return these facts without types that evidently have no value; None if none is left."""
        gone = set[str]()
        if self.bounds.is_empty:
            gone.update(NUMBERS)
        if self.max_length is not None and self.min_length > self.max_length:
            gone.add("string")
        if self.max_items is not None and self.min_items > self.max_items:
            gone.add("array")
        if self.max_keys is not None and max(self.min_keys, len(self.required)) > self.max_keys:
            gone.add("object")
        if self.absent.intersection(self.required):
            gone.add("object")
        left = self.types - gone
        if not left or self.enum == ():
            return None
        return self if left == self.types else replace(self, types=left)


def _is_tighter(
    bound: Decimal, is_open: bool, known: Decimal | None, known_open: bool, sign: int
) -> bool:
    if known is None or bound * sign > known * sign:
        return True
    return bound == known and is_open and not known_open


def require(facts: Facts, *keys: str) -> Facts:
    """Return facts with more required keys."""
    return replace(facts, required=tuple(dict.fromkeys((*facts.required, *keys))))


def place_with(facts: Facts, keyword: str) -> Place:
    """Return the schema that has a keyword."""
    for place in facts.sources:
        if isinstance(place.schema, Mapping) and keyword in place.schema:
            return place
    return facts.sources[0] if facts.sources else Place({}, "")


def types_of(value: Any) -> tuple[str, ...]:
    """Return the types that a value may be written as."""
    if value is None:
        return ("null",)
    if isinstance(value, bool):
        return ("boolean",)
    if isinstance(value, int):
        return ("integer",)
    if isinstance(value, float):
        return ("integer", "fraction") if value.is_integer() else ("fraction",)
    if isinstance(value, str):
        return ("string",)
    return ("object",) if isinstance(value, Mapping) else ("array",)
