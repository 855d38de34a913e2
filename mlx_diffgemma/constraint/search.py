"""Whether an expression of a JSON Schema is found in a text, in a time that grows with the text's
length alone. Python's `re` may take forever, and stops all other threads meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from ..errors import ConstraintError
from .dfa import DFA
from .net import Limits, Net
from .regex import compiled_node, parse
from .regex import search as search_automaton

_KEPT = 256
_SECONDS = 2.0  # of processor time, for each reading of an expression


def is_found(pattern: str, text: str) -> bool:
    """Return whether an expression is found anywhere in a text. Where ECMA's and Python's readings
    differ, Python's counts, if it is known.

    Raises:
      ConstraintError: if the expression is not supported, or its automaton is too large.
    """
    if _automaton(pattern, "narrow").accepts(text):
        return True
    if not _automaton(pattern, "wide").accepts(text):
        return False
    try:
        return _automaton(pattern, "unicode").accepts(text)
    except ConstraintError:  # an expression that only ECMA has
        return False


@lru_cache(maxsize=3 * _KEPT)
def _automaton(pattern: str, reading: Any) -> DFA:
    limits = Limits(seconds=_SECONDS)
    if reading == "unicode":
        return compiled_node(parse(pattern, reading), Net(limits), search=True)
    return search_automaton(pattern, reading, limits)


def keywords(kind: Any) -> Any:
    """Return a validator class of `jsonschema` whose expressions are searched for by `is_found`."""
    from jsonschema import ValidationError, validators

    def pattern(validator: Any, given: str, value: Any, schema: Any) -> Iterator[Any]:
        if validator.is_type(value, "string") and not is_found(given, value):
            yield ValidationError(f"{value!r} does not match {given!r}")

    def pattern_properties(validator: Any, given: Any, value: Any, schema: Any) -> Iterator[Any]:
        if validator.is_type(value, "object"):
            for each, inner in given.items():
                for key in value:
                    if is_found(each, key):
                        yield from validator.descend(value[key], inner, key, each)

    def additional(validator: Any, given: Any, value: Any, schema: Any) -> Iterator[Any]:
        if not validator.is_type(value, "object"):
            return
        named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        for key in value:
            if key in named or any(is_found(each, key) for each in patterns):
                continue
            if validator.is_type(given, "object"):
                yield from validator.descend(value[key], given, key)
            elif not given:
                yield ValidationError(f"the property {key!r} is not allowed")

    more = {
        "pattern": pattern,
        "patternProperties": pattern_properties,
        "additionalProperties": additional,
    }
    return validators.extend(kind, more)
