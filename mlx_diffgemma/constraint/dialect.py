"""A JSON Schema as a document: its dialect, its references, and places in it.

Drafts 4, 6, 7, 2019-09 and 2020-12 are read. A schema that names none is read as 2020-12, and may
have the keywords of the others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..errors import ConstraintError
from .search import keywords

_DRAFT = re.compile(
    r"^https?://json-schema\.org/(?:draft-0?([3467])|draft/(20\d\d)-\d\d)/schema#?$"
)
_LATEST = 2020
# Keyword -> first and last draft that has it, for those that not every draft has.
_SPAN = {
    "const": (6, _LATEST),
    "contains": (6, _LATEST),
    "minContains": (2019, _LATEST),
    "maxContains": (2019, _LATEST),
    "propertyNames": (6, _LATEST),
    "if": (7, _LATEST),
    "dependencies": (4, 7),
    "dependentRequired": (2019, _LATEST),
    "dependentSchemas": (2019, _LATEST),
    "prefixItems": (2020, _LATEST),
    "additionalItems": (4, 2019),
}


@dataclass(frozen=True, slots=True)
class Place:
    """A schema in the document. Negated, it stands for all that it does not allow."""

    schema: Any
    pointer: str
    base: str = ""  # pointer of the schema that `#` means
    trail: tuple[str, ...] = ()  # targets of the references on the way here
    is_negated: bool = False

    def at(self, *steps: str | int) -> Place:
        """Return the place some keys and indices further in, not negated."""
        schema, pointer, base = self.schema, self.pointer, self.base
        for step in steps:
            schema = schema[step]
            pointer += "/" + str(step).replace("~", "~0").replace("/", "~1")
            if isinstance(schema, Mapping) and _is_resource(schema):
                base = pointer
        return replace(self, schema=schema, pointer=pointer, base=base, is_negated=False)

    def negated(self) -> Place:
        return replace(self, is_negated=not self.is_negated)

    def refuse(self, keyword: str, reason: str) -> ConstraintError:
        """Return the error of a keyword of this schema."""
        where = self.pointer or "the root"
        what = f"JSON Schema, {keyword}" if keyword else "JSON Schema,"
        message = f"{what} at {where}: {reason}"
        return ConstraintError(message, keyword=keyword, pointer=self.pointer)

    @property
    def is_trivial(self) -> bool:
        """Whether this evidently allows everything."""
        if self.is_negated:
            return self.schema is False
        return self.schema is True or (isinstance(self.schema, Mapping) and not self.schema)


def _is_resource(schema: Mapping[str, Any]) -> bool:
    # In `properties`, "id" may be the name of a property: then it is no string.
    identifier = schema.get("$id", schema.get("id"))
    return isinstance(identifier, str) and not identifier.startswith("#")


class Document:
    """A whole schema."""

    def __init__(self, schema: Any) -> None:
        if not isinstance(schema, bool | Mapping):
            raise ConstraintError(
                f"a JSON Schema is an object, true or false, got {type(schema).__name__}",
                keyword="",
                pointer="",
            )
        self.schema = schema
        self.root = Place(schema, "")
        named = schema.get("$schema") if isinstance(schema, Mapping) else None
        found = _DRAFT.match(named) if isinstance(named, str) else None
        self.names_draft = found is not None
        self.draft = draft = int(found[1] or found[2]) if found else _LATEST
        if draft == 3:
            raise self.root.refuse("$schema", "draft 3 is not supported; use draft 7 or 2020-12")

    def has(self, keyword: str) -> bool:
        """Return whether the document's draft has a keyword."""
        first, last = _SPAN.get(keyword, (0, _LATEST))
        return first <= self.draft <= last

    def ignores(self, keyword: str) -> bool:
        """Return whether a keyword is none of the draft that the document names."""
        return self.names_draft and not self.has(keyword)

    def target(self, place: Place, keyword: str) -> Place:
        """Return what a reference refers to.

        Raises:
          ConstraintError: if it is not in the document, or is not a JSON pointer.
        """
        reference = place.schema[keyword]
        if not isinstance(reference, str):
            raise place.refuse(keyword, "it must be a string")
        url, _, fragment = reference.partition("#")
        found = self._resource(place, url)
        if found is None:
            raise place.refuse(keyword, f"{reference!r} is not in this schema; put it into $defs")
        if fragment and not fragment.startswith("/"):
            raise place.refuse(keyword, f"{reference!r} is an anchor; use a JSON pointer")
        for step in _unquoted(fragment).split("/")[1:]:
            key: str | int = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found.schema, list) and str(key).isdigit():
                key = int(key)
            try:
                found = found.at(key)
            except (KeyError, IndexError, TypeError):
                raise place.refuse(keyword, f"{reference!r} refers to nothing") from None
        return replace(found, trail=place.trail, is_negated=place.is_negated)

    def _resource(self, place: Place, url: str) -> Place | None:
        if not url:
            return self._at(place.base)
        root = self.schema if isinstance(self.schema, Mapping) else {}
        identifier = root.get("$id", root.get("id"))
        if isinstance(identifier, str) and url == identifier.rstrip("#"):
            return self.root
        return None

    def _at(self, pointer: str) -> Place:
        found = self.root
        for step in pointer.split("/")[1:]:
            key: str | int = step.replace("~1", "/").replace("~0", "~")
            found = found.at(int(key) if isinstance(found.schema, list) else key)
        return found

    def is_valid(self, value: Any, place: Place) -> bool:
        """Return whether `jsonschema` finds a value valid at a place."""
        validator = self._validator.evolve(schema=place.schema)
        return bool(validator.is_valid(value)) != place.is_negated

    @cached_property
    def _validator(self) -> Any:
        return validator_of(self.schema)


def validator_of(schema: Any) -> Any:
    """Return the validator of `jsonschema` for a schema, which checks formats too."""
    import jsonschema

    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    if kind is jsonschema.Draft202012Validator and _has_old_lists(schema):
        kind = jsonschema.Draft7Validator
    return keywords(kind)(schema, format_checker=kind.FORMAT_CHECKER)


def _has_old_lists(schema: Any) -> bool:
    """Return whether a schema uses `items` as drafts before 2020-12 do, without naming one."""
    if isinstance(schema, Mapping):
        return isinstance(schema.get("items"), list) or any(map(_has_old_lists, schema.values()))
    return isinstance(schema, list) and any(map(_has_old_lists, schema))


def _unquoted(fragment: str) -> str:
    """Return a fragment of a URL without its %-escapes."""
    if "%" not in fragment:
        return fragment
    spelled = re.sub(rb"%([0-9A-Fa-f]{2})", lambda m: bytes([int(m[1], 16)]), fragment.encode())
    return spelled.decode("utf-8", "replace")


def canonical(value: Any) -> str:
    """Return a text that equal JSON values share."""

    def plain(part: Any) -> Any:
        if isinstance(part, float) and part.is_integer():
            return int(part)
        if isinstance(part, Mapping):
            return {key: plain(each) for key, each in part.items()}
        return [plain(each) for each in part] if isinstance(part, list | tuple) else part

    return json.dumps(plain(value), sort_keys=True)
