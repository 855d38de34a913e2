"""What a JSON Schema does not allow, as alternatives: per keyword, the values that break it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any, Protocol

from . import formats
from .dialect import Document, Place, canonical
from .facts import NUMBERS, Facts, Items, Keys, require, types_of
from .search import is_found


class Reader(Protocol):
    """What reads schemas that are not negated."""

    document: Document

    def expand(self, facts: Facts, place: Place) -> list[Facts]: ...
    def each(self, facts: list[Facts], place: Place) -> list[Facts]: ...
    def written_types(self, place: Place) -> list[str]: ...
    def branches(self, place: Place, keyword: str) -> list[Place]: ...
    def expression(self, place: Place) -> str: ...
    def count(self, place: Place, keyword: str) -> int: ...
    def bounded(self, facts: Facts, place: Place, keyword: str) -> list[Facts]: ...


def negated(reader: Reader, facts: Facts, place: Place) -> list[Facts]:
    """Return the alternatives in which facts hold and a schema does not.

    Raises:
      ConstraintError: if what breaks a keyword cannot be held.
    """
    schema = place.schema
    keywords = list(schema)
    if "$ref" in schema and reader.document.draft <= 7:
        keywords = ["$ref"]
    found: list[Facts] = []
    for keyword in keywords:
        breaks = _BREAKS.get(keyword)
        if breaks is None:
            if keyword in _UNSUPPORTED and not _says_nothing(schema, keyword):
                raise place.refuse(keyword, "its opposite, which not needs, is not supported")
            continue
        if reader.document.ignores(keyword):
            continue
        if not reader.document.has(keyword):
            raise place.refuse(keyword, "it is not of this dialect, so not has two readings")
        found += [f for each in breaks(reader, facts, place, keyword) if (f := each.pruned())]
    return found


def _says_nothing(schema: Any, keyword: str) -> bool:
    value = schema[keyword]
    if keyword == "format":
        return value not in formats.UNSUPPORTED and formats.format_texts(value) is None
    return value in (True, {}) if keyword != "uniqueItems" else value is False


def _type(reader: Reader, facts: Facts, place: Place, keyword: str) -> list[Facts]:
    return [replace(facts, types=facts.types.difference(reader.written_types(place)))]


def _enum(reader: Reader, facts: Facts, place: Place, keyword: str) -> list[Facts]:
    values = [place.schema[keyword]] if keyword == "const" else place.schema[keyword]
    if facts.enum is not None:
        out = {canonical(value) for value in values}
        return [facts.one_of([value for value in facts.enum if canonical(value) not in out])]
    for value in values:
        written = types_of(value)[0]
        if written in ("object", "array", *NUMBERS) and facts.types.intersection(types_of(value)):
            reason = "without a number, list or object is not supported"
            raise place.refuse(keyword, reason)
    return [replace(facts, excluded=(*facts.excluded, *values))]


def _reference(reader: Reader, facts: Facts, place: Place, keyword: str) -> list[Facts]:
    target = reader.document.target(place, keyword)
    if target.pointer in place.trail:
        raise place.refuse(keyword, "the opposite of a recursive schema is not supported")
    trail = (*place.trail, target.pointer)
    return reader.expand(facts, replace(target, trail=trail).negated())


def _all(reader: Reader, facts: Facts, place: Place, keyword: str) -> list[Facts]:
    branches = reader.branches(place, keyword)
    return [f for branch in branches for f in reader.expand(facts, branch.negated())]


def _none(reader: Reader, facts: Facts, place: Place, keyword: str) -> list[Facts]:
    found = [facts]
    for branch in reader.branches(place, keyword):
        found = reader.each(found, branch.negated())
    return found


def _none_or_two(reader: Reader, facts: Facts, place: Place, keyword: str) -> list[Facts]:
    found = _none(reader, facts, place, keyword)
    for one, other in combinations(reader.branches(place, keyword), 2):
        found += reader.each(reader.expand(facts, one), other)
    return found


def _not(reader: Reader, facts: Facts, place: Place, keyword: str) -> list[Facts]:
    return reader.expand(facts, place.at(keyword))


def _if(reader: Reader, facts: Facts, place: Place, keyword: str) -> list[Facts]:
    condition = place.at("if")
    found: list[Facts] = []
    for branch, start in (("then", condition), ("else", condition.negated())):
        if branch in place.schema:
            reached = reader.expand(facts, start)
            found += reader.each(reached, place.at(branch).negated())
    return found


def _dependencies(reader: Reader, facts: Facts, place: Place, keyword: str) -> list[Facts]:
    found: list[Facts] = []
    for key, needed in place.schema[keyword].items():
        present = require(facts.only("object"), key)
        if isinstance(needed, list):
            found += [replace(present, absent=present.absent | {other}) for other in needed]
        else:
            found += reader.expand(present, place.at(keyword, key).negated())
    return found


def _properties(reader: Reader, facts: Facts, place: Place, keyword: str) -> list[Facts]:
    found = []
    for key in place.schema[keyword]:
        value = place.at(keyword, key).negated()
        if value.schema is True or value.schema == {}:
            continue
        layer = Keys({key: value}, {}, None, evaluates=False)
        found.append(require(replace(facts.only("object"), keys=(*facts.keys, layer)), key))
    return found


def _additional(reader: Reader, facts: Facts, place: Place, keyword: str) -> list[Facts]:
    """Return objects with a key that is not named. Which it may be must be known."""
    if _says_nothing(place.schema, keyword) or "object" not in facts.types:
        return []
    named = set(place.schema.get("properties", {}))
    patterns = list(place.schema.get("patternProperties", {}))
    wrong = place.at(keyword).negated()

    def is_named(key: str) -> bool:
        return key in named or any(is_found(pattern, key) for pattern in patterns)

    if wrong.schema is False and not all(map(is_named, facts.required)):
        return [facts.only("object")]
    closed = [
        layer.properties
        for layer in facts.keys
        if layer.rest is not None and layer.rest.schema is False and not layer.patterns
    ]
    if not closed:
        raise place.refuse(keyword, "its opposite, which not needs, is not supported")
    found = []
    for key in closed[0]:
        if not is_named(key) and all(key in layer for layer in closed):
            layer = Keys({key: wrong}, {}, None, evaluates=False)
            found.append(require(replace(facts.only("object"), keys=(*facts.keys, layer)), key))
    return found


def _required(reader: Reader, facts: Facts, place: Place, keyword: str) -> list[Facts]:
    present = facts.only("object")
    return [replace(present, absent=present.absent | {key}) for key in place.schema[keyword]]


def _items(reader: Reader, facts: Facts, place: Place, keyword: str) -> list[Facts]:
    """Return lists with some item that breaks `items`."""
    if isinstance(place.schema[keyword], list) or "prefixItems" in place.schema:
        raise place.refuse(keyword, "its opposite, which not needs, is not supported")
    wrong = place.at(keyword).negated()
    if wrong.schema is True or wrong.schema == {}:
        return []
    return [replace(facts.only("array"), contains=(*facts.contains, wrong))]


def _contains(reader: Reader, facts: Facts, place: Place, keyword: str) -> list[Facts]:
    if "minContains" in place.schema or "maxContains" in place.schema:
        raise place.refuse(keyword, "its opposite, which not needs, is not supported")
    layer = Items((), place.at(keyword).negated(), evaluates=False)
    return [replace(facts.only("array"), items=(*facts.items, layer))]


def _bound(reader: Reader, facts: Facts, place: Place, keyword: str) -> list[Facts]:
    """Return the numbers on the other side of a bound."""
    if isinstance(place.schema[keyword], bool):
        return []
    # The bound by itself; what it holds is the side to leave.
    bounds = reader.bounded(Facts(), place, keyword)[0].bounds
    numbers = facts.only(*NUMBERS)
    if bounds.low is not None:
        return [numbers.within(high=bounds.low, is_open=not bounds.low_open)]
    return [numbers.within(low=bounds.high, is_open=not bounds.high_open)]


def _counts(reader: Reader, facts: Facts, place: Place, keyword: str) -> list[Facts]:
    count = reader.count(place, keyword)
    kind, name = {"Length": ("length", "string"), "Items": ("items", "array")}.get(
        keyword[3:], ("keys", "object")
    )
    if keyword.startswith("max"):
        return [facts.only(name).counted(kind, low=count + 1)]
    return [facts.only(name).counted(kind, high=count - 1)] if count else []


def _pattern(reader: Reader, facts: Facts, place: Place, keyword: str) -> list[Facts]:
    wrong = (reader.expression(place), False)
    return [replace(facts.only("string"), patterns=(*facts.patterns, wrong))]


_UNSUPPORTED = (
    "patternProperties",
    "propertyNames",
    "unevaluatedProperties",
    "unevaluatedItems",
    "additionalItems",
    "prefixItems",
    "uniqueItems",
    "multipleOf",
    "format",
    "$dynamicRef",
    "$recursiveRef",
    "extends",
    "disallow",
)
_BREAKS: dict[str, Callable[[Reader, Facts, Place, str], list[Facts]]] = {
    "type": _type,
    "enum": _enum,
    "const": _enum,
    "$ref": _reference,
    "allOf": _all,
    "anyOf": _none,
    "oneOf": _none_or_two,
    "not": _not,
    "if": _if,
    **dict.fromkeys(("dependencies", "dependentRequired", "dependentSchemas"), _dependencies),
    "properties": _properties,
    "additionalProperties": _additional,
    "required": _required,
    "items": _items,
    "contains": _contains,
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _bound),
    **{f"{end}{n}": _counts for end in ("min", "max") for n in ("Length", "Items", "Properties")},
    "pattern": _pattern,
}
