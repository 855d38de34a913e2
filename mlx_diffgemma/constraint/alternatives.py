"""A JSON Schema as alternatives: `$ref`, the combinators, conditions and negations are replaced by
facts that hold together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

from ..errors import ConstraintError
from . import formats
from .dialect import Document, Place
from .facts import NUMBERS, Facts, Items, Keys, require, types_of
from .json_text import is_countable_multiple
from .negation import negated
from .net import Limits
from .regex import parse
from .strings import has_no_string

MOST_ALTERNATIVES = 200
_TYPE_NAMES = {
    **{name: (name,) for name in ("null", "boolean", "integer", "string", "array", "object")},
    "number": NUMBERS,
}
_REFUSED = {
    "$dynamicRef": "it is not supported; use $ref",
    "$recursiveRef": "it is not supported; use $ref",
    "extends": "it is not supported; use allOf",
    "disallow": "it is not supported; use not",
}
# A schema of these keywords alone is held by the enumeration and the types.
_SAY_NO_MORE = {"type", "enum", "const", "title", "description", "default", "examples", "$comment"}
_APPLICATORS = ("$ref", "allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas", "dependencies")


class Alternatives:
    """Reads places of a document."""

    def __init__(self, document: Document, recursion: int, limits: Limits) -> None:
        self.document, self._limits = document, limits
        self._recursion = recursion
        self.cuts: set[str] = set()  # targets of references that were not followed again
        self.ignored: dict[str, str] = {}  # what is not checked -> where
        self._known: dict[Any, list[Facts]] = {}

    def of(self, places: Sequence[Place]) -> list[Facts]:
        """Return the alternatives of some schemas that hold together."""
        places = [place for place in places if not place.is_trivial]
        key = tuple((p.pointer, p.is_negated, p.trail) for p in places)
        if key not in self._known:
            found = [Facts()]
            for place in places:
                found = self.each(found, place)
            self._known[key] = found
        return self._known[key]

    def each(self, facts: list[Facts], place: Place) -> list[Facts]:
        """Return the alternatives in which some of the facts and a schema hold together."""
        return self._each(facts, place, self.expand)

    def _each(
        self, facts: list[Facts], place: Place, expand: Callable[[Facts, Place], list[Facts]]
    ) -> list[Facts]:
        found = [p for each in facts for more in expand(each, place) if (p := more.pruned())]
        if len(found) > MOST_ALTERNATIVES:
            reason = f"it has more than {MOST_ALTERNATIVES} alternatives together with the rest"
            raise place.refuse(_combinator(place), reason)
        return found

    def expand(self, facts: Facts, place: Place) -> list[Facts]:
        """Return the alternatives in which facts and a schema hold together."""
        schema = place.schema
        if isinstance(schema, bool):
            return [facts] if schema != place.is_negated else []
        if not isinstance(schema, Mapping):
            raise place.refuse("", f"a schema is an object, true or false, got {schema!r}")
        if place.is_negated:
            return self._negated(facts, place)
        found = [replace(facts, sources=(*facts.sources, place))]
        if "$ref" in schema and self.document.draft <= 7:
            return self._each(found, place, self._reference)
        for keyword in schema:
            if keyword in _REFUSED:
                raise place.refuse(keyword, _REFUSED[keyword])
            if keyword in _HANDLERS and self.document.ignores(keyword):
                name = f"{keyword}, which draft {self.document.draft} does not have,"
                self.ignored[name] = place.pointer
        done: set[Any] = set()
        # What a combinator chooses from is smaller where everything else is known.
        for keyword in (keyword for keyword in _HANDLERS if keyword in schema):
            handler = _HANDLERS[keyword]
            if handler in done or self.document.ignores(keyword):
                continue
            if handler in _GROUPED:
                done.add(handler)
            found = self._each(found, place, _with(handler, self, keyword))
        before = len(facts.keys), len(facts.items)
        if "unevaluatedProperties" in schema:
            found = [self._unevaluated_keys(each, place, before) for each in found]
        if "unevaluatedItems" in schema:
            found = [self._unevaluated_items(each, place, before) for each in found]
        return found

    # Keywords for any type

    def _type(self, facts: Facts, place: Place, keyword: str) -> list[Facts]:
        return [facts.only(*self.written_types(place))]

    def written_types(self, place: Place) -> list[str]:
        named = place.schema["type"]
        names = named if isinstance(named, list) else [named]
        for name in names:
            if not isinstance(name, str) or name not in _TYPE_NAMES:
                raise place.refuse("type", f"{name!r} is no type of JSON")
        return [written for name in names for written in _TYPE_NAMES[name]]

    def _enum(self, facts: Facts, place: Place, keyword: str) -> list[Facts]:
        values = place.schema[keyword]
        if keyword == "const":
            values = [values]
        if not isinstance(values, list):
            raise place.refuse(keyword, "it must be a list")
        return [facts.one_of(values)]

    def _reference(self, facts: Facts, place: Place, keyword: str = "$ref") -> list[Facts]:
        target = self.document.target(place, keyword)
        if place.trail.count(target.pointer) > self._recursion:
            self.cuts.add(target.pointer)
            return []
        return self.expand(facts, replace(target, trail=(*place.trail, target.pointer)))

    # Combinators

    def branches(self, place: Place, keyword: str) -> list[Place]:
        if not isinstance(place.schema[keyword], list) or not place.schema[keyword]:
            raise place.refuse(keyword, "it must be a list with a schema in it")
        return [place.at(keyword, i) for i in range(len(place.schema[keyword]))]

    def _all(self, facts: Facts, place: Place, keyword: str) -> list[Facts]:
        found = [facts]
        for branch in self.branches(place, keyword):
            found = self.each(found, branch)
        return found

    def _any(self, facts: Facts, place: Place, keyword: str) -> list[Facts]:
        return [f for branch in self.branches(place, keyword) for f in self.expand(facts, branch)]

    def _one(self, facts: Facts, place: Place, keyword: str) -> list[Facts]:
        """Take each branch without what another branch allows too."""
        branches = self.branches(place, keyword)
        found: list[Facts] = []
        for i, branch in enumerate(branches):
            alone = self.each([facts], branch)
            for j, other in enumerate(branches):
                if j != i:
                    alone = [f for each in alone for f in self._outside(each, other, place)]
            found += alone
        return found

    def _outside(self, facts: Facts, other: Place, place: Place) -> list[Facts]:
        if self._exclude_each_other(facts, other):
            return [facts]
        try:
            return self.each([facts], other.negated())
        except ConstraintError as error:
            reason = f"its alternatives may overlap, and what {error.keyword} at {error.pointer} "
            raise place.refuse("oneOf", reason + "leaves out cannot be held") from error

    def _exclude_each_other(self, facts: Facts, other: Place) -> bool:
        cuts = set(self.cuts)
        self.cuts.clear()
        both = [f for f in self.each([facts], other) if not self.is_hopeless(f)]
        is_sure = not both and not self.cuts
        self.cuts |= cuts
        return is_sure

    def is_hopeless(self, facts: Facts, depth: int = 3) -> bool:
        """Return whether no value fits, as far as that is easily seen."""
        if facts.enum is not None:
            return not self.values(facts)
        types = set(facts.types)
        out = [value for value in facts.excluded if isinstance(value, bool)]
        if True in out and False in out:
            types.discard("boolean")
        if "string" in types and has_no_string(facts, self._limits):
            types.discard("string")
        if depth and "object" in types:
            for key in facts.required:
                places = [place for layer in facts.keys for place in layer.of(key, ())]
                if any(layer.patterns for layer in facts.keys):
                    break
                if all(self.is_hopeless(f, depth - 1) for f in self.of(places)):
                    types.discard("object")
        return not types

    def values(self, facts: Facts) -> list[Any]:
        """Return the values of an enumeration that every schema allows."""
        sources = [place for place in facts.sources if not set(place.schema) <= _SAY_NO_MORE]
        return [
            value
            for value in facts.enum or ()
            if facts.types.intersection(types_of(value))
            and all(self.document.is_valid(value, source) for source in sources)
        ]

    def _not(self, facts: Facts, place: Place, keyword: str) -> list[Facts]:
        return self.expand(facts, place.at("not").negated())

    def _if(self, facts: Facts, place: Place, keyword: str) -> list[Facts]:
        condition = place.at("if")
        found: list[Facts] = []
        for branch, start in (("then", condition), ("else", condition.negated())):
            reached = self.each([facts], start)
            if branch in place.schema:
                reached = self.each(reached, place.at(branch))
            found += reached
        return found

    def _dependencies(self, facts: Facts, place: Place, keyword: str) -> list[Facts]:
        found = [facts]
        for key, needed in self._mapping(place, keyword).items():
            further: list[Facts] = []
            for each in found:
                without = replace(each, absent=each.absent | {key})
                present = require(each.only("object"), key)
                if isinstance(needed, list):
                    having = [require(present, *needed)]
                else:
                    having = self.each([present], place.at(keyword, key))
                further += [p for f in (without, *having) if (p := f.pruned())]
            found = further
            if len(found) > MOST_ALTERNATIVES:
                raise place.refuse(keyword, f"it has more than {MOST_ALTERNATIVES} alternatives")
        return found

    # Objects and lists

    def _mapping(self, place: Place, keyword: str) -> Mapping[str, Any]:
        found = place.schema.get(keyword, {})
        if not isinstance(found, Mapping):
            raise place.refuse(keyword, "it must be an object")
        return found

    def _keys(self, facts: Facts, place: Place, keyword: str) -> list[Facts]:
        for pattern in self._mapping(place, "patternProperties"):
            self.check_expression(pattern, place, "patternProperties")
        layer = Keys(
            {key: place.at("properties", key) for key in self._mapping(place, "properties")},
            {
                pattern: place.at("patternProperties", pattern)
                for pattern in self._mapping(place, "patternProperties")
            },
            place.at("additionalProperties") if "additionalProperties" in place.schema else None,
        )
        return [replace(facts, keys=(*facts.keys, layer))]

    def _required(self, facts: Facts, place: Place, keyword: str) -> list[Facts]:
        return [require(facts, *self._names(place))]

    def _names(self, place: Place) -> list[str]:
        names = place.schema["required"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise place.refuse("required", "it must be a list of keys")
        return names

    def _property_names(self, facts: Facts, place: Place, keyword: str) -> list[Facts]:
        return [replace(facts, names=(*facts.names, place.at(keyword)))]

    def _items(self, facts: Facts, place: Place, keyword: str) -> list[Facts]:
        schema = place.schema
        first = "prefixItems" if "prefixItems" in schema else "items"
        rest = "items" if "prefixItems" in schema else "additionalItems"
        if isinstance(schema.get(first), list):
            prefix = tuple(place.at(first, i) for i in range(len(schema[first])))
            layer = Items(prefix, place.at(rest) if rest in schema else None)
        elif first == "items" and "items" in schema:
            layer = Items((), place.at("items"))
        else:
            return [facts]  # additionalItems alone says nothing
        return [replace(facts, items=(*facts.items, layer))]

    def _contains(self, facts: Facts, place: Place, keyword: str) -> list[Facts]:
        if place.schema.get("maxContains") is not None:
            raise place.refuse("maxContains", "it is not supported")
        least = self.count(place, "minContains") if "minContains" in place.schema else 1
        if least > 1:
            raise place.refuse("minContains", "more than 1 is not supported")
        if not least or "contains" not in place.schema:
            return [facts]
        return [replace(facts, contains=(*facts.contains, place.at("contains")))]

    def _unique(self, facts: Facts, place: Place, keyword: str) -> list[Facts]:
        return [replace(facts, is_unique=facts.is_unique or place.schema[keyword] is True)]

    def _unevaluated_keys(self, facts: Facts, place: Place, before: tuple[int, int]) -> Facts:
        """Read unevaluatedProperties: what the chosen alternatives do not speak of."""
        seen = [layer for layer in facts.keys[before[0] :] if layer.evaluates]
        if any(layer.rest is not None for layer in seen):
            return facts
        free = Place(True, place.pointer)
        layer = Keys(
            {key: free for layer in seen for key in layer.properties},
            {pattern: free for layer in seen for pattern in layer.patterns},
            place.at("unevaluatedProperties"),
        )
        return replace(facts, keys=(*facts.keys, layer))

    def _unevaluated_items(self, facts: Facts, place: Place, before: tuple[int, int]) -> Facts:
        seen = [layer for layer in facts.items[before[1] :] if layer.evaluates]
        if any(layer.rest is not None for layer in seen):
            return facts
        first = max((len(layer.first) for layer in seen), default=0)
        free = Place(True, place.pointer)
        layer = Items((free,) * first, place.at("unevaluatedItems"))
        return replace(facts, items=(*facts.items, layer))

    # Numbers, strings, counts

    def bounded(self, facts: Facts, place: Place, keyword: str) -> list[Facts]:
        value = place.schema[keyword]
        if isinstance(value, bool) and keyword.startswith("exclusive"):
            return [facts]  # draft 4: it speaks of the other keyword
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise place.refuse(keyword, "it must be a number")
        is_low = keyword in ("minimum", "exclusiveMinimum")
        twin = "exclusiveMinimum" if is_low else "exclusiveMaximum"
        is_open = keyword == twin or place.schema.get(twin) is True
        bound = Decimal(repr(value))
        if is_low:
            return [facts.within(low=bound, is_open=is_open)]
        return [facts.within(high=bound, is_open=is_open)]

    def _multiple(self, facts: Facts, place: Place, keyword: str) -> list[Facts]:
        value = place.schema[keyword]
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise place.refuse(keyword, "it must be a number above 0")
        if value != int(value) or not is_countable_multiple(int(value)):
            if not facts.types.intersection(NUMBERS):
                return [facts]
            raise place.refuse(keyword, "only whole numbers up to 1000 are supported")
        multiples = (*facts.bounds.multiples, int(value))
        return [replace(facts, bounds=replace(facts.bounds, multiples=multiples))]

    def count(self, place: Place, keyword: str) -> int:
        value = place.schema[keyword]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or value != int(value) or value < 0:
            raise place.refuse(keyword, "it must be a whole number")
        return int(value)

    def _counts(self, facts: Facts, place: Place, keyword: str) -> list[Facts]:
        count = self.count(place, keyword)
        kind = _COUNTED[keyword[3:]]
        if keyword.startswith("min"):
            return [facts.counted(kind, low=count)]
        return [facts.counted(kind, high=count)]

    def _pattern(self, facts: Facts, place: Place, keyword: str) -> list[Facts]:
        return [replace(facts, patterns=(*facts.patterns, (self.expression(place), True)))]

    def expression(self, place: Place) -> str:
        pattern = place.schema["pattern"]
        if not isinstance(pattern, str):
            raise place.refuse("pattern", "it must be a string")
        self.check_expression(pattern, place, "pattern")
        return pattern

    def check_expression(self, pattern: str, place: Place, keyword: str) -> None:
        """Raise ConstraintError, with the keyword, if an expression is not supported."""
        try:
            parse(pattern, "narrow")
        except ConstraintError as error:
            refusal = place.refuse(keyword, str(error))
            refusal.position = error.position
            raise refusal from None

    def _format(self, facts: Facts, place: Place, keyword: str) -> list[Facts]:
        name = place.schema[keyword]
        if "string" not in facts.types or not isinstance(name, str):
            return [facts]
        if name in formats.UNSUPPORTED:
            raise place.refuse("format", f"{name!r} is not supported")
        if formats.format_texts(name) is None:
            self.ignored.setdefault(f"format {name!r}", place.pointer)
            return [facts]
        return [replace(facts, formats=(*facts.formats, name))]

    def _negated(self, facts: Facts, place: Place) -> list[Facts]:
        facts = replace(facts, sources=(*facts.sources, place))
        return negated(self, facts, replace(place, is_negated=False))


def _with(
    handler: Callable[[Alternatives, Facts, Place, str], list[Facts]],
    reader: Alternatives,
    keyword: str,
) -> Callable[[Facts, Place], list[Facts]]:
    return lambda facts, place: handler(reader, facts, place, keyword)


def _combinator(place: Place) -> str:
    found = [keyword for keyword in _APPLICATORS if keyword in place.schema]
    return found[0] if found else next(iter(place.schema), "")


_GROUPED = (Alternatives._keys, Alternatives._items)
_COUNTED = {"Length": "length", "Items": "items", "Properties": "keys"}
# In the order in which they are read, which is that of the keys they name.
_HANDLERS: dict[str, Callable[[Alternatives, Facts, Place, str], list[Facts]]] = {
    "type": Alternatives._type,
    "const": Alternatives._enum,
    "enum": Alternatives._enum,
    **dict.fromkeys(
        ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), Alternatives.bounded
    ),
    "multipleOf": Alternatives._multiple,
    **{f"{end}{name}": Alternatives._counts for end in ("min", "max") for name in _COUNTED},
    "pattern": Alternatives._pattern,
    "format": Alternatives._format,
    "uniqueItems": Alternatives._unique,
    "contains": Alternatives._contains,
    "prefixItems": Alternatives._items,
    "items": Alternatives._items,
    "additionalItems": Alternatives._items,
    "required": Alternatives._required,
    "propertyNames": Alternatives._property_names,
    "properties": Alternatives._keys,
    "patternProperties": Alternatives._keys,
    "additionalProperties": Alternatives._keys,
    "$ref": Alternatives._reference,
    "allOf": Alternatives._all,
    "anyOf": Alternatives._any,
    "oneOf": Alternatives._one,
    "not": Alternatives._not,
    "if": Alternatives._if,
    "dependencies": Alternatives._dependencies,
    "dependentRequired": Alternatives._dependencies,
    "dependentSchemas": Alternatives._dependencies,
}
