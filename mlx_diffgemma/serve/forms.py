"""JSON objects with their structure given: a schema's keys become the literal text of a template,
its values slots."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ..language.template import Slot, Template
from .limits import keys_of

# Keywords of an object that say nothing but which keys it has and what their values are.
_PLAIN = frozenset(
    "type properties required additionalProperties title description default examples $schema $id "
    "$comment".split()
)


def form_of(schema: Any) -> Template | None:
    """Return a template of the object with all of a schema's keys; None where the schema does not
    give the structure: it is no object, has references or alternatives, or bounds on its keys."""
    if not _is_form(schema) or "$ref" in set(keys_of(schema)):
        return None
    parts: list[str | Slot] = []
    for part in _object(schema, "", []):
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)
    return Template(tuple(parts))


def _is_form(schema: Any) -> bool:
    return (
        isinstance(schema, dict)
        and schema.get("type") == "object"
        and isinstance(schema.get("properties"), dict)
        and bool(schema["properties"])
        and set(schema) <= _PLAIN
        and set(schema.get("required") or ()) <= set(schema["properties"])
    )


def _object(schema: dict[str, Any], indent: str, path: list[str]) -> Iterator[str | Slot]:
    inner = f"{indent}  "
    yield "{"
    for number, (key, value) in enumerate(schema["properties"].items()):
        yield f"{',' if number else ''}\n{inner}{json.dumps(key, ensure_ascii=False)}: "
        here = [*path, key]
        if _is_form(value):
            yield from _object(value, inner, here)
        else:
            yield Slot(_pointer(here), "json", schema=json.dumps(value))
    yield f"\n{indent}}}"


def _pointer(path: list[str]) -> str:
    """Return the JSON pointer of a value, by which its slot is called."""
    return "".join(f"/{key.replace('~', '~0').replace('/', '~1')}" for key in path)
